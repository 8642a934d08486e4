"""The records of a recurrent module's calls -> gradients of its states per timestep, and how far back it can see."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwatch.timesteps.adjoint import Cell, Seam, Walk, by_lag, ends_of, flip, square, walk_back
from gradwatch.timesteps.call_records import CallRecord, StateOrigin
from gradwatch.timesteps.replay import Replay
from gradwatch.values.snapshot import FactName

_COTANGENTS = 3
"""Random cotangents of each row: 8 rows give the decay rate within 2 %, for inputs of four features and more."""


@dataclass
class Series:
    """Numbers about one part of a module, still on the device."""

    part: str
    length: int
    rows: int
    values: dict[str, Tensor]
    reverse: bool = False
    """Whether it runs from the newest timestep to the oldest."""


@dataclass(frozen=True)
class _Call:
    """A call within the sequence that it is a part of."""

    record: CallRecord
    begin: int
    """Its first timestep."""
    gradients: Mapping[str, Tensor]
    """What arrived, as `CallRecord.gradients`; the cell state's is without what comes through the hidden state."""

    @property
    def end(self) -> int:
        """Its last timestep, and one."""
        return self.begin + len(self.record.x)


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a sequence end."""

    steps: int
    count: int
    ran: Tensor | None
    """How many timesteps of each row the module ran over, (R,); None: all."""
    own: Tensor | None
    """How many of each are not padding, from which lags count, (R,); None: all."""
    ends: list[int]
    """`ran`, or all timesteps, as numbers."""


def gradients_through_time(
    records: Sequence[CallRecord], own: Tensor | None, generator: torch.Generator
) -> tuple[list[Series], dict[tuple[FactName, str], Tensor]]:
    """Walk back through the calls that make one sequence. The records stay as they are.

    Args:
        records: of the calls, oldest first; each but the first took over the state of the one before.
        own: the lengths of rows of which the input was padded without being packed, (R,); None: as the module ran.
        generator: of the cotangents.

    Returns:
        The series of the module ("lag_gain", "replay_residual", "adjoint_residual", and "grad_input" where it is known
        from here alone), then those of each layer and direction; and facts about it, by name and part.

    """
    first = records[0]
    recurrence, layout = first.recurrence, first.layout
    wide = torch.float64 if first.x.dtype is torch.float64 else torch.float32
    x = torch.cat([record.x for record in records]).to(wide)
    y = torch.cat([record.y for record in records]).to(wide)
    ran = torch.tensor(layout.lengths, device=x.device) if layout.lengths is not None else None
    steps, count = x.shape[:2]
    rows = _Rows(steps, count, ran, own if own is not None else ran, layout.lengths or [steps] * count)
    replay = Replay(records, x, y, ran, wide)
    calls = _calls(records, replay.cells[0], wide)
    gradient = _of_outputs(calls, y, rows, generator)  # (T, S, R, features): the training's, and those of cotangents
    parts: list[Series] = []
    for layer in reversed(range(recurrence.layers)):
        numbers = range(layer * recurrence.directions, (layer + 1) * recurrence.directions)
        each = gradient.chunk(recurrence.directions, -1)
        walks = [_walked(replay.cells[n], n, calls, g, rows) for n, g in zip(numbers, each, strict=True)]
        parts = [_series(w, recurrence.part(n), rows) for n, w in zip(numbers, walks, strict=True)] + parts
        gradient = walks[0].dx if len(walks) == 1 else walks[0].dx + _flip(walks[1].dx, ran)
        if layer and replay.masks:
            gradient = gradient * replay.masks[layer - 1].unsqueeze(1)
    values = {"lag_gain": _gain(square(gradient[:, 1:]).mean(1), rows.own), "replay_residual": replay.residual}
    if all("x" in call.gradients for call in calls):
        known = torch.cat([call.gradients["x"] for call in calls]).to(wide)
        largest = known.abs().max().clamp(min=torch.finfo(wide).tiny)
        values["adjoint_residual"] = (gradient[:, 0] - known).abs().max() / largest
    elif layout.whole and any(c.gradients for c in calls) and not any("x" in c.gradients for c in calls):
        values["grad_input"] = _norms(square(gradient[:, 0]), rows.own)  # autograd was not asked for it
    return [Series("", steps, count, values), *parts], _facts(first, replay.cells, y)


def _calls(records: Sequence[CallRecord], cell: Cell, wide: torch.dtype) -> list[_Call]:
    """Return the calls in time, the gradients of their cell states without what comes through hidden states."""
    calls: list[_Call] = []
    for record in records:
        begin = calls[-1].end if calls else 0
        gradients = dict(record.gradients)
        if record.c_through_h and cell.through is not None and {"h", "c"} <= gradients.keys():
            gradients["c"] = gradients["c"].to(wide) - gradients["h"].to(wide) * cell.through[begin]
        calls.append(_Call(record, begin, gradients))
    return calls


def _of_outputs(calls: Sequence[_Call], y: Tensor, rows: _Rows, generator: torch.Generator) -> Tensor:
    """Return gradients of the outputs, (T, S, R, features): what arrived, and cotangents at each row's end."""
    found = y.new_zeros((rows.steps, 1 + _COTANGENTS, rows.count, y.shape[-1]))
    for call in calls:
        if "y" in call.gradients:
            found[call.begin : call.end, 0] = call.gradients["y"]
    newest = rows.own - 1 if rows.own is not None else torch.full((rows.count,), rows.steps - 1, device=y.device)
    every = torch.arange(rows.count, device=y.device)
    found[newest, 1:, every] = _cotangents(rows.count, y.shape[-1], generator).to(y)
    return found


def _cotangents(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw the cotangents of each row, (R, cotangents, width), each of length 1 in a uniformly distributed direction.

    The mean of ||J^T v||^2 is that for N(0, I/width), the squared Frobenius norm of J over the width. They are
    orthogonal to one another, as far as the width allows, because rows have similar Jacobians: what one has missed
    another sees, which halves the error where they are many.
    """
    drawn = torch.randn((width, rows * _COTANGENTS), generator=generator, dtype=torch.float64, device="cpu")
    found = torch.cat([torch.linalg.qr(block)[0] for block in torch.split(drawn, width, 1)], 1)
    return found.T.reshape(rows, _COTANGENTS, width)


def _walked(cell: Cell, number: int, calls: Sequence[_Call], gradient: Tensor, rows: _Rows) -> Walk:
    """Walk back through one layer and direction, which is turned around if it runs backwards.

    Args:
        cell: the layer and direction.
        number: its place in states.
        calls: of the module.
        gradient: of its outputs, (T, S, R, width), in the order of data time.
        rows: where they end.

    """
    last, recurrence = calls[-1], calls[-1].record.recurrence
    if number % recurrence.directions:
        gradient = _flip(gradient, rows.ran)
    gradient = gradient.contiguous()
    if "h" in last.gradients:  # the gradient of the last hidden state is one more of the last output
        at = torch.tensor([end - 1 for end in rows.ends], device=gradient.device)
        every = torch.arange(rows.count, device=gradient.device)
        state = last.gradients["h"][number].to(gradient.dtype)
        gradient = gradient.index_put((at, torch.zeros_like(at), every), state, accumulate=True)
    final_c = None
    if last.record.c0 is not None:
        final_c = gradient.new_zeros((gradient.shape[1], *last.record.c0.shape[1:]))
        if "c" in last.gradients:
            final_c[0] = last.gradients["c"][number]
    return walk_back(
        cell, gradient, final_c, ends_of(rows.ends, gradient.device), _seams(calls, number, gradient.dtype)
    )


def _seams(calls: Sequence[_Call], number: int, wide: torch.dtype) -> dict[int, Seam]:
    found = {}
    for call, later in itertools.pairwise(calls):
        h, c = (call.gradients[name][number].to(wide) if name in call.gradients else None for name in ("h", "c"))
        found[call.end - 1] = Seam(h, c, joined=later.record.origin is StateOrigin.JOINED)
    return found


def _series(walk: Walk, name: str, rows: _Rows) -> Series:
    """Put the norms of one layer and direction in the order of data time."""
    reverse = name.endswith("_reverse")

    def timed(squares: Tensor) -> Tensor:
        return flip(squares, rows.ran) if reverse else squares

    values = {
        "grad_hidden": _norms(timed(walk.hidden[0]), rows.own),
        "grad_hidden_direct": _norms(timed(walk.direct), rows.own),
    }
    # Carried to a state over what the state after it had; in a reverse direction the state after it is the older one.
    # The first state of a row hands nothing on: shorter rows would else dilute the ratio of others where they begin.
    handing = torch.cat([torch.zeros_like(walk.state[:1]), walk.state[1:]])
    state, carried = (by_lag(timed(s), rows.own)[0].flip(0) for s in (handing, walk.carried))
    later, handed = (state[:-1], carried[1:]) if reverse else (state[1:], carried[:-1])
    values["carry_ratio"] = (handed / later.clamp(min=1e-300)).sqrt()  # of nothing, nothing is carried
    if walk.cell is not None:
        values["grad_cell"] = _norms(timed(walk.cell[0]), rows.own)
    if not reverse:
        values["lag_gain_hidden"] = _gain(walk.hidden[1:].mean(0), rows.own)
        if walk.cell is not None:
            values["lag_gain_cell"] = _gain(walk.cell[1:].mean(0), rows.own)
    return Series(name, rows.steps, rows.count, values, reverse=reverse)


def _norms(squares: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the norm over rows that are aligned at their ends, oldest timestep first."""
    return by_lag(squares, lengths)[0].flip(0).sqrt()


def _gain(squares: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the root mean square over the rows that have a lag, newest timestep first."""
    sums, counts = by_lag(squares, lengths)
    return (sums / counts.clamp(min=1)).sqrt()


def _flip(tensor: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn (T, S, R, features) around in time."""
    return flip(tensor.transpose(1, 2), lengths).transpose(1, 2)


def _facts(record: CallRecord, cells: Sequence[Cell], y: Tensor) -> dict[tuple[FactName, str], Tensor]:
    """Measure what decides how long a recurrent network remembers, on its weights, gates and outputs."""
    recurrence = record.recurrence
    facts = {
        (name, recurrence.part(number)): value
        for number, cell in enumerate(cells)
        for name, value in recurrence.kind.facts(cell, recurrence.of_part(record.weights, number)).items()
    }
    if recurrence.kind.saturation is not None:
        facts["saturation", f"l{recurrence.layers - 1}"] = recurrence.kind.saturation(y)
    return facts
