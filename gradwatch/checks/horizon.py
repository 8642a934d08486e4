"""One batch: how far back can this model learn."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from gradwatch.checks.batch import Call, arguments, call_in_training_step, refuse
from gradwatch.detectors.memory import padding_read, rows_mixed
from gradwatch.detectors.misread_words import explain_over_batch, explain_padding
from gradwatch.detectors.time_words import explain_short, too_short, too_short_to_judge
from gradwatch.model.arguments import is_called, positional_names
from gradwatch.model.layers import named_modules
from gradwatch.sinks.terminal.errors import horizon_error
from gradwatch.timesteps.kinds import is_recurrent, recurrence_of
from gradwatch.timesteps.model_gain import Timesteps
from gradwatch.timesteps.model_pass import model_gain, recurrence_facts
from gradwatch.values.chain import limiting, narrowed_before
from gradwatch.values.report import Finding, GradientHealthError
from gradwatch.values.sequences import SequenceStats, sentence, whose
from gradwatch.values.snapshot import Fact

Input = str | int | tuple[str | int, ...] | None
"""Which input of the model is meant: its name, or the number of a positional argument, or the way into one."""


def horizon(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    output: Callable[[Any], Any] | None = None,
    timesteps: Timesteps = "auto",
    input: Input = None,  # noqa: A002  (the word of the field)
) -> SequenceStats:
    """Measure how far back a model can see in its data: by the gain from each timestep of it to its newest output.

    One forward pass, and one vector-Jacobian product by all that the model was given, with a random cotangent for each
    row of the batch; up to three where the horizon is not sure then. The model runs in its present mode, without its
    hooks; it, its gradients, its buffers and all random states are left exactly as they were.

    Every floating-point input of two or more dimensions has a horizon of its own, and so has what an `nn.Embedding`
    makes of whole numbers. Which of its dimensions is time is found by what the model does with it: a convolution
    slides along it, a recurrent module or a loop goes through it; where nothing tells, it is the first that is not the
    batch, and `time_assumed` says so. Sequences of different length (packed, or padded with zeros that nothing depends
    on) are aligned at their own ends.

    Args:
        model: it is run once forward and once backward, whatever it is wrapped in (torch.compile,
            DistributedDataParallel).
        batch: a tuple is positional arguments, a mapping keyword arguments, anything else one argument. Of a
            LightningModule that cannot be called with it, what its `training_step` takes: then the network that the
            step calls is measured.
        output: takes what the model returned and gives the tensor whose horizon is asked for. Default: the first
            floating-point tensor in it, a scalar only where there is no other. Where it has the input's timesteps,
            only the newest of each row counts.
        timesteps: "auto", or the dimension of time by name: of an input of the model ("" for all that have it), or of
            the input of a module, None for one that is called once a timestep.
        input: the input whose horizon is meant. Default: the one that is called a target, or else that with the longest
            horizon among the long ones.

    Returns:
        `SequenceStats` of module "" and part "model": `input` and `time`, `lag_gain` (root mean square over the rows of
        `||J^T v||`, the entries of v 1 / sqrt(R) or -1 / sqrt(R) by chance, R the width of the output), `length`,
        `rows`, `censored`; `horizon` with its `interval`, `decay_rate` and `half_life` follow from the gain. `beside`
        has the same of the other inputs, and of what enters the first recurrent module.

    Raises:
        TypeError, ValueError: an argument, or what the model returned, is not what it should be; no sequence was found,
            or of none it can be told which dimension is time.
        RuntimeError: the model cannot be run by one process (FSDP), or not be differentiated by an input (reentrant
            checkpointing).

    """
    return measured(model, batch, output, timesteps, input)[0]


def assert_horizon(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    at_least: int,
    output: Callable[[Any], Any] | None = None,
    timesteps: Timesteps = "auto",
    input: Input = None,  # noqa: A002  (as above)
) -> SequenceStats:
    """Do `horizon`, and raise if the newest `at_least` timesteps are not within the model's reach.

    They are within it if the upper end of the horizon's interval is.

    Returns:
        What `horizon` gives, with `need`.

    Raises:
        GradientHealthError: with the measured horizon, its definition, the cause and the remedy.
        ValueError: as `horizon`; also where the model reaches back to the oldest timestep of a batch whose sequences
            are shorter than `at_least`, where the horizon is not sure enough to judge by, and where the inputs of the
            model disagree and `input` does not say which of them matters.
        TypeError, RuntimeError: as `horizon`.

    """
    __tracebackhide__ = True
    if isinstance(at_least, bool) or not isinstance(at_least, int):
        raise TypeError(f"at_least must be a whole number of timesteps, got {at_least!r}")
    if at_least < 1:
        raise ValueError(f"at_least must be at least 1, got {at_least}")
    found, place, call = measured(model, batch, output, timesteps, input)
    stats = dataclasses.replace(found, need=at_least)
    reach = stats.reach
    if reach is None:
        raise GradientHealthError(
            "how far back the model learns cannot be told: its gain by lag is not finite, because of NaN or infinity on"
            " the way back"
        )
    if stats.reads_padding:
        raise GradientHealthError(horizon_error(stats, explain_padding(padding_read(stats, place))))
    if stats.misread:
        raise GradientHealthError(horizon_error(stats, explain_over_batch(rows_mixed(stats, ""))))
    if not reach.sure:
        raise ValueError(
            f"the horizon is not sure enough to judge by: {sentence('the model', reach, stats.length, whose(stats))};"
            " give it more rows"
        )
    if input is None:
        _refuse_to_guess(stats, at_least)
    if reach.high >= at_least:
        return stats
    if reach.censored:
        raise ValueError(too_short_to_judge(stats.length, whose(stats), at_least))
    raise GradientHealthError(
        horizon_error(stats, explain_short(shortfall(stats, at_least, call, place, named_modules(model)[place])))
    )


def _refuse_to_guess(stats: SequenceStats, need: int) -> None:
    """Raise where some inputs meet a need and some do not, and nothing tells which of them matters."""
    if "target" in stats.input:
        return
    others = [(s, found) for s in stats.beside if s.input and s.length >= need and (found := s.reach) is not None]
    own = stats.reach
    disagree = [s for s, found in others if own is not None and (found.high >= need) != (own.high >= need)]
    if disagree:
        known = [(s, found) for s in (stats, *disagree) if (found := s.reach) is not None]
        said = "; ".join(sentence("the model", found, s.length, whose(s)) for s, found in known)
        raise ValueError(f"which input needs {need} timesteps must be said with input=: {said}")


def shortfall(stats: SequenceStats, need: int | None, call: Call, place: str, module: nn.Module) -> Finding:
    """Return the finding that a horizon is too short, with its cause; `module` is the sequence module at a place."""
    facts: tuple[Fact, ...] = ()
    kind, found = None, stats.reach
    assert found is not None  # the callers have looked
    if (narrowed := narrowed_before(stats)) is not None:
        place = narrowed.around or narrowed.before
    elif not is_recurrent(module):
        place = limiting(stats) or ("" if isinstance(module, nn.Embedding) else place)
    else:
        kind = recurrence_of(module)
        with contextlib.suppress(Exception):  # a cause that cannot be measured must not stand in the way of the verdict
            facts = recurrence_facts(*call, place, module)
    return too_short(stats, found, facts, place=place or stats.module, kind=kind, need=need)


def measured(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    output: Callable[[Any], Any] | None,
    timesteps: Timesteps,
    wanted: Input,
) -> tuple[SequenceStats, str, Call]:
    """Return the horizon of a model, the name of its sequence module, and the call that was measured."""
    refuse(model, output)
    call = Call(model, *arguments(model, batch))
    try:
        gain = model_gain(*call, timesteps=timesteps, output=output)
    except Exception:
        # A LightningModule may have no forward, or one that takes a part of the batch.
        of_step = call_in_training_step(model, batch)
        if of_step is None:
            raise
        call = of_step
        gain = model_gain(*call, timesteps=timesteps, output=output, watched=model)
    return _of_input(call.module, gain.stats(), wanted), gain.place, call


def of_call(call: Call, model: nn.Module) -> tuple[SequenceStats, str]:
    """Return the horizon of a call of a model, or of a network in it, and the name of the model's sequence module."""
    gain = model_gain(*call, watched=model)
    return gain.stats(), gain.place


def _of_input(model: nn.Module, stats: SequenceStats, wanted: Input) -> SequenceStats:
    """Return the horizon of one input, with the others beside it."""
    if wanted is None:
        return stats
    every = [stats, *(s for s in stats.beside if s.input)]
    name = positional_names(model, wanted + 1)[wanted] if isinstance(wanted, int) else wanted
    found = [s for s in every if is_called(s.input, name)]
    if len(found) != 1:
        known = ", ".join(repr(s.input) for s in every if s.input) or "none"
        raise ValueError(f"input must name one of the model's inputs that have timesteps ({known}), got {wanted!r}")
    beside = tuple(s for s in (stats, *stats.beside) if s is not found[0])
    return dataclasses.replace(found[0], beside=tuple(dataclasses.replace(s, beside=()) for s in beside))
