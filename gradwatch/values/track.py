"""What is remembered of the steps of one optimizer, and the plain values that it is kept as."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import (
    EDGE,
    GIVEN_BACK,
    KEPT,
    KICK,
    KICK_LASTS,
    LARGEST_EXPONENT,
    LOSS_SCATTER,
    PROBES,
    UNMOVED,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


class Rows:
    """The last `KEPT` rows of numbers, which all have the same length, as a matrix of which no part is ever copied."""

    __slots__ = ("_begin", "_end", "_matrix")

    def __init__(self) -> None:
        """Begin without rows."""
        self._matrix: Floats | None = None
        self._begin = self._end = 0

    def append(self, row: Floats) -> None:
        """Add a row, and forget the oldest where there are too many."""
        import numpy as np

        if self._matrix is None:
            self._matrix = np.empty((KEPT + _SPARE, len(row)))
        if self._end == len(self._matrix):
            self._matrix[: KEPT - 1] = self._matrix[self._end - KEPT + 1 :]
            self._begin, self._end = 0, KEPT - 1
        self._matrix[self._end] = row
        self._end += 1
        self._begin = max(self._begin, self._end - KEPT)

    def clear(self) -> None:
        """Forget them; the next may have another length."""
        self._matrix, self._begin, self._end = None, 0, 0

    def newest(self, count: int) -> Floats:
        """Return the last rows, at most `count`, to be read before the next one comes; shape (<= count, length).

        Raises:
            LookupError: there is none.

        """
        return self._between(max(self._begin, self._end - count), self._end)

    def oldest(self, count: int) -> Floats:
        """Return the first of the rows in the same way."""
        return self._between(self._begin, min(self._begin + count, self._end))

    def _between(self, begin: int, end: int) -> Floats:
        if self._matrix is None:
            raise LookupError("a row must be there before it can be read")
        rows = self._matrix[begin:end]
        rows.flags.writeable = False
        return rows

    def to_plain(self) -> list[list[float]]:
        """Return them as lists, oldest first."""
        return [] if self._matrix is None else self._matrix[self._begin : self._end].tolist()


_SPARE = 5
"""Rows that are added before the others are moved up."""


@dataclass(slots=True)
class Track:
    """What is remembered of one optimizer."""

    snapshots: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=KEPT))
    probed: deque[Snapshot] = field(default_factory=deque)
    """Those of them that hold more than the norms of a step, as probes do."""
    probes: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=PROBES))
    """Those that have `sequences`, however long ago."""
    totals: deque[float | None] = field(default_factory=lambda: deque(maxlen=KEPT))
    """The global norm of each of `snapshots`."""
    sensitivities: Rows = field(default_factory=Rows)
    ratios: Rows = field(default_factory=Rows)
    lasting: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """What was worked out of `probed` and `probes`, and holds until they change; see `History.lasting`."""
    first_losses: list[float] = field(default_factory=list)
    last_losses: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    best_loss: float | None = None
    """The lowest median of `EDGE` losses in a row."""
    first_norms: list[float] = field(default_factory=list)
    """Finite global norms of the first window, the measure for later ones."""
    kicks: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By layer, the largest update of a weight over the weight, if it was a kick, and its step; a later one takes the
    place of one that no longer lasts."""
    frozen: set[str] = field(default_factory=set)
    """Parameters that were seen to be frozen once, by name."""
    left: set[str] = field(default_factory=set)
    """Parameters in whose place others of another shape have come, which no optimizer steps, by name."""
    added: int = 0
    """How many snapshots there were."""
    skipped: int = 0
    """Steps in a row that a GradScaler skipped, up to now."""
    update: float | None = None
    """How far the newest step that was measured so moved all weights, over their norm: `Snapshot.update_global`."""
    fastest: float = 0.0
    """The largest learning rate of all probes."""
    moved: int | None = None
    """The newest step that was seen to move the weights; None where none was."""
    standing: int = 0
    """Probes in a row, up to now, whose step had a gradient and left the weights where they were."""

    def forget(self) -> None:
        """Forget the snapshots, for those to come are of another model."""
        for kept in (
            self.snapshots,
            self.probed,
            self.probes,
            self.totals,
            self.sensitivities,
            self.ratios,
            self.lasting,
        ):
            kept.clear()

    def add(self, snapshot: Snapshot) -> None:
        """Take a snapshot in, and let go of the oldest."""
        self.skipped = self.skipped + 1 if snapshot.skipped else 0
        if self.probed and len(self.snapshots) == KEPT and self.probed[0] is self.snapshots[0]:
            self.probed.popleft()
            self.lasting.clear()
        self.snapshots.append(snapshot)
        self.totals.append(snapshot.norm_global)
        if _holds_more(snapshot):
            self.probed.append(snapshot)
            self.lasting.clear()
            if snapshot.sequences is not None:
                self.probes.append(snapshot)

    def note_movement(self, snapshot: Snapshot) -> None:
        """Note whether a step has moved the weights, if it had anything to move them by and that was measured."""
        self.fastest = max(self.fastest, snapshot.rate or 0.0)
        if (update := snapshot.update_global) is None or snapshot.skipped:
            return
        self.update = update
        if not any(snapshot.norm):
            return
        if update < UNMOVED:
            self.standing += 1
        else:
            self.moved, self.standing = snapshot.step, 0

    def add_loss(self, loss: float) -> None:
        """Take note of the loss of a step."""
        loss = math.inf if math.isnan(loss) else loss  # so that medians know where it stands
        self.last_losses.append(loss)
        if len(self.first_losses) < EDGE:
            self.first_losses.append(loss)
        if len(self.last_losses) >= EDGE and (self.best_loss is None or self.level < self.best_loss):
            self.best_loss = self.level

    @property
    def level(self) -> float:
        """The median of the last `EDGE` losses."""
        return statistics.median(itertools.islice(reversed(self.last_losses), EDGE))

    @property
    def has_size(self) -> bool:
        """Whether 0 is the least that the loss can be, so that a share of it means something."""
        lowest = min((*self.first_losses, *self.last_losses, self.best_loss or 0.0), default=0.0)
        return lowest >= 0 and statistics.median(self.first_losses) > 0

    def improved(self, share: float) -> bool | None:
        """Tell whether the loss is below that share of where it began, and has not lost half of that again.

        None where that is not known: a loss that begins at 0, or is ever below it, has no size to compare with.
        """
        if self.best_loss is None or len(self.last_losses) < 2 * EDGE or not self.has_size:
            return None
        first, last = statistics.median(self.first_losses), self.level
        if not math.isfinite(first) or not math.isfinite(last):
            return False
        gained, lost_again = first - self.best_loss, last - self.best_loss
        return first - last >= (1 - share) * first and lost_again <= GIVEN_BACK * gained

    def at_best(self, scatter: float) -> bool:
        """Tell whether the last losses are the best so far, and below the first.

        Where the best is below the first by more than the losses scatter, they may be above the best by as much.
        """
        if self.best_loss is None or len(self.last_losses) < EDGE:
            return False
        within = self.best_loss * math.exp(min(LOSS_SCATTER * scatter, LARGEST_EXPONENT))
        first = statistics.median(self.first_losses)
        return self.level <= (within if within < first else self.best_loss) < first

    def scatter(self) -> float | None:
        """Return how far a loss is from the next, in its logarithm and apart from the trend: the median over them.

        The last ten count only where there are too few before them: they may have jumped. None where losses have no
        size, or no two that follow one another are above 0 and finite.
        """
        losses = list(self.last_losses)
        losses = losses[: -2 * EDGE] if len(losses) > 3 * EDGE else losses
        pairs = [(a, b) for a, b in itertools.pairwise(losses) if 0 < a < math.inf and 0 < b < math.inf]
        if not pairs or not self.has_size:
            return None
        steps = [math.log(b) - math.log(a) for a, b in pairs]
        trend = statistics.fmean(steps)
        return statistics.median(abs(step - trend) for step in steps)

    def note_parameters(self, snapshot: Snapshot) -> None:
        """Take note of parameters that are frozen, and of updates that move units out of reach."""
        if len(self.snapshots) < 2 or self.snapshots[-2].model is not snapshot.model:
            self.frozen |= {p.name for p in snapshot.model.parameters if p.trainable is False}
        before = self.snapshots[-2].model if len(self.snapshots) > 1 else snapshot.model
        if before is not snapshot.model and snapshot.model.optimizers:
            stepped = {p.name: p.shape for p in before.parameters if p.optimizer is not None}
            gone = (p for p in snapshot.model.parameters if p.optimizer is None)
            self.left |= {p.name for p in gone if stepped.get(p.name, p.shape) != p.shape}
        for p, ratio in zip(snapshot.model.parameters, snapshot.update_ratio or (), strict=False):
            if ratio is None or not KICK <= ratio < math.inf or p.role != "weight":
                continue
            known, step = self.kicks.get(p.layer, (0.0, snapshot.step))
            if ratio > known or snapshot.step - step > KICK_LASTS:
                self.kicks[p.layer] = ratio, snapshot.step

    def to_plain(self, plain: Callable[[Snapshot], dict[str, Any]]) -> dict[str, Any]:
        """Return all of it as dicts, lists, numbers and strings; `plain` makes those of a snapshot."""
        older = [p for p in self.probes if not any(p is s for s in self.snapshots)]
        return {
            "snapshots": [plain(s) for s in self.snapshots],
            "probes": [plain(s) for s in older],
            "sensitivities": self.sensitivities.to_plain(),
            "ratios": self.ratios.to_plain(),
            "first_losses": list(self.first_losses),
            "last_losses": list(self.last_losses),
            "best_loss": self.best_loss,
            "first_norms": list(self.first_norms),
            "kicks": {layer: list(kick) for layer, kick in self.kicks.items()},
            "frozen": sorted(self.frozen),
            "left": sorted(self.left),
            "added": self.added,
            "skipped": self.skipped,
            "update": self.update,
            "moved": self.moved,
            "fastest": self.fastest,
            "standing": self.standing,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Snapshot]) -> Self:
        """Return what `to_plain` was taken of; `read` makes a snapshot of its plain values.

        Raises:
            KeyError, IndexError, TypeError, ValueError, AttributeError: it is not what that gives.

        """
        import numpy as np

        track = cls()
        track.probes.extend(map(read, plain.get("probes", ())))
        for snapshot in map(read, plain["snapshots"]):
            track.add(snapshot)
        for rows, kept in ((track.sensitivities, plain["sensitivities"]), (track.ratios, plain["ratios"])):
            for row in kept:
                rows.append(np.array(row, dtype=float))
        track.first_losses, track.first_norms = list(plain["first_losses"]), list(plain["first_norms"])
        track.last_losses.extend(plain["last_losses"])
        track.kicks = {layer: (ratio, step) for layer, (ratio, step) in plain.get("kicks", {}).items()}
        track.best_loss, track.added, track.skipped = plain["best_loss"], plain["added"], plain["skipped"]
        track.update, track.moved = plain.get("update"), plain.get("moved")
        track.fastest = plain.get("fastest", 0.0)
        track.standing, track.frozen = plain.get("standing", 0), set(plain.get("frozen", ()))
        track.left = set(plain.get("left", ()))
        return track


def _holds_more(s: Snapshot) -> bool:
    """Tell whether a snapshot holds more than the norms of its step."""
    return (
        s.weight_norm is not None
        or s.activations is not None
        or s.sequences is not None
        or s.update_ratio is not None
        or s.zeros is not None
        or s.facts is not None
        or s.flows is not None
        or s.cuts is not None
        or s.strays is not None
        or s.squashed is not None
        or s.crossed is not None
        or s.left_over is not None
        or s.came is not None
        or s.rate is not None
        or s.lost is not None
        or s.computed_in is not None
    )


def medians(rows: Floats) -> Floats:
    """Return the median of each column, NaN where one entry is; of few rows ten times as fast as `np.median`."""
    import numpy as np

    ordered, half = np.sort(rows, axis=0), len(rows) // 2  # NaN comes last
    middle = ordered[half] if len(rows) % 2 else (ordered[half - 1] + ordered[half]) / 2
    found: Floats = np.where(np.isnan(ordered[-1]), np.nan, middle)
    return found


def newest(items: Sequence[Any] | deque[Any], count: int | None) -> list[Any]:
    """Return the last `count` items; all where it is None."""
    return list(items) if count is None else list(itertools.islice(items, max(len(items) - count, 0), None))
