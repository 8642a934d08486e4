"""What a recorder has seen -> numbers on the device, and, once they are copied, `SequenceStats`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradwatch.model.forward_hooks import StepView, Transfer
from gradwatch.timesteps.adjoint import by_lag, square
from gradwatch.timesteps.call_records import CallRecord, SequenceCall, SequenceModule, StateOrigin
from gradwatch.timesteps.output import over_batch
from gradwatch.timesteps.padding import equal_to_last, padding_of, told
from gradwatch.timesteps.walk import Series, gradients_through_time
from gradwatch.values.sequences import Mixing, RecurrenceName, SequenceStats, horizon_of
from gradwatch.values.snapshot import Fact, FactName

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest residual of the replay and of the adjoint; formats narrower than float32 lose more."""
_NARROW = 5e-2
_SCALED = frozenset({"grad_input", "grad_hidden", "grad_hidden_direct", "grad_cell"})
"""Series that carry the loss scale."""


_VMAPPED = "no gradient of it can be read: the backward pass is vmapped (is_grads_batched=True, torchjd)"
_NO_GRADIENT = "its input has no gradient, and could not be given one"
_NOT_GIVEN = "its input has no gradient; named in timesteps= it is given one, where that does no harm"
_INSIDE = "its states lie inside of one call: of gradients through it, only that of its input is seen"
_NOT_FOLLOWED = (
    "its calls run once more within the backward pass, one by one:"
    " reentrant checkpointing of single timesteps cannot be followed"
)


@dataclass
class Trace:
    """One sequence module of a step: its numbers on their way from the device."""

    module: str
    series: list[Series] = field(default_factory=list)
    facts: dict[tuple[FactName, str], Tensor] = field(default_factory=dict)
    """By name and part."""
    kind: RecurrenceName | None = None
    mixing: Mixing = ""
    checks: dict[str, Tensor] = field(default_factory=dict)
    """Numbers on which notes and certificates depend."""
    notes: list[str] = field(default_factory=list)
    over_batch: bool = False
    """Whether it takes the rows of the batch for timesteps, by what the model gave."""
    reached: int | None = None
    """How many of the newest timesteps lie after the last detached state between its calls; None: none is detached."""
    arrived: bool = False
    """Whether a gradient reached it: where none did, no factor is on what is shown."""
    tolerance: float = 0.0
    derived: bool = False
    """Whether the gradient of its input comes from the walk back, and not from autograd."""
    alone: bool = True
    """Whether nothing but this module uses its input: then a large adjoint residual condemns the hidden series."""

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """Return everything that is to be copied, by part and name."""
        found = {(series.part, name): value for series in self.series for name, value in series.values.items()}
        return (
            found
            | {("fact", f"{name} {part}"): value for (name, part), value in self.facts.items()}
            | {("check", name): value for name, value in self.checks.items()}
        )

    def collect(
        self, step: StepView, transfer: Transfer, share: float
    ) -> Callable[[], tuple[list[SequenceStats], list[Fact]]]:
        """Hand the numbers over, and return what makes values of them once they have been copied.

        Args:
            step: that is measured.
            transfer: copies the numbers.
            share: of its maximum, below which the lag gain counts as gone.

        """
        pending = {key: transfer.add(tensor) for key, tensor in self.tensors().items()}

        def values() -> tuple[list[SequenceStats], list[Fact]]:
            numbers = {key: number.values for key, number in pending.items()}
            return self._stats(numbers, step, share), self.measured(numbers)

        return values

    def _stats(
        self, values: Mapping[tuple[str, str], Sequence[float]], step: StepView, share: float
    ) -> list[SequenceStats]:
        checks = {name: values["check", name][0] for name in self.checks}
        padding, data = told(values["check", "padding"]) if "padding" in checks else (None, None)
        scaled, scale = self.arrived and step.scaled(checks.get("changed")), step.factor
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
            if scale != 1.0:
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
                    mixing=self.mixing if not series.part else "",
                    reverse=series.reverse,
                    censored=known.censored if known is not None else None,
                    scaled=scaled,
                    note="; ".join(notes) or None if not series.part else None,
                    reached=reached if not series.part else None,
                    padding=padding if not series.part else None,
                    grad_data=data if not series.part else None,
                    over_batch=self.over_batch and not series.part,
                    **mine,
                )
            )
        return found or [SequenceStats(self.module, kind=self.kind, mixing=self.mixing, note="; ".join(notes) or None)]

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
                "the hidden series are left out: its outputs are not those of torch's equations"
                f" (they differ by {replay:.1g} of the largest): an overridden forward,"
                " a hook that changes what it gives, an edit in place, dropout that cannot be replayed, or NaN"
            )
            return False
        if not adjoint <= self.tolerance:
            notes.append(
                "the hidden series are left out: the gradient of its input is not what they lead to"
                f" (it differs by {adjoint:.1g} of the largest):"
                " a hook that changes a gradient, or an edit in place"
            )
            return False
        return True


def traces(
    targets: Iterable[SequenceModule], generator: torch.Generator, given: torch.Size | None = None
) -> list[Trace]:
    """Work out what was seen in this step, without a copy from the device; one module that fails says so alone.

    Args:
        targets: the modules that were seen.
        generator: of random cotangents.
        given: the shape of what the model gave, where that is known.

    """
    found = []
    for target in targets:
        try:
            found.append(_worked_out(target, generator, given))
        except Exception as error:  # noqa: BLE001  (whatever a sequence module is made to do)
            note = f"it could not be worked out: {type(error).__name__}: {error}"
            found.append(Trace(target.name, kind=target.recurrence, mixing=target.mixing, notes=[note]))
    return found


def _worked_out(target: SequenceModule, generator: torch.Generator, given: torch.Size | None) -> Trace:
    inside = _INSIDE if target.mixing in ("loop", "scan") else None
    notes = [note for note in (target.note, inside) if note is not None]
    result = Trace(target.name, kind=target.recurrence, mixing=target.mixing, notes=notes)
    passes = {s.number for s in target.calls if s.task is not None} or {s.number for s in target.calls}
    if target.repeated or not passes:
        if not target.note:
            result.notes.append(_why_not(target))
        return result
    changed = target.sentinel.difference()
    if changed is not None:
        result.checks["changed"] = changed
    last = [c for c in target.calls if c.number == max(passes)]
    newest = _last_sequence(last, result.notes) if last[0].single else last[-1:]
    chain = _chain(last, result.notes) if target.recurrent else newest
    _reached(target, chain, result.notes)
    result.arrived = any(s.task is not None for s in chain)
    result.over_batch = target.recurrent and len(last) == 1 and over_batch(given, chain[0].layout)
    own = _own_lengths(chain[0]) if len(chain) == 1 else None
    whole = Series("", sum(s.layout.steps for s in chain), chain[0].layout.rows, {})
    result.series = [whole]
    if any("x" in s.squares for s in chain):
        whole.values["grad_input"] = _series(chain, "x", own)
    if target.recurrent:
        _walk(chain, own, result, generator)
    if "grad_input" not in whole.values and result.arrived:
        result.notes.append(_VMAPPED if any(call.batched for call in chain) else _no_gradient(target))
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


def _no_gradient(target: SequenceModule) -> str:
    return _NOT_GIVEN if target.mixing else _NO_GRADIENT


def _why_not(target: SequenceModule) -> str:
    """Say why there is nothing to work out."""
    if target.repeated:
        return _NOT_FOLLOWED
    return "it ran without a graph" if target.without_grad else "it did not run in this step"


def _reached(target: SequenceModule, chain: Sequence[SequenceCall], notes: list[str]) -> None:
    """Let only the last backward pass count, and say what there was besides."""
    tasks = {s.task for s in chain if s.task is not None}
    task = max(tasks, default=None)
    for call in chain:
        if call.task != task:
            call.forget()
    if task is None:
        notes.append("no gradient reached it" if any(s.handles for s in chain) else _no_gradient(target))
    passes = len(target.passes.union(s.number for s in target.calls if s.task is not None))
    if passes > 1:
        notes.append(f"{passes} passes were accumulated in this step; the last is shown")
    backwards = max(len(tasks), *(len(s.tasks) for s in chain))
    if backwards > 1:
        notes.append(f"{backwards} backward passes reached it; the last is shown")


def _walk(chain: Sequence[SequenceCall], own: Tensor | None, result: Trace, generator: torch.Generator) -> None:
    """Add what walking back through a recurrent module gives."""
    records = [call.record for call in chain if call.record is not None]
    reason = _why_not_walked(chain, records)
    if reason is not None:
        result.notes.append(reason)
        return
    if any(record.origin is StateOrigin.CHANGED for record in records):
        result.notes.append("its state is changed between its calls, so how far back it can see is not known")
        result.series += _by_call(records)
        return
    result.reached = _since_the_cut(records)
    if result.reached is not None:
        result.notes.append(f"the state is detached between its calls: gradients end {result.reached} timesteps back")
    rows_own = chain[0].layout.chosen(own) if own is not None else None
    (module, *parts), result.facts = gradients_through_time(records, rows_own, generator)
    result.derived = "grad_input" in module.values
    result.series[0].values.update(module.values)
    result.series += parts
    if chain[0].single:
        parts[0].values.update(_of_every_row(chain, records))
    # Of an output that is a view and was edited in place, autograd forgets who asked for its gradient.
    result.alone = all(r.sole_user for r in records) or not any(r.gradients.keys() - {"x"} for r in records)
    result.tolerance = max(_NARROW if r.narrow else _TOLERANCE.get(r.y.dtype, _NARROW) for r in records)
    if records[0].origin is StateOrigin.CARRIED:
        result.checks["carried"] = records[0].h0.abs().max()
    if len(records) == 1 and records[0].layout.lengths is None and "x" in records[0].gradients:
        result.checks["padding"] = padding_of(equal_to_last(records[0].x), square(records[0].gradients["x"]))


def _why_not_walked(chain: Sequence[SequenceCall], records: Sequence[CallRecord]) -> str | None:
    """Say why a recurrent module cannot be walked back through, if it cannot."""
    if len(records) < len(chain):
        return "its inputs and outputs could not be kept"
    if not chain[0].layout.rows:
        return "its batch has no rows"
    if any(call.derived for call in chain):
        return "the hidden series are left out: a gradient of a gradient went through it"
    freed = any(record.freed for record in records)
    if freed or any(record.edited for record in records):
        what = "freed" if freed else "edited"
        return f"the hidden series are left out: its weights were {what} between the forward pass and the step"
    if records[0].recurrence.dropout and records[0].random is None:
        return (
            "what dropout kept between its layers cannot be known on this device;"
            " the gradient of its input is exact all the same"
        )
    return None


def _of_every_row(chain: Sequence[SequenceCall], records: Sequence[CallRecord]) -> dict[str, Tensor]:
    """Return what arrived at the states of a cell where that is the total: of all rows, not only of those looked at."""
    names = {"h": "grad_hidden"}
    if all(record.c_through_h for record in records):  # else a part of it comes through h
        names["c"] = "grad_cell"
    return {name: _series(chain, key, None) for key, name in names.items() if any(key in c.squares for c in chain)}


def _by_call(records: Sequence[CallRecord]) -> list[Series]:
    """Return what arrived at the states of a cell, call by call: what autograd says, whatever happens between."""
    found = {"grad_hidden": "h"}
    if records[0].c_through_h:
        found["grad_cell"] = "c"
    values = {name: torch.stack([_size(record, key) for record in records]) for name, key in found.items()}
    return [Series("l0", len(records), records[0].layout.rows, values)]


def _size(record: CallRecord, name: str) -> Tensor:
    gradient = record.gradients.get(name)
    return square(gradient).sum().sqrt() if gradient is not None else record.y.new_zeros((), dtype=torch.float64)


def _since_the_cut(records: Sequence[CallRecord]) -> int | None:
    """Return how many of the newest timesteps lie after the last detached state; None where none was detached."""
    cuts = [k for k, record in enumerate(records) if record.origin is StateOrigin.DETACHED and k]
    return sum(len(record.x) for record in records[cuts[-1] :]) if cuts else None


def _chain(calls: list[SequenceCall], notes: list[str]) -> list[SequenceCall]:
    """Return the last calls that make one sequence, each with the state of the one before."""
    chains: list[list[SequenceCall]] = []
    for call in calls:
        if chains and call.record is not None and call.record.origin.continues:
            chains[-1].append(call)
        else:
            chains.append([call])
    # Those that no backward pass has reached are no part of the training.
    chains = [chain for chain in chains if any(call.task is not None for call in chain)] or chains[-1:]
    if len(chains) > 1:
        notes.append(_several(len(chains)))
    return chains[-1]


def _last_sequence(calls: list[SequenceCall], notes: list[str]) -> list[SequenceCall]:
    """Return the last calls of a cell that follow each other; the first always begins."""
    begins = [0, *(at for at, call in enumerate(calls) if at and call.begins)]
    if len(begins) > 1:
        notes.append(_several(len(begins)))
    return calls[begins[-1] :]


def _several(count: int) -> str:
    return f"it ran over {count} sequences in this pass, each with a state of its own; the last is shown"


def _own_lengths(call: SequenceCall) -> Tensor | None:
    """Return the lengths of rows, (B,), where they end in timesteps of zero input and gradient; else None."""
    if call.lengths is not None:
        return call.lengths
    if call.blank is None or "x" not in call.squares:
        return None
    padding = (call.blank & (call.squares["x"] == 0)).flip(0).to(torch.int64).cumprod(0).sum(0)
    if padding.device.type == "cpu" and not padding.any():  # elsewhere looking would be a synchronisation
        return None
    return (call.layout.steps - padding).clamp(min=1)


def _series(chain: Sequence[SequenceCall], name: str, lengths: Tensor | None) -> Tensor:
    """Return the norm over rows and features per timestep, oldest first, aligned at the rows' ends; (T,)."""
    if lengths is not None:
        return by_lag(chain[0].squares[name], lengths)[0].flip(0).sqrt()
    like = next(s.squares[name] for s in chain if name in s.squares)
    return torch.cat(
        [s.squares[name].sum(1) if name in s.squares else like.new_zeros(s.layout.steps) for s in chain]
    ).sqrt()
