"""One batch: does what a model gives at a timestep depend on a later one, as no model that is to predict may."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.checks.batch import Call, arguments, call_in_training_step, refuse
from gradwatch.checks.causal_words import words
from gradwatch.checks.futures import Futures, Timed, difference, first_difference, inexact
from gradwatch.checks.horizon import Input
from gradwatch.checks.timed_pass import TimedPass
from gradwatch.sinks.terminal.errors import causality_error
from gradwatch.timesteps.model_gain import Timesteps
from gradwatch.values.causality import Causality, Leak
from gradwatch.values.report import GradientHealthError

_POSITIONS = 16
"""Timesteps of the output at which the future is changed."""
_DERIVATIVES = 64
"""Timesteps of the output that are differentiated, to tell where to change it besides."""
_EXACT = 1e-12
"""What counts as a difference in float64, over the largest entry."""
_SEEN = 1e-4
"""What counts as one in the format of the model."""
_SMALL, _ALIKE = 1e-4, 0.7
"""A difference that may be rounding within the model; the least cosine of two that are the same leak."""
_SHRINKS = 1e-4
"""How much of a difference float64 may leave of it: of a rounding error in float32 it leaves 2e-9."""
_GRADIENT = 1e-6
"""Share of the largest derivative by any timestep from which on that by a later one is no rounding error."""


def causal(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    offset: int | None = None,
    training: bool = False,
    output: Callable[[Any], Any] | None = None,
    timesteps: Timesteps = "auto",
    input: Input = None,  # noqa: A002  (the word of the field)
) -> Causality:
    """Measure whether what a model gives at a timestep depends on what it is given after it: whether it looks ahead.

    All that comes after a timestep is given other values, and what the model gives up to that timestep must stay the
    same bit for bit, at up to 16 timesteps and in several ways. A difference is measured again in float64, and counts
    as rounding where it shrinks with the precision. The derivative by later timesteps says where to look closely.

    The model runs some 30 times, without its hooks; it, its gradients, buffers and all random states are left as they
    were. Of what has timesteps, all is changed: floating-point inputs, whole numbers, booleans, packed sequences.

    What it cannot see is what happens before the batch: data that was scaled, filled, resampled or labelled with what
    came later. `assert_causal_features` looks at that.

    Args:
        model: whatever it is wrapped in.
        batch: as for `gradwatch.horizon`.
        offset: how many timesteps ahead an output may look: 1 where that at t is made of what is known at t + 1, -1
            where it must not even look at t. Default: 0, where the output has as many timesteps as the input.
        training: whether it is measured in training mode (BatchNorm then averages over what is to come), and not in
            evaluation mode; dropout is drawn alike in all passes.
        output: takes what the model returned and gives the tensor that is meant. Default: the first that has timesteps.
        timesteps: as for `gradwatch.horizon`; "" is the model's own inputs.
        input: the input that is meant, as for `gradwatch.horizon`. Default: all that have as many timesteps as the
            output; name one where others may be seen whole, as an encoder's.

    Returns:
        What was found; `print` it. `leak` has the pair of timesteps that lie farthest apart, and the first module whose
        own output leaks.

    Raises:
        TypeError, ValueError: an argument is not what it should be; the output has no timesteps, or others than the
            input, so that `offset` must say which belong together; two passes on the same batch differ.
        RuntimeError: the model cannot be run by one process (FSDP), refuses every other future, or changes so little
            that it may be rounding, and does not run in float64.

    """
    _refuse(model, offset, output)
    call = Call(model, *arguments(model, batch))
    try:
        return _measured(call, timesteps, output, input, offset, training=training)
    except Exception:
        # A LightningModule may have no forward, or one that takes a part of the batch.
        of_step = call_in_training_step(model, batch)
        if of_step is None:
            raise
    found = _measured(of_step, timesteps, output, input, offset, training=training)
    what = "forward" if of_step.module is model else f"{type(of_step.module).__name__} that it calls"
    note = f"Of the training step only the {what} was looked at, and nothing that is computed around it"
    return dataclasses.replace(found, notes=(*found.notes, note))


def _measured(
    call: Call,
    timesteps: Timesteps,
    output: Callable[[Any], Any] | None,
    wanted: Input,
    offset: int | None,
    *,
    training: bool,
) -> Causality:
    """Look at each output that lies in time as the first does, until one looks ahead."""
    first = _Check(call, timesteps, output, wanted, training=training)
    found = first.result(offset)
    for number in first.others:
        if found.causal:
            found = _Check(call, timesteps, output, wanted, training=training, number=number).result(offset)
    return found


def assert_causal(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    offset: int | None = None,
    training: bool = False,
    output: Callable[[Any], Any] | None = None,
    timesteps: Timesteps = "auto",
    input: Input = None,  # noqa: A002  (as above)
) -> Causality:
    """Do `causal`, and raise if the model looks ahead.

    Raises:
        GradientHealthError: with the pair of timesteps, the first module that looks ahead, why, and the remedy.
        TypeError, ValueError, RuntimeError: as `causal`.

    """
    __tracebackhide__ = True
    found = causal(model, batch, offset=offset, training=training, output=output, timesteps=timesteps, input=input)
    if not found.causal:
        raise GradientHealthError(causality_error(found))
    return found


def _refuse(model: object, offset: object, output: object) -> None:
    refuse(model, output)
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, int)):
        raise TypeError(f"offset must be a whole number of timesteps, or None, got {offset!r}")


class _Check:
    """One model, one batch."""

    def __init__(
        self,
        call: Call,
        timesteps: Timesteps,
        output: Callable[[Any], Any] | None,
        wanted: Input,
        *,
        training: bool,
        number: int = 0,
    ) -> None:
        self._pass = TimedPass(call, timesteps, output, wanted, training=training, number=number)
        self.others = range(1, self._pass.outputs)
        """Numbers of further outputs."""
        self._training = training
        self._rounding = 0.0
        self._in_other: Timed | None = None
        """The output in another precision, once that was asked for."""

    def result(self, offset: int | None) -> Causality:
        """Look for a leak."""
        may = offset or 0
        self._output = dataclasses.replace(self._pass.output, data=self._pass.run({}))
        if difference(self._output, self._pass.run({}), self._output.steps) != 0:
            raise ValueError(
                "two passes of the model on the same batch differ, so whether it looks ahead cannot be told: it draws"
                " from a random state that is not torch's, numpy's or Python's own, or computes in another order"
            )
        inputs = self._pass.inputs = self._that_matter()
        steps, labels = inputs[0].steps, tuple(one.label for one in inputs)
        positions = _positions(self._output.steps, steps, may)
        wary = [t for t in _positions(self._output.steps, steps, may, _DERIVATIVES) if self._looks(t, may)]
        leak = self._search(positions, wary, may)
        if leak is not None and offset is None and leak.ahead <= steps - self._output.steps:
            raise ValueError(
                f"the output has {self._output.steps} timesteps and {leak.input} has {steps}, and an output depends on"
                f" what lies {leak.ahead} ahead of it: offset={steps - self._output.steps} says that the last of both"
                " belong together, offset=0 that the first do"
            )
        notes = (*self._pass.notes, *(self._notes(positions, wary, may) if leak is None else ()))
        return Causality(steps, labels, tuple(positions), may, self._training, leak, self._rounding, notes)

    def _that_matter(self) -> list[Timed]:
        """Return the inputs without which the output would be another: targets, of which only a loss is made, are none.

        Raises:
            ValueError: there is none.

        """
        inputs = self._pass.inputs
        futures = Futures(inputs)

        def matters(label: str) -> bool:
            for way in futures.ways:
                try:
                    if difference(self._output, self._pass.run(futures.of(way, -1, label)), self._output.steps) != 0:
                        return True
                except Exception:  # noqa: BLE001  (it is looked at)
                    return True
            return False

        found = [one for one in inputs if matters(one.label)]
        if not found and self._decides:  # nothing can be told of one that always decides alike
            return inputs
        without = " and ".join(one.label for one in inputs if one not in found)
        if not found:
            said = ". ".join(["", *self._pass.notes])
            raise ValueError(f"the output does not depend on {without}, which has as many timesteps{said}")
        if without:
            self._pass.notes.append(f"The output does not depend on {without}")
        return found

    def _looks(self, t: int, may: int) -> bool:
        """Tell whether the output at a timestep has a derivative by what comes after it."""
        return self._pass.derivative(t, _GRADIENT) > t + may

    @property
    def _decides(self) -> bool:
        """Whether the output is whole numbers or booleans, which seldom change with what they are made of."""
        return not inexact(self._output.data)

    def _notes(self, positions: Sequence[int], wary: Sequence[int], may: int) -> tuple[str, ...]:
        """Return what is worth telling where no leak was found."""
        notes = []
        if wary:
            notes.append(f"A gradient goes to later timesteps, as from {wary[0]}, although no value comes from there")
        if self._decides:
            t = positions[len(positions) // 2]
            place = self._pass.place(Futures(self._pass.inputs).of(0, t + may), t, None, _SEEN)
            where = f": what {place.name or 'the model'} computes looks ahead" if place is not None else ""
            notes.append(f"The output is decisions, which seldom change{where}; output= may give what they are made of")
        return tuple(notes)

    def _search(self, positions: Sequence[int], wary: Sequence[int], may: int) -> Leak | None:
        """Change what comes after timesteps, until the output up to one changes with it."""
        futures = Futures(self._pass.inputs)
        every = [(t, way) for way in futures.ways for t in wary[:: max(len(wary) // _POSITIONS, 1)]]
        for number, t in enumerate(positions):
            every += [(t, futures.ways[turn % len(futures.ways)]) for turn in (number, number + 1)]
        refused: Exception | None = None
        passed = False
        for t, way in every:
            future = futures.of(way, t + may)
            try:
                change = difference(self._output, self._pass.run(future), t)
            except Exception as error:  # noqa: BLE001  (a model may refuse values that are none of its data)
                refused = error
                continue
            passed = True
            if change > 0 and self._is_real(future, t, change):
                return self._leak(futures, t, way, may, change)
        if refused is not None and not passed:
            raise RuntimeError(f"the model cannot be run with another future: {refused}") from refused
        return None

    def _is_real(self, future: dict[int, Tensor], t: int, change: float) -> bool:
        """Tell whether a difference stays when it is computed in another precision; else it is rounding.

        Raises:
            RuntimeError: it is small, and the model runs in no other precision.

        """
        also = self._in_other_precision(future, t)
        if also is None:
            if change < math.sqrt(torch.finfo(self._pass.dtype).eps):
                raise RuntimeError(
                    f"a change of the future changes the output by {change:.1e} of its largest entry; whether that is"
                    " rounding cannot be told, because the model does not run in float64"
                )
            return True
        exact, rough = (change, also) if self._pass.dtype is torch.float64 else (also, change)
        if exact > _SHRINKS * rough and not (change < _SMALL and self._is_erratic(future, t)):
            return True
        self._rounding = max(self._rounding, change)
        return False

    def _is_erratic(self, future: dict[int, Tensor], t: int) -> bool:
        """Tell whether a small difference is another one where all inputs are larger by a trifle.

        So it is where the model rounds to float32 itself, whatever it is given.
        """
        known = (self._output.when <= t).expand(self._output.data.shape)

        def apart(scale: float) -> Tensor:
            before, after = self._pass.run({}, scale=scale), self._pass.run(future, scale=scale)
            return (after - before)[known].flatten().double()

        if not self._output.data.is_floating_point():
            return False
        one, other = apart(1.0), apart(1 + 2**-10)
        return bool(torch.dot(one, other) < _ALIKE * one.norm() * other.norm())

    def _in_other_precision(self, future: dict[int, Tensor], t: int) -> float | None:
        """Measure a difference in float64, of a model in float64 in float32; None where that does not run."""
        dtype = torch.float32 if self._pass.dtype is torch.float64 else torch.float64
        with contextlib.suppress(Exception):
            if self._in_other is None:
                self._in_other = dataclasses.replace(self._output, data=self._pass.run({}, dtype))
            return difference(self._in_other, self._pass.run(future, dtype), t)
        return None

    def _leak(self, futures: Futures, t: int, way: int, may: int, change: float) -> Leak:
        """Find the farthest pair of timesteps, and the place: in float64, where the model runs in that."""
        exact = self._in_other is not None or self._pass.dtype is torch.float64
        dtype = torch.float64 if exact else None
        own = self._pass.dtype is torch.float64
        base = self._output if own or self._in_other is None else self._in_other
        tolerance = _EXACT if exact else 0.0

        def first(after: int, only: str) -> int | None:
            return first_difference(base, self._pass.run(futures.of(way, after, only), dtype), t, tolerance)

        labels = [one.label for one in futures.inputs]
        of = next((label for label in labels if first(t + may, label) is not None), labels[0])
        low, high = t + may, futures.inputs[0].steps - 1  # changing all after `low` shows, after `high` nothing changes
        seen = first(low, of)
        while high - low > 1:
            middle = (low + high) // 2
            found = first(middle, of)
            low, high, seen = (low, middle, seen) if found is None else (middle, high, found)
        from_ = t if seen is None else seen
        place = self._pass.place(futures.of(way, t + may, of), t, dtype, tolerance) or self._pass.whole
        gradient = self._pass.gradient(from_, of, high)
        leak = Leak(from_, of, high, change, gradient, place.name, place.kind, place.before)
        cause, remedy = words(place.module, leak, training=self._training)
        return dataclasses.replace(leak, cause=cause, remedy=remedy)


def _positions(outputs: int, steps: int, may: int, most: int = _POSITIONS) -> list[int]:
    """Choose the timesteps of the output to look at: the first, the last that can be, and others between them.

    Raises:
        ValueError: there is none.

    """
    every = [t for t in range(min(outputs, steps)) if t + may < steps - 1]
    if not every:
        ahead = f" more than {may} ahead" if may else ""
        raise ValueError(f"the batch has {steps} timesteps, and none of the output has one{ahead} after it")
    if len(every) <= most:
        return every
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randperm(len(every) - 2, generator=generator)[: most - 3] + 1
    return sorted({0, len(every) // 2, len(every) - 1, *drawn.tolist()})
