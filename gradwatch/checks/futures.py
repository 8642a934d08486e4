"""Inputs and outputs by timestep: where each entry lies in time, and inputs with another future."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Timed:
    """A tensor with timesteps."""

    label: str
    """Of an input the way to it."""
    data: Tensor
    """Its entries; of a packed sequence those."""
    when: Tensor
    """The timestep of each entry, int64, on its device; as many dimensions, of which it is broadcast along most."""
    steps: int
    """How many timesteps there are."""


def along(tensor: Tensor, dim: int, *, period: int | None = None, step: int = 1) -> Tensor:
    """Return the timesteps of the entries of a tensor along a dimension.

    Args:
        tensor: whose.
        dim: the dimension of time.
        period: in a flat window, after how many entries the timesteps begin anew.
        step: entries from one timestep to the next.

    """
    dim %= tensor.dim()
    numbers = torch.arange(tensor.shape[dim], device=tensor.device)
    if period is not None:
        numbers = numbers % period // step
    return numbers.view([-1 if at == dim else 1 for at in range(tensor.dim())])


def when_packed(packed: PackedSequence) -> Tensor:
    """Return the timesteps of the entries of a packed sequence."""
    sizes = packed.batch_sizes
    numbers = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes).to(packed.data.device)
    return numbers.view([-1] + [1] * (packed.data.dim() - 1))


Change = Callable[[Tensor, torch.Generator], Tensor]


def _spread(tensor: Tensor) -> float:
    """Return the standard deviation of the entries, 1 where all are the same."""
    numbers = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()
    found = float(numbers.std(correction=0)) if numbers.numel() else 0.0
    return found if 0 < found < float("inf") else 1.0


def _shifted(sign: float) -> Change:
    return lambda tensor, _: tensor + sign * 8 * _spread(tensor)


def _next(tensor: Tensor, _: torch.Generator) -> Tensor:
    """Keep whole numbers from 0, or the smallest that is there, to the largest."""
    low, high = min(int(tensor.min()), 0), int(tensor.max())
    return (tensor - low + 1) % max(high - low + 1, 2) + low


def _negated(tensor: Tensor, _: torch.Generator) -> Tensor:
    return ~tensor


def _ways(given: Timed) -> Iterator[Tensor]:
    """Yield other values for all of an input. Those of other timesteps come first: a model may always be given them."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    tensor = given.data.detach()
    if not tensor.numel():
        return
    dim = next((at for at, size in enumerate(given.when.shape) if size > 1), 0)

    def permuted(tensor: Tensor, generator: torch.Generator) -> Tensor:
        order = torch.randperm(tensor.shape[dim], generator=generator)
        return tensor.index_select(dim, order.to(tensor.device))

    changes: Sequence[Change]
    if tensor.dtype is torch.bool:
        changes = (permuted, _negated)
    elif inexact(tensor):
        changes = (permuted, _shifted(1), _shifted(-1))
    else:
        changes = (permuted, _next)
    for change in changes:
        yield change(tensor, generator).to(tensor.dtype)


class Futures:
    """Inputs with another future: always the same one, and drawn from no random state of torch's own."""

    def __init__(self, inputs: Sequence[Timed]) -> None:
        """Take the inputs, and find other values for all of their entries."""
        self.inputs = [one for one in inputs if one.data.numel()]
        self._ways = [list(_ways(one)) for one in self.inputs]
        self.ways = range(max(map(len, self._ways), default=0))
        """The ways in which they can be changed."""

    def of(self, way: int, after: int, only: str | None = None) -> dict[int, Tensor]:
        """Return the inputs, by `id` of the tensors that are there, whose timesteps after one have other values.

        Args:
            way: in which of the ways; where an input has fewer, they begin anew.
            after: the last timestep that stays.
            only: the one input to change; None: all.

        """
        return {
            id(one.data): torch.where(one.when > after, every[way % len(every)], one.data.detach())
            for one, every in zip(self.inputs, self._ways, strict=True)
            if only is None or one.label == only
        }


def swapped(tensors: Mapping[int, Tensor], dtype: torch.dtype | None, scale: float) -> Callable[[Tensor], Tensor]:
    """Return what gives a model its own copy of a tensor: of another in its place, in another format, and scaled."""

    def own(tensor: Tensor) -> Tensor:
        mine = tensors.get(id(tensor), tensor).detach()
        if mine.layout is not torch.strided or mine.is_nested:
            return mine
        if scale != 1 and mine.is_floating_point():
            mine = mine * scale
        if dtype is not None and mine.is_floating_point():
            return mine.to(dtype, copy=True)
        return mine.clone()

    return own


def difference(one: Timed, other: Tensor, until: int) -> float:
    """Return the largest difference of two outputs up to a timestep, over the largest entry of the first.

    0 where they are the same bit for bit; NaN where the other is not finite where the first is.
    """
    if one.data.shape != other.shape:
        return float("inf")
    known = (one.when <= until).expand(one.data.shape)
    mine, theirs = one.data[known], other[known]
    if torch.equal(mine, theirs):
        return 0.0
    if not inexact(mine):
        return float((mine != theirs).any())
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    apart = (mine.to(_wide(mine)) - theirs.to(_wide(mine))).abs()[~same]
    if not apart.numel():
        return 0.0
    scale, largest = _largest(one.data), float(apart.max())
    return largest / scale if scale else float("inf")


def inexact(tensor: Tensor) -> bool:
    """Tell whether the entries are numbers that may be rounded, and no whole ones or booleans."""
    return tensor.is_floating_point() or tensor.is_complex()


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude of the finite entries; of whole numbers 1."""
    if not inexact(tensor):
        return 1.0
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def first_difference(one: Timed, other: Tensor, until: int, share: float) -> int | None:
    """Return the first timestep at which two outputs differ by more than a share of the largest entry, or None."""
    if one.data.shape != other.shape:
        return None
    apart = (one.data.to(_wide(one.data)) - other.to(_wide(one.data))).abs()
    differs = (apart > share * _largest(one.data)) & (one.when <= until)
    return int(one.when.expand(differs.shape)[differs].min()) if bool(differs.any()) else None
