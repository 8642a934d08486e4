"""One batch: is the gradient of this model sound, before anything is trained."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch import console
from gradwatch.detectors import DETECTORS
from gradwatch.history import Detector
from gradwatch.intact import as_it_was
from gradwatch.layers import named_modules
from gradwatch.report import GradientHealthError, Report, Severity
from gradwatch.snapshot import Fact, SequenceStats
from gradwatch.thresholds import Thresholds
from gradwatch.timesteps.model import Timesteps
from gradwatch.watcher import Cadence, Watcher, check_verdicts
from gradwatch.watcher.memory import causes, model_gain

_SHOWN = 10
"""Layers that an error shows."""


def check(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    loss: Callable[[Any], Tensor] | None = None,
    thresholds: Thresholds | None = None,
    ignore: Sequence[str] = (),
    detectors: Sequence[Detector] = DETECTORS,
) -> Report:
    """Measure the gradients of one batch, and judge them; the model and all random states are left exactly as they were.

    Args:
        model: it is run once forward and once backward, in the mode in which it is.
        batch: a tuple is positional arguments, a mapping keyword arguments, anything else one argument.
        loss: takes what the model returned and gives a scalar tensor (targets by closure). Default: the product of all
            floating-point outputs with fixed random numbers, which no normalization at the end annihilates.
        thresholds: the numbers behind the verdicts; the window is one snapshot.
        ignore: mutes findings, as for `watch`.
        detectors: as for `watch`.

    Returns:
        The report; what is wrong is in `report.open`.

    Raises:
        ValueError: the output holds nothing that a gradient could start from, the loss is not a scalar with a graph, no
            parameter gets a gradient, or parameters have no shape yet.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function from what the model returned to a scalar tensor, or None, got {loss!r:.80}")
    check_verdicts(thresholds, ignore, detectors)
    watcher = Watcher(
        model,
        (),
        cadence=Cadence(1, 1),
        thresholds=dataclasses.replace(thresholds or Thresholds(), window=1, disconnected_steps=1),
        ignore=ignore,
        detectors=detectors,
        sinks=(),
        on_alert=lambda _: None,
        strict=True,
    )
    with watcher, watcher.alone(), as_it_was(model):
        watcher.look_ahead()
        with torch.inference_mode(False), torch.enable_grad():
            args, kwargs = _arguments(batch)
            value = (loss or _projection)(model(*args, **kwargs))
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise ValueError(f"loss must give a scalar tensor that depends on the parameters, got {_shown(value)}")
            value.backward()  # type: ignore[no-untyped-call]  # torch's
        if all(parameter.grad is None for parameter in model.parameters()):
            raise ValueError("loss must depend on the model's parameters, and none of them got a gradient")
        watcher.step()
    return watcher.report


def assert_healthy(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    loss: Callable[[Any], Tensor] | None = None,
    thresholds: Thresholds | None = None,
    ignore: Sequence[str] = (),
    detectors: Sequence[Detector] = DETECTORS,
) -> Report:
    """Do `check`, and raise if it finds anything of severity warning or higher.

    Raises:
        GradientHealthError: with the worst layers, the numbers, the cause and the remedy.
        ValueError: as `check`.

    """
    __tracebackhide__ = True
    report = check(model, batch, loss=loss, thresholds=thresholds, ignore=ignore, detectors=detectors)
    wrong = [alert for alert in report.open if alert.severity >= Severity.WARNING]
    if wrong:
        raise GradientHealthError(console.health_error(report, wrong, _SHOWN), wrong)
    return report


def horizon(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    output: Callable[[Any], Any] | None = None,
    timesteps: Timesteps = "auto",
) -> SequenceStats:
    """Measure how far back a model can see: the gain from each timestep of what enters its first sequence module to its newest output.

    One forward pass, and one vector-Jacobian product by that input, with a random cotangent for each row of the batch. Rows are probes: 32 of them give the
    decay rate within 2 % and the horizon within 1 step in 19 of 20 cases, 8 of them within 4 % and 1 step. The model runs in the mode in which it is, without its hooks; it, its gradients, its buffers and all random states
    are left exactly as they were.

    The first sequence module is the first that runs of the recurrent ones (`nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells, whose calls are the timesteps)
    and of those that `timesteps` names. Without one, the model's first floating-point input of three or more dimensions counts (time is dimension 1), or
    what its first `nn.Embedding` gives. Sequences of different length (packed, or padded with zeros that nothing depends on) are aligned at their own ends.

    Args:
        model: it is run once forward and once backward, whatever it is wrapped in (torch.compile, DistributedDataParallel).
        batch: a tuple is positional arguments, a mapping keyword arguments, anything else one argument.
        output: takes what the model returned and gives the tensor whose memory is asked. Default: the first floating-point tensor in it, a scalar only where
            there is no other. Where it has the input's timesteps, only the newest of each row counts.
        timesteps: "auto", or more sequence modules: from names to the dimension of time of their input, None for a cell that is called once a timestep;
            "" is the model itself.

    Returns:
        `SequenceStats` of module "" and part "model": `lag_gain` (root mean square over the rows of `||J^T v||`, v ~ N(0, I/R), R the width of the output),
        `length`, `rows`, `censored`; `horizon`, `decay_rate` and `half_life` follow from the gain.

    Raises:
        TypeError, ValueError: an argument, or what the model returned, is not what it should be; no sequence was found.
        RuntimeError: the model cannot be run by one process (FSDP), or not be differentiated by an input (reentrant checkpointing).

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
        ValueError: as `horizon`; also where the model reaches back to the oldest timestep of a batch whose sequences are shorter than `at_least`.
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
        raise GradientHealthError("how far back the model learns cannot be told: its gain by lag is not finite, because of NaN or infinity on the way back")
    if stats.censored and stats.length < at_least:
        raise ValueError(f"the sequences have {stats.length} timesteps, the need is {at_least}")
    if stats.horizon < at_least:
        facts: tuple[Fact, ...] = ()
        with contextlib.suppress(Exception):  # a cause that cannot be measured must not stand in the way of the verdict
            facts = causes(model, *_arguments(batch), place)
        module = named_modules(model)[place]
        known = not isinstance(module, nn.Embedding) and (place or isinstance(module, nn.RNNBase | nn.RNNCellBase))
        raise GradientHealthError(console.horizon_error(stats, at_least, facts, place=place if known else "", kind=type(module).__name__ if known else ""))
    return stats


def _measured(model: nn.Module, batch: Any, output: Callable[[Any], Any] | None, timesteps: Timesteps) -> tuple[SequenceStats, str]:  # noqa: ANN401
    """Give the memory of a model, and the name of its sequence module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if output is not None and not callable(output):
        raise TypeError(f"output must be a function from what the model returned to a tensor, or None, got {output!r:.80}")
    args, kwargs = _arguments(batch)
    gain = model_gain(model, args, kwargs, timesteps=timesteps, output=output)
    return gain.stats(gain.numbers.tolist()), gain.place


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    if isinstance(batch, tuple) and not isinstance(batch, PackedSequence):
        return batch, {}
    return ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})


def _projection(output: Any) -> Tensor:  # noqa: ANN401
    """Multiply every floating-point output with random numbers of its own, and add up.

    A plain sum would be constant behind a normalization, whose outputs always add up to the same: its gradient is zero.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    parts = []
    for tensor in _tensors(output):
        if tensor.requires_grad:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            parts.append((real * torch.randn(real.shape, generator=generator, device="cpu").to(real.device, real.dtype)).sum())
    if not parts:
        raise ValueError(f"the model's output must hold a floating-point tensor that depends on its parameters, got {type(output).__name__}")
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _tensors(output: Any) -> Iterator[Tensor]:  # noqa: ANN401
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a graph'}"
