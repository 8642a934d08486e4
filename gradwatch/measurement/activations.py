"""Which activation a node of the graph is, and how much of what it gave is at an end of its range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradwatch.measurement.barriers import saved_dim
from gradwatch.values.snapshot import Function
from gradwatch.values.thresholds import OUTER_SHARE

_FUNCTIONS: Mapping[str, Function] = {
    "TanhBackward0": "tanh",
    "SigmoidBackward0": "sigmoid",
    "ReluBackward0": "relu",
    "ThresholdBackward0": "relu",
    "HardtanhBackward0": "hardtanh",
    "HardswishBackward0": "relu",
    "SoftmaxBackward0": "softmax",
    "HardsigmoidBackward0": "sigmoid",
    "ClampBackward1": "clamp",
    "ClampMinBackward0": "clamp",
    "ClampMaxBackward0": "clamp",
}
"""Activations, by the node that they leave in the graph."""
SILENT = frozenset({"ReluBackward0", "ThresholdBackward0", "HardtanhBackward0", "HardswishBackward0"})
"""Those whose output is exactly 0 where their derivative is."""
_BOUNDS = (("_saved_min_val", "_saved_min"), ("_saved_max_val", "_saved_max"))
"""What nodes that clamp call their lower and their upper bound."""
_AROUND = 64
"""Nodes from a sum back to what a skip connection leads around."""


def function_of(node: Any, kind: str) -> Function | None:  # noqa: ANN401  (nodes have no common type that tells of this)
    """Return the activation that a node of this kind is; None where it is none that is known."""
    return _FUNCTIONS.get(kind) or ("softsign" if kind == "DivBackward0" and _is_softsign(node) else None)


def saturated_share(rows: Tensor, node: Any, function: Function) -> Tensor | None:  # noqa: ANN401  (as below)
    """Return the share of entries that a bounded activation put to an end of its range; None for others."""
    inner = 1 - 2 * OUTER_SHARE
    if function in ("tanh", "softsign"):
        return _share_above(rows, 0.0, inner)
    if function == "sigmoid":
        return _share_above(rows, 0.5, inner / 2)
    if function == "softmax":
        dim = saved_dim(node)
        return _share_above(rows.amax(dim), 0.0, 1 - OUTER_SHARE) if dim % rows.dim() else None  # those are thinned out
    return _clamped(rows, node, function) if function in ("hardtanh", "clamp") else None


def _clamped(rows: Tensor, node: Any, function: Function) -> Tensor | None:  # noqa: ANN401  (as below)
    """Return the share of entries that were clamped; a lower bound of 0 is what a ReLU has, and does not count."""
    low, high = (next((getattr(node, n) for n in names if hasattr(node, n)), None) for names in _BOUNDS)
    if low is not None and high is not None and (low or function == "clamp"):
        return _share_above(rows, (low + high) / 2, (0.5 - OUTER_SHARE) * (high - low))
    ends: Tensor | None = rows >= high if high is not None else rows <= low if low else None
    return None if ends is None else ends.float().mean()


def _share_above(rows: Tensor, middle: float, distance: float) -> Tensor:
    """Return the share of entries farther from the middle than this; NaN is not."""
    return (rows - middle).abs_().sub_(distance).clamp_(min=0).sign_().mean(dtype=torch.float32)


def is_skip(node: Any) -> bool:  # noqa: ANN401  (as below)
    """Tell whether a sum adds to something what was made from it."""
    if node is None or node.name() != "AddBackward0":
        return False
    ends = [n for n, _ in node.next_functions]
    if len(ends) != 2 or None in ends:
        return False
    for start, wanted in (ends, ends[::-1]):
        front, seen = [start], 0
        while front and seen < _AROUND:
            one = front.pop(0)
            seen += 1
            if one is wanted:
                return True
            front += [n for n, _ in one.next_functions if n is not None]
    return False


def _is_softsign(node: Any) -> bool:  # noqa: ANN401  (as below)
    """Tell whether a division is x / (1 + |x|), which has no node of its own."""
    over, under = (n for n, _ in node.next_functions)
    if over is None or under is None or under.name() != "AddBackward0":
        return False
    sizes = [n for n, _ in under.next_functions if n is not None and n.name() == "AbsBackward0"]
    return any(n.next_functions[0][0] is over for n in sizes)
