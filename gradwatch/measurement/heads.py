"""How a loss is made of what a model gave: whether the scores are squashed twice, or held against all targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
_ERRORS = frozenset(
    f"{kind}Backward0" for kind in ("Pow", "Abs", "Mul", "MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "LogCosh")
)
"""Nodes that make the size of an error, or the mean of such sizes."""
_DIFFERENCES = frozenset({"SubBackward0", "ExpandBackward0"})
"""Nodes at which broadcasting shows: a difference, and what the loss functions of torch make of what they take."""


def squashed(loss: Any, name_of: Callable[[Any], str | None]) -> Squashed | None:  # noqa: ANN401  (nodes have no type)
    """Return what a loss function squashes though something has squashed it already; None where that is not so.

    Args:
        loss: the node of the loss.
        name_of: returns the name of the module that gave what a node computes, or of the nearest before it.

    """
    for node in _back(loss):
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
    return None


def crossed(loss: Any, name_of: Callable[[Any], str | None]) -> int | None:  # noqa: ANN401  (as above)
    """Return how many forecasts are held against as many targets, each against each; None where that is not so.

    So broadcasting does it with forecasts of shape (B, 1) and targets of shape (B,): the errors have the shape (B, B).

    Args:
        loss: the node of the loss.
        name_of: returns the name of the module that gave what a node computes, if one did; the loss comes after that.

    """
    for node in _back(loss, lambda n: name_of(n) is not None):
        if node.name() not in _ERRORS:
            continue
        (errors, *_) = before(node) or (None,)
        if errors is None or name_of(errors) is not None or errors.name() not in _DIFFERENCES:
            continue
        pairs: tuple[int, ...] = tuple(errors._input_metadata[0].shape)
        given = [(n, number) for n, number in errors.next_functions if n is not None]
        if len(given) == 1 and given[0][0].name() == "ExpandBackward0":
            given = [(n, number) for n, number in given[0][0].next_functions if n is not None]
        # Of two outputs of the model each against each may well be meant.
        rows = math.prod(given[0][0]._input_metadata[given[0][1]].shape) if len(given) == 1 else 1
        if rows > 1 and pairs == (rows, rows):
            return rows
    return None


def _back(loss: Any, ends: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:  # noqa: ANN401  (as above)
    """Yield the nodes of a loss, nearest first, up to those at which it ends."""
    front, seen = [loss], {loss}
    while front and len(seen) < _LOSS:
        node = front.pop(0)
        yield node
        for n in before(node) if not ends(node) else ():
            if n not in seen:
                seen.add(n)
                front.append(n)


def _classes(node: Any, taken: Any, made: Any) -> int:  # noqa: ANN401  (as above)
    """Return over how many entries a loss function works that takes what one node gives, and another has made."""
    # What takes the logarithm to be there works along the dimension along which that should have been taken.
    of, shape = (node, taken) if hasattr(node, "_saved_dim") else (made, made)
    dim = of._saved_dim
    (number,) = map(signed, dim if isinstance(dim, tuple) else (dim,))
    classes: int = shape._input_metadata[0].shape[number]
    return classes
