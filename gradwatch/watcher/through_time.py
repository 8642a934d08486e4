"""The gradients through time of a step: what recorders have seen of it, and the horizon of the model where a need is declared."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradwatch.measurement.norms import number
from gradwatch.timesteps.model_calls import ModelCalls
from gradwatch.timesteps.model_gain import ModelGain
from gradwatch.timesteps.model_pass import model_gain
from gradwatch.timesteps.recorder import Recorder
from gradwatch.timesteps.series import Trace, traces
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Fact
from gradwatch.watcher.warn_once import Once, said

_log = logging.getLogger("gradwatch")

Timesteps = Literal["auto", False] | Mapping[str, int | None]
"""`watch`'s argument: recurrent modules alone, nothing, or other modules too, each with its dimension of time."""
Horizon = int | Mapping[str, int] | None
"""How many of the newest timesteps matter: to the model, or to modules by name."""

Key = tuple[object, ...]


@dataclass
class Sequences:
    """What was worked out of one step, on its way from the device."""

    traces: Sequence[Trace] = ()
    gains: Mapping[str, ModelGain | str] = field(default_factory=dict)
    """By module, "" for the model: its own memory, or why it could not be measured."""
    scale: float | Tensor | None = None
    """The loss scale of the backward pass; None: nobody said."""
    need: Horizon = None
    share: float = 0.0
    """Of its maximum, below which a lag gain counts as gone."""

    def tensors(self) -> dict[Key, Tensor]:
        """Return everything that is to be copied."""
        found: dict[Key, Tensor] = {(id(t), *key): tensor for t in self.traces for key, tensor in t.tensors().items()}
        found |= {("gain", name): gain.numbers for name, gain in self.gains.items() if isinstance(gain, ModelGain)}
        return found if self.scale is None else found | {("backward scale",): number(self.scale)}

    def values(
        self, numbers: Mapping[Key, Sequence[float]], changed: float | None
    ) -> tuple[tuple[SequenceStats, ...], tuple[Fact, ...]]:
        """Make values of them, each with the need that was declared for it.

        Args:
            numbers: what `tensors` gave, as numbers.
            changed: how far a gradient of the model at the step is from what arrived in the backward pass; None: not known.

        """
        scale = numbers["backward scale",][0] if self.scale is not None else None
        stats: list[SequenceStats] = []
        facts: list[Fact] = []
        for trace in self.traces:
            mine = {key: numbers[(id(trace), *key)] for key in trace.tensors()}
            stats += trace.stats(mine, scale, self.share, changed)
            facts += trace.measured(mine)
        for name, gain in self.gains.items():
            own = (
                SequenceStats("", "model", note=gain)
                if isinstance(gain, str)
                else gain.stats(numbers["gain", name], self.share)
            )
            if name:
                stats = _joined(stats, name, own)
            else:
                stats.insert(0, own)
        return tuple(self._needed(stats)), tuple(facts)

    def _needed(self, stats: Sequence[SequenceStats]) -> Iterator[SequenceStats]:
        needs = (
            {("", "model"): self.need}
            if isinstance(self.need, int)
            else {(name, ""): need for name, need in (self.need or {}).items()}
        )
        for one in stats:
            yield dataclasses.replace(one, need=needs.pop((one.module, one.part), None))
        for (name, part), need in needs.items():
            yield SequenceStats(name, part, need=need, note="nothing was seen of it in this step")


def _joined(stats: Sequence[SequenceStats], name: str, own: SequenceStats) -> list[SequenceStats]:
    """Put the memory of a module, measured on itself, beside what was seen of it."""
    found = []
    for one in stats:
        if (one.module, one.part) == (name, ""):
            notes = "; ".join(note for note in (one.note, own.note) if note) or None
            one = dataclasses.replace(  # noqa: PLW2901
                one,
                lag_gain=own.lag_gain,
                censored=own.censored,
                rows=own.rows or one.rows,
                length=one.length or own.length,
                note=notes,
            )
        found.append(one)
    return found


class ThroughTime:
    """Visits the forward pass of a probe step, and works out what it saw."""

    def __init__(self, timesteps: Timesteps, horizon: Horizon, share: float, warn: Once, *, strict: bool) -> None:
        """Take `watch`'s arguments; see there."""
        self._timesteps = timesteps
        self._need, self._share, self._warn, self._strict = horizon, share, warn, strict
        self._recorder = Recorder("auto" if timesteps is False else timesteps)
        self._calls = ModelCalls() if horizon is not None else None
        self._compiled = False
        self._generator = torch.Generator(device="cpu").manual_seed(0)  # a private one: the training's must not move

    # --- the forward pass, as hooks.Visitor ---

    def arm(self, modules: Mapping[str, nn.Module], *, compiled: bool) -> dict[int, nn.Module]:
        """Choose the modules to visit, by `id`."""
        self._compiled = compiled
        chosen = self._recorder.arm(modules, compiled=compiled)
        if self._calls is not None and not compiled:
            wanted = (
                {} if isinstance(self._need, int) else {id(modules[n]): n for n in (self._need or {}) if n in modules}
            )
            self._calls.arm(wanted, frozenset(self._recorder.targets))
            chosen |= {id(m): m for m in modules.values()}
        return chosen

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Take note of the inputs; what is returned takes their place."""
        with self._aside():
            if self._calls is not None and not self._compiled:
                self._calls.entered(module)
            return self._recorder.entered(module, inputs)
        return None

    def left(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:  # noqa: ANN401
        """Take note of the output."""
        with self._aside():
            if self._calls is not None and not self._compiled:
                self._calls.left(module, inputs, kwargs)
            self._recorder.left(module, inputs, kwargs, output)

    def clear(self) -> None:
        """Let go of what was seen."""
        self._recorder.clear()
        if self._calls is not None:
            self._calls.clear()

    # --- the step ---

    def work_out(
        self, model: nn.Module, scale: float | Tensor | None, mine: AbstractSet[int], others: AbstractSet[int]
    ) -> Sequences:
        """Work out the gradients through time of this step.

        Args:
            model: the watched one.
            scale: the loss scale of the backward pass; None: nobody said.
            mine: what the optimizer of this step steps, parameters by `id`.
            others: what the others step.

        """
        targets = self._recorder.owned(mine, others)
        found = traces(targets, self._generator)
        self._recorder.next_step(targets)
        if not others:
            found += [Trace(name, notes=["the model has no module of this name"]) for name in self._recorder.missing()]
        need: Horizon = self._need
        if isinstance(need, Mapping):
            theirs = {t.name for t in self._recorder.targets.values()} - {t.name for t in targets}
            need = {name: count for name, count in need.items() if name not in theirs}
        walked = {t.name for t in targets if t.recurrent}
        asked = [""] if isinstance(need, int) else [name for name in need or {} if name not in walked]
        gains = {name: self._gain(model, name) for name in asked}
        if self._calls is not None and not others:  # the next optimizer asks for the same
            self._calls.forget()
        return Sequences(found, gains, scale, need, self._share) if found or gains else Sequences()

    def _gain(self, model: nn.Module, name: str) -> ModelGain | str:
        call = self._calls.calls.get(name) if self._calls is not None else None
        if call is None and self._compiled:
            return "its memory is not measured: torch.compile is in use, and compiled code calls no hooks"
        if call is None:
            return "its memory is not measured: it was not called with gradients in this step"
        module = call.module()
        if module is None:
            return "its memory is not measured: what was called is gone"
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
        except Exception as error:
            if self._strict:
                raise
            _log.debug("the memory of %s", name or "the model", exc_info=error)
            return f"the memory of {name or 'the model'} could not be measured: {said(error)}"

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._strict:
                raise
            self._warn("timesteps", f"a sequence module could not be looked at: {said(error)}")
            _log.debug("a sequence module", exc_info=error)
