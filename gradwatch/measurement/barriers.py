"""What lets nothing of a gradient through, by what an operation is and what it works over."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from gradwatch.values.autograd import BarrierKind

_NARROW = 2
"""Values up to which a normalization gives the same whatever it takes: of one its shift, of two 1 and -1."""
REARRANGED = frozenset(
    f"{kind}Backward{number}"
    for kind in (
        *("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Expand", "Squeeze", "Unsqueeze"),
        *("Clone", "Alias", "ToCopy", "Split", "SplitWithSizes", "Slice", "Select", "Unbind"),
    )
    for number in (0, 1, 2)
)
"""Operations that give what they take, or a part of it, in another shape."""
SOFTMAX = frozenset({"SoftmaxBackward0", "SafeSoftmaxBackward0"})
_KEEP_DIFFERENCES = frozenset(f"{kind}Backward0" for kind in ("Add", "Sub", "MaskedFill", "Where", "Expand", "ToCopy"))
"""Operations through which what is alike for all that a softmax compares stays so, but for what a mask takes out."""
_TOTALS = frozenset({"SumBackward1", "LinalgVectorNormBackward0"})
"""Sums and norms along dimensions."""
_ALIKE = REARRANGED | {"AddBackward0", "ClampMinBackward0", "ClampBackward1"}
"""What may come between a sum and the division by it: an epsilon, a smallest value, another shape."""
_EPSILON = 1e-3
"""Share of a sum that may have been added to it, to have no effect."""
_SCORES = (0, 1)
"""Where the queries and keys stand among what attention takes."""


def before(node: Any) -> list[Any]:  # noqa: ANN401
    """Return the nodes that a node takes from."""
    return [n for n, _ in node.next_functions if n is not None]


class Block(NamedTuple):
    """What lets nothing of the gradient through to some of what a node takes."""

    operation: BarrierKind
    values: int
    """Over how many values it works."""
    places: tuple[int, ...] = (0,)
    """Which of those that it takes."""


def blocks(node: Any, kind: str) -> Block | None:  # noqa: ANN401
    """Return what kind of barrier a node of this kind is; None where it is none."""
    if kind in SOFTMAX:
        shape = node._input_metadata[0].shape
        width = shape[saved_dim(node)] if len(shape) else 1
        return Block("softmax", 1) if width == 1 else None
    if kind.startswith("ScaledDotProduct"):  # attention to a single key is a softmax over one value
        of_keys = [n._input_metadata[number].shape for n, number in node.next_functions[1:3] if n is not None]
        single = any(len(shape) > 1 and shape[-2] == 1 for shape in of_keys)
        return Block("softmax", 1, _SCORES) if single else None
    if kind == "NativeLayerNormBackward0":
        width = math.prod(node._saved_normalized_shape)
        return Block("layer_norm", width) if width <= _NARROW else None
    if kind == "NativeGroupNormBackward0":
        width = node._saved_C // max(node._saved_group, 1) * node._saved_HxW
        return Block("group_norm", width) if width <= _NARROW else None
    return Block("quotient", 1, (0, 1)) if kind == "DivBackward0" and _by_itself(node) else None


def compared_along(node: Any, kind: str, along: int | None) -> int | None:  # noqa: ANN401
    """Return the dimension, from the end, of which what follows on a node takes differences alone.

    Args:
        node: the node.
        kind: its name.
        along: the same of what it gives.

    """
    if kind in SOFTMAX or kind == "LogSoftmaxBackward0":
        dim, many = saved_dim(node), len(node._input_metadata[0].shape)
        return None if not many else dim if dim < 0 else dim - many
    return along if kind in _KEEP_DIFFERENCES else None


def shifts(node: Any, along: int | None) -> Block | None:  # noqa: ANN401
    """Return the barrier before what is added to all that is compared alike; None where there is none.

    Args:
        node: the node.
        along: as `compared_along` gives it for what the node takes.

    """
    if along is None or node.name() not in _KEEP_DIFFERENCES:
        return None
    whole = _size(node, 0, along)
    edges = enumerate(node.next_functions)
    alike = tuple(place for place, (n, number) in edges if n is not None and _size(n, number, along) == 1 < whole)
    return Block("shift", 1, alike) if alike else None


def _size(node: Any, number: int, dim: int) -> int:  # noqa: ANN401
    """Return the size of what a node gives along a dimension from the end, 1 where it lacks it."""
    shape = node._input_metadata[number].shape
    return shape[dim] if len(shape) >= -dim else 1


def _by_itself(node: Any) -> bool:  # noqa: ANN401
    """Tell whether a quotient divides each value by the sum or norm of itself alone, which gives 1 or -1.

    What may have been added to that is in the numbers that it has saved.
    """
    (above, number), (below, _) = node.next_functions if len(node.next_functions) == 2 else ((None, 0), (None, 0))
    while below is not None and below.name() in _ALIKE and len(earlier := before(below)) == 1:
        below = earlier[0]
    if above is None or below is None or below.name() not in _TOTALS or below.next_functions[0] != (above, number):
        return False
    if math.prod(below._input_metadata[0].shape) != math.prod(above._input_metadata[number].shape):
        return False
    top, bottom = (saved(node, name) for name in ("self", "other"))
    if top is None or bottom is None:
        return False
    return bool(((top.abs() - bottom.abs()).abs() <= _EPSILON * bottom.abs()).all())


def saved_dim(node: Any) -> int:  # noqa: ANN401
    """Return the dimension that a node works along, as it was given."""
    return signed(node._saved_dim)


def signed(dim: int) -> int:
    """Return a dimension as it was given: of the negative ones autograd gives the bits."""
    return dim - 2**64 if dim >= 2**63 else dim


def saved(node: Any, name: str) -> Tensor | None:  # noqa: ANN401
    """Return what a node has saved; None where that was put away.

    What hooks of the user's have packed, as a checkpoint does, is not unpacked; before torch 2.7 nobody can tell
    whether it is.
    """
    found = getattr(getattr(node, f"_raw_saved_{name}"), "data", None)
    return found.detach() if type(found) is Tensor else None
