"""Optimizers that are watched and have not stepped once, while others do and gradients come to what is theirs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from gradwatch.measurement.model_map import ModelMap
from gradwatch.measurement.parameters import undisturbed
from gradwatch.values.snapshot import Silence, Snapshot
from gradwatch.values.thresholds import RESTING
from gradwatch.watcher.optimizer_steps import OptimizerSteps


class Resting:
    """Counts steps of others that were measured while one rests, and tells of it once."""

    def __init__(self, model_map: ModelMap) -> None:
        """Begin with none."""
        self._model_map = model_map
        self._counts: dict[int, int] = {}

    def while_stepped(self, snapshot: Snapshot, steps: Sequence[OptimizerSteps]) -> Iterator[Snapshot]:
        """Yield what there is to tell after a measured step of one of these optimizers."""
        for one in steps:
            if one.count or one.waits or one.optimizer is None or snapshot.optimizer in (None, one.index):
                continue
            others = self._model_map.stepped_by_others(one.optimizer)
            own = [p for p in self._model_map.parameters(one.optimizer) if p in self._model_map and id(p) not in others]
            if any(p.grad is None for p in own) or not own:
                continue
            count = self._counts[one.index] = self._counts.get(one.index, 0) + 1
            if count != RESTING:
                continue
            with undisturbed():
                arrives = any(bool(torch.count_nonzero(p.grad)) for p in own if p.grad is not None)
            if not arrives:
                self._counts[one.index] = 0
                continue
            by = snapshot.model.optimizers[snapshot.optimizer or 0].kind
            yield Snapshot(
                step=snapshot.step,
                wall_time=time.time(),
                model=snapshot.model,
                optimizer=one.index,
                norm=(None,) * len(snapshot.model.parameters),
                silence=Silence(0, 0, told=count, by=by, watched=True),
            )
