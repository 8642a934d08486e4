"""What a recorder has seen -> numbers on the device, and, once they are copied, `SequenceStats`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradwatch.model.gradient_hooks import has_unknown_scale
from gradwatch.timesteps.adjoint import by_lag, square
from gradwatch.timesteps.recorder import Seen, Target
from gradwatch.timesteps.replay import Call
from gradwatch.timesteps.walk import Series, trace
from gradwatch.values.sequences import Recurrence, SequenceStats, horizon_of
from gradwatch.values.snapshot import Fact, FactName

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest residual of the replay and of the adjoint; formats narrower than float32 lose more."""
_NARROW = 5e-2
_SCALED = frozenset({"grad_input", "grad_hidden", "grad_hidden_direct", "grad_cell"})
"""Series that carry the loss scale."""


_NO_GRADIENT = "its input has no gradient, and could not be given one"
_NOT_FOLLOWED = "its calls run once more within the backward pass, one by one: reentrant checkpointing of single timesteps cannot be followed"


@dataclass
class Trace:
    """One sequence module of a step: its numbers on their way from the device."""

    module: str
    series: list[Series] = field(default_factory=list)
    facts: dict[tuple[FactName, str], Tensor] = field(default_factory=dict)
    """By name and part."""
    kind: Recurrence | None = None
    checks: dict[str, Tensor] = field(default_factory=dict)
    """Numbers on which notes and certificates depend."""
    notes: list[str] = field(default_factory=list)
    reached: int | None = None
    """How many of the newest timesteps lie after the last detached state between its calls; None where none is detached."""
    arrived: bool = False
    """Whether a gradient reached it: where none did, no factor is on what is shown."""
    tolerance: float = 0.0
    derived: bool = False
    """Whether the gradient of its input comes from the walk back, and not from autograd."""
    alone: bool = True
    """Whether nothing but this module uses its input, so that a large adjoint residual means that the hidden series are wrong."""

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """Return everything that is to be copied, by part and name."""
        found = {(series.part, name): value for series in self.series for name, value in series.values.items()}
        return (
            found
            | {("fact", f"{name} {part}"): value for (name, part), value in self.facts.items()}
            | {("check", name): value for name, value in self.checks.items()}
        )

    def stats(
        self,
        values: Mapping[tuple[str, str], Sequence[float]],
        scale: float | None,
        share: float,
        changed: float | None = None,
    ) -> list[SequenceStats]:
        """Make the numbers values.

        Args:
            values: what `tensors` gave, as numbers.
            scale: the loss scale of the backward pass; None: whether there was one is not known.
            share: of its maximum, below which the lag gain counts as gone.
            changed: how far a gradient of another module at the step is from what arrived, for a module that trains none; None: not known.

        """
        checks = {name: values["check", name][0] for name in self.checks}
        scaled = self.arrived and has_unknown_scale(scale, checks.get("changed", changed))
        notes, reached = list(self.notes), self.reached
        if checks.get("carried", 0.0) > 0:
            notes.append("the state that was carried in is detached: the gradient ends where this sequence begins")
            reached = self.series[0].length if reached is None else reached
        residuals = {
            name: values["", name][0] for name in ("replay_residual", "adjoint_residual") if ("", name) in values
        }
        if not self.alone and residuals.get("adjoint_residual", 0.0) > self.tolerance:
            del residuals["adjoint_residual"]
            notes.append("its input is used elsewhere too, so the gradient of that cannot certify the hidden series")
        trusted = self._trusted(residuals, notes)
        found = []
        for series in self.series:
            if series.part and not trusted:
                continue
            mine: dict[str, Any] = {name: tuple(values[series.part, name]) for name in series.values}
            if scale is not None and scale != 1.0:
                mine |= {name: tuple(v / scale for v in mine[name]) for name in _SCALED & mine.keys()}
            for name in ("replay_residual", "adjoint_residual"):
                if mine.pop(name, None) and name in residuals:
                    mine[name] = residuals[name]
            if not trusted:
                mine.pop("lag_gain", None)
                if self.derived:
                    mine.pop("grad_input", None)
            known = horizon_of(mine["lag_gain"], share) if "lag_gain" in mine else None
            found.append(
                SequenceStats(
                    module=self.module,
                    part=series.part,
                    length=series.length,
                    rows=series.rows,
                    kind=self.kind if not series.part else None,
                    reverse=series.reverse,
                    censored=known.censored if known is not None else None,
                    scaled=scaled,
                    note="; ".join(notes) or None if not series.part else None,
                    reached=reached if not series.part else None,
                    **mine,
                )
            )
        return found or [SequenceStats(self.module, kind=self.kind, note="; ".join(notes) or None)]

    def measured(self, values: Mapping[tuple[str, str], Sequence[float]]) -> list[Fact]:
        """Return the facts as values."""
        return [
            Fact(self.module, name, value, part)
            for name, part in self.facts
            if math.isfinite(value := values["fact", f"{name} {part}"][0])
        ]

    def _trusted(self, residuals: dict[str, float], notes: list[str]) -> bool:
        """Judge the certificates; what they say against the hidden series goes to the notes."""
        replay, adjoint = residuals.get("replay_residual", 0.0), residuals.get("adjoint_residual", 0.0)
        if not replay <= self.tolerance:
            notes.append(
                f"the hidden series are left out: its outputs are not those of torch's equations (they differ by {replay:.1g} of the largest): an overridden"
                " forward, a hook that changes what it gives, an edit in place, dropout that cannot be replayed, or NaN"
            )
            return False
        if not adjoint <= self.tolerance:
            notes.append(
                f"the hidden series are left out: the gradient of its input is not what they lead to (it differs by {adjoint:.1g} of the largest):"
                " a hook that changes a gradient, or an edit in place"
            )
            return False
        return True


def traces(targets: Iterable[Target], generator: torch.Generator) -> list[Trace]:
    """Work out what was seen of these in this step; nothing is copied from the device, and one that cannot be worked out says so alone."""
    found = []
    for target in targets:
        try:
            found.append(_traced(target, generator))
        except Exception as error:  # noqa: BLE001  (whatever a sequence module is made to do)
            found.append(
                Trace(
                    target.name,
                    kind=target.kind,
                    notes=[f"it could not be worked out: {type(error).__name__}: {error}"],
                )
            )
    return found


def _traced(target: Target, generator: torch.Generator) -> Trace:
    result = Trace(target.name, kind=target.kind, notes=[target.note] if target.note else [])
    passes = {s.number for s in target.seen if s.task is not None} or {s.number for s in target.seen}
    if target.repeated or not passes:
        if not target.note:
            result.notes.append(
                _NOT_FOLLOWED
                if target.repeated
                else "it ran without a graph"
                if target.without_grad
                else "it did not run in this step"
            )
        return result
    changed = target.sentinel.difference()
    if changed is not None:
        result.checks["changed"] = changed
    mine = [s for s in target.seen if s.number == max(passes)]
    chain = _chain(mine, result.notes) if target.recurrent else mine if mine[0].single else mine[-1:]
    _reached(target, chain, result.notes)
    result.arrived = any(s.task is not None for s in chain)
    own = _own_lengths(chain[0]) if len(chain) == 1 else None
    whole = Series("", sum(s.layout.steps for s in chain), chain[0].layout.rows, {})
    result.series = [whole]
    if any("x" in s.squares for s in chain):
        whole.values["grad_input"] = _series(chain, "x", own)
    if target.recurrent:
        _walk(chain, own, result, generator)
    if "grad_input" not in whole.values and result.arrived:
        result.notes.append(_NO_GRADIENT)
    if target.recurrent:
        return result
    states = {
        name: _series(chain, key, own)
        for key, name in (("h", "grad_hidden"), ("c", "grad_cell"))
        if any(key in s.squares for s in chain)
    }
    if states:
        result.series.append(Series("l0", whole.length, whole.rows, states))
    return result


def _reached(target: Target, chain: Sequence[Seen], notes: list[str]) -> None:
    """Let only the last backward pass count, and say what there was besides."""
    tasks = {s.task for s in chain if s.task is not None}
    task = max(tasks, default=None)
    for seen in chain:
        if seen.task != task:
            seen.squares = {}
            if seen.call is not None:
                seen.call.gradients = {}
    if task is None:
        notes.append("no gradient reached it" if any(s.handles for s in chain) else _NO_GRADIENT)
    passes = len(target.passes.union(s.number for s in target.seen if s.task is not None))
    if passes > 1:
        notes.append(f"{passes} passes were accumulated in this step; the last is shown")
    backwards = max(len(tasks), *(s.tasks for s in chain))
    if backwards > 1:
        notes.append(f"{backwards} backward passes reached it; the last is shown")


def _walk(chain: Sequence[Seen], own: Tensor | None, result: Trace, generator: torch.Generator) -> None:
    """Add what walking back through a recurrent module gives."""
    calls = [s.call for s in chain if s.call is not None]
    if len(calls) < len(chain):
        result.notes.append("what it took and gave could not be kept")
        return
    if not chain[0].layout.rows:
        result.notes.append("its batch has no rows")
        return
    if any(s.derived for s in chain):
        result.notes.append("the hidden series are left out: a gradient of a gradient went through it")
        return
    freed = any(
        w.numel() and not w.untyped_storage().size() for call in calls for w in call.weights
    )  # to read these would end the process
    if freed or any(
        w._version != v for s, c in zip(chain, calls, strict=True) for w, v in zip(c.weights, s.versions, strict=True)
    ):
        result.notes.append(
            f"the hidden series are left out: its weights were {'freed' if freed else 'edited'} between the forward pass and the step"
        )
        return
    if calls[0].spec.dropout and calls[0].random is None:
        result.notes.append(
            "what dropout kept between its layers cannot be known on this device; the gradient of its input is exact all the same"
        )
        return
    if any(call.changed for call in calls):
        result.notes.append("its state is changed between its calls, so how far back it can see is not known")
        result.series += _by_call(calls)
        return
    result.reached = _since_the_cut(calls)
    if result.reached is not None:
        result.notes.append(f"the state is detached between its calls: gradients end {result.reached} timesteps back")
    (module, *parts), result.facts = trace(calls, chain[0].layout.chosen(own) if own is not None else None, generator)
    result.derived = "grad_input" in module.values
    result.series[0].values.update(module.values)
    result.series += parts
    if chain[0].single:
        parts[0].values.update(_of_every_row(chain, calls))
    # Of an output that is a view and was edited in place, autograd forgets who asked for its gradient.
    result.alone = all(call.alone for call in calls) or not any(call.gradients.keys() - {"x"} for call in calls)
    result.tolerance = max(_NARROW if call.narrow else _TOLERANCE.get(call.y.dtype, _NARROW) for call in calls)
    if calls[0].carried:
        result.checks["carried"] = calls[0].h0.abs().max()


def _of_every_row(chain: Sequence[Seen], calls: Sequence[Call]) -> dict[str, Tensor]:
    """Return what arrived at the states of a cell: the total, and not only of the rows that are looked at. Of a fused cell, a part of what c gets comes through h."""
    names = {"h": "grad_hidden"} | ({"c": "grad_cell"} if all(call.total for call in calls) else {})
    return {name: _series(chain, key, None) for key, name in names.items() if any(key in s.squares for s in chain)}


def _by_call(calls: Sequence[Call]) -> list[Series]:
    """Return what arrived at the states of a cell, a call after the other: of each what autograd says, whatever happens between."""
    found = {"grad_hidden": "h"} | (
        {"grad_cell": "c"} if calls[0].total else {}
    )  # of a fused cell, the rest comes through h
    values = {name: torch.stack([_size(call, key) for call in calls]) for name, key in found.items()}
    return [Series("l0", len(calls), calls[0].layout.rows, values)]


def _size(call: Call, name: str) -> Tensor:
    gradient = call.gradients.get(name)
    return square(gradient).sum().sqrt() if gradient is not None else call.y.new_zeros((), dtype=torch.float64)


def _since_the_cut(calls: Sequence[Call]) -> int | None:
    """Return how many of the newest timesteps lie after the last state that was handed on detached; None where none was."""
    cuts = [k for k, call in enumerate(calls) if call.joined is False and k]
    return sum(len(call.x) for call in calls[cuts[-1] :]) if cuts else None


def _chain(seen: list[Seen], notes: list[str]) -> list[Seen]:
    """Return the last calls that make one sequence, each with the state of the one before."""
    chains: list[list[Seen]] = []
    for one in seen:
        if chains and one.call is not None and (one.call.joined is not None or one.call.changed):
            chains[-1].append(one)
        else:
            chains.append([one])
    chosen = next((c for c in reversed(chains) if any(s.task is not None for s in c)), chains[-1])
    if len(chains) > 1:
        notes.append(
            f"it ran over {len(chains)} sequences in this pass, each with a state of its own; the last is shown"
        )
    return chosen


def _own_lengths(seen: Seen) -> Tensor | None:
    """Return the lengths of rows, (B,), where they end in padding: timesteps whose input and gradient are exactly zero. None: all are full."""
    if seen.lengths is not None:
        return seen.lengths
    if seen.blank is None or "x" not in seen.squares:
        return None
    padding = (seen.blank & (seen.squares["x"] == 0)).flip(0).to(torch.int64).cumprod(0).sum(0)
    if padding.device.type == "cpu" and not padding.any():  # elsewhere looking would be a synchronisation
        return None
    return (seen.layout.steps - padding).clamp(min=1)


def _series(chain: Sequence[Seen], name: str, lengths: Tensor | None) -> Tensor:
    """Return the norm over rows and features per timestep, oldest first, aligned at the rows' ends; (T,)."""
    if lengths is not None:
        return by_lag(chain[0].squares[name], lengths)[0].flip(0).sqrt()
    like = next(s.squares[name] for s in chain if name in s.squares)
    return torch.cat(
        [s.squares[name].sum(1) if name in s.squares else like.new_zeros(s.layout.steps) for s in chain]
    ).sqrt()
