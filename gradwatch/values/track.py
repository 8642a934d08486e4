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
from gradwatch.values.thresholds import EDGE, KEPT, KICK, KICK_LASTS, PROBES, UNMOVED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(slots=True)
class Track:
    """What is remembered of one optimizer."""

    snapshots: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=KEPT))
    probes: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=PROBES))
    """Those that have `sequences`, however long ago."""
    sensitivities: deque[Floats] = field(default_factory=lambda: deque(maxlen=KEPT))
    ratios: deque[Floats] = field(default_factory=lambda: deque(maxlen=KEPT))
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
    added: int = 0
    """How many snapshots there were."""
    skipped: int = 0
    """Steps in a row that a GradScaler skipped, up to now."""
    update: float | None = None
    """How far the newest step that was measured so moved all weights, over their norm: `Snapshot.update_global`."""
    moved: int | None = None
    """The newest step that was seen to move the weights; None where none was."""
    standing: int = 0
    """Probes in a row, up to now, whose step had a gradient and left the weights where they were."""

    def note_movement(self, snapshot: Snapshot) -> None:
        """Note whether a step has moved the weights, if it had anything to move them by and that was measured."""
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
        level = statistics.median(list(self.last_losses)[-EDGE:])
        if len(self.last_losses) >= EDGE and (self.best_loss is None or level < self.best_loss):
            self.best_loss = level

    @property
    def has_size(self) -> bool:
        """Whether 0 is the least that the loss can be, so that a share of it means something."""
        lowest = min((*self.first_losses, *self.last_losses, self.best_loss or 0.0), default=0.0)
        return lowest >= 0 and statistics.median(self.first_losses) > 0

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
            "sensitivities": [row.tolist() for row in self.sensitivities],
            "ratios": [row.tolist() for row in self.ratios],
            "first_losses": list(self.first_losses),
            "last_losses": list(self.last_losses),
            "best_loss": self.best_loss,
            "first_norms": list(self.first_norms),
            "kicks": {layer: list(kick) for layer, kick in self.kicks.items()},
            "frozen": sorted(self.frozen),
            "added": self.added,
            "skipped": self.skipped,
            "update": self.update,
            "moved": self.moved,
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
        track.snapshots.extend(map(read, plain["snapshots"]))
        track.probes.extend(map(read, plain.get("probes", ())))
        track.probes.extend(s for s in track.snapshots if s.sequences is not None)
        track.sensitivities.extend(np.array(row, dtype=float) for row in plain["sensitivities"])
        track.ratios.extend(np.array(row, dtype=float) for row in plain["ratios"])
        track.first_losses, track.first_norms = list(plain["first_losses"]), list(plain["first_norms"])
        track.last_losses.extend(plain["last_losses"])
        track.kicks = {layer: (ratio, step) for layer, (ratio, step) in plain.get("kicks", {}).items()}
        track.best_loss, track.added, track.skipped = plain["best_loss"], plain["added"], plain["skipped"]
        track.update, track.moved = plain.get("update"), plain.get("moved")
        track.standing, track.frozen = plain.get("standing", 0), set(plain.get("frozen", ()))
        return track


def newest(items: Sequence[Any] | deque[Any], count: int | None) -> list[Any]:
    """Return the last `count` items; all where it is None."""
    return list(items) if count is None else list(itertools.islice(items, max(len(items) - count, 0), None))
