"""What one recurrent module went through in a step -> gradients of its states per timestep, and how far back it can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwatch.timesteps.adjoint import Lstm, Seam, Walk, Walker, by_lag, ends_of, flip, square
from gradwatch.timesteps.replay import Call, Replay
from gradwatch.values.snapshot import FactName
from gradwatch.values.thresholds import OUTER_SHARE

_COTANGENTS = 3
"""Random cotangents of each row: 8 rows give the decay rate within 2 %, for inputs of four features and more."""
_POWERS = 10
"""Squarings of a matrix whose norm then gives its spectral radius: the 1024th root takes nearly all of the constant away."""
_LARGEST = 256
"""Hidden units up to which that is worth its price."""
_SATURATED = 1 - 2 * OUTER_SHARE
"""|tanh| from which an output lies in the outer 1 % of its range."""


@dataclass
class Series:
    """Numbers about one part of a module, still on the device."""

    part: str
    length: int
    rows: int
    values: dict[str, Tensor]
    reverse: bool = False
    """Whether it runs from the newest timestep to the oldest."""


def trace(
    chain: Sequence[Call], own: Tensor | None, generator: torch.Generator
) -> tuple[list[Series], dict[tuple[FactName, str], Tensor]]:
    """Walk back through the calls that make one sequence.

    Args:
        chain: the calls, oldest first; each but the first took over the state of the one before.
        own: the lengths of rows of which the input was padded without being packed, (R,); None: as the module ran.
        generator: of the cotangents.

    Returns:
        The series of the module ("lag_gain", "replay_residual", "adjoint_residual", and "grad_input" where it is known
        from here alone), then those of each layer and direction; and facts about it, by name and part.

    """
    first = chain[0]
    spec = first.spec
    wide = torch.float64 if first.x.dtype is torch.float64 else torch.float32
    x = torch.cat([c.x for c in chain]).to(wide)
    y = torch.cat([c.y for c in chain]).to(wide)
    steps, rows = x.shape[:2]
    ran = torch.tensor(first.layout.lengths, device=x.device) if first.layout.lengths is not None else None
    forward = Replay(chain, x, y, ran, wide)
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
            walk = Walker(
                forward.cells[number], *_outside(chain[-1], number, mine, lengths), ends, _seams(chain, number, wide)
            ).walk()
            inputs.append(_flip(walk.dx, ran) if direction else walk.dx)
            parts.append(
                _part(walk, f"l{layer}" + "_reverse" * direction, ran if direction else None, aligned, steps, rows)
            )
        found = parts + found
        below = inputs[0] if len(inputs) == 1 else inputs[0] + inputs[1]
        direct = below if not layer or not forward.masks else below * forward.masks[layer - 1].unsqueeze(1)
    whole = {"lag_gain": _gain(square(direct[:, 1:]).mean(1), aligned), "replay_residual": forward.residual}
    if all("x" in c.gradients for c in chain):
        known = torch.cat([c.gradients["x"] for c in chain]).to(wide)
        whole["adjoint_residual"] = (direct[:, 0] - known).abs().max() / known.abs().max().clamp(
            min=torch.finfo(wide).tiny
        )
    elif (
        first.layout.whole and any(c.gradients for c in chain) and not any("x" in c.gradients for c in chain)
    ):  # autograd was not asked for it
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
            (at, torch.zeros_like(at), torch.arange(rows, device=direct.device)),
            last.gradients["h"][number].to(direct.dtype),
            accumulate=True,
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
    return Series(name, steps, rows, values, reverse=reverse)


def _gain(squares: Tensor, lengths: Tensor | None) -> Tensor:
    sums, counts = by_lag(squares, lengths)
    return (sums / counts.clamp(min=1)).sqrt()


def _flip(tensor: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn (T, S, R, features) around in time."""
    return flip(tensor.transpose(1, 2), lengths).transpose(1, 2)


def _facts(call: Call, y: Tensor) -> dict[tuple[FactName, str], Tensor]:
    """Measure what decides how long a recurrent network remembers, on its weights and outputs."""
    spec = call.spec
    facts: dict[tuple[FactName, str], Tensor] = {}
    per = 2 + 2 * spec.bias + spec.projected
    for number in range(spec.layers * spec.directions):
        part = spec.part(number)
        weights = call.weights[number * per : (number + 1) * per]
        hidden = weights[1].shape[-1]
        if spec.kind == "LSTM" and spec.bias:
            size = weights[2].shape[0] // 4
            facts["forget_bias", part] = (weights[2] + weights[3])[size : 2 * size].mean()
        if spec.kind == "RNN" and hidden <= _LARGEST:
            w = weights[1].float()
            facts["spectral_radius", part] = _radius(w)
            facts["spectral_norm", part] = _radius(w.T @ w).sqrt()
    if spec.kind == "RNN" and not spec.relu:
        facts["saturation", f"l{spec.layers - 1}"] = (y.abs() > _SATURATED).double().mean()
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
