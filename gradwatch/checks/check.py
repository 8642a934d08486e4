"""One batch: is the gradient of this model sound, before anything is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.checks.batch import arguments
from gradwatch.checks.operations import first_bad_operation
from gradwatch.checks.uses import computed_with
from gradwatch.detectors import DETECTORS
from gradwatch.detectors.alerts import judge
from gradwatch.model.arguments import labelled
from gradwatch.model.nested import floats, tensors
from gradwatch.model.rerun import as_it_was
from gradwatch.sinks.terminal.errors import health_error
from gradwatch.values.history import Detector, History
from gradwatch.values.report import GradientHealthError, Report, Severity
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.options import Options
from gradwatch.watcher.watcher import Watcher

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
    """Measure the gradients of one batch, and judge them; the model and all random states stay exactly as they were.

    Args:
        model: it is run once forward and once backward, in the mode in which it is; where a gradient is not finite,
            once more, to find the operation, and where weights have none whose module does not run, to see whether
            anything is made of them.
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
        raise TypeError(
            f"loss must be a function from what the model returned to a scalar tensor, or None, got {loss!r:.80}"
        )
    options = Options(
        every_n_steps=1,
        probe_every_n_steps=1,
        thresholds=Thresholds() if thresholds is None else thresholds,
        ignore=ignore,
        detectors=detectors,
        on_alert=lambda _: None,
    )
    at_once = dataclasses.replace(options.thresholds, window=1, disconnected_steps=1)
    watcher = Watcher(model, (), dataclasses.replace(options, thresholds=at_once), strict=True)
    args, kwargs = arguments(model, batch)

    def run() -> Tensor:
        return (loss or _projection)(model(*args, **kwargs))

    with watcher, as_it_was(model), watcher.probing():
        with torch.inference_mode(False), torch.enable_grad():
            output = model(*args, **kwargs)
            value = (loss or _projection)(output)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise ValueError(f"loss must give a scalar tensor that depends on the parameters, got {_shown(value)}")
            value.backward()  # type: ignore[no-untyped-call]  # torch's
        if all(parameter.grad is None for parameter in model.parameters()):
            raise ValueError("loss must depend on the model's parameters, and none of them got a gradient")
        watcher.look_at(value)
        watcher.step(loss=value.detach() if loss is not None else _size(output))
    snapshot = watcher.report.snapshot
    if not snapshot.finite:
        with watcher.probing():
            given = ((name, tensor) for name, leaf in labelled(model, args, kwargs) for tensor in floats(leaf))
            origin = first_bad_operation(model, given, run) or snapshot.origin
        snapshot = dataclasses.replace(snapshot, origin=origin)
    elif "unused" in (snapshot.absent or ()):  # by their modules; the model may apply them itself
        with watcher.probing():
            used = computed_with(model, run)
        columns = zip(snapshot.model.parameters, snapshot.absent or (), strict=True)
        absent = tuple("disconnected" if why == "unused" and p.name in used else why for p, why in columns)
        snapshot = dataclasses.replace(snapshot, absent=absent)
    if snapshot == watcher.report.snapshot:
        return watcher.report
    return judge(History(at_once), snapshot, detectors=detectors, ignore=ignore)


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
        raise GradientHealthError(health_error(report, wrong, _SHOWN), wrong)
    return report


def _projection(output: Any) -> Tensor:  # noqa: ANN401
    """Multiply every floating-point output with random numbers of its own, and add up.

    A plain sum would be constant after a normalization, whose outputs always add up to the same: its gradient is zero.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    parts = []
    for tensor in tensors(output):
        if tensor.requires_grad:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            parts.append(
                (real * torch.randn(real.shape, generator=generator, device="cpu").to(real.device, real.dtype)).sum()
            )
    if not parts:
        raise ValueError(
            "the model's output must hold a floating-point tensor that depends on its parameters,"
            f" got {type(output).__name__}"
        )
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _size(output: Any) -> float:  # noqa: ANN401
    """Return the root mean square of the projection over all random numbers: it may itself be 0 by chance."""
    return math.hypot(
        *(tensor.detach().abs().double().norm().item() for tensor in tensors(output) if tensor.requires_grad)
    )


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a graph'}"
