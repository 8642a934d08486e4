"""Where the gradient ended on its way back to layers that it did not reach."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gradwatch.measurement.graph import Graph
from gradwatch.measurement.output_gradients import Output
from gradwatch.model.forward_hooks import StepView
from gradwatch.values.autograd import Cut, CutKind


@dataclass
class Call:
    """The last call of a module."""

    began: int = 0
    ended: int = 0
    """Its place among all beginnings and ends of calls."""
    outermost: int = 0
    """Number of the outermost call that it was part of."""
    graph: bool = False
    """Whether what it gave has a graph."""
    checkpoint: bool = False
    """Whether a reentrant checkpoint ran it without a graph."""
    same: bool = False
    """Whether it gave what it took."""
    loose: tuple[tuple[int, tuple[int, ...], bool], ...] = ()
    """Of what it took without a graph, if it took nothing else: storage, shape, and whether it is no whole numbers."""
    mixed: frozenset[int] = frozenset()
    """Storages of what it took that no module gave."""
    aliases: frozenset[str] = frozenset()
    """Layers in question whose output it took outside of the graph."""
    source: str | None = None
    """The layer whose output it took."""
    joined: bool = False
    """Whether it took the sum of that and of something else, or both side by side."""
    taken: frozenset[int] = frozenset()
    """Storages of all that it took."""
    fed: bool = True
    """Whether anything of the batch, or of a layer before it, goes into it."""
    made: int = -1
    """When what it gave was made, by autograd's count."""
    shape: tuple[int, ...] = ()
    """Of what it gave."""
    given: Output | None = None
    """The gradient at that."""


class Token:
    """Lies at a node, and is gone with it."""


@dataclass
class Outputs:
    """What a layer in question gave in this step."""

    nodes: list[weakref.ref[Token]] = field(default_factory=list)
    """By call: alive as long as its node is."""
    storages: set[int] = field(default_factory=set)


@dataclass
class Seen:
    """What was seen of the forward pass of a step."""

    graph: Graph
    calls: dict[str, Call] = field(default_factory=dict)
    outputs: dict[str, Outputs] = field(default_factory=dict)
    storages: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """Those that a module took without a graph: when the first one did, and the shape."""
    weak: list[Any] = field(default_factory=list)
    """Storages that were seen; as long as one is here, no other has its number."""


def cuts(seen: Seen, step: StepView, reached: Collection[str], suspects: Collection[str]) -> Iterator[Cut]:
    """Tell of each layer that is in question, or has no gradient, where that ended."""
    calls = seen.calls
    lively = {call.outermost for name, call in calls.items() if name in reached}
    came = sorted((c.began, n) for n, c in calls.items() if n in reached)
    lost = sorted((c.ended, n) for n, c in calls.items() if n not in reached)
    for name, call in calls.items():
        own = trainable(step.modules.get(name))
        if not call.ended or (name not in suspects and (not own or any(p.grad is not None for p in own))):
            continue
        if name in reached:
            if (kind := _passed_by(step.modules.get(name), call)) is not None:
                yield Cut(name, name, name, graph=True, kind=kind)
            continue
        followers = [n for began, n in came if began > call.ended]
        after = _follower(seen, name, followers, [calls[n] for end, n in lost if end >= call.ended])
        # The last module before that which the gradient did not reach.
        end = calls[after].began if after is not None else call.ended
        last = max((one for one in lost if call.ended <= one[0] <= end), default=(0, name))[1]
        kind = "between"
        if calls[last].checkpoint or call.checkpoint:
            kind = "checkpoint"
        elif after is None and call.outermost not in lively:
            kind = "outside"
        elif after is None and call.graph and not _kept(seen, name):
            kind = "unused"
        elif after is None and call.graph:
            kind = "outside"
        yield Cut(name, last, after, graph=calls[last].graph, kind=kind)


def _follower(seen: Seen, name: str, followers: Sequence[str], lost: Sequence[Call]) -> str | None:
    """Return the first module that took numbers cut off from the graph.

    Args:
        seen: what was seen of the step.
        name: the layer that has no gradient.
        followers: modules that the gradient reached, of those that began later, in their order.
        lost: calls that it did not reach, of those that ended later, and this one.

    """
    call = seen.calls[name]
    for other in followers:
        its = seen.calls[other]
        new = [(shape, wide) for storage, shape, wide in its.loose if seen.storages[storage][0] > call.ended]
        if name in its.aliases or any(_may_be_of(shape, wide, c.shape) for shape, wide in new for c in lost):
            return other
    if not call.graph:
        return next((other for other in followers if seen.calls[other].mixed), None)
    known = {shape for when, shape in seen.storages.values() if when <= call.ended}
    joins = sorted(join for join in seen.graph.joins if join[1] not in known)
    return next((at for n, shape, at in joins if any(n > c.made >= 0 and shape == c.shape for c in lost)), None)


def _kept(seen: Seen, name: str) -> bool:
    """Tell whether somebody keeps the graph of what a layer gave, though no module gave it on."""
    alive = [ref() is not None for ref in (seen.outputs[name].nodes if name in seen.outputs else ())]
    return any(alive[:-1]) or (any(alive) and name not in seen.graph.names)


def _may_be_of(shape: tuple[int, ...], is_float: bool, given: tuple[int, ...]) -> bool:  # noqa: FBT001  (of a table)
    """Tell whether numbers without a graph may be made of what a module gave: as many rows, and not narrower.

    Whole numbers have no width: they are indices.
    """
    if not shape or not given or shape[0] != given[0]:
        return False
    return not is_float or shape[-1] >= given[-1]


def _passed_by(module: nn.Module | None, call: Call) -> CutKind | None:
    """Tell why a layer has no gradient though what it gave has one; None where it has one, or is not to have one.

    A module that holds nothing else is there to apply its weights; one with layers of its own may do without them.
    """
    own = trainable(module)
    if module is None or not own or any(p.grad is not None for p in own):
        return None
    return "own" if holds_layers(module) or call.same else "inside"


def holds_layers(module: nn.Module) -> bool:
    """Tell whether a module has layers beneath it."""
    return any(p is not None for m in module.children() for p in m.parameters())


def trainable(module: nn.Module | None) -> list[Tensor]:
    """Return the weights of a module itself that are to be trained."""
    found: Iterable[Tensor | None] = module._parameters.values() if module is not None else ()
    return [p for p in found if p is not None and p.requires_grad]
