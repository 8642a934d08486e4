"""Optimizers that are watched and have not stepped once, while others do and gradients come to what is theirs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from torch import Tensor

from gradwatch.measurement.model_map import ModelMap
from gradwatch.measurement.norms import plain
from gradwatch.measurement.parameters import undisturbed
from gradwatch.values.snapshot import Silence, Snapshot
from gradwatch.values.thresholds import RESTING
from gradwatch.watcher.optimizer_steps import OptimizerSteps
from gradwatch.watcher.unheard import finite


class Resting:
    """Counts steps of others that were measured while one rests, and tells of it: as they go on, and at the end."""

    def __init__(self, model_map: ModelMap) -> None:
        """Begin with none."""
        self._model_map = model_map
        self._counts: dict[int, int] = {}
        self._newest: Snapshot | None = None

    def while_stepped(self, snapshot: Snapshot, steps: Sequence[OptimizerSteps]) -> Iterator[Snapshot]:
        """Yield what there is to tell after a measured step of one of these optimizers."""
        for one in self._resting(steps):
            if snapshot.optimizer in (None, one.index):
                continue
            self._newest = snapshot
            gradients = self._gradients(one)
            if not gradients or any(g is None for g in gradients):
                continue
            count = self._counts[one.index] = self._counts.get(one.index, 0) + 1
            if count == RESTING and self._arrives(one):
                yield self._told(one, snapshot, ended=False)

    def at_the_end(self, steps: Sequence[OptimizerSteps]) -> Iterator[Snapshot]:
        """Yield what there is to tell of those that have not stepped in all of the training."""
        for one in self._resting(steps):
            if self._newest is not None and self._counts.get(one.index, 0) >= RESTING and self._arrives(one):
                yield self._told(one, self._newest, ended=True)

    @staticmethod
    def _resting(steps: Sequence[OptimizerSteps]) -> list[OptimizerSteps]:
        return [one for one in steps if not (one.count or one.waits) and one.optimizer is not None]

    def _gradients(self, one: OptimizerSteps) -> list[Tensor | None]:
        """Return the gradients of what it alone is to step."""
        others = self._model_map.stepped_by_others(one.optimizer)
        mine = self._model_map.parameters(one.optimizer)
        return [p.grad for p in mine if p in self._model_map and id(p) not in others]

    def _arrives(self, one: OptimizerSteps) -> bool:
        """Tell whether anything but zeros arrives there; what is not finite a scaler may skip without a call."""
        gradients = self._gradients(one)
        with undisturbed():
            return finite(gradients) and any(bool(plain(g).any()) for g in gradients if g is not None)

    def _told(self, one: OptimizerSteps, snapshot: Snapshot, *, ended: bool) -> Snapshot:
        by = snapshot.model.optimizers[snapshot.optimizer or 0].kind
        return Snapshot(
            step=snapshot.step,
            wall_time=time.time(),
            model=snapshot.model,
            optimizer=one.index,
            norm=(None,) * len(snapshot.model.parameters),
            silence=Silence(0, 0, told=self._counts[one.index], by=by, watched=True, ended=ended),
        )
