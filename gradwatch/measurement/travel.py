"""How far weights have come from one probe to the next, beside what a single step moves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradwatch.measurement.norms import CLASSES, PLAIN

_TENSORS, _ENTRIES = 8, 64
"""How many weights are followed, and of each how many entries."""
_APART = 5
"""Steps from one probe to the next, at least: what is undone at every few steps stands in between."""


class Travel:
    """Follows entries of some weights of one optimizer, from before each probed step to before the next."""

    def __init__(self) -> None:
        """Begin without entries."""
        self._columns: list[int] = []
        self._before: Tensor | None = None
        """The entries before this step, (weights, entries)."""
        self._earlier: tuple[int, Tensor, Tensor] | None = None
        """Of the probe before, its step, the entries before that, and how far it moved each weight."""

    def begin(self, columns: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Take the entries before a step."""
        self._before = None
        fitting = [
            (column, p)
            for column, p in zip(columns, parameters, strict=True)
            if p.dim() > 1 and p.numel() >= _ENTRIES and type(p) in CLASSES and p.dtype in PLAIN and p.is_contiguous()
        ]
        fitting = [one for one in fitting if one[1].device == fitting[0][1].device]
        chosen = fitting[:: max(len(fitting) // _TENSORS, 1)][:_TENSORS]
        if not chosen:
            return
        if self._columns != (mine := [column for column, _ in chosen]):
            self._columns, self._earlier = mine, None
        self._before = _entries([p for _, p in chosen])

    def end(self, number: int, columns: Sequence[int], parameters: Sequence[Tensor]) -> Tensor | None:
        """Return how far the weights had come before this step, over what a step moves them; None at the first probe.

        Nor at one that follows another closely.

        The median over the weights; NaN where none moved.
        """
        before, self._before = self._before, None
        by_column = dict(zip(columns, parameters, strict=True))
        if before is None or any(column not in by_column for column in self._columns):
            return None
        if self._earlier is not None and 0 <= number - self._earlier[0] < _APART:
            return None
        step = (_entries([by_column[column] for column in self._columns]) - before).norm(dim=1)
        earlier, self._earlier = self._earlier, (number, before, step)
        if earlier is None:
            return None
        _, was, moved = earlier
        came: Tensor = (before - was).norm(dim=1) / torch.minimum(step, moved)
        return came.nanmedian()


def _entries(weights: Sequence[Tensor]) -> Tensor:
    """Return entries of each weight from all over it, (weights, entries), in float32."""
    flat = [weight.detach().view(-1) for weight in weights]
    return torch.stack([one[:: len(one) // _ENTRIES][:_ENTRIES].float() for one in flat])
