"""Whether torch.compile has compiled a model, as far as that can be told: compiled code calls no hooks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class _Graphs:
    """Counts the graphs that were compiled in this process; those of optimizers' steps are none of a model's."""

    def __init__(self) -> None:
        self._counters: Mapping[str, Any] = {}
        self._of_steps = 0
        self._before: int | None = None

    def step_begins(self) -> None:
        """Take note: what is compiled from now on is of an optimizer's step."""
        self._before = self._count()

    def step_ends(self) -> None:
        """Take note: it is not, any more."""
        if self._before is not None:
            self._of_steps += max(self._count() - self._before, 0)
            self._before = None

    def may_be_of_models(self) -> bool:
        """Tell whether anything was compiled that is not known to be of optimizers alone."""
        if (count := self._count()) < self._of_steps:  # dynamo was reset
            self._of_steps = 0
        return count > self._of_steps or (not self._of_steps and any(self._counters.get("frames", {}).values()))

    def _count(self) -> int:
        if not self._counters:
            self._counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
        # Not those of frames, in which what `fullgraph=True` compiles is missing.
        stats = self._counters.get("stats")
        return stats["unique_graphs"] if stats else 0


graphs = _Graphs()
