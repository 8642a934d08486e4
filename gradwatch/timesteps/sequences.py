"""The gradients through time of a step: what was recorded of it, and the model's horizon where a need is declared."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from gradwatch.model.attempts import Attempts
from gradwatch.model.forward_hooks import ModelView, Part, ProbeValues, StepView, Transfer
from gradwatch.timesteps.call_records import SequenceModule
from gradwatch.timesteps.model_calls import ModelCalls
from gradwatch.timesteps.model_gain import ModelGain
from gradwatch.timesteps.model_gain import Timesteps as Declared
from gradwatch.timesteps.model_pass import model_gain
from gradwatch.timesteps.output import OverBatch
from gradwatch.timesteps.recorder import Recorder
from gradwatch.timesteps.series import Trace, traces
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Fact

_log = logging.getLogger("gradwatch")

Timesteps = Declared | Literal[False]
"""`watch`'s argument: recurrent modules alone, nothing, or other modules too, each with its dimension of time."""
Need = int | Mapping[str, int] | None
"""How many of the newest timesteps matter: to the model, or to modules by name."""


def _joined(stats: Sequence[SequenceStats], name: str, own: SequenceStats) -> list[SequenceStats]:
    """Put the horizon of a module, measured on itself, beside what was seen of it."""
    found = []
    for one in stats:
        if (one.module, one.part) == (name, ""):
            notes = "; ".join(note for note in (one.note, own.note) if note) or None
            one = dataclasses.replace(  # noqa: PLW2901
                one,
                lag_gain=own.lag_gain,
                lag_gain_error=own.lag_gain_error,
                censored=own.censored,
                rows=own.rows or one.rows,
                length=one.length or own.length,
                note=notes,
            )
        found.append(one)
    return found


class Sequences:
    """Sees sequence modules, and what their gradients through time are worked out from; a `Probe`."""

    def __init__(self, timesteps: Timesteps, need: Need, share: float, attempts: Attempts) -> None:
        """Begin with nothing seen.

        Args:
            timesteps: as for `gradwatch.watch`.
            need: how many of the newest timesteps matter, as `horizon=` declares.
            share: of its maximum, below which a lag gain counts as gone.
            attempts: knows which calls and backward passes an exception ended.

        """
        self._timesteps, self._need, self._share = timesteps, need, share
        self._recorder = Recorder("auto" if timesteps is False else timesteps, attempts)
        self._calls = ModelCalls(attempts) if need is not None else None
        self._compiled = False
        self._generator = torch.Generator(device="cpu").manual_seed(0)  # a private one: the training's must not move

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose the sequence modules, by `id`; all modules where a need is declared."""
        self._compiled, modules = view.compiled, view.modules
        chosen = self._recorder.arm(modules, compiled=view.compiled)
        if self._calls is not None and not view.compiled:
            needs = self._need if isinstance(self._need, Mapping) else {}
            self._calls.arm({id(modules[n]): n for n in needs if n in modules}, frozenset(self._recorder.targets))
            chosen |= {id(m): m for m in modules.values()}
        return chosen

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Take note of the inputs; what is returned takes their place."""
        if self._calls is not None and not self._compiled:
            self._calls.entered(module)
        return self._recorder.entered(module, inputs)

    def left(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Take note of the output."""
        if self._calls is not None and not self._compiled:
            self._calls.left(module, inputs, kwargs)
        self._recorder.left(module, inputs, kwargs, output)

    def clear(self) -> None:
        """Let go of what was seen."""
        self._recorder.clear()
        if self._calls is not None:
            self._calls.clear()

    def collect(self, step: StepView, transfer: Transfer) -> Part:
        """Work out the gradients through time of this step, and the horizons that were asked for."""
        self._recorder.leave_out_void()
        targets = self._recorder.owned(step.mine, step.others)
        found = traces(targets, self._generator, self._recorder.given)
        self._recorder.next_step(targets)
        if not step.others and self._calls is None:  # else the model's own pass says it, which knows its inputs too
            found += [Trace(name, notes=["the model has no module of this name"]) for name in self._recorder.missing()]
        need = self._open_need(targets)
        walked = {t.name for t in targets if t.recurrent}
        asked = [""] if isinstance(need, int) else [name for name in need or {} if name not in walked]
        part_of = self._part(step.modules) if "" in asked else ""
        gains = [(name, self._gain(step.modules[""], name)) for name in asked]
        if self._calls is not None and not step.others:  # the next optimizer asks for the same
            self._calls.forget()
        if not found and not gains:
            return ProbeValues
        walks = [trace.collect(step, transfer, self._share) for trace in found]
        horizons = [(n, g.collect(transfer, self._share) if isinstance(g, ModelGain) else g) for n, g in gains]

        def part() -> ProbeValues:
            stats: list[SequenceStats] = []
            facts: list[Fact] = []
            for walk in walks:
                mine, measured = walk()
                stats += mine
                facts += measured
            for name, own in horizons:
                gain = own() if callable(own) else SequenceStats("", "model", note=str(own))
                if isinstance(own, OverBatch):
                    stats = _over_batch(stats, own)
                gain = dataclasses.replace(gain, module="" if name else part_of)
                if name:
                    stats = _joined(stats, name, gain)
                else:
                    stats.insert(0, gain)
            return ProbeValues(sequences=tuple(_needed(stats, need)), facts=tuple(facts))

        return part

    def _open_need(self, targets: Iterable[SequenceModule]) -> Need:
        """Return the need that was declared, without what another optimizer's step is to tell, or has told."""
        told = {name for name, call in (self._calls.calls if self._calls is not None else {}).items() if call.told}
        if isinstance(self._need, int):
            return None if "" in told else self._need
        theirs = {t.name for t in self._recorder.targets.values()} - {t.name for t in targets} | told
        return {name: count for name, count in (self._need or {}).items() if name not in theirs}

    def _part(self, modules: Mapping[str, nn.Module]) -> str:
        """Return the module whose horizon stands for the model's, where a loop calls its parts and never the model."""
        call = self._calls.of("") if self._calls is not None and self._calls.in_pieces else None
        module = call.module() if call is not None else None
        return next((name for name, other in modules.items() if other is module), "")

    def _gain(self, model: nn.Module, name: str) -> ModelGain | OverBatch | str:
        call = self._calls.of(name) if self._calls is not None else None
        if call is None and self._compiled:
            return "torch.compile is in use, and compiled code calls no hooks"
        if call is None:
            return "it was not called with gradients in this step"
        module = call.module()
        if module is None:
            return "what was called is gone"
        call.told = True
        timesteps: Any = self._timesteps or "auto"
        if name:  # its own input
            timesteps = (
                {"": self._timesteps[name]}
                if isinstance(self._timesteps, Mapping) and name in self._timesteps
                else "auto"
            )
        try:
            with call.autocast():
                return model_gain(module, call.args, call.kwargs, timesteps=timesteps, watched=None if name else model)
        except OverBatch as error:
            return error
        except Exception as error:  # noqa: BLE001  (whatever a model does when it is run once more)
            _log.debug("the horizon of %s", name or "the model", exc_info=error)
            return f"the extra pass failed: {type(error).__name__}: {error}"


def _over_batch(stats: Sequence[SequenceStats], found: OverBatch) -> list[SequenceStats]:
    """Say of a module that it runs over the batch."""
    its = next((s for s in stats if (s.module, s.part) == (found.place, "")), None)
    its = its or SequenceStats(found.place, length=found.steps, rows=found.rows)
    return [*(s for s in stats if s is not its), dataclasses.replace(its, over_batch=True)]


def _needed(stats: Sequence[SequenceStats], need: Need) -> Iterator[SequenceStats]:
    """Put to each the need that was declared for it."""
    needs = (
        {("", "model"): need} if isinstance(need, int) else {(name, ""): count for name, count in (need or {}).items()}
    )
    for one in stats:
        of = "" if one.part == "model" else one.module
        yield dataclasses.replace(one, need=needs.pop((of, one.part), None))
    for (name, part), count in needs.items():
        yield SequenceStats(name, part, need=count, note="it was not seen in this step")
