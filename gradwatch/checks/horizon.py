"""One batch: how far back can this model learn."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from gradwatch.checks.batch import arguments
from gradwatch.detectors.memory import padding_read
from gradwatch.detectors.time_words import explain_padding, words_of_horizon
from gradwatch.model.layers import named_modules
from gradwatch.sinks.terminal.errors import horizon_error
from gradwatch.timesteps.kinds import is_recurrent, recurrence_of
from gradwatch.timesteps.model_gain import Timesteps
from gradwatch.timesteps.model_pass import model_gain, recurrence_facts
from gradwatch.values.report import GradientHealthError
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Fact


def horizon(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    output: Callable[[Any], Any] | None = None,
    timesteps: Timesteps = "auto",
) -> SequenceStats:
    """Measure how far back a model can see: by the gain from each timestep of its input to its newest output.

    The input is that of its first sequence module.

    One forward pass, and one vector-Jacobian product by that input, with a random cotangent for each row of the batch.
    Rows are samples: 32 of them give the decay rate within 2 % and the horizon within 1 step in 19 of 20 cases, 8 of
    them within 4 % and 1 step. The model runs in its present mode, without its hooks; it, its gradients, its buffers
    and all random states are left exactly as they were.

    The first sequence module is the first that runs of the recurrent ones (`nn.RNN`, `nn.LSTM`, `nn.GRU` and their
    cells, whose calls are the timesteps) and of those that `timesteps` names. Without one, the model's first
    floating-point input of three or more dimensions counts (time is dimension 1), or what its first `nn.Embedding`
    gives. Sequences of different length (packed, or padded with zeros that nothing depends on) are aligned at their
    own ends.

    Args:
        model: it is run once forward and once backward, whatever it is wrapped in (torch.compile,
            DistributedDataParallel).
        batch: a tuple is positional arguments, a mapping keyword arguments, anything else one argument.
        output: takes what the model returned and gives the tensor whose horizon is asked for. Default: the first
            floating-point tensor in it, a scalar only where there is no other. Where it has the input's timesteps,
            only the newest of each row counts.
        timesteps: "auto", or more sequence modules: from names to the dimension of time of their input, None for a
            cell that is called once a timestep; "" is the model itself.

    Returns:
        `SequenceStats` of module "" and part "model": `lag_gain` (root mean square over the rows of `||J^T v||`, v ~
        N(0, I/R), R the width of the output), `length`, `rows`, `censored`; `horizon`, `decay_rate` and `half_life`
        follow from the gain.

    Raises:
        TypeError, ValueError: an argument, or what the model returned, is not what it should be; no sequence was found.
        RuntimeError: the model cannot be run by one process (FSDP), or not be differentiated by an input (reentrant
            checkpointing).

    """
    return _measured(model, batch, output, timesteps)[0]


def assert_horizon(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    at_least: int,
    output: Callable[[Any], Any] | None = None,
    timesteps: Timesteps = "auto",
) -> SequenceStats:
    """Do `horizon`, and raise if the newest `at_least` timesteps are not within the model's reach.

    Returns:
        What `horizon` gives, with `need`.

    Raises:
        GradientHealthError: with the measured horizon, its definition, the cause and the remedy.
        ValueError: as `horizon`; also where the model reaches back to the oldest timestep of a batch whose sequences
            are shorter than `at_least`.
        TypeError, RuntimeError: as `horizon`.

    """
    __tracebackhide__ = True
    if isinstance(at_least, bool) or not isinstance(at_least, int):
        raise TypeError(f"at_least must be a whole number of timesteps, got {at_least!r}")
    if at_least < 1:
        raise ValueError(f"at_least must be at least 1, got {at_least}")
    found, place = _measured(model, batch, output, timesteps)
    stats = dataclasses.replace(found, need=at_least)
    if stats.horizon is None:
        raise GradientHealthError(
            "how far back the model learns cannot be told: its gain by lag is not finite, because of NaN or infinity on"
            " the way back"
        )
    if stats.reads_padding:
        raise GradientHealthError(horizon_error(stats, explain_padding(padding_read(stats, place))))
    if stats.censored and stats.length < at_least:
        raise ValueError(f"the sequences have {stats.length} timesteps, the need is {at_least}")
    if stats.horizon < at_least:
        facts: tuple[Fact, ...] = ()
        with contextlib.suppress(Exception):  # a cause that cannot be measured must not stand in the way of the verdict
            facts = recurrence_facts(model, *arguments(batch), place)
        module = named_modules(model)[place]
        known = not isinstance(module, nn.Embedding) and (place or is_recurrent(module))
        words = words_of_horizon(
            stats, at_least, facts, place=place if known else "", kind=recurrence_of(module) if known else None
        )
        raise GradientHealthError(horizon_error(stats, words))
    return stats


def _measured(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    output: Callable[[Any], Any] | None,
    timesteps: Timesteps,
) -> tuple[SequenceStats, str]:
    """Return the horizon of a model, and the name of its sequence module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if output is not None and not callable(output):
        raise TypeError(
            f"output must be a function from what the model returned to a tensor, or None, got {output!r:.80}"
        )
    args, kwargs = arguments(batch)
    gain = model_gain(model, args, kwargs, timesteps=timesteps, output=output)
    return gain.stats(gain.numbers.tolist()), gain.place
