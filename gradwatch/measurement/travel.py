"""How far weights have come from one probe to the next, beside what a single step moves them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradwatch.measurement.norms import CLASSES, PLAIN

_TENSORS, _ENTRIES = 8, 64
"""How many weights are followed, and of each how many entries."""
_APART = 5
"""Steps from one probe to the next, at least: what is undone at every few steps stands in between."""


class _Step(NamedTuple):
    """A probed step, and what it did to the entries, all (weights, entries)."""

    number: int
    before: Tensor
    moves: Tensor
    moved: Tensor
    """1 where it is the gradient that moved it: without one, weight decay alone does, and somebody may put that back,
    as all rows of an embedding but the one that is to be learned."""


class Travel:
    """Follows entries of some weights of one optimizer, from before each probed step to before the next."""

    def __init__(self) -> None:
        """Begin without entries."""
        self._columns: list[int] = []
        self._before: tuple[Tensor, Tensor] | None = None
        """The entries before this step, (weights, entries), and 1 where they had a gradient: by its end it may be
        zeroed."""
        self._earlier: _Step | None = None
        """That of the probe before."""

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
        weights = [p for _, p in chosen]
        self._before = _entries(weights), _moved(weights, unknown=0.0)

    def end(self, number: int, columns: Sequence[int], parameters: Sequence[Tensor]) -> Tensor | None:
        """Return how far the weights had come before this step, over what a step moves them; None at the first probe.

        Nor at one that follows another closely.

        The median over the weights, of the entries that had a gradient in both steps; NaN where none moved.
        """
        begun, self._before = self._before, None
        by_column = dict(zip(columns, parameters, strict=True))
        if begun is None or any(column not in by_column for column in self._columns):
            return None
        if self._earlier is not None and 0 <= number - self._earlier.number < _APART:
            return None
        weights, before = [by_column[column] for column in self._columns], begun[0]
        moved = torch.maximum(begun[1], _moved(weights, unknown=1.0))
        earlier, self._earlier = self._earlier, _Step(number, before, _entries(weights) - before, moved)
        if earlier is None:
            return None
        both = earlier.moved * self._earlier.moved
        step = torch.minimum(*((one.moves * both).norm(dim=1) for one in (earlier, self._earlier)))
        came: Tensor = ((before - earlier.before) * both).norm(dim=1) / step
        return came.nanmedian()


def _entries(weights: Sequence[Tensor]) -> Tensor:
    """Return entries of each weight from all over it, (weights, entries), in float32."""
    flat = [weight.detach().view(-1) for weight in weights]
    return torch.stack([one[_places(len(one), one.device)].float() for one in flat])


def _moved(weights: Sequence[Tensor], *, unknown: float) -> Tensor:
    """Return 1 for the same entries where the gradient is not exactly 0, 0 where it is, and else what is `unknown`."""
    rows = [torch.full((_ENTRIES,), unknown, dtype=torch.float32, device=weight.device) for weight in weights]
    for row, weight in zip(rows, weights, strict=True):
        gradient = weight.grad
        if gradient is not None and type(gradient) is Tensor and gradient.layout is torch.strided:
            flat = gradient.detach().reshape(-1)
            row.copy_(flat[_places(len(flat), flat.device)] != 0)
    return torch.stack(rows)


@functools.lru_cache(maxsize=64)
def _places(size: int, device: torch.device) -> Tensor:
    return (torch.arange(_ENTRIES, device="cpu") * size // _ENTRIES).to(device)
