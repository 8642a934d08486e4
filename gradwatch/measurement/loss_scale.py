"""The loss scale of a GradScaler: what of it is in the gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradwatch.values.snapshot import Stage


def at_step(scaler: Any, optimizer: Any, stage: Stage) -> float | Tensor | None:  # noqa: ANN401  (torch has several scalers and no common type)
    """Return the loss scale that is still in the gradients; None if there is none, or nobody said."""
    fused = getattr(optimizer, "grad_scale", None)
    if isinstance(fused, Tensor):
        return fused
    if scaler is None or stage == "applied" or not scaler.is_enabled():
        return None
    states = getattr(scaler, "_per_optimizer_states", {})
    if id(optimizer) in states and states[id(optimizer)]["stage"].name != "READY":
        return None  # unscale_() has been called
    return float(scaler.get_scale())


def of_backward(scaler: Any, optimizer: Any) -> float | Tensor | None:  # noqa: ANN401
    """Return the loss scale of the backward pass; None if nobody said."""
    fused = getattr(optimizer, "grad_scale", None)
    if isinstance(fused, Tensor):
        return fused
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None
