"""Where rows and timesteps lie in the inputs and outputs of a sequence module: padded, unbatched or packed."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradwatch.timesteps.adjoint import square


class Layout(Protocol):
    """Takes apart the inputs, outputs and states of a sequence module, as the user's tensors are."""

    single: bool
    """Whether the call is one timestep: its tensors have no dimension of time."""
    batched: bool
    """Whether there is a dimension of rows."""
    steps: int
    count: int
    """How many rows there are."""
    rows: int
    """How many of them are looked at closely."""
    whole: bool
    """Whether these are all."""
    lengths: list[int] | None
    """Of those rows, as far as the module ran; None: all timesteps."""

    def take(self, tensor: Tensor) -> Tensor:
        """Copy the rows that are looked at, (T, rows, features)."""
        ...

    def state(self, tensor: Tensor) -> Tensor:
        """Copy those rows of a state of shape (layers x directions, B, features), of a cell (B, features)."""
        ...

    def every(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sums of squares over the features, (T, B), and the lengths of the rows, (B,); None: all T."""
        ...

    def laid(self, tensor: Tensor) -> Tensor:
        """Lay a tensor out as timesteps, rows and features, (T, B, features); packed ones as (all, features)."""
        ...

    def placed(self, values: Tensor) -> Tensor:
        """Take what `laid` lays out without its features, as (T, B), zero beyond the ends of rows."""
        ...

    def inner(self, features: int) -> tuple[int, ...]:
        """Return the shape that torch's recurrent kernels lay out between two layers."""
        ...

    def from_inner(self, tensor: Tensor) -> Tensor:
        """Take the rows that are looked at from a tensor of that shape, (T, rows, features)."""
        ...

    def chosen(self, tensor: Tensor) -> Tensor:
        """Take the rows that are looked at from (..., B), in the order of `every`."""
        ...


def layout_of(value: Tensor | PackedSequence, time: int | None, rows: int | None = None) -> Layout:
    """Return where rows and timesteps lie in what enters a sequence module.

    Args:
        value: the input: padded, unbatched or packed. A tensor of two dimensions of which time is the second is rows
            and timesteps without features; else it is timesteps and features of one row.
        time: its dimension of time; None: the call is one timestep. Of a packed sequence it is known.
        rows: how many are looked at closely; None: all.

    Raises:
        IndexError: the tensor has no such dimension.

    """
    if isinstance(value, PackedSequence):
        return Packed(value, rows)
    if time is None:
        return Padded(torch.Size((1, *value.shape)), 0, rows, batched=value.dim() > 1, single=True)
    if not -value.dim() <= time < value.dim():
        raise IndexError(f"time must be a dimension of the input of shape {tuple(value.shape)}, got {time}")
    time %= value.dim()
    return Padded(value.shape, time, rows, batched=value.dim() > 2 or time == 1)


def spaced(count: int, wanted: int | None) -> list[int]:
    """Choose `wanted` numbers below `count`, evenly spaced; None: all."""
    if wanted is None or count <= wanted:
        return list(range(count))
    return [round(k * (count - 1) / max(wanted - 1, 1)) for k in range(wanted)]


def blank_of(layout: Layout, tensor: Tensor) -> Tensor:
    """Tell which timesteps of which rows are all zeros, (T, B), as padding is; those beyond a packed row's end are."""
    return layout.placed(layout.laid(tensor).any(-1)) == 0


class Padded:
    """A tensor with a dimension of time and one of rows, or none of rows."""

    def __init__(
        self, shape: torch.Size, time: int, wanted: int | None, *, batched: bool, single: bool = False
    ) -> None:
        """Take the shape of the input.

        Args:
            shape: of the input; of a single timestep with a dimension of time in front.
            time: which dimension that is.
            wanted: how many rows may be looked at; None: all.
            batched: whether there is a dimension of rows.
            single: whether the tensors lack the dimension of time.

        """
        self.single, self.batched = single, batched
        self.lengths: list[int] | None = None
        self._time, self._batch = time, (1 - min(time, 1) if batched else None)
        self.steps = shape[time]
        self.count = shape[self._batch] if self._batch is not None else 1
        self._chosen = spaced(self.count, wanted)
        self.rows = len(self._chosen)
        self.whole = self.rows == self.count

    def take(self, tensor: Tensor) -> Tensor:
        """Copy the rows that are looked at, (T, rows, features)."""
        tensor = self._completed(tensor)
        if self._batch is None:
            return tensor.movedim(self._time, 0).flatten(1).unsqueeze(1).clone()
        return self._pick(tensor, self._batch).movedim((self._time, self._batch), (0, 1)).flatten(2).clone()

    def state(self, tensor: Tensor) -> Tensor:
        """Copy those rows of a state of shape (layers x directions, B, features), of a cell (B, features)."""
        tensor = tensor.detach().unsqueeze(0) if self.single else tensor.detach()
        return tensor.unsqueeze(1).clone() if self._batch is None else self._pick(tensor, 1).clone()

    def every(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sums of squares over the features of all rows, (T, B)."""
        laid = self.laid(tensor)
        if not len(laid):
            return laid.new_zeros((0, laid.shape[1])), None
        # In pieces that stay in the cache once they are float64: of time, or of rows where time is what lies together.
        along = int(laid.stride(0) == 1 and laid.shape[1] > 1)
        piece = max(2**16 // max(laid.numel() // laid.shape[along], 1), 1)
        return torch.cat([square(part) for part in torch.split(laid, piece, along)], along), None

    def laid(self, tensor: Tensor) -> Tensor:
        """Lay a tensor out as timesteps, rows and features, (T, B, features)."""
        tensor = self._completed(tensor)
        if self._batch is None:
            return tensor.movedim(self._time, 0).flatten(1).unsqueeze(1)
        return tensor.movedim((self._time, self._batch), (0, 1)).flatten(2)

    def placed(self, values: Tensor) -> Tensor:
        """Take what `laid` lays out without its features, as (T, B)."""
        return values

    def inner(self, features: int) -> tuple[int, ...]:
        """Return the shape that torch's recurrent kernels lay out between two layers."""
        return self.steps, self.count, features

    def from_inner(self, tensor: Tensor) -> Tensor:
        """Take the rows that are looked at from a tensor of that shape, (T, rows, features)."""
        return self._pick(tensor, 1)

    def chosen(self, tensor: Tensor) -> Tensor:
        """Take the rows that are looked at from (..., B), in the order of `every`."""
        return self._pick(tensor, -1)

    def _completed(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the dimension that it lacks: time of a single timestep, or features."""
        tensor = tensor.detach()
        if self.single:
            tensor = tensor.unsqueeze(0)
        return tensor.unsqueeze(-1) if tensor.dim() < (2 if self._batch is None else 3) else tensor

    def _pick(self, tensor: Tensor, dimension: int) -> Tensor:
        if self.whole:
            return tensor
        return tensor.index_select(dimension, torch.tensor(self._chosen, device=tensor.device))


class Packed:
    """The data of a PackedSequence: rows in the order of their lengths, longest first."""

    def __init__(self, packed: PackedSequence, wanted: int | None) -> None:
        """Read the batch sizes, which are always on the CPU; `wanted` as for `Padded`."""
        self.single, self.batched = False, True
        sizes: list[int] = packed.batch_sizes.tolist()
        self.steps = len(sizes)
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        every = [0] * sizes[0]
        for size in sizes:
            for row in range(size):
                every[row] += 1
        chosen = spaced(sizes[0], wanted)
        self.count, self.rows = sizes[0], len(chosen)
        self.whole = self.rows == self.count
        self.lengths: list[int] | None = [every[row] for row in chosen]
        device = packed.data.device
        self._index = torch.tensor(
            [[offsets[t] + row if t < every[row] else 0 for row in chosen] for t in range(self.steps)], device=device
        )
        self._there = torch.tensor([[t < every[row] for row in chosen] for t in range(self.steps)], device=device)
        places = torch.tensor(chosen, device=device)
        self._sorted = places
        self._places = places if packed.sorted_indices is None else packed.sorted_indices[places]
        self._every = torch.tensor(every, device=device)
        self._time = torch.repeat_interleave(torch.arange(self.steps, device="cpu"), packed.batch_sizes).to(device)
        self._row = torch.cat([torch.arange(size, device="cpu") for size in sizes]).to(device)

    def take(self, tensor: Tensor) -> Tensor:
        """Copy the rows that are looked at, (T, rows, features), zero beyond their ends."""
        return tensor.detach()[self._index] * self._there.unsqueeze(-1)

    def state(self, tensor: Tensor) -> Tensor:
        """Copy those rows of a state of shape (layers x directions, B, features), in the user's order."""
        return tensor.detach().index_select(1, self._places)

    def every(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sums of squares over the features, (T, B), and the lengths of the rows, (B,)."""
        return self.placed(square(tensor.detach())), self._every

    def laid(self, tensor: Tensor) -> Tensor:
        """Lay a tensor out as timesteps of any row and features, (all timesteps, features)."""
        return tensor.detach().flatten(1)

    def placed(self, values: Tensor) -> Tensor:
        """Take what `laid` lays out without its features, as (T, B), zero beyond the ends of rows."""
        found = values.new_zeros((self.steps, len(self._every)))
        found[self._time, self._row] = values
        return found

    def inner(self, features: int) -> tuple[int, ...]:
        """Return the shape that torch's recurrent kernels lay out between two layers."""
        return len(self._row), features

    def from_inner(self, tensor: Tensor) -> Tensor:
        """Take the rows that are looked at from a tensor of that shape, (T, rows, features)."""
        return self.take(tensor)

    def chosen(self, tensor: Tensor) -> Tensor:
        """Take the rows that are looked at from (..., B), in the order of `every`."""
        return tensor.index_select(-1, self._sorted)
