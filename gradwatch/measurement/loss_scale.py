"""The loss scale of a GradScaler: what of it is in the gradients, and whether one that nobody told is."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.model.attempts import callers
from gradwatch.model.forward_hooks import ModelView, Part, Pending, ProbeValues, StepView, Transfer
from gradwatch.model.gradient_hooks import Sentinel, transformed
from gradwatch.model.nested import floats
from gradwatch.values.snapshot import Stage

_SCALED_STEP = torch.amp.GradScaler.step.__code__


class ScaleSentinel:
    """Sees gradients of a module as they arrive, to compare them with those at the step; a `Probe`."""

    def __init__(self, passes: Mapping[int, bool]) -> None:
        """Begin without a module; `passes` says of each backward pass, by its number, whether it counts."""
        self._sentinel = Sentinel(passes)
        self._changed: Tensor | None = None
        self._left_over: Pending | None = None

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work."""
        self.clear()
        return {} if view.compiled else {id(module): module for module in view.modules.values()}

    def entered(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Need nothing of the inputs."""

    def left(self, module: nn.Module, _inputs: object, _kwargs: object, output: Any) -> None:  # noqa: ANN401
        """Watch two small parameters of the first module whose output has a graph."""
        if self._sentinel.watching or not torch.is_grad_enabled() or transformed():
            return
        if any(t.grad_fn is not None and not hasattr(t, "placements") for t in floats(output)):
            self._sentinel.watch(module)

    def changed(self, step: StepView, broken: AbstractSet[int], transfer: Transfer) -> Pending | None:
        """Return how far the gradient at this step is from what arrived, as a share of it.

        None where nothing can be compared.

        Args:
            step: that is measured.
            broken: backward passes that an exception ended, by their number.
            transfer: takes the number along.

        """
        self._sentinel.forget(broken)
        if (changed := self._sentinel.difference()) is not None:
            self._changed = changed
        # What another optimizer steps, or none, may stand there on purpose. This one waits since its own last step.
        share = self._sentinel.left_over(step.mine)
        self._left_over = transfer.add(share) if share is not None else None
        self._sentinel.remove(step.mine if step.others else None)  # what arrives from now on is of the next step
        return None if self._changed is None else transfer.add(self._changed)

    def collect(self, _step: StepView, _transfer: Transfer) -> Part:
        """Return what of the gradient was there before; what else it knows is asked for before the probes are."""
        share, self._left_over = self._left_over, None
        return ProbeValues if share is None else lambda: ProbeValues(left_over=share.value)

    def clear(self) -> None:
        """Let go of the parameters."""
        self._sentinel.remove()
        self._changed = self._left_over = None


def stepping() -> Any:  # noqa: ANN401  (torch has several scalers and no common type)
    """Return the GradScaler whose `step` has called, by way of an optimizer, what calls this; None where none has."""
    return next((frame.f_locals.get("self") for frame in callers() if frame.f_code is _SCALED_STEP), None)


def of_scaler(scaler: Any) -> float | Tensor | None:  # noqa: ANN401
    """Return the loss scale that is in force, where it is: to ask for the number would be to wait for the device."""
    if scaler is None or not scaler.is_enabled():
        return None
    scale = getattr(scaler, "_scale", None)
    return scale.detach().clone() if isinstance(scale, Tensor) else float(scaler.get_scale())


def at_step(scaler: Any, optimizer: Any, stage: Stage) -> float | Tensor | None:  # noqa: ANN401  (no common type)
    """Return the loss scale that is still in the gradients; None if there is none, or nobody said."""
    fused = getattr(optimizer, "grad_scale", None)
    if isinstance(fused, Tensor):
        return fused
    if scaler is None or stage == "applied" or not scaler.is_enabled():
        return None
    states = getattr(scaler, "_per_optimizer_states", {})
    if id(optimizer) in states and states[id(optimizer)]["stage"].name != "READY":
        return None  # unscale_() has been called
    return of_scaler(scaler)


def of_backward(scaler: Any, optimizer: Any) -> float | Tensor | None:  # noqa: ANN401
    """Return the loss scale of the backward pass; None if nobody said."""
    fused = getattr(optimizer, "grad_scale", None)
    if isinstance(fused, Tensor):
        return fused
    return of_scaler(scaler)
