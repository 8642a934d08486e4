"""What mixes timesteps within one call of a module, told by the graph between its input and its output.

Nothing is run again, and no saved tensor is looked at: operations have names, shapes and dimensions. What lies between
is not followed dimension by dimension, so that a dimension is mostly known by its size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradwatch.values.sequences import Mixing

LEAST, _LONG = 5, 16
"""Entries taken one by one along a dimension that make a loop: half of all, at least the first, at most the second.
Queries, keys and values are three, and the gates of an LSTM four."""
_FAR = 300
"""Nodes from what a loop gave at one timestep back to what it gave at the one before, at most."""
_CUMULATIVE = frozenset({"Cumsum", "Cumprod", "Logcumsumexp", "Cummax", "Cummin"})
_PRODUCTS = frozenset({"Bmm", "Baddbmm"})
_SIDE_BY_SIDE = frozenset({"Stack", "Cat"})
_INNER = 4
"""Dimensions from which on an operation of somebody's own may mix what lies along one of the inner ones."""

Edge = tuple[Any, int]
"""A node of the graph, and which of its outputs."""
Graph = Mapping[Any, Sequence[Edge]]
"""Nodes between an input and an output, each with those that it takes from; those first that are near the output."""


class Seen(NamedTuple):
    """A sequence module."""

    time: int | None
    """Dimension of time of its input; None: each call is a timestep."""
    mixing: Mixing = ""
    length: int = 1
    """Timesteps of a call."""


class _Mixed(NamedTuple):
    """A dimension along which an operation mixes, by its size."""

    mixing: Mixing
    size: int
    slack: int = 0
    """By how much the module's own dimension may be shorter or longer, as padding makes it."""
    dim: int | None = None
    """Which one it is of the module's input, where that is known."""
    last: bool = False
    """Whether it may be the last one of the input, which mostly holds features."""


def seen_in(
    x: Tensor, gave: Iterable[Tensor], graph: Graph, inner: Container[Any], *, batch_first: bool | None = None
) -> Seen | None:
    """Return what is mixed along which dimension of a module's input, if the module gives that dimension back.

    Args:
        x: the input; only one of three dimensions is looked at, which pictures have not.
        gave: what the module gave.
        graph: what lies between.
        inner: nodes of it that stand for whole modules inside.
        batch_first: what the module says of its own layout; None: nothing.

    """
    if x.dim() != 3:
        return None
    mine = [node for node in graph if node not in inner]
    for mixed in (*_loops(mine, x), *_meetings(graph, x), *(m for node in mine for m in _mixed(node, x))):
        time = _time(x, mixed, batch_first)
        if time is not None and any(
            abs(size - x.shape[time]) <= mixed.slack for y in gave if y.dim() > 2 for size in y.shape
        ):
            return Seen(time, mixed.mixing, x.shape[time])
    return None


def reaches(node: Any, ends: set[Any], most: int) -> bool:  # noqa: ANN401  (a node of the graph, or None)
    """Tell whether a node was made of one of some others, of at most so many that lie near."""
    waiting = [node]
    seen: set[Any] = set()
    while waiting and len(seen) < most:
        one = waiting.pop(0)
        if one in ends:
            return True
        if one is not None and one not in seen:
            seen.add(one)
            waiting += [next_ for next_, _ in one.next_functions]
    return False


def entry_of(node: Any, most: int) -> tuple[Any, int] | None:  # noqa: ANN401  (as above)
    """Return of which node the nearest single entry was taken that something was made of, and which; None: of none."""
    waiting: list[Edge] = [(node, 0)]
    seen: set[Any] = set()
    while waiting and len(seen) < most:
        one, number = waiting.pop(0)
        if one is None or one in seen:
            continue
        seen.add(one)
        taken = _taken(one, number)
        if taken is not None:
            source = one.next_functions[0][0]
            return None if hasattr(source, "variable") else (source, taken[1])  # a row of a parameter
        waiting += one.next_functions
    return None


def _time(x: Tensor, mixed: _Mixed, batch_first: bool | None) -> int | None:  # noqa: FBT001  (what the module says)
    """Return the dimension of a module's input along which something in it mixes; None where that is not clear."""
    if mixed.dim is not None:
        return mixed.dim if x.shape[mixed.dim] == mixed.size else None
    away = {dim: abs(size - mixed.size) for dim, size in enumerate(x.shape) if size >= LEAST}
    near = [dim for dim, by in away.items() if by <= mixed.slack and (mixed.last or dim < 2)]
    best = [dim for dim in near if away[dim] == min(away[d] for d in near)]
    if {0, 1} <= set(best):
        return None if batch_first is None else int(batch_first)
    return max(best, key=lambda dim: dim == 1, default=None)


def _mixed(node: Any, x: Tensor) -> Iterator[_Mixed]:  # noqa: ANN401  (as above)
    """Yield along what an operation mixes."""
    kind, shape = _kind(node), _shape(node)
    if kind == "Convolution":
        yield from _convolved(node, shape)
    elif "Attention" in kind and len(shape) > 2:
        yield _Mixed("attention", shape[-2])
    elif kind in _PRODUCTS:
        left, right = (_shape(next_) for next_, _ in node.next_functions[-2:])
        if left and right and not any(_is_weight(next_) for next_, _ in node.next_functions[-2:]):
            yield _Mixed("attention", right[-2], last=left[-2] == left[-1])
    elif kind in _CUMULATIVE:
        dim = _signed(node._saved_dim)
        yield _Mixed("scan", shape[dim], dim=_own(shape, dim, x))
    elif kind.startswith("Fft") and len(node._saved_dim) == 1:
        size = shape[_signed(node._saved_dim[0])]
        yield _Mixed("scan", size, slack=size)
    elif isinstance(node, torch.autograd.function.BackwardCFunction) and len(shape) >= _INNER:
        yield from (_Mixed("scan", size) for size in shape[1:-1] if size in x.shape[:2])


def _convolved(node: Any, shape: Sequence[int]) -> Iterator[_Mixed]:  # noqa: ANN401  (as above)
    weight = _shape(node.next_functions[1][0])
    if len(weight) != 3 or weight[-1] == 1 or node._saved_transposed:
        return
    reach = node._saved_dilation[0] * (weight[-1] - 1)
    stride = node._saved_stride[0]
    size = (shape[-1] - 1) * stride - 2 * node._saved_padding[0] + reach + 1
    yield _Mixed("convolution", size, slack=reach + stride - 1, last=True)


def _loops(nodes: Iterable[Any], x: Tensor) -> Iterator[_Mixed]:
    """Yield dimensions along which lie results that feed each other, or whose halves of halves are added."""
    put: Counter[tuple[int, ...]] = Counter()
    halved: set[int] = set()
    for node in nodes:
        kind = _kind(node)
        if kind == "Slice" and node._saved_step == 2:
            halved.add(node._saved_self_sym_sizes[_signed(node._saved_dim)])
        elif kind == "CopySlices":
            put[_shape(node)] += 1
        elif kind in _SIDE_BY_SIDE and _feed_each_other(node, x):
            size, dim = len(node.next_functions), _signed(node._saved_dim)
            own = _own(_shape(node), dim, x)
            yield _Mixed("loop", size, slack=int(own is None), dim=own)  # the first state may be among them
    for size in halved:
        if halved & {size // 2, (size + 1) // 2}:  # halves of halves: a parallel scan
            yield _Mixed("scan", size)
    for shape, count in put.items():
        if count >= LEAST and len(shape) >= x.dim():
            yield from (_Mixed("loop", size, slack=1) for size in shape if size in (count, count + 1))


def _meetings(graph: Graph, x: Tensor) -> Iterator[_Mixed]:
    """Yield dimensions whose entries are taken one by one, each of which meets what was made of the ones before."""
    for (shape, dim), met in _meet(graph).items():
        if met + 1 >= max(LEAST, min(shape[dim] / 2, _LONG)):
            yield _Mixed("loop", shape[dim], dim=_own(shape, dim, x))


def _feed_each_other(node: Any, x: Tensor) -> bool:  # noqa: ANN401  (as above)
    """Tell whether things of one timestep each are put side by side, of which the last was made of the one before."""
    parts, shape = [part for part, _ in node.next_functions], _shape(node)
    single = len(shape) == x.dim() and len(parts) >= LEAST and shape[_signed(node._saved_dim)] == len(parts)
    return single and reaches(parts[-1], {parts[-2]}, _FAR)


def _meet(graph: Graph) -> dict[tuple[tuple[int, ...], int], int]:
    """Return how many entries met what was made of an earlier one, by the shape that they were taken of, and where.

    That they are put side by side at the end is no meeting.
    """
    last: dict[Any, dict[tuple[tuple[int, ...], int], int]] = {}
    met: dict[tuple[tuple[int, ...], int], set[int]] = {}
    for node in _inputs_first(graph):
        mine: dict[tuple[tuple[int, ...], int], int] = {}
        for next_, number in graph[node]:
            found = dict(last.get(next_, {}))
            if next_ is not None and (taken := _taken(next_, number)) is not None:
                found[taken[0]] = taken[1]
            for group, index in found.items():
                other = mine.get(group)
                if other is not None and other != index and _kind(node) not in _SIDE_BY_SIDE:
                    met.setdefault(group, set()).add(max(other, index))
                mine[group] = index if other is None else max(other, index)
        last[node] = mine
    return {group: len(found) for group, found in met.items()}


def _inputs_first(graph: Graph) -> list[Any]:
    """Return the nodes of a graph, each after all that it takes from."""
    done: dict[Any, None] = {}
    for begin in graph:
        waiting = [begin]
        while waiting:
            node = waiting[-1]
            missing = [n for n, _ in graph[node] if n in graph and n not in done and n is not node]
            if node in done or not missing:
                done[node] = None
                waiting.pop()
            else:
                waiting += missing
    return list(done)


def _taken(node: Any, number: int) -> tuple[tuple[tuple[int, ...], int], int] | None:  # noqa: ANN401  (as above)
    """Return the shape and dimension of which a node takes one entry, and which; None where it takes none."""
    kind = _kind(node)
    if kind == "Select":
        shape, dim = tuple(node._saved_self_sym_sizes), _signed(node._saved_dim)
        return (shape, dim % len(shape)), _signed(node._saved_index) % shape[dim]
    if kind == "Unbind":
        inner, dim, count = _shape(node), _signed(node._saved_dim), len(node._input_metadata)
        dim %= len(inner) + 1
        return ((*inner[:dim], count, *inner[dim:]), dim), number
    return None


def _own(shape: Sequence[int], dim: int, x: Tensor) -> int | None:
    """Return which dimension of a module's input one of a tensor is that has the same first two; None: not known."""
    same = len(shape) == x.dim() and tuple(shape[:2]) == tuple(x.shape[:2])
    return dim % len(shape) if same and dim % len(shape) < 2 else None


def _kind(node: Any) -> str:  # noqa: ANN401  (as above)
    """Return what an operation is called: "Convolution"."""
    name: str = node.name()
    return name.rpartition(":")[2].rstrip("0123456789").removesuffix("Backward")


def _shape(node: Any) -> tuple[int, ...]:  # noqa: ANN401  (as above)
    return () if node is None else tuple(node._input_metadata[0].shape)


def _is_weight(node: Any) -> bool:  # noqa: ANN401  (as above)
    """Tell whether a matrix is a parameter, whatever it is laid out as."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")


def _signed(dim: int) -> int:
    """Return a dimension or an index that was counted from the end, and is kept as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim
