"""How a loss is made of what a model gave: whether scores are squashed twice, or held against all targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from gradwatch.measurement.barriers import REARRANGED, SOFTMAX, before, saved_dim, signed
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
    "BinaryCrossEntropyWithLogitsBackward0": "sigmoid",
    "LogSigmoidBackward0": "sigmoid",
    "NllLossBackward0": "nll",
    "NllLoss2DBackward0": "nll",
    "CtcLossBackward0": "nll",
}
"""Nodes of loss functions, and what they take their input for."""
_ENTROPIES = frozenset({"NllLossBackward0", "NllLoss2DBackward0"})
"""Loss functions of which it is known what guessing costs."""
_MEAN = 1
"""Torch's number for `reduction="mean"`."""
_TOTALS = frozenset(
    f"{kind}Backward0"
    for kind in (
        *("Mean", "Sum", "Div", "Mul", "Add", "Neg", "Pow", "Abs", "Sqrt", "Maximum", "Minimum", "Where", "Clamp"),
        *("ClampMin", "ClampMax", "MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss"),
    )
)
"""Nodes that make one number of the sizes of errors, entry by entry; a sum along one dimension is no such."""
_DIFFERENCES = frozenset({"SubBackward0", "ExpandBackward0"})
"""Nodes at which broadcasting shows: a difference, and what the loss functions of torch make of what they take."""


def chance(loss: Any) -> tuple[Any, float] | None:  # noqa: ANN401  (nodes have no type)
    """Return the node of the scores, and the loss that equal scores for all classes would have.

    None where the loss is no mean of cross-entropies alone. Weights of classes change nothing: it is their mean too;
    nor does a division by 1 or more, as by the number of batches whose gradients are accumulated: what is told is not
    above that.

    Args:
        loss: the node of the loss.

    """
    while loss.name() == "DivBackward0" and len(earlier := before(loss)) == 1 and _lessens(loss):
        loss = earlier[0]
    if loss.name() not in _ENTROPIES or loss._saved_reduction != _MEAN:
        return None
    scores = _made(loss.next_functions[0][0])
    if scores.name() != "LogSoftmaxBackward0":
        return None
    return scores, math.log(scores._input_metadata[0].shape[saved_dim(scores)])


def _lessens(node: Any) -> bool:  # noqa: ANN401  (as above)
    """Tell whether a division is by 1 or more; after the backward pass nobody knows."""
    try:
        divisor = node._saved_other
    except RuntimeError:
        return False
    return isinstance(divisor, Tensor) and bool((divisor.abs() >= 1).all())


def squashed(loss: Any, name_of: Callable[[Any], str | None]) -> Squashed | None:  # noqa: ANN401  (nodes have no type)
    """Return what a loss function squashes though something has squashed it already; None where that is not so.

    Args:
        loss: the node of the loss.
        name_of: returns the name of the module that gave what a node computes, or of the nearest before it.

    """
    for node in _back(loss):
        into, taken = _TAKES.get(node.name()), before(node)
        if node.name() == "SubBackward0" and len(taken) == 2 and taken[1].name() == "LogsumexpBackward0":
            node, other = taken[1], taken[0]  # noqa: PLW2901  (a log_softmax by hand, as a Categorical takes it)
            taken = before(node)
            into = "softmax" if taken and _made(taken[0]) is _made(other) else None
        if into is None or not taken:
            continue
        made = _made(taken[0])
        by = _MADE.get(made.name())
        if by is not None and (into, by) != ("nll", "sigmoid"):
            classes = 1 if into == "sigmoid" else _classes(node, taken[0], made)
            return Squashed(name_of(made) or "", by, into, classes)
    return None


def crossed(loss: Any, name_of: Callable[[Any], str | None]) -> int | None:  # noqa: ANN401  (as above)
    """Return how many forecasts are held against as many targets, each against each; None where that is not so.

    So broadcasting does it with forecasts of shape (B, 1) and targets of shape (B,): the errors have the shape (B, B).
    Where forecasts are held against each other too, a distribution is meant, as an energy distance does it.

    Args:
        loss: the node of the loss.
        name_of: returns the name of the module that gave what a node computes, if one did; the loss comes after that.

    """
    found: int | None = None
    for node in _back(loss, lambda n: name_of(n) is not None or n.name() not in _TOTALS):
        pairs = tuple(size for size in node._input_metadata[0].shape if size != 1)
        if node.name() not in _DIFFERENCES or len(pairs) != 2 or pairs[0] != pairs[1]:
            continue
        given = _taken(node)
        if len(given) == 1 and given[0][0].name() == "ExpandBackward0":
            given = _taken(given[0][0])
        if len(given) != 1:
            return None
        if math.prod(given[0][0]._input_metadata[given[0][1]].shape) == pairs[0]:
            found = pairs[0]
    return found


def _taken(node: Any) -> list[tuple[Any, int]]:  # noqa: ANN401  (as above)
    """Return the nodes that a node takes from, each with the number of its output."""
    return [(n, number) for n, number in node.next_functions if n is not None]


def _made(node: Any) -> Any:  # noqa: ANN401  (as above)
    """Return the node that made what this one picks, or gives in another shape."""
    while node.name() in _PICKED and (earlier := before(node)):
        node = earlier[0]
    return node


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
    of, given = (node, taken) if hasattr(node, "_saved_dim") else (made, made)
    shape: tuple[int, ...] = tuple(given._input_metadata[0].shape)
    dims = of._saved_dim if isinstance(of._saved_dim, tuple) else (of._saved_dim,)
    return math.prod(shape[signed(dim)] for dim in dims) if shape else 1
