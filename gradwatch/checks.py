"""One batch: is the gradient of this model sound, before anything is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch import console
from gradwatch.detectors import DETECTORS
from gradwatch.history import Detector
from gradwatch.report import GradientHealthError, Report, Severity
from gradwatch.thresholds import Thresholds
from gradwatch.watcher import Cadence, Watcher

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
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("the parameters of model must have their shapes: lazy modules get them when a batch has gone through once")
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
    with watcher, watcher.alone(), _as_it_was(model):
        watcher.look_ahead()
        with torch.inference_mode(False), torch.enable_grad():
            value = (loss or _projection)(_call(model, batch))
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


def _call(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    if isinstance(batch, tuple):
        return model(*batch)
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _projection(output: Any) -> Tensor:  # noqa: ANN401
    """Multiply every floating-point output with random numbers of its own, and add up.

    A plain sum would be constant behind a normalization, whose outputs always add up to the same: its gradient is zero.
    """
    generator = torch.Generator().manual_seed(0)
    parts = []
    for tensor in _tensors(output):
        if tensor.requires_grad:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            parts.append((real * torch.randn(real.shape, generator=generator).to(real.device, real.dtype)).sum())
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


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what modules hold (parameters, buffers, a hidden state, lists), gradients, modes, and the random states."""
    modules = [(module, dict(vars(module))) for module in model.modules()]
    attributes = [value for _, own in modules for value in own.values()]
    # Weights too: a momentum encoder moves its own in forward().
    tensors = [(tensor, tensor.detach().clone()) for value in attributes for tensor in _held(value)]
    containers = [(value, dict(value) if isinstance(value, dict) else list(value)) for value in attributes if isinstance(value, dict | list | set | deque)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        for module, own in modules:
            vars(module).clear()
            vars(module).update(own)
        for container, content in containers:
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(content)
        with torch.no_grad():
            for tensor, before in tensors:
                if tensor.layout is not torch.strided or not torch.equal(tensor, before):
                    tensor.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _held(value: object) -> list[Tensor]:
    """Give the tensors in an attribute of a module: itself, or in a collection of them."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    return [item for item in items if isinstance(item, Tensor)]
