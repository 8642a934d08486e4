"""The autograd graph of what a model gave: which layers it leads to, and what on the way lets nothing through."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.measurement.barriers import (
    REARRANGED,
    SOFTMAX,
    before,
    blocks,
    compared_along,
    saved,
    saved_dim,
    shifts,
)
from gradwatch.values.autograd import Barrier

_MOST = 30_000
"""Nodes that are looked at in one step."""
_NEAR = 8
"""Nodes from what a layer takes to the module that gave it."""

WIDE = 8
"""Nodes that are followed at once."""
_SIDE_BY_SIDE = frozenset({"CatBackward0", "StackBackward0"})
_JOINS = _SIDE_BY_SIDE | {"AddBackward0", "SubBackward0", "WhereBackward0"}
"""Operations on several tensors; a product has a number, a mask or a mask of dropout beside what has a graph."""
MATRIX_PRODUCTS = frozenset({"MmBackward0", "BmmBackward0", "AddmmBackward0"})
"""Sums of products."""
_PRODUCTS = MATRIX_PRODUCTS | {"MulBackward0"}


@dataclass(frozen=True)
class Meeting:
    """Where weights that their module does not apply itself meet what is made of the input."""

    node: Any
    source: str | None = None
    """The layer that gave the other thing; None where that was not found."""
    given: Any = None
    """The node of what that gave."""
    fed: bool = True
    """Whether anything of the batch, or of a layer, was met there."""

    @property
    def joins(self) -> bool:
        """Whether they are added there, or put beside."""
        return self.node.name() in _JOINS

    @property
    def multiplies(self) -> bool:
        """Whether it is a product."""
        return self.node.name() in _PRODUCTS


class _Way(NamedTuple):
    """A node, and what lies on the way to it from what the model gave."""

    node: Any
    within: str = ""
    """The last module on it."""
    barrier: Barrier | None = None
    state: str | None = None
    """A recurrent layer whose initial state it goes through."""
    peak: int | None = None
    """Number of the last softmax on it."""
    meets: tuple[Any, int] | None = None
    """The last node on it, since the last layer, that takes something else too, and where the way enters it."""
    along: int | None = None
    """The dimension, from the end, of which all that follows takes differences alone, as a softmax does."""


@dataclass
class _Ways:
    """What is known of all ways to what a module gives, or to its weights."""

    open: bool = False
    """Whether no barrier lies on one of them."""
    barrier: Barrier | None = None
    direct: bool = False
    """Whether one of them is none through the initial state of a recurrent layer."""
    state: str | None = None
    peak: int | None = None
    """Number of the softmax on the first one that was found to have one."""
    meets: tuple[Any, int] | None = None
    """Of the first; of several weights that of one that is not added, if there is one."""

    def add(self, way: _Way) -> None:
        """Take another way."""
        if self.peak is None:
            self.peak = way.peak
        if self.meets is None or (way.meets is not None and self.meets[0].name() in _JOINS):
            self.meets = way.meets
        self.open |= way.barrier is None
        self.barrier = self.barrier or way.barrier
        self.direct |= way.state is None
        self.state = self.state or way.state


class Graph:
    """What was seen of the graph of one step; once `let_go` was called it keeps none of it."""

    def __init__(self, mark: object, owners: Mapping[int, str] | None = None) -> None:
        """Begin with nothing.

        Args:
            mark: the key under which the name of a module lies at the node that it gave.
            owners: by weight, by `id`, the module that it is of.

        """
        self._mark, self._state = mark, (mark, "state")
        self._owners = owners or {}
        self._layers = frozenset(self._owners.values())
        self.joins: list[tuple[int, tuple[int, ...], str]] = []
        """Where something without a graph was put to what has one: when, of what shape, and before which module."""
        self.applied: dict[int, int] = {}
        """By weight, by `id`, when something was first made of it, by autograd's count."""
        self._tops: list[Tensor] = []
        self._to_outputs: dict[str, _Ways] = {}
        self._to_weights: dict[str, _Ways] = {}

    @property
    def names(self) -> Collection[str]:
        """Modules whose output it leads to."""
        return self._to_outputs.keys()

    def name_of(self, node: Any) -> str | None:  # noqa: ANN401  (nodes have no common type that tells of this)
        """Return the name of the module that gave what a node computes."""
        found: str | None = node.metadata.get(self._mark)
        return found

    def note_state(self, node: Any, name: str) -> None:  # noqa: ANN401
        """Note that what a node computes is the initial state of a recurrent layer."""
        if node is not None:
            node.metadata[self._state] = name

    def nearest(self, node: Any, among: Collection[str] | None = None) -> tuple[str | None, Any, bool]:  # noqa: ANN401
        """Return the nearest module on the way back from a node, of these if any are named, and its node.

        And whether anything is added on the way there, or put beside it.
        """
        front = [(node, False)]
        for _ in range(_NEAR):
            for one, joined in front:
                name = self.name_of(one)
                if name is not None and (among is None or name in among):
                    return name, one, joined
            front = [
                (n, joined or (one.name() in _JOINS and len(edges) > 1))
                for one, joined in front
                for edges in (before(one),)
                for n in edges
            ][:WIDE]
        return None, None, False

    def owner(self, node: Any, but: Collection[str] = ()) -> str | None:  # noqa: ANN401
        """Return the module of the nearest parameter on the way back from a node, passing over those of some."""
        leaves = (getattr(one, "variable", None) for one in near(node, _NEAR))
        owners = (self._owners.get(id(leaf)) for leaf in leaves if isinstance(leaf, nn.Parameter))
        return next((owner for owner in owners if owner not in but), None)

    def walk(self, roots: Iterable[Any]) -> None:
        """Go through the graph of what an outermost call gave.

        Each node is seen with the best ways to it: whether no barrier, and no initial state, is on them.
        """
        best: dict[Any, tuple[bool, bool, bool]] = {}
        stack = [_Way(node) for node in roots]
        while stack and len(best) < _MOST:
            way = stack.pop()
            node = way.node
            known, free = best.get(node, (False, False, False)), way.barrier is None
            # A way on which differences alone count is no better than one with a barrier, for what shifts them all.
            now = (known[0] or free, known[1] or way.state is None, known[2] or (free and way.along is None))
            if node in best and now == known:
                continue
            stack += self._behind(self._seen(way, first=node not in best))
            best[node] = now

    def _seen(self, way: _Way, *, first: bool) -> _Way:
        """Take note of a node, and return the way as it goes on from it."""
        node, notes = way.node, way.node.metadata
        if (state := notes.get(self._state)) is not None:
            way = way._replace(state=state)
        if (leaf := getattr(node, "variable", None)) is not None:
            if (owner := self._owners.get(id(leaf))) is not None:
                self._to_weights.setdefault(owner, _Ways()).add(way)
                if way.meets is not None:
                    when = way.meets[0]._sequence_nr()
                    self.applied[id(leaf)] = min(when, self.applied.get(id(leaf), when))
            return way
        name: str | None = notes.get(self._mark)
        if name is not None:
            way = way._replace(within=name)
            self._to_outputs.setdefault(name, _Ways()).add(way)
            if name in self._layers:
                way = way._replace(meets=None)
        if first:
            if node.name() in SOFTMAX and (top := _top(node)) is not None:
                way = way._replace(peak=len(self._tops))
                self._tops.append(top)
            self._note_join(node, way.within)
        return way

    def _behind(self, way: _Way) -> Iterator[_Way]:
        """Yield the ways from a node to those that it takes from."""
        node, within, barrier, state, peak, meets, along = way
        edges, kind = node.next_functions, node.name()
        several = len(edges) > 1 and (  # elsewhere what has no graph may be a mere number
            sum(n is not None for n, _ in edges) > 1 or kind in MATRIX_PRODUCTS or kind in _SIDE_BY_SIDE
        )
        along = compared_along(node, kind, along)
        found = blocks(node, kind) or shifts(node, along) if barrier is None else None
        blocked = barrier if found is None else Barrier(within, found.operation, found.values)
        for place, (n, _) in enumerate(edges):
            if n is not None:
                its = blocked if found is None or place in found.places else barrier
                yield _Way(n, within, its, state, peak, (node, place) if several else meets, along)

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

    def let_go(self) -> None:
        """Let go of the nodes where ways meet: whoever keeps one keeps all that lies behind it."""
        for ways in (*self._to_outputs.values(), *self._to_weights.values()):
            ways.meets = None

    def _ways(self, name: str) -> _Ways:
        """Return the ways to the weights of a module; where those were not met, to what it gives."""
        return self._to_weights.get(name) or self._to_outputs.get(name) or _Ways()

    def peak(self, name: str) -> Tensor | None:
        """Return, of a module that leads to a softmax, the mean of the largest weights of that."""
        peak = self._ways(name).peak
        return None if peak is None else self._tops[peak]

    def barrier(self, name: str) -> Barrier | None:
        """Return, of a module that lies behind a barrier on every way, one of those."""
        ways = self._ways(name)
        return None if ways.open else ways.barrier

    def state(self, name: str) -> str | None:
        """Return, of a module that feeds nothing but the initial state of a recurrent layer, that layer."""
        ways = self._ways(name)
        return None if ways.direct else ways.state

    def beside(self, name: str) -> Any:  # noqa: ANN401
        """Return the node that puts what a module gives, as it is, side by side with something else."""
        ways = self._to_outputs.get(name)
        node, place = ways.meets if ways is not None and ways.meets is not None else (None, 0)
        if node is None or node.name() not in _SIDE_BY_SIDE:
            return None
        one = node.next_functions[place][0]
        while one is not None and self.name_of(one) != name:
            one = before(one)[0] if one.name() in REARRANGED else None
        return node if one is not None else None

    def meeting(self, name: str) -> Meeting | None:
        """Return where the weights of a module meet what is made of the input; None where they were not met."""
        ways = self._to_weights.get(name)
        if ways is None or ways.meets is None:
            return None
        node, mine = ways.meets
        others = [n for place, (n, _) in enumerate(node.next_functions) if place != mine]
        fed = None in others
        for other in filter(None, others):
            if self._is_weight(other):
                continue
            source, at, _ = self.nearest(other, self._layers)
            if source is None:  # of weights that are applied without their module
                source = self.owner(other, but=(name,))
            if source is not None:
                return Meeting(node, source, at, fed=True)
            fed = True
        return Meeting(node, fed=fed)

    @staticmethod
    def _is_weight(node: Any) -> bool:  # noqa: ANN401
        """Tell whether a node gives a leaf, as it is."""
        while node.name() in REARRANGED and (behind := before(node)):
            node = behind[0]
        return hasattr(node, "variable")


def near(node: Any, steps: int) -> Iterator[Any]:  # noqa: ANN401
    """Yield a node and those on the way back from it that are fewer steps away than these, the nearest first."""
    front = [node]
    for _ in range(steps):
        yield from front
        front = [n for one in front for n in before(one)][:WIDE]


def _top(node: Any) -> Tensor | None:  # noqa: ANN401
    """Return the mean of the largest weights of a softmax, from what it has saved; None where that was put away."""
    result, shape = saved(node, "result"), tuple(node._input_metadata[0].shape)
    if result is None or tuple(result.shape) != shape or not shape or not result.numel():
        return None
    return result.amax(saved_dim(node)).mean(dtype=torch.float32)
