"""What one recurrent module went through in a step -> gradients of its states per timestep, and how far back it can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.timesteps.adjoint import Cell, Gru, Lstm, Plain, Seam, Walk, Walker, by_lag, ends_of, flip, square
from gradwatch.timesteps.layout import Layout

_COTANGENTS = 3
"""Random cotangents of each row: 8 rows give the decay rate within 2 %, for inputs of four features and more."""
_POWERS = 10
"""Squarings of a matrix whose norm then gives its spectral radius: the 1024th root takes nearly all of the constant away."""
_LARGEST = 256
"""Hidden units up to which that is worth its price."""
_SATURATED = 0.98
"""|tanh| from which an output lies in the outer 1 % of its range."""


@dataclass(frozen=True)
class Spec:
    """What a recurrent module is."""

    kind: str
    """LSTM, GRU or RNN."""
    layers: int
    directions: int
    relu: bool
    bias: bool
    projected: bool
    dropout: float
    """Probability between layers in this call; 0 in evaluation."""

    @classmethod
    def of(cls, module: nn.Module) -> Spec:
        """Describe torch's recurrent modules, cells included."""
        if isinstance(module, nn.RNNBase):
            kind = {"RNN_TANH": "RNN", "RNN_RELU": "RNN"}.get(module.mode, module.mode)
            dropout = module.dropout if module.training and module.num_layers > 1 else 0.0
            return cls(kind, module.num_layers, 1 + module.bidirectional, module.mode == "RNN_RELU", module.bias, module.proj_size > 0, dropout)
        kind = next(k for k, c in (("LSTM", nn.LSTMCell), ("GRU", nn.GRUCell), ("RNN", nn.RNNCell)) if isinstance(module, c))
        return cls(kind, 1, 1, getattr(module, "nonlinearity", "tanh") == "relu", bool(module.bias), False, 0.0)


@dataclass
class Call:
    """One call of the module: rows of what it took and gave, and what its backward pass brought."""

    spec: Spec
    layout: Layout
    weights: list[Tensor]
    x: Tensor
    """(T, R, inputs)"""
    y: Tensor
    """(T, R, directions x width)"""
    h0: Tensor
    """(layers x directions, R, width)"""
    c0: Tensor | None
    """The same of an LSTM's cell state."""
    random: Tensor | None = None
    """State of the CPU's generator before the call, where dropout draws from it."""
    narrow: bool = False
    """Whether it ran under autocast: then some of it was computed in a format narrower than that of what it gave."""
    alone: bool = False
    """Whether nothing else uses its input: it is a leaf that was put in."""
    carried: bool = False
    """Whether the first call of a sequence was given a state without a graph."""
    total: bool = False
    """Whether the gradient of its cell state includes what comes through its hidden state: an LSTMCell that is not one fused kernel."""
    joined: bool | None = None
    """Whether its state came from the call before: True along the graph, False detached; None: it did not."""
    changed: bool = False
    """Whether that of a cell came from something else in the graph: what became of the state that the call before gave, probably."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Like x ("x"), y ("y"), h0 ("h") and c0 ("c"): what arrived at the input, the outputs and the last states."""

    def masks(self) -> list[Tensor]:
        """Draw once more which entries dropout kept between the layers, (T, R, width x directions) each, scaled as dropout scales."""
        if self.random is None:
            return []
        generator = torch.Generator(device="cpu")
        generator.set_state(self.random)
        shape = self.layout.inner(self.y.shape[-1])
        keep = 1 - self.spec.dropout
        # What the kernels draw does not depend on the format that it is stored in.
        blanks = (torch.empty(shape, dtype=torch.uint8, device="cpu") for _ in range(self.spec.layers - 1))
        drawn = (blank.bernoulli_(keep, generator=generator) for blank in blanks)
        return [self.layout.from_inner(mask).to(self.y.dtype) / (keep or 1.0) for mask in drawn]


@dataclass
class Series:
    """Numbers about one part of a module, still on the device."""

    part: str
    length: int
    rows: int
    values: dict[str, Tensor]


def trace(chain: Sequence[Call], own: Tensor | None, generator: torch.Generator) -> tuple[list[Series], dict[str, Tensor]]:
    """Walk back through the calls that make one sequence.

    Args:
        chain: the calls, oldest first; each but the first took over the state of the one before.
        own: the lengths of rows of which the input was padded without being packed, (R,); None: as the module ran.
        generator: of the cotangents.

    Returns:
        The series of the module ("lag_gain", "replay_residual", "adjoint_residual", and "grad_input" where it is known
        from here alone), then those of each layer and direction; and facts about it, by name.

    """
    first = chain[0]
    spec = first.spec
    wide = torch.float64 if first.x.dtype is torch.float64 else torch.float32
    x = torch.cat([c.x for c in chain]).to(wide)
    y = torch.cat([c.y for c in chain]).to(wide)
    steps, rows = x.shape[:2]
    ran = torch.tensor(first.layout.lengths, device=x.device) if first.layout.lengths is not None else None
    forward = _Forward(chain, x, y, ran, wide)
    aligned = own if own is not None else ran
    lengths = first.layout.lengths or [steps] * rows
    newest = (aligned - 1) if aligned is not None else torch.full((rows,), steps - 1, device=x.device)

    direct = y.new_zeros((steps, 1 + _COTANGENTS, rows, y.shape[-1]))
    for begin, call in _begins(chain):
        if "y" in call.gradients:
            direct[begin : begin + len(call.x), 0] = call.gradients["y"]
        cell = forward.cells[0]
        if call.total and isinstance(cell, Lstm) and {"h", "c"} <= call.gradients.keys():
            call.gradients["c"] = call.gradients["c"].to(wide) - call.gradients["h"].to(wide) * cell.through[begin]
    direct[newest, 1:, torch.arange(rows, device=x.device)] = _cotangents(rows, y.shape[-1], generator).to(y)

    found: list[Series] = []
    ends = ends_of(lengths, x.device)
    width = y.shape[-1] // spec.directions
    for layer in reversed(range(spec.layers)):
        inputs, parts = [], []
        for direction in range(spec.directions):
            number = layer * spec.directions + direction
            mine = direct[..., direction * width : (direction + 1) * width]
            if direction:
                mine = _flip(mine, ran)
            walk = Walker(forward.cells[number], *_outside(chain[-1], number, mine, lengths), ends, _seams(chain, number, wide)).walk()
            inputs.append(_flip(walk.dx, ran) if direction else walk.dx)
            parts.append(_part(walk, f"l{layer}" + "_reverse" * direction, ran if direction else None, aligned, steps, rows))
        found = parts + found
        below = inputs[0] if len(inputs) == 1 else inputs[0] + inputs[1]
        direct = below if not layer or not forward.masks else below * forward.masks[layer - 1].unsqueeze(1)
    whole = {"lag_gain": _gain(square(direct[:, 1:]).mean(1), aligned), "replay_residual": forward.residual}
    if all("x" in c.gradients for c in chain):
        known = torch.cat([c.gradients["x"] for c in chain]).to(wide)
        whole["adjoint_residual"] = (direct[:, 0] - known).abs().max() / known.abs().max().clamp(min=torch.finfo(wide).tiny)
    elif first.layout.whole and any(c.gradients for c in chain) and not any("x" in c.gradients for c in chain):  # autograd was not asked for it
        whole["grad_input"] = by_lag(square(direct[:, 0]), aligned)[0].flip(0).sqrt()
    return [Series("", steps, rows, whole), *found], {**forward.facts, **_facts(first, y)}


def _cotangents(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw the cotangents of each row, (R, cotangents, width), each of length 1 in a direction that is uniformly distributed.

    The mean of ||J^T v||^2 is that for N(0, I/width), the squared Frobenius norm of J over the width. They are orthogonal to one another, as far as the
    width allows, because rows have similar Jacobians: what one has missed another sees, which halves the error where they are many.
    """
    drawn = torch.randn((width, rows * _COTANGENTS), generator=generator, dtype=torch.float64, device="cpu")
    found = torch.cat([torch.linalg.qr(block)[0] for block in torch.split(drawn, width, 1)], 1)
    return found.T.reshape(rows, _COTANGENTS, width)


def _begins(chain: Sequence[Call]) -> list[tuple[int, Call]]:
    begins, at = [], 0
    for call in chain:
        begins.append((at, call))
        at += len(call.x)
    return begins


def _outside(last: Call, number: int, direct: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Add the gradient of the last hidden state to those of the outputs, and give that of the last cell state."""
    rows = direct.shape[2]
    direct = direct.contiguous()
    if "h" in last.gradients:
        at = torch.tensor([n - 1 for n in lengths], device=direct.device)
        direct = direct.index_put(
            (at, torch.zeros_like(at), torch.arange(rows, device=direct.device)), last.gradients["h"][number].to(direct.dtype), accumulate=True
        )
    if last.c0 is None:
        return direct, None
    final = direct.new_zeros((direct.shape[1], *last.c0.shape[1:]))
    if "c" in last.gradients:
        final[0] = last.gradients["c"][number]
    return direct, final


def _seams(chain: Sequence[Call], number: int, wide: torch.dtype) -> dict[int, Seam]:
    found = {}
    for (begin, call), later in zip(_begins(chain), chain[1:], strict=False):
        h, c = (call.gradients[name][number].to(wide) if name in call.gradients else None for name in ("h", "c"))
        found[begin + len(call.x) - 1] = Seam(h, c, joined=bool(later.joined))
    return found


def _part(walk: Walk, name: str, flipped: Tensor | None, aligned: Tensor | None, steps: int, rows: int) -> Series:
    """Put the norms of one layer and direction in the order of data time."""
    reverse = name.endswith("_reverse")

    def timed(squares: Tensor) -> Tensor:
        return flip(squares, flipped) if reverse else squares

    def series(squares: Tensor) -> Tensor:
        return by_lag(timed(squares), aligned)[0].flip(0).sqrt()

    values = {"grad_hidden": series(walk.hidden[0]), "grad_hidden_direct": series(walk.direct)}
    # Carried to a state over what the state after it had; in a reverse direction the state after it is the older one. The
    # first state of a row hands nothing on: shorter rows would else dilute the ratio of the others at the lag where they begin.
    handing = torch.cat([torch.zeros_like(walk.state[:1]), walk.state[1:]])
    state, carried = (by_lag(timed(s), aligned)[0].flip(0) for s in (handing, walk.carried))
    later, handed = (state[:-1], carried[1:]) if reverse else (state[1:], carried[:-1])
    values["carry_ratio"] = (handed / later.clamp(min=1e-300)).sqrt()  # of nothing, nothing is carried
    if walk.cell is not None:
        values["grad_cell"] = series(walk.cell[0])
    if not reverse:
        values["lag_gain_hidden"] = _gain(walk.hidden[1:].mean(0), aligned)
        if walk.cell is not None:
            values["lag_gain_cell"] = _gain(walk.cell[1:].mean(0), aligned)
    return Series(name, steps, rows, values)


def _gain(squares: Tensor, lengths: Tensor | None) -> Tensor:
    sums, counts = by_lag(squares, lengths)
    return (sums / counts.clamp(min=1)).sqrt()


def _flip(tensor: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn (T, S, R, features) around in time."""
    return flip(tensor.transpose(1, 2), lengths).transpose(1, 2)


class _Forward:
    """The forward pass once more: the states of all layers, recomputed, and how well the last layer's agree with what the module gave."""

    def __init__(self, chain: Sequence[Call], x: Tensor, y: Tensor, lengths: Tensor | None, wide: torch.dtype) -> None:
        first = chain[0]
        self._spec, self._wide = first.spec, wide
        self._weights = [w.to(wide) for w in first.weights]
        self._lengths = lengths
        self.cells: list[Cell] = []
        self.facts: dict[str, Tensor] = {}
        self.masks = [torch.cat(parts).to(wide) for parts in zip(*(c.masks() for c in chain), strict=True)]
        width = y.shape[-1] // first.spec.directions
        residuals = []
        for layer in range(first.spec.layers):
            last = layer == first.spec.layers - 1
            outputs = []
            for direction in range(first.spec.directions):
                number = layer * first.spec.directions + direction
                own = flip(x, lengths) if direction else x
                h0 = first.h0[number].to(wide)
                c0 = first.c0[number].to(wide) if first.c0 is not None else h0
                given = y[..., direction * width : (direction + 1) * width] if last else None
                h = self._kernel(own, h0, c0, number) if given is None else flip(given, lengths) if direction else given
                again = self._replay(own, torch.cat([h0.unsqueeze(0), h[:-1]]), c0, number)
                if last:
                    residuals.append(self._differ(again, h))
                outputs.append(flip(h, lengths) if direction else h)
            if not last:
                x = torch.cat(outputs, -1)
                if self.masks:
                    x = x * self.masks[layer]
        self.residual = torch.stack(residuals).max()

    def _own(self, number: int) -> list[Tensor]:
        per = 2 + 2 * self._spec.bias + self._spec.projected
        return self._weights[number * per : (number + 1) * per]

    def _kernel(self, x: Tensor, h0: Tensor, c0: Tensor, number: int) -> Tensor:
        """Run one layer and direction through torch's own kernel."""
        spec = self._spec
        run: Any = {"LSTM": torch._VF.lstm, "GRU": torch._VF.gru, "RNN": torch._VF.rnn_relu if spec.relu else torch._VF.rnn_tanh}[spec.kind]
        state: Any = h0.unsqueeze(0)
        if spec.kind == "LSTM":
            state = (state, c0.unsqueeze(0))
        result: Tensor = run(x.contiguous(), state, self._own(number), spec.bias, 1, 0.0, False, False, False)[0]
        return result

    def _replay(self, x: Tensor, before: Tensor, c0: Tensor, number: int) -> Tensor:
        """Recompute the states from those before them, and keep what the way back needs."""
        weights = self._own(number)
        bias = (weights[2], weights[3]) if self._spec.bias else (None, None)
        common = (x, before, weights[0], weights[1], *bias)
        name = f"l{number // self._spec.directions}" + "_reverse" * (number % self._spec.directions)
        if self._spec.kind == "LSTM":
            lstm = Lstm(*common)
            h = lstm.run(c0, weights[-1] if self._spec.projected else None)
            self.cells.append(lstm)
            self.facts[f"forget_gate_{name}"] = lstm.kept.mean()
        elif self._spec.kind == "GRU":
            gru = Gru(*common)
            h = gru.run()
            self.cells.append(gru)
            self.facts[f"update_gate_{name}"] = gru.kept.mean()
        else:
            plain = Plain(*common)
            h = plain.run(relu=self._spec.relu)
            self.cells.append(plain)
        return h

    def _differ(self, again: Tensor, h: Tensor) -> Tensor:
        if self._lengths is not None:  # beyond the ends there is nothing to agree with
            there = (torch.arange(len(h), device=h.device).unsqueeze(1) < self._lengths).unsqueeze(-1)
            again = again * there
        return (again - h).abs().max() / h.abs().max().clamp(min=torch.finfo(h.dtype).tiny)


def _facts(call: Call, y: Tensor) -> dict[str, Tensor]:
    """Measure what decides how long a recurrent network remembers, on its weights and outputs."""
    spec = call.spec
    facts: dict[str, Tensor] = {}
    per = 2 + 2 * spec.bias + spec.projected
    for number in range(spec.layers * spec.directions):
        name = f"l{number // spec.directions}" + "_reverse" * (number % spec.directions)
        weights = call.weights[number * per : (number + 1) * per]
        hidden = weights[1].shape[-1]
        if spec.kind == "LSTM" and spec.bias:
            size = weights[2].shape[0] // 4
            facts[f"forget_bias_{name}"] = (weights[2] + weights[3])[size : 2 * size].mean()
        if spec.kind == "RNN" and hidden <= _LARGEST:
            w = weights[1].float()
            facts[f"spectral_radius_{name}"] = _radius(w)
            facts[f"spectral_norm_{name}"] = _radius(w.T @ w).sqrt()
    if spec.kind == "RNN" and not spec.relu:
        facts[f"saturation_l{spec.layers - 1}"] = (y.abs() > _SATURATED).double().mean()
    return facts


def _radius(matrix: Tensor) -> Tensor:
    """Spectral radius by Gelfand's formula, ||M^k||^(1/k), with k = 2^10 by squaring."""
    log, tiny = matrix.new_zeros(()), torch.finfo(matrix.dtype).tiny
    for power in range(_POWERS):
        size = torch.linalg.matrix_norm(matrix).clamp(min=tiny)
        log = log + size.log() / 2**power
        matrix = matrix / size
        matrix = matrix @ matrix
    radius: Tensor = (log + torch.linalg.matrix_norm(matrix).clamp(min=tiny).log() / 2**_POWERS).exp()
    return radius
