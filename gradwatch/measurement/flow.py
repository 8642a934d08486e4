"""Where layers in question stand in the graph of a step: what they take, who takes from them, where it is cut."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointFunction

from gradwatch.measurement import norms
from gradwatch.measurement.graph import Graph
from gradwatch.measurement.output_gradients import Output, OutputGradients
from gradwatch.model.attempts import Attempts, callers
from gradwatch.model.forward_hooks import ModelView, Part, Pending, ProbeValues, StepView, Transfer
from gradwatch.model.gradient_hooks import transformed
from gradwatch.model.nested import floats, tensors
from gradwatch.values.snapshot import Cut, CutKind, Flow

_CHECKPOINT = CheckpointFunction.forward.__code__


class _Token:
    """Lies at a node, and is gone with it."""


@dataclass
class _Call:
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


@dataclass
class _Outputs:
    """What a layer in question gave in this step."""

    nodes: list[weakref.ref[_Token]] = field(default_factory=list)
    """By call: alive as long as its node is."""
    storages: set[int] = field(default_factory=set)


class FlowProbe:
    """Sees, of layers in question, how the graph leads from them to what the model gives; a `Probe`.

    What an operation outside of the graph takes leaves no trace, so whether an output is used there is told by what
    follows: a module that takes numbers without a graph, or a graph that is kept though no module gave it.
    """

    def __init__(self, outputs: OutputGradients, attempts: Attempts) -> None:
        """Begin with nothing.

        Args:
            outputs: the probe that knows how far the gradient came; it must be collected first.
            attempts: knows which calls are outermost.

        """
        self._outputs, self._attempts = outputs, attempts
        self.suspects: Collection[str] = frozenset()
        """Layers in question."""
        self._mark = object()
        """What this one writes at nodes, beside what other watchers write there."""
        self._names: Mapping[int, str] = {}
        self._buffers: frozenset[int] = frozenset()
        self._owners: frozenset[str] = frozenset()
        """Modules with weights of their own that are to be trained."""
        self._owners_of: dict[int, str] = {}
        """Those by their weights, by `id`."""
        self.clear()

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work."""
        self.clear()
        if view.compiled:
            return {}
        self._names = view.names
        buffers = (b for module in view.modules.values() for b in module._buffers.values() if b is not None)
        self._buffers = frozenset(map(_storage, buffers))
        self._owners = frozenset(name for name, module in view.modules.items() if _own(module))
        self._owners_of = {id(p): name for name in self._owners for p in _own(view.modules[name])}
        return {id(module): module for module in view.modules.values()}

    def clear(self) -> None:
        """Let go of what was seen in this step, and look no more."""
        self._names, self._buffers, self._owners, self._owners_of = {}, frozenset(), frozenset(), {}
        self._begin()

    def _begin(self) -> None:
        self._calls: dict[str, _Call] = {}
        self._given: dict[str, _Outputs] = {}
        self._weak: list[Any] = []
        """Storages that were seen; as long as one is here, no other has its number."""
        self._seen: dict[int, tuple[int, tuple[int, ...]]] = {}
        """Those that a module took without a graph: when the first one did, and the shape."""
        self._tick = 0
        self.graph = Graph(self._mark)

    # --- the forward pass ---

    def entered(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Take note of when a module begins."""
        name = self._names.get(id(module))
        if name is None or not self._now():
            return
        self._tick += 1
        call = self._calls.setdefault(name, _Call())
        call.began, call.outermost = self._tick, self._attempts.now

    def left(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,  # noqa: ANN401  (whatever a module gives)
    ) -> None:
        """Take note of what a module took and gave."""
        name = self._names.get(id(module))
        call = self._calls.get(name) if name is not None else None
        if name is None or call is None or not self._now():
            return
        self._tick += 1
        call.ended = self._tick
        given = floats(output)
        call.graph = any(t.grad_fn is not None for t in given)
        node: Any = next((t.grad_fn for t in given if t.grad_fn is not None), None)
        call.made = node._sequence_nr() if node is not None else -1
        call.shape = tuple(given[0].shape) if given else ()
        call.checkpoint = not torch.is_grad_enabled() and bool(self.suspects) and _in_a_checkpoint()
        if not torch.is_grad_enabled():
            return
        with contextlib.suppress(Exception):  # what has no storage, as a nested tensor
            self._taken(call, [*tensors(inputs), *tensors(kwargs)], given)
        for tensor in given:
            self._give(name, tensor)
        if hasattr(module, "hidden_size") and hasattr(module, "num_layers"):  # recurrent, over a whole sequence
            state = inputs[1] if len(inputs) > 1 else kwargs.get("hx")
            for tensor in floats(state):
                self.graph.note_state(tensor.grad_fn, name)
        if not self._attempts.running:
            with contextlib.suppress(Exception):
                self._settle(call.outermost, (*tensors(inputs), *tensors(kwargs)))
            if self.suspects:
                self.graph.walk([t.grad_fn for t in given if t.grad_fn is not None])

    @staticmethod
    def _now() -> bool:
        """Tell whether this is the forward pass itself, and not what a checkpoint computes once more."""
        return torch._C._current_graph_task_id() == -1 and not transformed()

    def _taken(self, call: _Call, taken: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Note where what a module took comes from."""
        loose = [t for t in taken if not t.requires_grad]
        for tensor in loose:
            if _storage(tensor) not in self._seen:
                self._weak.append(_weak(tensor))
                self._seen[_storage(tensor)] = call.began, tuple(tensor.shape)
        numbers = set(map(_storage, loose))
        call.loose = (
            tuple((_storage(t), _shape(t), t.is_floating_point()) for t in loose) if len(loose) == len(taken) else ()
        )
        call.mixed = frozenset(
            _storage(t)
            for t in taken
            if t.is_floating_point() and (t.grad_fn is None or self.graph.name_of(t.grad_fn) is None)
        )
        call.aliases = frozenset(n for n, g in self._given.items() if not numbers.isdisjoint(g.storages))
        nodes = [t.grad_fn for t in taken if t.grad_fn is not None]
        call.same = any(t is g or (t.grad_fn is not None and t.grad_fn is g.grad_fn) for t in taken for g in given)
        if nodes and self.suspects:
            name, node = self.graph.nearest(nodes[0])
            call.given = self._outputs.at(node) if node is not None else None
            call.source = name if name in self._owners else self.graph.nearest(node or nodes[0], self._owners)[0]
            if call.source is None:
                call.source = self._owners_of.get(self.graph.leaf(nodes[0]) or 0)
        call.taken = frozenset(map(_storage, taken))

    def _settle(self, outermost: int, taken: Iterable[Tensor]) -> None:
        """Leave out what the outermost call was given: as long as that lasts, no other storage has its number."""
        outside = set(map(_storage, taken)) | self._buffers
        for call in self._calls.values():
            if call.outermost == outermost:
                call.loose = call.loose if outside.isdisjoint(s for s, *_ in call.loose) else ()
                call.mixed -= outside
                known = call.source is not None and call.source in self._calls
                call.fed = known or not outside.isdisjoint(call.taken)

    def _give(self, name: str, tensor: Tensor) -> None:
        """Mark what a module gives, and of a layer in question note how long it is kept."""
        node: Any = tensor.grad_fn
        if node is None:
            return
        notes: dict[object, Any] = node.metadata
        notes.setdefault(self._mark, name)
        if self.suspects and name in self._owners:
            token = notes.setdefault((self._mark, "token"), _Token())
            mine = self._given.setdefault(name, _Outputs())
            mine.nodes.append(weakref.ref(token))
            with contextlib.suppress(Exception):  # as above
                storage = _weak(tensor)
                self._weak.append(storage)
                mine.storages.add(storage.cdata)

    # --- the step ---

    def collect(self, step: StepView, transfer: Transfer) -> Part:
        """Return where layers in question stand, once the gradients are there."""
        reached, broken = self._outputs.reached, self._attempts.broken
        cuts = () if reached is None else tuple(self._cuts(step, reached))
        names = [name for name in self._calls if name in self.suspects]
        through: dict[str, Pending] = {}
        for name in names:
            share = self._through(step.modules.get(name), self._calls[name], self._outputs.sizes.get(name), broken)
            if share is not None:
                through[name] = transfer.add(share)
        uncalled = {c.source for c in self._calls.values() if c.source is not None} - self._calls.keys()
        peaks = {name: transfer.add(peak) for name, peak in self.graph.peaks(names).items()}
        barriers, states = self.graph.barriers(names), self.graph.states(names)
        sources = {name: self._calls[name].source for name in names}
        fed = {name: self._calls[name].fed for name in names}
        self._begin()

        def part() -> ProbeValues:
            flows = (
                Flow(
                    name,
                    source=sources[name],
                    fed=fed[name],
                    through=through[name].value if name in through else None,
                    state_of=states.get(name),
                    barrier=barriers.get(name),
                    peak=peaks[name].value if name in peaks else None,
                )
                for name in names
            )
            beside = (Flow(name, fed=False) for name in sorted(uncalled))
            return ProbeValues(cuts=cuts, flows=(*(f for f in flows if f != Flow(f.layer)), *beside))

        return part

    @staticmethod
    def _through(module: nn.Module | None, call: _Call, mine: Tensor | None, broken: Collection[int]) -> Tensor | None:
        """Return the largest share of the gradient at what a layer takes that can have come through it.

        That is `||W|| ||dL/dy|| / ||dL/dx||`, with the Frobenius norm of W, which is never below the spectral norm.
        """
        named = module._parameters.items() if module is not None else ()
        weights = [p.detach() for name, p in named if p is not None and not name.startswith("bias")]
        there = call.given.norm(broken) if call.given is not None else None
        if not weights or mine is None or there is None or any(hasattr(w, "placements") for w in weights):
            return None
        size = torch.stack([norms.norm(norms.plain(w)) for w in weights]).square().sum().sqrt()
        return (size * mine / there.clamp(min=torch.finfo(there.dtype).tiny)).to(torch.float64)

    def _cuts(self, step: StepView, reached: Collection[str]) -> Iterator[Cut]:
        """Tell of each layer that is in question, or has no gradient, where that ended."""
        lively = {call.outermost for name, call in self._calls.items() if name in reached}
        came = sorted((c.began, n) for n, c in self._calls.items() if n in reached)
        lost = sorted((c.ended, n) for n, c in self._calls.items() if n not in reached)
        for name, call in self._calls.items():
            own = _own(step.modules.get(name))
            if not call.ended or (name not in self.suspects and (not own or any(p.grad is not None for p in own))):
                continue
            if name in reached:
                if (kind := _passed_by(step.modules.get(name), call)) is not None:
                    yield Cut(name, name, name, graph=True, kind=kind)
                continue
            followers = [n for began, n in came if began > call.ended]
            after = self._follower(name, call, followers, [self._calls[n] for end, n in lost if end >= call.ended])
            # The last module before that which the gradient did not reach.
            end = self._calls[after].began if after is not None else call.ended
            last = max((one for one in lost if call.ended <= one[0] <= end), default=(0, name))[1]
            kind = "between"
            if self._calls[last].checkpoint or call.checkpoint:
                kind = "checkpoint"
            elif after is None and call.outermost not in lively:
                kind = "outside"
            elif after is None and call.graph and not self._kept(name):
                kind = "unused"
            elif after is None and call.graph:
                kind = "outside"
            yield Cut(name, last, after, graph=self._calls[last].graph, kind=kind)

    def _follower(self, name: str, call: _Call, followers: Sequence[str], lost: Sequence[_Call]) -> str | None:
        """Return the first module that took numbers cut off from the graph.

        Args:
            name: the layer that has no gradient.
            call: its call.
            followers: modules that the gradient reached, of those that began later, in their order.
            lost: calls that it did not reach, of those that ended later, and this one.

        """
        for other in followers:
            its = self._calls[other]
            new = [(shape, wide) for storage, shape, wide in its.loose if self._seen[storage][0] > call.ended]
            if name in its.aliases or any(_may_be_of(shape, wide, c.shape) for shape, wide in new for c in lost):
                return other
        if not call.graph:
            return next((other for other in followers if self._calls[other].mixed), None)
        known = {shape for when, shape in self._seen.values() if when <= call.ended}
        joins = sorted(join for join in self.graph.joins if join[1] not in known)
        return next((at for n, shape, at in joins if any(n > c.made >= 0 and shape == c.shape for c in lost)), None)

    def _kept(self, name: str) -> bool:
        """Tell whether somebody keeps the graph of what a layer gave, though no module gave it on."""
        alive = [ref() is not None for ref in (self._given[name].nodes if name in self._given else ())]
        return any(alive[:-1]) or (any(alive) and name not in self.graph.names)


def _weak(tensor: Tensor) -> Any:  # noqa: ANN401  (a class without types)
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch's


def _storage(tensor: Tensor) -> int:
    """Return the number of what a tensor's entries lie in; of what has none (a sparse one) the tensor's own."""
    try:
        number: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)
    return number


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape; of what is the same for all rows, as positions are, no rows."""
    return tuple(tensor.shape) if tensor.dim() and tensor.stride(0) else (0, *tensor.shape[1:])


def _may_be_of(shape: tuple[int, ...], is_float: bool, given: tuple[int, ...]) -> bool:  # noqa: FBT001  (of a table)
    """Tell whether numbers without a graph may be made of what a module gave: as many rows, and not narrower.

    Whole numbers have no width: they are indices.
    """
    if not shape or not given or shape[0] != given[0]:
        return False
    return not is_float or shape[-1] >= given[-1]


def _in_a_checkpoint() -> bool:
    return any(frame.f_code is _CHECKPOINT for frame in callers())


def _passed_by(module: nn.Module | None, call: _Call) -> CutKind | None:
    """Tell why a layer has no gradient though what it gave has one; None where it has one, or is not to have one.

    A module that holds nothing else is there to apply its weights; one with layers of its own may do without them.
    """
    own = _own(module)
    if module is None or not own or any(p.grad is not None for p in own):
        return None
    beneath = any(p is not None for m in module.children() for p in m.parameters())
    return "own" if beneath or call.same else "inside"


def _own(module: nn.Module | None) -> list[Tensor]:
    found: Iterable[Tensor | None] = module._parameters.values() if module is not None else ()
    return [p for p in found if p is not None and p.requires_grad]
