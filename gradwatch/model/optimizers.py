"""Optimizers -> what the rules know of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gradwatch.values.snapshot import OptimizerInfo

# What divides the gradient by a running measure of its own size. Optimizers of others are known by their state, below.
_ADAPTIVE = (
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "SparseAdam",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "Rprop",
    "Adafactor",
    "Muon",
    "Lion",
    "LAMB",
)
_ADAPTIVE_STATE = frozenset({"exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta"})


def optimizer_info(optimizer: torch.optim.Optimizer) -> OptimizerInfo:
    """Describe an optimizer; whether it is adaptive is told by its class and those it derives from, or by its state."""
    kind = type(optimizer).__name__
    names = {base.__name__ for base in type(optimizer).__mro__}
    kept = {
        key
        for state in list(getattr(optimizer, "state", {}).values())[:1]
        if isinstance(state, Mapping)
        for key in state
    }
    eps = (getattr(optimizer, "defaults", None) or {}).get("eps")
    return OptimizerInfo(
        kind,
        bool(names & set(_ADAPTIVE) or kept & _ADAPTIVE_STATE),
        float(eps) if isinstance(eps, int | float) else None,
    )
