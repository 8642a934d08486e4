"""The adjoint recurrences of RNN, LSTM and GRU, by hand, over states that a fused kernel went through.

Everything here is laid out (time, rows, features), runs forward in time (a reverse direction is flipped before), and takes
padding at the end of a row for what it is: no gradient is injected there, so none arises. Formulas: the backward pass of the
equations in the documentation of torch.nn.RNN, torch.nn.LSTM and torch.nn.GRU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

Carry = TypeVar("Carry", Tensor, Tensor | None)

_CHUNK = 64
"""Timesteps whose intermediate results are held at once: enough for one product of matrices to pay, and little memory."""


@dataclass
class Cell(ABC):
    """One layer and direction: its weights as torch keeps them, and the states that it went through."""

    x: Tensor
    """(T, R, inputs)"""
    before: Tensor
    """The hidden state that each timestep began with, (T, R, width)."""
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None

    @abstractmethod
    def back(self, t: int, dh: Tensor, dc: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go one timestep back.

        Args:
            t: the timestep.
            dh: total gradient of its hidden state, (S, R, width).
            dc: gradient of its cell state as it was carried from the future, (S, R, hidden); None but for an LSTM.
            out: where the gradient of the pre-activations goes, as the input sees them, (S, R, gates x hidden).

        Returns:
            What is carried to the hidden state before, what to the cell state before, and the total of this cell state.

        """

    def _gates(self, x: Tensor, h: Tensor) -> Tensor:
        return functional.linear(x, self.w_ih, self.b_ih) + functional.linear(h, self.w_hh, self.b_hh)


class Plain(Cell):
    """h' = f(W_ih x + b_ih + W_hh h + b_hh), f = tanh or relu."""

    def run(self, *, relu: bool) -> Tensor:
        """Recompute the hidden states, (T, R, width)."""
        a = self._gates(self.x, self.before)
        h = a.relu() if relu else a.tanh()
        self._slope = (a > 0).to(a.dtype) if relu else 1 - h * h
        return h

    def back(self, t: int, dh: Tensor, dc: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go one timestep back; see `Cell.back`."""
        torch.mul(dh, self._slope[t], out=out)
        return out @ self.w_hh, None, dc


class Gru(Cell):
    """r, z = sigmoid(...), n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h."""

    def run(self) -> Tensor:
        """Recompute the hidden states, (T, R, width)."""
        xr, xz, xn = functional.linear(self.x, self.w_ih, self.b_ih).chunk(3, -1)
        hr, hz, q = functional.linear(self.before, self.w_hh, self.b_hh).chunk(3, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * q).tanh()
        self._r, self.kept = r, z
        dn = (1 - z) * (1 - n * n)
        self._k = torch.stack([dn * q * r * (1 - r), (self.before - n) * z * (1 - z), dn], -2)
        return n + z * (self.before - n)

    def back(self, t: int, dh: Tensor, dc: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go one timestep back; see `Cell.back`."""
        parts = out.view(*out.shape[:-1], 3, -1)
        torch.mul(dh.unsqueeze(-2), self._k[t], out=parts)
        inner = torch.cat(
            [out[..., : 2 * dh.shape[-1]], parts[..., 2, :] * self._r[t]], -1
        )  # the reset gate stands inside of n, on the side of h only
        return torch.addcmul(inner @ self.w_hh, dh, self.kept[t]), None, dc


class Lstm(Cell):
    """i, f, o = sigmoid(...), g = tanh(...), c' = f c + i g, h' = o tanh(c'), or W_hr of that."""

    def run(self, c: Tensor, w_hr: Tensor | None) -> Tensor:
        """Recompute the hidden states, (T, R, width), from the cell state before the first of them, (R, hidden)."""
        i, f, g, o = self._gates(self.x, self.before).chunk(4, -1)
        i, f, g, o = i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
        self._w_hr, self.kept = w_hr, f
        new = i * g
        cells = torch.empty_like(new)
        earlier = torch.empty_like(new)
        for t in range(len(new)):
            earlier[t] = c
            c = torch.addcmul(new[t], f[t], c, out=cells[t])
        squashed = cells.tanh_()
        self._k = torch.stack([g * i * (1 - i), earlier.mul_(f * (1 - f)), new.copy_(i * (1 - g * g))], -2)
        self._ko = squashed * o * (1 - o)
        self.through = o * (1 - squashed * squashed)
        h = squashed.mul_(o)
        return h if w_hr is None else h @ w_hr.T

    def back(self, t: int, dh: Tensor, dc: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go one timestep back; see `Cell.back`."""
        assert dc is not None
        inner = dh if self._w_hr is None else dh @ self._w_hr
        total = torch.addcmul(dc, inner, self.through[t])
        hidden = total.shape[-1]
        torch.mul(total.unsqueeze(-2), self._k[t], out=out.view(*out.shape[:-1], 4, hidden)[..., :3, :])
        torch.mul(inner, self._ko[t], out=out[..., 3 * hidden :])
        return out @ self.w_hh, total * self.kept[t], total


@dataclass
class Seam:
    """Between two calls of the module that were joined to one sequence: what autograd says of the state that was handed on."""

    h: Tensor | None
    """Total gradient of the hidden state, (R, width); None: none arrived."""
    c: Tensor | None
    joined: bool
    """Whether the graph goes on through it; detached, nothing flows."""


@dataclass
class Walk:
    """What came of walking back through one layer and direction. Squares are float64 and summed over features."""

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


@dataclass
class Walker:
    """Walks back through the timesteps with several streams of gradients at once: the training's, and the cotangents of lags."""

    cell: Cell
    direct: Tensor
    """Gradients of the outputs from outside of the recurrence, (T, S, R, width)."""
    final_c: Tensor | None
    """Gradient of the last cell state from outside, (S, R, hidden), for each row at its own end."""
    ends: Mapping[int, Tensor]
    """Which rows end with a timestep."""
    seams: Mapping[int, Seam] = field(default_factory=dict)
    """By the last timestep of a call."""

    def walk(self) -> Walk:
        """Walk."""
        steps, streams, rows, width = self.direct.shape
        gates = self.cell.w_ih.shape[0]
        lstm = self.final_c is not None
        hidden_width = self.final_c.shape[-1] if self.final_c is not None else width
        shape = (steps, streams, rows)
        squares = {
            name: self.direct.new_zeros(shape, dtype=torch.float64)
            for name in ("hidden", "direct", "carried", "state", "cell")
        }
        dx = self.direct.new_empty((*shape, self.cell.w_ih.shape[1]))
        carry_h = self.direct.new_zeros((streams, rows, width))
        carry_c = self.direct.new_zeros((streams, rows, hidden_width)) if lstm else None
        buffers = {
            name: self.direct.new_empty((min(_CHUNK, steps), streams, rows, width)) for name in ("total", "came")
        }
        cells = (
            {
                name: self.direct.new_empty((min(_CHUNK, steps), streams, rows, hidden_width))
                for name in ("total", "came", "alone")
            }
            if lstm
            else {}
        )
        da = self.direct.new_empty((min(_CHUNK, steps), streams, rows, gates))
        for stop in range(steps, 0, -_CHUNK):
            start = max(stop - _CHUNK, 0)
            for t in range(stop - 1, start - 1, -1):
                k = t - start
                seam = self.seams.get(t)
                carry_h, carry_c = _over(seam, carry_h), _over(seam, carry_c)
                buffers["came"][k] = carry_h
                if carry_c is not None:
                    cells["came"][k] = carry_c
                if seam is not None:
                    carry_h, carry_c = _known(carry_h, seam.h), _known(carry_c, seam.c)
                if carry_c is not None and self.final_c is not None and t in self.ends:
                    carry_c = carry_c.index_add(1, self.ends[t], self.final_c[:, self.ends[t]])
                dh = torch.add(self.direct[t], carry_h, out=buffers["total"][k])
                if carry_c is not None:
                    cells["alone"][k] = carry_c
                carry_h, carry_c, dc = self.cell.back(t, dh, carry_c, da[k])
                if dc is not None:
                    cells["total"][k] = dc
            size = stop - start
            dx[start:stop] = da[:size] @ self.cell.w_ih
            total, came = buffers["total"][:size], buffers["came"][:size]
            squares["hidden"][start:stop] = square(total)
            squares["direct"][start:stop] = square(self.direct[start:stop])
            for t in self.seams.keys() & range(
                start, stop
            ):  # what crossed and was not the next call's is used directly
                squares["direct"][t] = _difference(total[t - start], came[t - start])
            squares["carried"][start:stop] = square(came)
            squares["state"][start:stop] = squares["hidden"][start:stop]
            if lstm:
                squares["cell"][start:stop] = square(cells["total"][:size])
                squares["carried"][start:stop] += square(cells["came"][:size])
                squares["state"][start:stop] += square(cells["alone"][:size])
        return Walk(
            dx,
            squares["hidden"].transpose(0, 1),
            squares["direct"][:, 0],
            squares["carried"][:, 0],
            squares["state"][:, 0],
            squares["cell"].transpose(0, 1) if lstm else None,
        )


def _over(seam: Seam | None, carry: Carry) -> Carry:
    """Return what comes over a seam of what the call behind it hands back: nothing where it is detached."""
    return carry if seam is None or seam.joined or carry is None else torch.zeros_like(carry)


def _known(carry: Carry, known: Tensor | None) -> Carry:
    """Take autograd's word for what the state at a seam has in the training's own stream; cotangents cross as they come."""
    if carry is None:
        return carry
    return torch.cat([torch.zeros_like(carry[:1]) if known is None else known.unsqueeze(0), carry[1:]])


def _difference(total: Tensor, part: Tensor) -> Tensor:
    """Return the squares of total - part, zero where that is only rounding."""
    squares = square(total - part)
    return squares * (squares > square(total) * (64 * torch.finfo(total.dtype).eps) ** 2)


def square(tensor: Tensor) -> Tensor:
    """Sum the squares over the last dimension, in float64: float32 squares of vanished gradients are zero."""
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
    lag = lengths - 1 - torch.arange(steps, device=squares.device).unsqueeze(1)
    there = (lag >= 0).to(squares.dtype)
    lag = lag.clamp(min=0).flatten()
    sums = squares.new_zeros(steps).index_add_(0, lag, (squares * there).flatten())
    return sums, squares.new_zeros(steps).index_add_(0, lag, there.flatten())


def ends_of(lengths: Sequence[int], device: torch.device) -> dict[int, Tensor]:
    """Return the rows that end with each timestep."""
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows.setdefault(length - 1, []).append(row)
    return {t: torch.tensor(found, device=device) for t, found in rows.items()}
