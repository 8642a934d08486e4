"""The dimensions of a tensor, as parts of those of an input that it was made of, and what operations make of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Where the entries along a dimension of some tensor lie along one dimension of an input of the model."""

    dim: int
    """The input's dimension."""
    size: int
    step: int = 1
    """Entries of the input's dimension from one to the next."""
    period: int | None = None
    """In a flat window, after how many entries of the input's dimension it begins anew; None: it does not."""

    def split(self, outer: int) -> tuple[Axis, Axis]:
        """Return what a dimension becomes that is reshaped into two, the first of this size."""
        inner = self.size // outer
        return (
            dataclasses.replace(self, size=outer, step=self.step * inner),
            dataclasses.replace(self, size=inner, period=self.step * inner),
        )


Labels = tuple[tuple[Axis | int, ...], ...]
"""Of each dimension, the axes that it is made of, outermost first; a number is the size of what is no axis."""


_LIKE_VIEWS = frozenset({"reshape", "view", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "_unsafe_view"})
_SIDES = {f"{name}{n}d": n for n in (1, 2, 3) for name in ("conv", "conv_transpose", "max_pool", "avg_pool", "lp_pool")}
"""Along how many dimensions, the last ones, convolutions and pools go."""
_CONVOLUTIONS = frozenset(name for name in _SIDES if name.startswith("conv"))
_POOLS = frozenset(_SIDES) - _CONVOLUTIONS
_IN_ORDER = frozenset({"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "diff", "flip", "roll"})
_AFTER_A_NUMBER = frozenset({"diff", "roll"})
"""Those whose dimension comes after how many times, or how far."""
_SPECTRA = frozenset({"fft_rfft", "fft_fft", "rfft", "fft"})
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_LONGER = frozenset({"pad", "cat", "concat", "concatenate"})
ENTRIES = frozenset({"__getitem__", "select", "unbind"})
_SLICES = frozenset({"__getitem__", "narrow", "split", "chunk", "tensor_split"})
TELLING = (
    _CONVOLUTIONS
    | _POOLS
    | _IN_ORDER
    | _SPECTRA
    | {
        "multi_head_attention_forward",
        "_pack_padded_sequence",
        "unfold",
    }
)
"""Operations that tell what the dimensions of an input are."""
_LINEAR = frozenset({"linear", "matmul", "__matmul__", "bmm", "mm"})
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "max", "min", "norm", "logsumexp", "std", "var", "prod"})


@dataclass(slots=True)
class Operation:
    """An operation on a tensor whose dimensions are known; there is one for most of what a model computes."""

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    tensor: Tensor
    given: Labels
    """Of the tensor."""

    def _argument(self, at: int, name: str, default: Any = None) -> Any:  # noqa: ANN401
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    @property
    def _first(self) -> bool:
        """Whether the tensor is what is worked on, and no weight."""
        return self._argument(0, "input") is self.tensor

    def ordered(self) -> Iterator[tuple[int, str]]:
        """Yield the dimensions along which order matters to it, each with what it does."""
        if not self._first:
            return
        if _SIDES.get(self.name) == 1 and self._kernel()[0] > 1:
            yield -1, f"a {'convolution' if self.name in _CONVOLUTIONS else 'window'} slides"
        elif self.name in _IN_ORDER:
            at = 2 if self.name in _AFTER_A_NUMBER else 1
            dims = self._argument(at, "dim", self._argument(at, "dims", () if self.name == "roll" else -1))
            for dim in dims if isinstance(dims, tuple | list) else [dims]:
                yield dim, f"{self.name} goes"
        elif self.name in _SPECTRA:
            yield self._argument(2, "dim", -1), "a Fourier transform goes"
        elif self.name == "_pack_padded_sequence":
            yield int(self._argument(2, "batch_first", False)), "rows are packed"

    def slides(self, result: Tensor) -> Iterator[tuple[int, bool]]:
        """Yield the dimensions along which it slides, of several, each with whether one entry is left.

        A picture's convolution slides along all of its sides, so that this tells less than `ordered`.
        """
        sides = _SIDES.get(self.name, 1)
        if sides > 1 and self._first and result.dim() == self.tensor.dim():
            for side, size in zip(range(-sides, 0), self._kernel(), strict=True):
                if size > 1 and self.tensor.shape[side] > 1:
                    yield side, result.shape[side] == 1

    def _kernel(self) -> tuple[int, ...]:
        """Return the sizes of a convolution's or a pool's kernel."""
        sides = _SIDES[self.name]
        if self.name in _CONVOLUTIONS:
            return tuple(self._argument(1, "weight").shape[-sides:])
        return _numbers(self._argument(1, "kernel_size", 1), sides)

    @property
    def _convolves_rows(self) -> bool:
        """Whether it is a convolution of rows, features and sides, in that order."""
        return self._first and self.name in _CONVOLUTIONS and self.tensor.dim() == _SIDES[self.name] + 2

    def rows(self) -> Iterator[int]:
        """Yield the dimensions that it takes for the batch."""
        if self.name == "multi_head_attention_forward" and self.tensor.dim() == 3:
            yield 1
        elif self._convolves_rows:
            yield 0
        elif self._first and self.name == "_pack_padded_sequence":
            yield 1 - int(self._argument(2, "batch_first", False))

    def channels(self) -> Iterator[int]:
        """Yield the dimension that it takes for features: order along it does not matter."""
        if self._convolves_rows:
            yield 1

    def taken(self, result: Tensor) -> tuple[Axis, int] | None:
        """Return the axis of which it has taken a single entry, and where that lies in storage; None: of none."""
        if self.name not in ENTRIES or result.dim() != self.tensor.dim() - 1 or not self._views(result):
            return None
        left = [stride for size, stride in zip(result.shape, result.stride(), strict=True) if size > 1]
        every = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        gone = [at for at, (size, stride) in enumerate(every) if size > 1 and stride not in left]
        axis = axis_along(self.given, gone[0]) if len(gone) == 1 else None
        return None if axis is None else (axis, int(result.storage_offset()))

    def tail(self, result: Tensor) -> Axis | None:
        """Return the axis of which it has left only the last entries, several; None where it has not."""
        if self.name != "__getitem__" or result.stride() != self.tensor.stride() or not self._views(result):
            return None
        kept = zip(self.tensor.shape, result.shape, self.tensor.stride(), strict=True)
        cut = [(at, (size - left) * step) for at, (size, left, step) in enumerate(kept) if 1 < left < size]
        begins = int(result.storage_offset()) - int(self.tensor.storage_offset())
        return axis_along(self.given, cut[0][0]) if len(cut) == 1 and cut[0][1] == begins else None

    def _views(self, result: Tensor) -> bool:
        return result is not self.tensor and (
            result._base is self.tensor or (result._base is not None and result._base is self.tensor._base)
        )

    def labels(self, result: Tensor) -> Labels | None:  # noqa: PLR0911  (one line for each family of operations)
        """Return the labels of what it gave; None where they are not known."""
        if self.name in _LIKE_VIEWS:
            return _regrouped(self.given, result.shape)
        if self.name in _SIDES:
            return self._convolved(result)
        if self.name == "embedding":
            return (*self.given, (result.shape[-1],))
        if self.name in _RECURRENT:
            return (*self.given[:-1], (result.shape[-1],)) if result.shape[:-1] == self.tensor.shape[:-1] else None
        if self.name in _LINEAR:
            return self._multiplied(result)
        if self.name == "stack":
            at = self._argument(1, "dim", 0) % result.dim()
            return (*self.given[:at], (result.shape[at],), *self.given[at:])
        return self._by_shape(result)

    def _by_shape(self, result: Tensor) -> Labels | None:
        if self.name in _REDUCTIONS and result.dim() < self.tensor.dim():
            return self._reduced(result)
        if result.shape == self.tensor.shape and result.stride() == self.tensor.stride():
            return self.given
        if self._views(result):
            return self._viewed(result)
        if self.name in _LONGER and result.dim() == self.tensor.dim():
            pairs = zip(self.given, result.shape, strict=True)
            return tuple(_resized(group, size) for group, size in pairs)
        return self._broadcast(result)

    def _convolved(self, result: Tensor) -> Labels | None:
        if not self._first or result.dim() != self.tensor.dim():
            return None
        sides = _SIDES[self.name]
        if self.name in _POOLS:
            strides = _numbers(self._argument(2, "stride") or self._argument(1, "kernel_size", 1), sides)
            before: Labels = self.given[:-sides]
        else:
            strides = (1,) * sides if "transpose" in self.name else _numbers(self._argument(3, "stride", 1), sides)
            before = (*self.given[: -sides - 1], (result.shape[-sides - 1],))
        along = zip(self.given[-sides:], result.shape[-sides:], strides, strict=True)
        return (*before, *(_resized(group, size, stride) for group, size, stride in along))

    def _multiplied(self, result: Tensor) -> Labels | None:
        if self._first and result.dim() == self.tensor.dim():
            return (*self.given[:-1], (result.shape[-1],))
        if not self._first and result.dim() >= self.tensor.dim() > 1 and self.name != "linear":
            before = ((size,) for size in result.shape[: result.dim() - self.tensor.dim()])
            return (*before, *self.given[:-2], (result.shape[-2],), self.given[-1])
        return None

    def _reduced(self, result: Tensor) -> Labels | None:
        dims = self._argument(1, "dim")
        gone = {d % self.tensor.dim() for d in (dims if isinstance(dims, tuple | list) else [dims])}
        left = tuple(group for at, group in enumerate(self.given) if at not in gone)
        return left if len(left) == result.dim() else None

    def _viewed(self, result: Tensor) -> Labels:
        """Return the labels of a view: an entry's stride tells which dimension it comes from."""
        found: list[tuple[Axis | int, ...]] = []
        same = self.name in _SLICES and result.stride() == self.tensor.stride()
        for at, (size, stride) in enumerate(zip(result.shape, result.stride(), strict=True)):
            from_ = at if same else _source(self.tensor, size, stride)
            if from_ is None:
                found.append((size,))
            elif size == self.tensor.shape[from_] and stride == self.tensor.stride(from_):
                found.append(self.given[from_])
            else:
                steps = stride // max(self.tensor.stride(from_), 1)
                found.append(_resized(self.given[from_], size, steps))
        return tuple(found)

    def _broadcast(self, result: Tensor) -> Labels | None:
        """Return the labels of what works entry by entry, as nearly everything does that keeps a shape."""
        before = result.dim() - self.tensor.dim()
        if before < 0 or any(
            mine not in (1, theirs) for mine, theirs in zip(self.tensor.shape, result.shape[before:], strict=True)
        ):
            return None
        kept = zip(self.given, self.tensor.shape, result.shape[before:], strict=True)
        return (
            *((size,) for size in result.shape[:before]),
            *(group if mine == theirs else (theirs,) for group, mine, theirs in kept),
        )


def _numbers(value: Any, count: int) -> tuple[int, ...]:  # noqa: ANN401  (an int, or a sequence of one or of so many)
    given = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)
    return tuple(int(one) for one in (given * count if len(given) == 1 else given))


def _source(tensor: Tensor, size: int, stride: int) -> int | None:
    """Return the dimension of a tensor that one of a view of it comes from; None where it is none, or several."""
    inside = [
        (theirs, at)
        for at, (count, theirs) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        if count > 1 and 0 < theirs <= stride and stride % theirs == 0 and (size - 1) * (stride // theirs) < count
    ]
    return max(inside)[1] if inside and size > 1 else None


def axis_along(labels: Labels, dim: int) -> Axis | None:
    """Return the axis along a dimension; None where it is none, or several."""
    if not -len(labels) <= dim < len(labels):
        return None
    group = labels[dim]
    return group[0] if len(group) == 1 and isinstance(group[0], Axis) else None


def axes_of(labels: Labels) -> list[Axis | None]:
    """Return the axis along each dimension, as `axis_along` does."""
    return [axis_along(labels, dim) for dim in range(len(labels))]


def _resized(group: tuple[Axis | int, ...], size: int, steps: int = 1) -> tuple[Axis | int, ...]:
    """Return what a dimension becomes of which only some entries are left, or to which some were added."""
    if len(group) == 1 and isinstance(group[0], Axis):
        return (dataclasses.replace(group[0], size=size, step=group[0].step * steps),)
    return group if math.prod(map(_size, group)) == size and steps == 1 else (size,)


def _size(part: Axis | int) -> int:
    return part.size if isinstance(part, Axis) else part


def _regrouped(labels: Labels, shape: Iterable[int]) -> Labels | None:
    """Return the labels of what was reshaped; None where dimensions were cut across."""
    left = [part for group in labels for part in group if _size(part) != 1][::-1]
    found: list[tuple[Axis | int, ...]] = []
    for size in shape:
        group: list[Axis | int] = []
        missing = size
        while missing > 1:
            if not left:
                return None
            part = left.pop()
            if missing % _size(part) == 0:
                group.append(part)
                missing //= _size(part)
            elif _size(part) % missing == 0:
                outer, inner = part.split(missing) if isinstance(part, Axis) else (missing, part // missing)
                group.append(outer)
                left.append(inner)
                missing = 1
            else:
                return None
        found.append(_joined(group) or (size,))
    return tuple(found)


def _joined(group: Sequence[Axis | int]) -> tuple[Axis | int, ...]:
    """Put together again what was split before."""
    found: list[Axis | int] = []
    for part in group:
        last = found[-1] if found else None
        if (
            isinstance(last, Axis)
            and isinstance(part, Axis)
            and last.dim == part.dim
            and part.period == last.step == part.size * part.step
        ):
            found[-1] = Axis(last.dim, last.size * part.size, part.step, last.period)
        else:
            found.append(part)
    return tuple(found)
