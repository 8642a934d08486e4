"""The adjoint recurrences of RNN, LSTM and GRU, by hand, over states that a fused kernel went through.

Everything here is laid out (time, rows, features), runs forward in time (a reverse direction is flipped before), and
takes padding at the end of a row for what it is: no gradient is injected there, so none arises. Formulas: the backward
pass of the equations in the documentation of torch.nn.RNN, torch.nn.LSTM and torch.nn.GRU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from gradwatch.values.thresholds import OUTER_SHARE

Carry = TypeVar("Carry", Tensor, Tensor | None)

_CHUNK = 64
"""Timesteps whose intermediate results are held at once: enough for one product of matrices to pay, and few bytes."""
_SATURATED = 1 - 2 * OUTER_SHARE
"""|tanh| from which an output lies in the outer 1 % of its range."""


def saturation(outputs: Tensor) -> Tensor:
    """Return the share of a tanh's outputs that lie in the outer 1 % of its range."""
    return (outputs.abs() > _SATURATED).double().mean()


def _saturated(sigmoids: Sequence[Tensor], tanhs: Sequence[Tensor]) -> Tensor:
    """Return the share of the entries of all of them that are in the outer 1 % of their range."""
    of_gates = [((s - 0.5).abs() > 0.5 - OUTER_SHARE).double().mean() for s in sigmoids]
    return torch.stack(of_gates + [saturation(t) for t in tanhs]).mean()


class LayerWeights(NamedTuple):
    """The weights of one layer and direction, as torch names and shapes them."""

    ih: Tensor
    """From the input, (gates x hidden, inputs)."""
    hh: Tensor
    """From the hidden state, (gates x hidden, width)."""
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    hr: Tensor | None = None
    """The projection of the hidden state, (width, hidden)."""


@dataclass
class Cell(ABC):
    """One layer and direction: its weights, and the inputs and states that it went through."""

    x: Tensor
    """(T, R, inputs)"""
    before: Tensor
    """The hidden state that each timestep began with, (T, R, width)."""
    weights: LayerWeights
    kept: Tensor | None = field(default=None, init=False)
    """After `run`: the share of the old state that a gate kept, (T, R, hidden); None where no gate does."""
    flat: Tensor | None = field(default=None, init=False)
    """After `run`: the share of gates and candidates, or of states, in the outer 1 % of their range; None where none
    has an end."""
    through: Tensor | None = field(default=None, init=False)
    """After `run`: the derivative of h' by c', (T, R, hidden); None where there is no cell state."""
    let_in: Tensor | None = field(default=None, init=False)
    """After `run`: the mean share of what is new that a gate let into the cell; None where no gate does."""
    saturated: Tensor | None = field(default=None, init=False)
    """After `run`: the share of cell states whose tanh is saturated; None where there is no cell state."""

    @abstractmethod
    def run(self, c0: Tensor | None) -> Tensor:
        """Recompute the hidden states, (T, R, width), and keep what the way back needs.

        Args:
            c0: the cell state before the first timestep, (R, hidden); None where the kind has none.

        """

    @abstractmethod
    def back(self, t: int, dh: Tensor, dc: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go one timestep back.

        Args:
            t: the timestep.
            dh: total gradient of its hidden state, (S, R, width).
            dc: gradient of its cell state as it was carried from the future, (S, R, hidden); None where there is none.
            out: where the gradient of the pre-activations goes, as the input sees them, (S, R, gates x hidden).

        Returns:
            What is carried to the hidden state before, what to the cell state before, and the total of this cell state.

        """

    def _from_input(self) -> Tensor:
        return functional.linear(self.x, self.weights.ih, self.weights.b_ih)

    def _from_state(self) -> Tensor:
        return functional.linear(self.before, self.weights.hh, self.weights.b_hh)


@dataclass
class Rnn(Cell):
    """h' = f(W_ih x + b_ih + W_hh h + b_hh), f = tanh or relu."""

    relu: bool = False

    def run(self, c0: Tensor | None) -> Tensor:  # noqa: ARG002  (it has no cell state)
        """Recompute the hidden states; see `Cell.run`."""
        a = self._from_input() + self._from_state()
        h = a.relu() if self.relu else a.tanh()
        self.flat = None if self.relu else _saturated((), (h,))
        self._slope = (a > 0).to(a.dtype) if self.relu else 1 - h * h
        return h

    def back(self, t: int, dh: Tensor, dc: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go one timestep back; see `Cell.back`."""
        torch.mul(dh, self._slope[t], out=out)
        return out @ self.weights.hh, None, dc


class Gru(Cell):
    """r, z = sigmoid(...), n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h."""

    def run(self, c0: Tensor | None) -> Tensor:  # noqa: ARG002  (it has no cell state)
        """Recompute the hidden states; see `Cell.run`."""
        xr, xz, xn = self._from_input().chunk(3, -1)
        hr, hz, q = self._from_state().chunk(3, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * q).tanh()
        self._r, self._z, self.kept = r, z, z
        self.flat = _saturated((r, z), (n,))
        dn = (1 - z) * (1 - n * n)
        self._k = torch.stack([dn * q * r * (1 - r), (self.before - n) * z * (1 - z), dn], -2)
        return n + z * (self.before - n)

    def back(self, t: int, dh: Tensor, dc: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go one timestep back; see `Cell.back`."""
        parts = out.view(*out.shape[:-1], 3, -1)
        torch.mul(dh.unsqueeze(-2), self._k[t], out=parts)
        # The reset gate stands inside of n, on the side of h only.
        inner = torch.cat([out[..., : 2 * dh.shape[-1]], parts[..., 2, :] * self._r[t]], -1)
        return torch.addcmul(inner @ self.weights.hh, dh, self._z[t]), None, dc


class Lstm(Cell):
    """i, f, o = sigmoid(...), g = tanh(...), c' = f c + i g, h' = o tanh(c'), or W_hr of that."""

    def run(self, c0: Tensor | None) -> Tensor:
        """Recompute the hidden states; see `Cell.run`."""
        assert c0 is not None
        i, f, g, o = (self._from_input() + self._from_state()).chunk(4, -1)
        i, f, g, o = i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
        self._f, self.kept = f, f
        self.flat = _saturated((i, f, o), (g,))
        new = i * g
        cells = torch.empty_like(new)
        earlier = torch.empty_like(new)
        c = c0
        for t in range(len(new)):
            earlier[t] = c
            c = torch.addcmul(new[t], f[t], c, out=cells[t])
        squashed = cells.tanh_()
        self.let_in, self.saturated = i.mean(), saturation(squashed)
        self._k = torch.stack([g * i * (1 - i), earlier.mul_(f * (1 - f)), new.copy_(i * (1 - g * g))], -2)
        self._ko = squashed * o * (1 - o)
        self._through = self.through = o * (1 - squashed * squashed)
        h = squashed.mul_(o)
        return h if self.weights.hr is None else h @ self.weights.hr.T

    def back(self, t: int, dh: Tensor, dc: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go one timestep back; see `Cell.back`."""
        assert dc is not None
        inner = dh if self.weights.hr is None else dh @ self.weights.hr
        total = torch.addcmul(dc, inner, self._through[t])
        hidden = total.shape[-1]
        torch.mul(total.unsqueeze(-2), self._k[t], out=out.view(*out.shape[:-1], 4, hidden)[..., :3, :])
        torch.mul(inner, self._ko[t], out=out[..., 3 * hidden :])
        return out @ self.weights.hh, total * self._f[t], total


@dataclass
class Seam:
    """Where two calls were joined to one sequence: what autograd says of the state that was handed on."""

    h: Tensor | None
    """Total gradient of the hidden state, (R, width); None: none arrived."""
    c: Tensor | None
    """The same of the cell state, (R, hidden)."""
    joined: bool
    """Whether the graph goes on through it; detached, nothing flows."""


@dataclass
class Walk:
    """The gradients of one layer and direction. Squares are float64 and summed over features."""

    dx: Tensor
    """Gradients of the input, (T, S, R, inputs)."""
    hidden: Tensor
    """Squared norms of the total gradient of the hidden state, (S, T, R)."""
    direct: Tensor
    """Squared norms of what came not from later timesteps, of the first stream, (T, R)."""
    carried: Tensor
    """Squared norms of what each timestep handed back to the state before it, of the first stream, (T, R)."""
    state: Tensor
    """Squared norms of the gradient that each timestep's state had in all, of the first stream, (T, R)."""
    cell: Tensor | None = None
    """As `hidden`, of the cell state."""


def walk_back(
    cell: Cell,
    direct: Tensor,
    final_c: Tensor | None,
    ends: Mapping[int, Tensor],
    seams: Mapping[int, Seam],
) -> Walk:
    """Walk back through time with several streams of gradients at once: the training's, and the cotangents of lags.

    Args:
        cell: the layer and direction; it has run.
        direct: gradients of the outputs from outside of the recurrence, (T, S, R, width).
        final_c: gradient of the last cell state from outside, (S, R, hidden), for each row at its own end; None where
            the kind has no cell state.
        ends: which rows end with a timestep.
        seams: by the last timestep of a call.

    """
    steps, streams, rows, width = direct.shape
    chunk = min(_CHUNK, steps)

    def squares() -> Tensor:
        return direct.new_zeros((steps, streams, rows), dtype=torch.float64)

    def buffer(features: int) -> Tensor:
        return direct.new_empty((chunk, streams, rows, features))

    dx = direct.new_empty((steps, streams, rows, cell.weights.ih.shape[1]))
    hidden, outside, carried, state = squares(), squares(), squares(), squares()
    cell_state = _CellState(squares(), *(buffer(final_c.shape[-1]) for _ in range(3))) if final_c is not None else None
    total_h, carried_h, gates = buffer(width), buffer(width), buffer(cell.weights.ih.shape[0])
    carry_h = direct.new_zeros((streams, rows, width))
    carry_c = torch.zeros_like(final_c) if final_c is not None else None
    for stop in range(steps, 0, -_CHUNK):
        start = max(stop - _CHUNK, 0)
        for t in range(stop - 1, start - 1, -1):
            k = t - start
            seam = seams.get(t)
            carry_h, carry_c = _over(seam, carry_h), _over(seam, carry_c)
            carried_h[k] = carry_h
            if cell_state is not None and carry_c is not None:
                cell_state.carried[k] = carry_c
            carry_h, carry_c = _known(seam, carry_h, carry_c)
            carry_c = _ended(carry_c, final_c, ends.get(t))
            dh = torch.add(direct[t], carry_h, out=total_h[k])
            if cell_state is not None and carry_c is not None:
                cell_state.without_h[k] = carry_c
            carry_h, carry_c, dc = cell.back(t, dh, carry_c, gates[k])
            if cell_state is not None and dc is not None:
                cell_state.total[k] = dc
        size = stop - start
        dx[start:stop] = gates[:size] @ cell.weights.ih
        hidden[start:stop] = square(total_h[:size])
        outside[start:stop] = square(direct[start:stop])
        for t in seams.keys() & range(start, stop):  # what crossed and was not the next call's is used directly
            outside[t] = _difference(total_h[t - start], carried_h[t - start])
        carried[start:stop] = square(carried_h[:size])
        state[start:stop] = hidden[start:stop]
        if cell_state is not None:
            cell_state.squares[start:stop] = square(cell_state.total[:size])
            carried[start:stop] += square(cell_state.carried[:size])
            state[start:stop] += square(cell_state.without_h[:size])
    return Walk(
        dx,
        hidden.transpose(0, 1),
        outside[:, 0],
        carried[:, 0],
        state[:, 0],
        cell_state.squares.transpose(0, 1) if cell_state is not None else None,
    )


@dataclass
class _CellState:
    """What walking back keeps of the cell state: squares of all timesteps, and gradients of those of one chunk."""

    squares: Tensor
    """Squared norms of the total gradient, (T, S, R)."""
    total: Tensor
    """(chunk, S, R, hidden), as the two below."""
    carried: Tensor
    """What the timestep after handed back."""
    without_h: Tensor
    """The total but for what comes through the hidden state of the same timestep."""


def _over(seam: Seam | None, carry: Carry) -> Carry:
    """Return what crosses a seam of what the call after it hands back: nothing where it is detached."""
    return carry if seam is None or seam.joined or carry is None else torch.zeros_like(carry)


def _known(seam: Seam | None, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Replace the training's own stream at a seam by what autograd says; cotangents cross as they come."""
    if seam is None:
        return h, c
    return _replaced(h, seam.h), None if c is None else _replaced(c, seam.c)


def _replaced(carry: Tensor, first: Tensor | None) -> Tensor:
    """Return a carry with another first stream; None: of zeros."""
    return torch.cat([torch.zeros_like(carry[:1]) if first is None else first.unsqueeze(0), carry[1:]])


def _ended(carry: Tensor | None, final: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Add the gradient of the last cell state in the rows that end here."""
    if carry is None or final is None or rows is None:
        return carry
    return carry.index_add(1, rows, final[:, rows])


def _difference(total: Tensor, part: Tensor) -> Tensor:
    """Return the squares of total - part, zero where that is only rounding."""
    squares = square(total - part)
    return squares * (squares > square(total) * (64 * torch.finfo(total.dtype).eps) ** 2)


def square(tensor: Tensor) -> Tensor:
    """Sum the squares over the last dimension, in float64: float32 squares of vanished gradients are zero."""
    if tensor.dim() > 1 and tensor.stride(-1) > 1 and 1 in tensor.stride():  # as of channels before time: far faster so
        return tensor.double().square().sum(-1)
    squares: Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float64).square_()
    return squares


def flip(tensor: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn each row around in time, up to its own end. Its own inverse.

    Args:
        tensor: (T, R, ...).
        lengths: of the rows, (R,); None: all T.

    """
    if lengths is None:
        return tensor.flip(0)
    time = torch.arange(len(tensor), device=tensor.device).unsqueeze(1)
    index = torch.where(time < lengths, lengths - 1 - time, time)
    return tensor.gather(0, index.view(*index.shape, *[1] * (tensor.dim() - 2)).expand_as(tensor))


def by_lag(squares: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add up over rows, lag by lag from each row's own end.

    Args:
        squares: (T, R).
        lengths: as for `flip`.

    Returns:
        The sums and the number of rows that have this lag, both float64, (T,), lag 0 first.

    """
    steps, rows = squares.shape
    if lengths is None:
        return squares.sum(1).flip(0), squares.new_full((steps,), rows)
    lag, there = lags_of(squares, lengths)
    sums = squares.new_zeros(steps).index_add_(0, lag.flatten(), (squares * there).flatten())
    return sums, squares.new_zeros(steps).index_add_(0, lag.flatten(), there.flatten())


def lags_of(squares: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lag of each entry of (T, R) from its row's own end, and 1 where the row has it, 0 beyond its end."""
    lag = lengths - 1 - torch.arange(len(squares), device=squares.device).unsqueeze(1)
    return lag.clamp(min=0), (lag >= 0).to(squares.dtype)


def ends_of(lengths: Sequence[int], device: torch.device) -> dict[int, Tensor]:
    """Return the rows that end with each timestep."""
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows.setdefault(length - 1, []).append(row)
    return {t: torch.tensor(found, device=device) for t, found in rows.items()}
