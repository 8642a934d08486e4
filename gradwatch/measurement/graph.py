"""The autograd graph of what a model gave: which layers it leads to, and what on the way lets nothing through."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.values.snapshot import Barrier

_MOST = 30_000
"""Nodes that are looked at in one step."""
_NEAR = 8
"""Nodes from what a layer takes to the module that gave it."""
_NARROW = 2
"""Values up to which a normalization gives the same whatever it takes: of one its shift, of two 1 and -1."""

_JOINS = frozenset({"CatBackward0", "StackBackward0", "AddBackward0", "SubBackward0", "WhereBackward0"})
"""Operations on several tensors; a product has a number, a mask or a mask of dropout beside what has a graph."""
_SOFTMAX = frozenset({"SoftmaxBackward0", "SafeSoftmaxBackward0"})
_SCORES = (0, 1)
"""Where the queries and keys stand among what attention takes."""


class Graph:
    """What was seen of the graph of one step; it keeps none of it."""

    def __init__(self, mark: object) -> None:
        """Begin with nothing; `mark` is the key under which the name of a module lies at the node that it gave."""
        self._mark, self._state = mark, (mark, "state")
        self.names: set[str] = set()
        """Modules whose output it leads to."""
        self.joins: list[tuple[int, tuple[int, ...], str]] = []
        """Where something without a graph was put to what has one: when, of what shape, and before which module."""
        self._open: set[str] = set()
        """Modules to whose output a way leads that no barrier is on."""
        self._barriers: dict[str, Barrier] = {}
        self._tops: list[Tensor] = []
        self._peaks: dict[str, int] = {}
        """By module, the softmax on the first way that was found to it."""
        self._direct: set[str] = set()
        """Modules to whose output a way leads that is none through the initial state of a recurrent layer."""
        self._states: dict[str, str] = {}

    def name_of(self, node: Any) -> str | None:  # noqa: ANN401  (nodes have no common type that tells of this)
        """Return the name of the module that gave what a node computes."""
        found: str | None = node.metadata.get(self._mark)
        return found

    def note_state(self, node: Any, name: str) -> None:  # noqa: ANN401
        """Note that what a node computes is the initial state of a recurrent layer."""
        if node is not None:
            node.metadata[self._state] = name

    def nearest(self, node: Any, among: Collection[str] | None = None) -> tuple[str | None, Any]:  # noqa: ANN401
        """Return the nearest module on the way back from a node, of these if there are any named, and its node."""
        for one in near(node, _NEAR):
            name = self.name_of(one)
            if name is not None and (among is None or name in among):
                return name, one
        return None, None

    @staticmethod
    def leaf(node: Any) -> int | None:  # noqa: ANN401
        """Return the nearest parameter on the way back from a node, by `id`."""
        for one in near(node, _NEAR):
            if isinstance(leaf := getattr(one, "variable", None), nn.Parameter):
                return id(leaf)
        return None

    def walk(self, roots: Iterable[Any]) -> None:
        """Go through the graph of what an outermost call gave.

        Each node is seen with the best way to it: whether no barrier, and no initial state, is on it.
        """
        best: dict[Any, tuple[bool, bool]] = {}
        stack: list[tuple[Any, str, Barrier | None, str | None, int | None]] = [
            (node, "", None, None, None) for node in roots
        ]
        while stack and len(best) < _MOST:
            node, within, barrier, state, peak = stack.pop()
            known = best.get(node, (False, False))
            now = (known[0] or barrier is None, known[1] or state is None)
            if node in best and now == known:
                continue
            best[node] = now
            notes = node.metadata
            name: str | None = notes.get(self._mark)
            state = notes.get(self._state, state)
            if name is not None:
                within = name
                self._see(name, barrier, state)
                if peak is not None:
                    self._peaks.setdefault(name, peak)
            if node.name() in _SOFTMAX and (top := _top(node)) is not None:
                peak = len(self._tops)
                self._tops.append(top)
            if known == (False, False):
                self._note_join(node, within)
            if barrier is None and (found := _blocks(node)) is not None:
                barrier = Barrier(within, *found)
            one = Barrier(within, "softmax", 1) if barrier is None and _attends_to_one(node) else barrier
            stack += [
                (n, within, one if place in _SCORES else barrier, state, peak)
                for place, (n, _) in enumerate(node.next_functions)
                if n is not None
            ]

    def _see(self, name: str, barrier: Barrier | None, state: str | None) -> None:
        self.names.add(name)
        if barrier is None:
            self._open.add(name)
        else:
            self._barriers.setdefault(name, barrier)
        if state is None:
            self._direct.add(name)
        else:
            self._states.setdefault(name, state)

    def _note_join(self, node: Any, within: str) -> None:  # noqa: ANN401
        """Note where something without a graph comes in beside what has one."""
        edges = node.next_functions
        if node.name() not in _JOINS or all(n is not None for n, _ in edges) or len(edges) < 2:
            return
        shape = tuple(node._input_metadata[0].shape)
        if node.name() == "CatBackward0":
            dim = saved_dim(node) % max(len(shape), 1)
            known = [n._input_metadata[number].shape for n, number in edges if n is not None]
            missing = sum(n is None for n, _ in edges)
            rest = shape[dim] - sum(s[dim] for s in known)
            shape = (*shape[:dim], rest // missing, *shape[dim + 1 :])
        elif node.name() == "StackBackward0":
            dim = saved_dim(node) % max(len(shape), 1)
            shape = shape[:dim] + shape[dim + 1 :]
        self.joins.append((node._sequence_nr(), shape, within))

    def peaks(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return, of modules that lead to a softmax, the mean of its largest weights."""
        return {name: self._tops[self._peaks[name]] for name in names if name in self._peaks}

    def barriers(self, names: Sequence[str]) -> dict[str, Barrier]:
        """Return, of the modules that lie behind a barrier on every way, one of those."""
        return {name: self._barriers[name] for name in names if name in self._barriers and name not in self._open}

    def states(self, names: Sequence[str]) -> dict[str, str]:
        """Return, of the modules that feed nothing but the initial state of a recurrent layer, that layer."""
        return {name: self._states[name] for name in names if name in self._states and name not in self._direct}


def near(node: Any, steps: int) -> Iterator[Any]:  # noqa: ANN401
    """Yield a node and those on the way back from it that are fewer steps away than these, the nearest first."""
    front = [node]
    for _ in range(steps):
        yield from front
        front = [n for one in front for n, _ in one.next_functions if n is not None][:8]


def _top(node: Any) -> Tensor | None:  # noqa: ANN401
    """Return the mean of the largest weights of a softmax, from what it has saved; None where that was put away.

    What hooks of the user's have packed, as a checkpoint does, is not unpacked.
    """
    raw = node._raw_saved_result
    result = raw.data
    shape = tuple(node._input_metadata[0].shape)
    if type(result) is not Tensor or tuple(result.shape) != shape or not shape or not result.numel():
        return None
    return result.detach().amax(saved_dim(node)).mean(dtype=torch.float32)


def saved_dim(node: Any) -> int:  # noqa: ANN401
    """Return the dimension that a node works along, as it was given: of the negative ones autograd gives the bits."""
    dim: int = node._saved_dim
    return dim - 2**64 if dim >= 2**63 else dim


def _attends_to_one(node: Any) -> bool:  # noqa: ANN401
    """Tell whether a node is the attention to a single key, which is a softmax over one value."""
    if not node.name().startswith("ScaledDotProduct"):
        return False
    of_keys = [n._input_metadata[number].shape for n, number in node.next_functions[1:3] if n is not None]
    return any(len(shape) > 1 and shape[-2] == 1 for shape in of_keys)


def _blocks(node: Any) -> tuple[Any, int] | None:  # noqa: ANN401
    """Return what kind of barrier a node is, and over how many values it works; None where it is none."""
    kind = node.name()
    if kind in _SOFTMAX:
        shape = node._input_metadata[0].shape
        width = shape[saved_dim(node)] if len(shape) else 1
        return ("softmax", 1) if width == 1 else None
    if kind == "NativeLayerNormBackward0":
        width = math.prod(node._saved_normalized_shape)
        return ("layer_norm", width) if width <= _NARROW else None
    if kind == "NativeGroupNormBackward0":
        width = node._saved_C // max(node._saved_group, 1) * node._saved_HxW
        return ("group_norm", width) if width <= _NARROW else None
    return None
