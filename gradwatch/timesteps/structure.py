"""Which modules of a model mix timesteps: seen by the graph that their calls leave, and by calls that feed the next.

No name and no class tells that, and nothing is run again. A module is a sequence module if an operation in it mixes
what lies along one dimension of its input (a convolution, attention, a cumulative sum, a spectrum, a loop), and its
output still has that dimension; of modules in each other the innermost. A module whose calls each take what the call
before gave, and something new, is a cell, of which each call is a timestep.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.model.nested import floats
from gradwatch.timesteps.kinds import kind_of, may_mix
from gradwatch.timesteps.layout import spaced
from gradwatch.values.sequences import Mixing

_MOST = 3000
"""Nodes of the graph that one call is looked at through."""
_LOOP, _LONG = 5, 16
"""Entries taken one by one along a dimension that make a loop: half of all, at least the first, at most the second.
Queries, keys and values are three, and the gates of an LSTM four."""
_NEAR = 64
"""Nodes between what a call of a cell gave and what its next call takes, at most."""
_CUMULATIVE = frozenset({"Cumsum", "Cumprod", "Logcumsumexp", "Cummax", "Cummin", "Flip"})
_PRODUCTS = frozenset({"Bmm", "Baddbmm"})
_MODULES, _NUMBERS = 16, 4096
"""Modules that are looked at in a training, and timesteps of those altogether that are no recurrence, at most."""
_UNKNOWN_DIMENSIONS = 4
"""Dimensions from which on an operation of somebody's own may mix what lies along one of the inner ones."""


class Seen(NamedTuple):
    """A sequence module."""

    time: int | None
    """Dimension of time of its input; None: each call is a timestep."""
    mixing: Mixing = ""
    length: int = 1
    """Timesteps of a call."""


class _Mixed(NamedTuple):
    """A dimension along which an operation mixes, by its size: what lies between is not followed."""

    mixing: Mixing
    size: int
    slack: int = 0
    """By how much the module's own dimension may be shorter or longer, as padding makes it."""


@dataclass
class _Calls:
    """Calls of a module that may be a cell."""

    gave: Sequence[Tensor]
    took: Sequence[Tensor]
    fed: int = 0
    """How many took what the one before gave, and something new."""


class Structure:
    """Looks for sequence modules in the first step that it sees, and knows them from then on."""

    def __init__(self) -> None:
        """Begin with none known."""
        self.seen: dict[str, Seen] = {}
        """Those that are worth their price at each probe, by name."""
        self._settled = False
        self._names: dict[int, str] = {}
        """The modules to look at, by `id`."""
        self._found: dict[str, Seen] = {}
        self._passed: dict[Any, list[Any]] = {}
        """By node of the graph that a module's output comes from, those that what it took comes from."""
        self._known: set[str] = set()
        self._calls: dict[str, _Calls] = {}
        self._depth = 0

    def arm(self, modules: Mapping[str, nn.Module]) -> dict[int, nn.Module]:
        """Choose the modules to look at, by `id`; none where it is known."""
        self._names, self._found, self._known, self._depth = {}, {}, set(), 0
        self._let_go()
        if self._settled:
            return {}
        chosen = {id(module): module for name, module in modules.items() if name and may_mix(module)}
        self._names = {id(module): name for name, module in modules.items() if id(module) in chosen}
        return chosen

    def settle(self) -> None:
        """Choose among those that were found, if anything ran, and let go of the graph.

        Cells, loops and scans come first: what attention or a convolution forgets is known from their weights. Of many
        some are chosen that lie evenly over the depth.
        """
        if not self._known:
            return
        recurrent = {n: s for n, s in self._found.items() if s.mixing not in ("attention", "convolution")}
        others = {n: s for n, s in self._found.items() if n not in recurrent}
        longest = max((s.length for s in others.values()), default=1)
        self.seen = _spaced(recurrent, _MODULES) | _spaced(others, min(max(_NUMBERS // longest, 1), _MODULES))
        self._settled = True
        self.arm({})

    def _let_go(self) -> None:
        """Let go of the graph: others tell by its nodes what is still there."""
        self._passed, self._calls = {}, {}

    def entered(self) -> None:
        """Note that a call begins."""
        self._depth += 1

    def left(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Look at a call that ends; those within it have been looked at."""
        self._depth -= 1
        if self._names:
            self._look(module, inputs, kwargs, output)
        if self._depth <= 0:
            self._let_go()

    def _look(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        name = self._names.get(id(module))
        if name is None or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        took, gave = [t for part in (*inputs, *kwargs.values()) for t in floats(part)], floats(output)
        if not took or not gave:
            return
        with contextlib.suppress(Exception):  # a graph of another shape than is known here tells nothing
            self._look_for_cell(name, inputs, took, gave)
            if name not in self._known:
                self._known.add(name)
                seen = _seen(took[0], gave, self._nodes(took, gave))
                if seen is not None and kind_of(module) is None:
                    self._found[name] = seen

    def _nodes(self, took: Iterable[Tensor], gave: Iterable[Tensor]) -> list[Any]:
        """Return the nodes between what a module took and what it gave, without those within modules inside of it."""
        begin: list[Any] = [t.grad_fn for t in took if t.grad_fn is not None]
        ends: list[Any] = [t.grad_fn for t in gave if t.grad_fn is not None]
        found: dict[Any, None] = {}
        waiting, seen = list(ends), set(begin)
        while waiting and len(seen) < _MOST:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            inner = self._passed.get(node)
            if inner is None:
                found[node] = None
                waiting += [next_ for next_, _ in node.next_functions]
            else:
                waiting += inner
        for node in ends:
            self._passed.setdefault(node, begin)
        return list(found)

    def _look_for_cell(
        self, name: str, inputs: tuple[Any, ...], took: Sequence[Tensor], gave: Sequence[Tensor]
    ) -> None:
        before = self._calls.get(name)
        first = inputs[0] if inputs else None
        self._calls[name] = now = _Calls(gave, took)
        if before is None or not isinstance(first, Tensor) or first.dim() < 2:
            return
        mine = {id(t) for t in before.gave}
        fed = [t for t in took if id(t) in mine or _made_of(t, before.gave)]
        if any(t is first for t in fed) or any(first is t for t in before.took) or not fed:
            return
        now.fed = before.fed + 1
        outer = any(name.startswith(f"{other}.") for other, seen in self._found.items() if seen.time is None)
        if now.fed + 1 >= _LOOP and not outer:
            for inside in [n for n in self._found if n.startswith(f"{name}.")]:
                del self._found[inside]
            self._found[name] = Seen(None, "cell")


def _spaced(found: dict[str, Seen], most: int) -> dict[str, Seen]:
    names = list(found)
    return {names[k]: found[names[k]] for k in spaced(len(names), most)}


def _seen(x: Tensor, gave: Iterable[Tensor], nodes: Sequence[Any]) -> Seen | None:
    """Return what is mixed along which dimension of a module's input, if the module gives that dimension back."""
    if x.dim() < 3:
        return None
    found = [
        Seen(time, mixed.mixing, x.shape[time])
        for mixed in (*_loops(nodes), *(m for node in nodes for m in _mixed(node, x)))
        if (time := _time(x, mixed)) is not None
        and any(abs(size - x.shape[time]) <= mixed.slack for y in gave if y.dim() > 2 for size in y.shape)
    ]
    # A product also sums over features, which come last.
    sure = [seen for seen in found if seen.mixing != "attention" or seen.time != x.dim() - 1]
    return next(iter(sure or found), None)


def _time(x: Tensor, mixed: _Mixed) -> int | None:
    """Return the dimension of a module's input along which something in it mixes, by its size: the likeliest first."""
    away = {dim: abs(size - mixed.size) for dim, size in enumerate(x.shape) if size >= _LOOP}
    near = [dim for dim, by in away.items() if by <= mixed.slack]
    return min(near, key=lambda dim: (away[dim], dim in (0, x.dim() - 1), dim), default=None)


def _mixed(node: Any, x: Tensor) -> Iterator[_Mixed]:  # noqa: ANN401  (a node of the graph)
    """Yield along what an operation mixes."""
    kind, shape = _kind(node), _shape(node)
    if kind == "Convolution":
        yield from _convolved(node, shape)
    elif "Attention" in kind and len(shape) > 2:
        yield _Mixed("attention", shape[-2])
    elif kind in _PRODUCTS:
        left, right = (_shape(next_) for next_, _ in node.next_functions[-2:])
        if left and right and not any(_is_weight(next_) for next_, _ in node.next_functions[-2:]):
            yield _Mixed("attention", right[-2])
    elif kind in _CUMULATIVE:
        dims = node._saved_dims if kind == "Flip" else (node._saved_dim,)
        for dim in dims:
            yield _Mixed("scan", shape[_signed(dim)])
    elif kind.startswith("Fft"):
        for dim in node._saved_dim:
            yield _Mixed("scan", shape[_signed(dim)], slack=shape[_signed(dim)])
    elif isinstance(node, torch.autograd.function.BackwardCFunction) and len(shape) >= _UNKNOWN_DIMENSIONS:
        yield from (_Mixed("scan", size) for size in shape[1:-1] if size in x.shape[:2])


def _convolved(node: Any, shape: Sequence[int]) -> Iterator[_Mixed]:  # noqa: ANN401  (as above)
    weight = _shape(node.next_functions[1][0])
    if len(weight) != 3 or weight[-1] == 1 or node._saved_transposed:
        return
    reach = node._saved_dilation[0] * (weight[-1] - 1)
    stride = node._saved_stride[0]
    size = (shape[-1] - 1) * stride - 2 * node._saved_padding[0] + reach + 1
    yield _Mixed("convolution", size, slack=reach + stride - 1)


def _loops(nodes: Sequence[Any]) -> Iterator[_Mixed]:
    """Yield dimensions whose entries are taken or put one by one, or along which results lie that feed each other."""
    taken: dict[tuple[int, int], set[int]] = {}
    put: Counter[tuple[int, ...]] = Counter()
    for node in nodes:
        kind = _kind(node)
        if kind == "Select":
            dim = _signed(node._saved_dim)
            taken.setdefault((node._saved_self_sym_sizes[dim], dim), set()).add(node._saved_index)
        elif kind == "Slice" and node._saved_step == 2:  # halves of halves: a parallel scan
            yield _Mixed("scan", node._saved_self_sym_sizes[_signed(node._saved_dim)])
        elif kind == "CopySlices":
            put[_shape(node)] += 1
        elif kind in ("Stack", "Cat") and _feed_each_other(node):
            yield _Mixed("loop", len(node.next_functions), slack=1)  # the first state may be among them
    for (size, _), indices in taken.items():
        if len(indices) >= max(_LOOP, min(size / 2, _LONG)):
            yield _Mixed("loop", size)
    for shape, count in put.items():
        if count >= _LOOP:
            yield from (_Mixed("loop", size, slack=1) for size in shape if size in (count, count + 1))


def _feed_each_other(node: Any) -> bool:  # noqa: ANN401  (as above)
    """Tell whether things of one timestep each are put side by side, of which the last was made of the one before."""
    parts = [part for part, _ in node.next_functions]
    single = len(parts) >= _LOOP and _shape(node)[_signed(node._saved_dim)] == len(parts)
    return single and _reaches(parts[-1], {parts[-2]}, _MOST // 10)


def _kind(node: Any) -> str:  # noqa: ANN401  (as above)
    """Return what an operation is called: "Convolution"."""
    name: str = node.name()
    return name.rpartition(":")[2].rstrip("0123456789").removesuffix("Backward")


def _shape(node: Any) -> tuple[int, ...]:  # noqa: ANN401  (a node of the graph, or None)
    return () if node is None else tuple(node._input_metadata[0].shape)


def _is_weight(node: Any) -> bool:  # noqa: ANN401  (as above)
    """Tell whether a matrix is a parameter, whatever it is laid out as."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")


def _signed(dim: int) -> int:
    """Return a dimension that was counted from the end, and is kept as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


def _made_of(tensor: Tensor, gave: Iterable[Tensor]) -> bool:
    """Tell whether a tensor was made of some others, not far from them."""
    ends = {t.grad_fn for t in gave if t.grad_fn is not None}
    return bool(ends) and _reaches(tensor.grad_fn, ends, _NEAR)


def _reaches(node: Any, ends: set[Any], most: int) -> bool:  # noqa: ANN401  (a node of the graph, or None)
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
