"""The losses of the coming steps: what was told, and which optimizers have had it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

_KEPT = 10_000
"""Losses that are remembered between two steps."""


class Losses:
    """What was told since the last optimizer took its loss; of several optimizers, each that steps next has it once.

    Optimizers are told apart by a number of each.
    """

    def __init__(self, *, raw: bool = False) -> None:
        """Begin with nothing told.

        Args:
            raw: what will be told are the scalars on which backward is called: the loss of a step is their sum, and the
                loss scale is in it.

        """
        self.raw = raw
        self._told: deque[float | Tensor] = deque(maxlen=_KEPT)
        self._takers: set[int] = set()

    def record(self, loss: float | Tensor) -> None:
        """Add a loss to those of the coming step, a tensor without its graph; what was taken is of the step before.

        Raises:
            TypeError, ValueError: it is neither a tensor nor a number.

        """
        told = loss.detach() if isinstance(loss, Tensor) else float(loss)
        if self._takers:
            self._told.clear()
            self._takers.clear()
        self._told.append(told)

    @property
    def fresh(self) -> bool:
        """Whether something was told that no optimizer has taken."""
        return bool(self._told) and not self._takers

    def of(self, optimizer: int) -> Sequence[float | Tensor]:
        """Return what was told of the coming step of this optimizer; nothing if it has had that."""
        if optimizer in self._takers:
            return ()
        return [sum(self._told)] if self.raw and self._told else self._told

    def taken(self, optimizer: int) -> None:
        """Note that this optimizer has had what was told."""
        self._takers.add(optimizer)

    def begin(self, optimizer: int) -> None:
        """Note that this optimizer begins a step: what it has had is of its step before, and of nobody's next."""
        if optimizer in self._takers:
            self._told.clear()

    def end(self, optimizer: int) -> None:
        """Note that this optimizer has stepped: what a closure evaluated again has told is of nobody's next."""
        if optimizer not in self._takers:
            self._told.clear()

    def clear(self) -> None:
        """Let go of what was told."""
        self._told.clear()
