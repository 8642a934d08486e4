"""How a loss is made of what a model gave: whether something squashes the scores before the loss function does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from gradwatch.measurement.graph import REARRANGED, SOFTMAX, before, signed
from gradwatch.values.autograd import Squashed

_LOSS = 200
"""Nodes from the loss on in which the loss function is looked for."""
_PICKED = REARRANGED | {"IndexBackward0", "IndexSelectBackward0", "MaskedSelectBackward0"}
_MADE: Mapping[str, Literal["softmax", "sigmoid"]] = {
    **dict.fromkeys(SOFTMAX, "softmax"),
    "SigmoidBackward0": "sigmoid",
}
_TAKES: Mapping[str, Literal["softmax", "sigmoid", "nll"]] = {
    "LogSoftmaxBackward0": "softmax",
    "LogsumexpBackward0": "softmax",
    "BinaryCrossEntropyWithLogitsBackward0": "sigmoid",
    "NllLossBackward0": "nll",
    "NllLoss2DBackward0": "nll",
    "CtcLossBackward0": "nll",
}
"""Nodes of loss functions, and what they take their input for."""


def squashed(loss: Any, name_of: Callable[[Any], str | None]) -> Squashed | None:  # noqa: ANN401  (nodes have no type)
    """Return what a loss function squashes though something has squashed it already; None where that is not so.

    Args:
        loss: the node of the loss.
        name_of: returns the name of the module that gave what a node computes, or of the nearest before it.

    """
    front, seen = [loss], {loss}
    while front and len(seen) < _LOSS:
        node = front.pop(0)
        into, taken = _TAKES.get(node.name()), before(node)
        if into is not None and taken:
            given = taken[0]
            while given.name() in _PICKED and (earlier := before(given)):
                given = earlier[0]
            by = _MADE.get(given.name())
            if by is not None and (into, by) != ("nll", "sigmoid"):
                return Squashed(
                    name_of(given) or "", by, into, 1 if into == "sigmoid" else _classes(node, taken[0], given)
                )
        for n in taken:
            if n not in seen:
                seen.add(n)
                front.append(n)
    return None


def _classes(node: Any, taken: Any, made: Any) -> int:  # noqa: ANN401  (as above)
    """Return over how many entries a loss function works that takes what one node gives, and another has made."""
    # What takes the logarithm to be there works along the dimension along which that should have been taken.
    of, shape = (node, taken) if hasattr(node, "_saved_dim") else (made, made)
    dim = of._saved_dim
    (number,) = map(signed, dim if isinstance(dim, tuple) else (dim,))
    classes: int = shape._input_metadata[0].shape[number]
    return classes
