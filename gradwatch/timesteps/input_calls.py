"""Inputs of a sequence module, as parts of tensors to differentiate by -> gains by lag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.nested import data_of
from gradwatch.timesteps.layout import Layout, blank_of, layout_of
from gradwatch.timesteps.padding import equal_to_last, may_be_padded, padding_of

Root = tuple[int, int]
"""A tensor by which a derivative is taken: its `id` and its version."""


class _View(NamedTuple):
    """Where the entries of a tensor lie in the storage of its base."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


Place = tuple[Root, _View | None]
"""What to differentiate by for an input, and which part of that it is; None: all."""


class Roots:
    """The tensors by which derivatives are taken, each at the version at which it was an input."""

    def __init__(self) -> None:
        """Begin with none."""
        self._edges: dict[Root, tuple[Tensor, GradientEdge]] = {}

    def add(self, tensor: Tensor) -> Place:
        """Return what to differentiate by for an input, and which part of that it is; None: all.

        A view counts as the part of its base that it is: what else uses the base (a skip connection beside a transposed
        input) counts too.
        """
        base = tensor._base
        root, view = tensor, None
        if base is not None and base.requires_grad and not base.is_leaf and base.dtype is tensor.dtype:  # noqa: SIM102
            if _apart(tensor) and _apart(base):
                offset = int(tensor.storage_offset()) - int(base.storage_offset())
                root, view = base, _View(tensor.shape, tensor.stride(), offset)
        key = (id(root), root._version)
        if (
            key not in self._edges
        ):  # the edge, because the tensor itself may be edited in place before the model is done
            self._edges[key] = root, get_gradient_edge(root)
        return key, view

    def value(self, key: Root) -> Tensor | None:
        """Return such a tensor; None where it was edited since."""
        tensor, _ = self._edges[key]
        return tensor.detach() if tensor._version == key[1] else None

    def gradients(
        self, output: Tensor, cotangent: Tensor, keys: Sequence[Root], *, again: bool = False
    ) -> dict[Root, Tensor | None]:
        """Return the derivatives, laid out in storage as the tensors are; None: the output does not depend on it.

        Args:
            output: what is differentiated.
            cotangent: the direction.
            keys: by what.
            again: whether this will be asked once more.

        """
        if not keys:  # which torch refuses before 2.7
            return {}
        edges = [self._edges[key][1] for key in keys]
        found = torch.autograd.grad([output], edges, [cotangent], allow_unused=True, retain_graph=again)
        with torch.no_grad():
            return {key: _laid_out_as(g, self._edges[key][0]) for key, g in zip(keys, found, strict=True)}


@dataclass
class InputCall:
    """One call of the sequence module: where its rows and timesteps are."""

    layout: Layout
    root: Root
    view: _View | None
    shape: torch.Size
    time: int | None
    """The dimension of time; None: the call is one timestep."""
    packed: PackedSequence | None
    blank: Tensor
    """(T, B): whether the input is exactly zero there, as padding is."""
    same: Tensor | None = None
    """(T, B): whether it belongs to a run of equal timesteps at its row's end, as padding does; None where no row has
    one, or the call is one timestep, or packed."""
    given: Tensor | None = None
    """The input as the caller of the model gave it, whatever that edits; None where it is not his."""
    begins: bool = False
    """Whether it begins a sequence of its own, and does not go on with the state of the call before."""

    @classmethod
    def of(
        cls, value: Tensor | PackedSequence, time: int | None, place: Place, shape: torch.Size | None = None
    ) -> InputCall:
        """Describe a call.

        Args:
            value: its input.
            time: its dimension of time; None: the call is one timestep. Of a packed sequence it is known.
            place: what to differentiate by.
            shape: of the input, where `value` only tells which timesteps are zero or equal.

        Raises:
            IndexError: the input has no such dimension.

        """
        tensor = data_of(value)
        layout = layout_of(value, time, rows=1)
        root, view = place
        packed = value if isinstance(value, PackedSequence) else None
        time = time % tensor.dim() if time is not None and packed is None else time
        blank, same = blank_of(layout, tensor), None
        if packed is None and not layout.single and layout.batched:
            by_time = tensor.detach().movedim((time or 0, 1 - min(time or 0, 1)), (0, 1)).unsqueeze(-1)
            same = equal_to_last(by_time) if may_be_padded(by_time) else None
        return cls(layout, root, view, tensor.shape if shape is None else shape, time, packed, blank, same)

    @property
    def batched(self) -> bool:
        """Whether the input has a dimension of rows."""
        return self.layout.batched

    def squares(self, gradients: Mapping[Root, Tensor | None]) -> Tensor:
        """Return the sums over features of the squares of the input's gradient, (T, B)."""
        gradient = gradients[self.root]
        if gradient is None:
            return torch.zeros_like(self.blank, dtype=torch.float64)
        return self.layout.every(self._part(gradient))[0]

    def value(self, roots: Roots) -> Tensor | None:
        """Return the input as `Layout.laid` does; None where it was edited since."""
        if self.given is not None:
            value: Tensor | None = self.given
        else:
            whole = roots.value(self.root)
            value = None if whole is None else self._part(whole)
        return None if value is None else self.layout.laid(value).double()

    def contributions(self, gradients: Mapping[Root, Tensor | None], deviation: Tensor) -> Tensor:
        """Return the sums over features of the input's gradient times what `deviation` has for it, (T, B)."""
        gradient = gradients[self.root]
        if gradient is None:
            return torch.zeros_like(self.blank, dtype=torch.float64)
        return self.layout.placed((self.layout.laid(self._part(gradient)) * deviation).sum(-1))

    def _part(self, tensor: Tensor) -> Tensor:
        """Return what the input is of what is differentiated by, or of its gradient."""
        if self.view is not None:
            offset = tensor.storage_offset() + self.view.offset
            tensor = tensor.as_strided(self.view.shape, self.view.stride, offset)
        return tensor.reshape(self.shape)


@dataclass
class InputSequence:
    """Calls that follow each other in time."""

    calls: list[InputCall] = field(default_factory=list)
    lengths: Tensor | None = None
    """Of its rows, (B,), where they are known; None: to be found out."""

    @property
    def steps(self) -> int:
        """How many timesteps it has."""
        return sum(call.layout.steps for call in self.calls)

    @property
    def rows(self) -> int:
        """How many rows, where most are."""
        return max(call.blank.shape[1] for call in self.calls)

    @property
    def packed(self) -> PackedSequence | None:
        """The packed sequence that it is; None where it is none."""
        return self.calls[0].packed

    def full(self) -> Tensor:
        """Return how many timesteps of each row are not zeros at its end, (B,), where zeros can be padding.

        They can where some row goes on to the end, as in a batch that is padded to its longest row; else all count.
        """
        blank = _stacked([call.blank for call in self.calls])
        on = ~blank[-1]
        if bool(on.all()) or not bool(on.any()):
            return torch.full_like(on, len(blank), dtype=torch.int64)
        return _ends(~blank)

    def padding(self, squares: Tensor) -> Tensor:
        """Return what `padding_of` does of squared norms, (2,); zeros where it came in several calls, or has none."""
        same = self.calls[0].same if len(self.calls) == 1 else None
        if same is None:
            return torch.zeros(2, dtype=torch.float64, device=self.calls[0].blank.device)
        return padding_of(same, squares)

    def contributions(self, gradients: Mapping[Root, Tensor | None], roots: Roots) -> Tensor | None:
        """Return what each timestep adds to the output, to first order, (T, B).

        That is the derivative times how far the input lies from its mean over all rows and timesteps. None where the
        input was edited since.
        """
        values = [value for call in self.calls if (value := call.value(roots)) is not None]
        if len(values) < len(self.calls):
            return None
        entries = sum(value[..., 0].numel() for value in values)
        mean = torch.stack([value.flatten(0, -2).sum(0) for value in values]).sum(0) / max(entries, 1)
        pairs = zip(self.calls, values, strict=True)
        return _stacked([call.contributions(gradients, value - mean) for call, value in pairs])

    def squares(self, gradients: Mapping[Root, Tensor | None], lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the squared norms of the gradient, (T, B), and how long each row is, (B,).

        Args:
            gradients: see `Roots.gradients`.
            lengths: of the rows; None: a row ends with the last timestep that is not zero or has a gradient.

        """
        squares = [call.squares(gradients) for call in self.calls]
        if self.packed is not None:
            return squares[0], packed_lengths(self.packed).to(squares[0].device)
        every, lengths = _stacked(squares), self.lengths if lengths is None else lengths
        if lengths is None:
            lengths = _ends(~_stacked([call.blank for call in self.calls]) | (every != 0))
        return every, lengths


def packed_lengths(packed: PackedSequence) -> Tensor:
    """Return the lengths of packed rows, longest first, on the CPU."""
    rows = torch.arange(int(packed.batch_sizes[0]), device="cpu").unsqueeze(1)
    return (packed.batch_sizes.unsqueeze(0) > rows).sum(1)


def _apart(tensor: Tensor) -> bool:
    """Tell whether no two entries of a tensor are the same place in storage."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach += stride * (size - 1)
    return True


def _laid_out_as(gradient: Tensor | None, root: Tensor) -> Tensor | None:
    """Lay a gradient out in storage as its tensor is, so that a view of the one is a view of the other."""
    if gradient is None or gradient.stride() == root.stride() or not _apart(root):
        return gradient
    return torch.empty_strided(root.shape, root.stride(), dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Put (T, B) next to each other in time; in a loop, rows that end before others are blank or zero from there on."""
    if len(parts) == 1:
        return parts[0]
    most = max(part.shape[1] for part in parts)
    blank = parts[0].dtype is torch.bool
    return torch.cat([nn.functional.pad(part, (0, most - part.shape[1]), value=float(blank)) for part in parts])


def _ends(alive: Tensor) -> Tensor:
    """Return for each row of (T, B) how many timesteps there are up to the last that is alive; all where none is."""
    steps = len(alive)
    order = torch.arange(1, steps + 1, device=alive.device).unsqueeze(1)
    ends = (alive * order).amax(0)
    return torch.where(ends == 0, steps, ends)
