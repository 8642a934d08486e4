"""The fold over snapshots that detectors read."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, TypeVar

from gradwatch.values.layer_columns import LayerColumns
from gradwatch.values.plain import (
    FORMAT,
    FORMATS,
    compact,
    model_from_plain,
    snapshot_from_plain,
    snapshot_to_plain,
    to_plain,
)
from gradwatch.values.report import Finding
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Column, ModelInfo, Role, Snapshot
from gradwatch.values.thresholds import EDGE, PROBES, Thresholds
from gradwatch.values.track import Track, medians, newest

if TYPE_CHECKING:
    from gradwatch.values.track import Floats

Key = tuple[str, str, str | None, int | None]
"""Which alert a finding belongs to: code, place, parameter, optimizer."""

T = TypeVar("T")


class History:
    """What detectors may know: the last snapshots of each optimizer, the first and last losses, the best ratios.

    `add` folds a snapshot in; everything else reads, and speaks of the optimizer that took the newest step.
    Arrays have one row per snapshot, oldest first, and one column per layer of `model.layers`.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        """Begin with nothing seen."""
        self.thresholds = thresholds or Thresholds()
        self.best_ratio: dict[str, float] = {}
        """Per layer, the largest median of five ratios in a row (see `ratios`), one five after the other."""
        self._open: frozenset[Key] = frozenset()
        self._places: dict[str, set[str]] = {}
        self.muted: frozenset[str] = frozenset()  # codes of what was found now, and muted
        self._explained = False
        self._tracks: dict[int | None, Track] = {}
        self._now: int | None = None
        self._latest: Snapshot | None = None
        self._weight_norms: dict[str, float] = {}
        self._columns: LayerColumns | None = None
        self._weights: Floats | None = None
        """What `LayerColumns.weights` gives for the newest norms of the weights; None until it is asked for."""
        self._once: dict[Callable[[History], Any], Any] = {}

    def add(self, snapshot: Snapshot) -> None:
        """Fold one snapshot in."""
        import numpy as np

        snapshot = compact(snapshot)
        self._now, self._latest = snapshot.optimizer, snapshot
        self._once.clear()
        track = self._tracks.setdefault(self._now, Track())
        if track.snapshots and not track.snapshots[-1].model.is_like(snapshot.model):
            track.forget()
        track.add(snapshot)
        if snapshot.weight_norm is not None:
            both = zip(snapshot.model.parameters, snapshot.weight_norm, strict=True)
            self._weight_norms.update((p.name, weight) for p, weight in both if weight is not None)
            self._weights = None
        track.note_parameters(snapshot)
        columns = self.columns
        if self._weights is None:
            self._weights = columns.weights(self._weight_norms)
        # The gradients of a skipped step are not those of the loss: its row says nothing.
        norms = np.array(snapshot.norm if not snapshot.skipped else [None] * len(snapshot.norm), dtype=float)
        sensitivity = columns.sensitivity(norms, self._weights)
        track.sensitivities.append(sensitivity)
        track.ratios.append(columns.over_later(sensitivity))
        track.note_movement(snapshot)
        track.added += 1
        if track.added % EDGE == 0:
            self._note_best(track)
        if not snapshot.skipped:
            total = track.totals[-1]
            if len(track.first_norms) < self.thresholds.window and total is not None and math.isfinite(total):
                track.first_norms.append(total)
            if snapshot.loss is not None and snapshot.silence is None:  # else it is the loss of others
                track.add_loss(snapshot.loss)

    def note_open(self, keys: Iterable[Key], *, explained: bool = False) -> None:
        """Take note of the alerts that are open from now on, for hysteresis.

        Args:
            keys: `Finding.key` of each.
            explained: whether one of them tells why a loss may stand still.

        """
        self._open, self._explained = frozenset(keys), explained
        self._places = {}
        for code, place, *_ in self._open:
            self._places.setdefault(code, set()).add(place)
        self._once.clear()

    def _note_best(self, track: Track) -> None:
        """Note where the ratios of the last snapshots were the best so far.

        One snapshot proves nothing: in a homogeneous network all layers have the same sensitivity at initialization,
        however little gradient each of their weights gets. So what counts is the median of a few.
        """
        level = medians(track.ratios.newest(EDGE))
        for layer, value in zip(track.snapshots[-1].model.layers, level.tolist(), strict=True):
            if value > self.best_ratio.get(layer.name, 0.0):  # never for NaN
                self.best_ratio[layer.name] = value

    # --- what detectors read ---

    def once(self, work: Callable[[History], T]) -> T:
        """Return what a function makes of this history: it is worked out once for all who ask between two changes."""
        if work not in self._once:
            self._once[work] = work(self)
        return self._once[work]  # type: ignore[no-any-return]  # what `work` made

    def lasting(self, work: Callable[..., T], *given: Hashable) -> T:
        """Return what a function makes of this history and of what is given, and work it out once between two probes.

        It may read nothing but the thresholds, the model with the order of its layers, `probed` and `sequences`.
        """
        known, key = self.track.lasting, (work, *given)
        return known[key] if key in known else known.setdefault(key, work(self, *given))  # type: ignore[no-any-return]

    @property
    def open(self) -> Collection[Key]:
        """Keys of the alerts that are open."""
        return self._open

    @property
    def explained(self) -> bool:
        """Whether an alert that is open tells why the loss may stand still."""
        return self._explained

    @property
    def begun(self) -> bool:
        """Whether there is a snapshot."""
        return self._now in self._tracks

    @property
    def snapshot(self) -> Snapshot:
        """The newest snapshot."""
        if self._latest is None:
            raise LookupError("a history must have taken a snapshot before it can be read")
        return self._latest

    @property
    def model(self) -> ModelInfo:
        """The model as the newest snapshot describes it."""
        return self.snapshot.model

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer of the newest snapshot is Adam-like."""
        optimizer = self.snapshot.optimizer
        return optimizer is not None and self.model.optimizers[optimizer].adaptive

    @property
    def count(self) -> int:
        """How many snapshots there were, the forgotten ones included."""
        return self.track.added

    @property
    def skipped(self) -> int:
        """Steps in a row that a GradScaler skipped, up to now."""
        return self.track.skipped

    @property
    def first_norms(self) -> Sequence[float]:
        """Global gradient norms of the first window."""
        return self.track.first_norms

    def had_gradients(self, *, anywhere: bool = False) -> bool:
        """Tell whether a parameter of this optimizer, or `anywhere` one of any, has ever had a gradient."""
        tracks = self._tracks.values() if anywhere else [self.track]
        return any(track.first_norms or any(s.silence is None for s in track.snapshots) for track in tracks)

    def window(self, count: int | None = None) -> list[Snapshot]:
        """Return the last `count` snapshots (default: all that are kept), fewer if there are not so many."""
        return newest(self.track.snapshots, count)

    @property
    def remembered(self) -> list[Snapshot]:
        """All snapshots that are kept, of all optimizers, oldest first."""
        return sorted((s for track in self._tracks.values() for s in track.snapshots), key=lambda s: s.step)

    @property
    def probed(self) -> Sequence[Snapshot]:
        """Those of the window that hold more than the norms of their step, as probes do, oldest first."""
        return self.track.probed

    @property
    def totals(self) -> Sequence[float | None]:
        """The global norm of each snapshot of the window, oldest first."""
        return self.track.totals

    def looks(self, count: int | None = None) -> list[Snapshot]:
        """Return the last `count` of the kept snapshots that have `activations` (default: all), oldest first."""
        return newest([s for s in self.probed if s.activations is not None], count)

    def weight_norms(self, *, first: bool = False) -> Column | None:
        """Return the norms of the parameters, now or as far back as is remembered; None where not measured."""
        probed = self.probed if first else reversed(self.probed)
        return next((s.weight_norm for s in probed if s.weight_norm is not None), None)

    def sensitivities(self, count: int) -> Floats:
        """Return ||gradient|| x ||weight|| per layer, biases and lone gains left out; NaN where there is none.

        Shape (<= count, layers).
        """
        return self.track.sensitivities.newest(count)

    def ratios(self, count: int) -> Floats:
        """Return each layer's sensitivity over the largest of the layers after it in the forward pass.

        Shape (<= count, layers).
        """
        return self.track.ratios.newest(count)

    @property
    def order(self) -> Sequence[int]:
        """Numbers of the layers in the order of the forward pass, as `ModelInfo.forward_order`."""
        return self.columns.order

    @property
    def numbers(self) -> Mapping[str, int]:
        """The number of each layer by its name, as `LayerColumns.numbers`."""
        return self.columns.numbers

    @property
    def inner(self) -> Sequence[str]:
        """Names of the modules of layers that no other of them lies in, in the order of the forward pass."""
        return self.columns.innermost

    def gains(self, *, first: bool = False) -> Floats:
        """Return the gain of each layer (see `LayerColumns.gains`), now or as far back as is remembered."""
        return self.lasting(History._gains, first)

    def _gains(self, first: bool) -> Floats:  # noqa: FBT001  (a part of the key by which it is remembered)
        return self.columns.gains(self.weight_norms(first=first))

    def elements(self, *roles: Role) -> Floats:
        """Return the number of entries of each parameter, 0 for those of other roles. Shape (parameters,)."""
        return self.columns.elements(roles)

    def sequences(self, count: int = PROBES) -> list[Snapshot]:
        """Return the last snapshots that have `sequences`, oldest first: at most `count`, and at most eight."""
        return newest(self.track.probes, count) if self.begun else []

    @property
    def last_sequences(self) -> tuple[SequenceStats, ...]:
        """What the last probe saw of time, whichever optimizer's it was."""
        probes = [track.probes[-1] for track in self._tracks.values() if track.probes]
        return max(probes, key=lambda snapshot: snapshot.wall_time).sequences or () if probes else ()

    def losses(self, count: int) -> list[float]:
        """Return the last `count` known losses."""
        return newest(self.track.last_losses, count)

    @property
    def first_loss(self) -> float | None:
        """Median of the first five losses; None where the loss is not known."""
        return statistics.median(self.track.first_losses) if self.track.first_losses else None

    @property
    def best_loss(self) -> float | None:
        """The lowest median of five losses in a row; None where the loss is not known."""
        return self.track.best_loss

    @property
    def improved(self) -> bool | None:
        """Whether the loss is well below where it began, and has not lost half of that again.

        None where that is not known: a loss that begins at 0, or is ever below it, has no size to compare with.
        """
        return self.once(History._has_improved) if self.begun else None

    def _has_improved(self) -> bool | None:
        return self.track.improved(self.thresholds.improved)

    @property
    def scatter(self) -> float | None:
        """How far a loss is from the next: see `Track.scatter`."""
        return self.once(History._scatter)

    def _scatter(self) -> float | None:
        return self.track.scatter()

    @property
    def at_best(self) -> bool:
        """Whether a plateau is being left: see `Track.at_best`."""
        return self.scatter is not None and self.track.at_best(self.scatter)

    def sound_once(self, layer: int) -> bool:
        """Tell whether this layer once had a gradient that was worth something beside those of later layers."""
        name = self.model.layers[layer].name
        return self.best_ratio.get(name, 0.0) >= self.thresholds_of(layer).vanishing_sound

    def thresholds_of(self, layer: int) -> Thresholds:
        """Return the thresholds that hold for a layer: one inside of a module has those of the module too."""
        if not self.thresholds.layers:
            return self.thresholds
        info = self.model.layers[layer]
        return self.thresholds.of(info.name, info.module)

    def is_open(self, code: str, place: str) -> bool:
        """Tell whether an alert of this rule is open at this place."""
        return place in self.open_at(code)

    def open_at(self, code: str) -> AbstractSet[str]:
        """Return the places at which an alert of this rule is open."""
        return self._places.get(code, frozenset())

    def runs(self, chosen: Collection[int], among: Collection[int]) -> list[list[int]]:
        """Group layers that follow one another in the forward pass: see `LayerColumns.runs`."""
        return self.columns.runs(chosen, among)

    def since(self, holds: Iterable[bool]) -> int:
        """Return the step at which the newest unbroken run of `holds` (one per snapshot, the newest last) began."""
        flags = list(holds)
        run = len(list(itertools.takewhile(bool, reversed(flags))))
        return self.window(max(run, 1))[0].step

    # --- to go on after a stop ---

    def state_dict(self) -> dict[str, Any]:
        """Return all that is remembered as dicts, lists, numbers and strings."""
        models: list[ModelInfo] = []

        def plain(snapshot: Snapshot) -> dict[str, Any]:
            if not any(snapshot.model is m for m in models):
                models.append(snapshot.model)
            return snapshot_to_plain(snapshot, next(i for i, m in enumerate(models) if m is snapshot.model))

        tracks = [{"optimizer": optimizer, **track.to_plain(plain)} for optimizer, track in self._tracks.items()]
        return {
            "format": FORMAT,
            "models": [to_plain(m) for m in models],
            "tracks": tracks,
            "now": self._now,
            "best_ratio": dict(self.best_ratio),
            "weight_norms": dict(self._weight_norms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, be it in format 1 or 2.

        Raises:
            KeyError, IndexError, TypeError, ValueError, AttributeError: it is not what that gives.

        """
        written = state.get("format", 1)
        if written not in FORMATS:
            raise ValueError(f"the format of a history must be 1 to {FORMAT}, got {written!r:.80}")
        models = [model_from_plain(m, written) for m in state["models"]]

        def read(plain: Mapping[str, Any]) -> Snapshot:
            return snapshot_from_plain(plain, models, written)

        self._tracks = {plain["optimizer"]: Track.from_plain(plain, read) for plain in state["tracks"]}
        self._now = state["now"]
        self.best_ratio, self._weight_norms = dict(state["best_ratio"]), dict(state["weight_norms"])
        self._columns = self._weights = None
        self._once.clear()
        self._latest = self.track.snapshots[-1] if self.begun else None

    @property
    def track(self) -> Track:
        """What is remembered of the optimizer of the newest snapshot."""
        return self._tracks[self._now]

    @property
    def columns(self) -> LayerColumns:
        """How the columns of the newest snapshot fold into layers."""
        if self._columns is None or self._columns.model is not self.model:
            self._columns, self._weights = LayerColumns(self.model), None
            for track in self._tracks.values():
                track.lasting.clear()
        return self._columns


Detector = Callable[[History], Iterable[Finding]]
"""A pure function of the history: what it finds wrong, now.

It may carry its rules as an attribute `rules`, a list or tuple of `gradwatch.Rule`: they give its findings their words,
and say how its alerts behave. Without, an alert shows its numbers.
"""
