"""Where layers in question stand in the graph of a step: what they take, who takes from them, where it is cut."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointFunction

from gradwatch.measurement import norms
from gradwatch.measurement.barriers import before
from gradwatch.measurement.cuts import Call, Outputs, Seen, Token, cuts, holds_layers, trainable
from gradwatch.measurement.graph import Graph, near
from gradwatch.measurement.heads import chance, crossed, squashed
from gradwatch.measurement.output_gradients import Output, OutputGradients
from gradwatch.model.attempts import Attempts, callers
from gradwatch.model.forward_hooks import ModelView, Part, ProbeValues, StepView, Transfer
from gradwatch.model.gradient_hooks import transformed
from gradwatch.model.nested import floats, storage_of, tensors
from gradwatch.values.autograd import Flow, Squashed
from gradwatch.values.snapshot import Fact

_CHECKPOINT = CheckpointFunction.forward.__code__
_CASTS = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Devices that autocast knows; of others it must not be asked."""
_TO_WEIGHTS = 4
"""Nodes from what a layer gives to a copy of its weights: a view, a product, a transposition."""


@dataclass(frozen=True)
class _Met:
    """Where the weights of a layer that does not apply them itself meet something else."""

    source: str | None
    """The layer that gave that."""
    fed: bool
    added: bool
    given: Output | None
    """The gradient at what that layer gave."""
    product: Output | None
    """The gradient at their product with it; None where it is none."""


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
        self.applied: Mapping[int, int] = {}
        """By weight of theirs, by `id`, when something was made of it, in the step that was collected last."""
        self._mark = object()
        """What this one writes at nodes, beside what other watchers write there."""
        self._names: Mapping[int, str] = {}
        self._buffers: frozenset[int] = frozenset()
        self._owners: frozenset[str] = frozenset()
        """Modules with weights of their own that are to be trained."""
        self._owners_of: dict[int, str] = {}
        """Those by their weights, by `id`."""
        self._containers: frozenset[str] = frozenset()
        """Those that hold other layers, to which their own weights are an addition."""
        self.clear()

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work."""
        self.clear()
        if view.compiled:
            return {}
        self._names = view.names
        buffers = (b for module in view.modules.values() for b in module._buffers.values() if b is not None)
        self._buffers = frozenset(map(storage_of, buffers))
        own = {name: weights for name, module in view.modules.items() if (weights := trainable(module))}
        self._owners = frozenset(own)
        self._owners_of = {id(p): name for name, weights in reversed(own.items()) for p in weights}
        self._containers = frozenset(name for name in own if holds_layers(view.modules[name]))
        self._begin()
        return {id(module): module for module in view.modules.values()}

    def clear(self) -> None:
        """Let go of what was seen in this step, and look no more."""
        self._names, self._owners_of = {}, {}
        self._buffers, self._owners, self._containers = frozenset(), frozenset(), frozenset()
        self._begin()

    def _begin(self) -> None:
        self._seen = Seen(Graph(self._mark, self._owners_of))
        self._met: dict[str, _Met] = {}
        self._whole: dict[str, Output] = {}
        """By layer, the gradient at what its output was put side by side with something else in."""
        self._squashed: Squashed | None = None
        self._crossed: int | None = None
        self._entropies: list[tuple[Tensor, Fact | None]] = []
        """What was told of the losses of this step, and what guessing would cost."""
        self._behind: dict[str, int] = {}
        """By module, how often its weights were written to since the copy was made that it has used."""
        self._tick = 0

    @property
    def graph(self) -> Graph:
        """What was seen of the graph."""
        return self._seen.graph

    # --- the forward pass ---

    def entered(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Take note of when a module begins."""
        name = self._names.get(id(module))
        if name is None or not self._now():
            return
        self._tick += 1
        call = self._seen.calls.setdefault(name, Call())
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
        call = self._seen.calls.get(name) if name is not None else None
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
            if name in self._owners and tensor.device.type in _CASTS and torch.is_autocast_enabled(tensor.device.type):
                self._note_copies(name, tensor.grad_fn)
        if hasattr(module, "hidden_size") and hasattr(module, "num_layers"):  # recurrent, over a whole sequence
            state = inputs[1] if len(inputs) > 1 else kwargs.get("hx")
            for tensor in floats(state):
                self.graph.note_state(tensor.grad_fn, name)
        if not self._attempts.running:
            with contextlib.suppress(Exception):
                self._settle(call.outermost, (*tensors(inputs), *tensors(kwargs)))
            if self.suspects:
                self.graph.walk([t.grad_fn for t in given if t.grad_fn is not None])
                self._meet()

    @staticmethod
    def _now() -> bool:
        """Tell whether this is the forward pass itself, and not what a checkpoint computes once more."""
        return torch._C._current_graph_task_id() == -1 and not transformed()

    def _taken(self, call: Call, taken: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Note where what a module took comes from."""
        loose = [t for t in taken if not t.requires_grad]
        for tensor in loose:
            if storage_of(tensor) not in self._seen.storages:
                self._seen.weak.append(_weak(tensor))
                self._seen.storages[storage_of(tensor)] = call.began, tuple(tensor.shape)
        numbers = set(map(storage_of, loose))
        call.loose = (
            tuple((storage_of(t), _shape(t), t.is_floating_point()) for t in loose) if len(loose) == len(taken) else ()
        )
        call.mixed = frozenset(
            storage_of(t)
            for t in taken
            if t.is_floating_point() and (t.grad_fn is None or self.graph.name_of(t.grad_fn) is None)
        )
        call.aliases = frozenset(n for n, g in self._seen.outputs.items() if not numbers.isdisjoint(g.storages))
        nodes = [t.grad_fn for t in taken if t.grad_fn is not None]
        call.same = any(t is g or (t.grad_fn is not None and t.grad_fn is g.grad_fn) for t in taken for g in given)
        if nodes and self.suspects:
            name, node, call.joined = self.graph.nearest(nodes[0])
            call.given = self._outputs.at(node) if node is not None else None
            call.source = name
            if name not in self._owners:
                call.source, _, joined = self.graph.nearest(node or nodes[0], self._owners)
                call.joined |= joined
            if call.source is None:
                call.source = self.graph.owner(nodes[0])
        call.taken = frozenset(map(storage_of, taken))

    def _settle(self, outermost: int, taken: Iterable[Tensor]) -> None:
        """Leave out what the outermost call was given: as long as that lasts, no other storage has its number."""
        outside = set(map(storage_of, taken)) | self._buffers
        for call in self._seen.calls.values():
            if call.outermost == outermost:
                call.loose = call.loose if outside.isdisjoint(s for s, *_ in call.loose) else ()
                call.mixed -= outside
                known = call.source is not None and call.source in self._seen.calls
                call.fed = known or not outside.isdisjoint(call.taken)

    def _meet(self) -> None:
        """Listen where layers in question meet others, and let go of the nodes."""
        for name in self.suspects:
            if name in self._containers or name not in self._seen.calls:
                if (meeting := self.graph.meeting(name)) is not None:
                    self._met[name] = _Met(
                        meeting.source,
                        meeting.fed,
                        meeting.joins,
                        self._outputs.at(meeting.given) if meeting.given is not None else None,
                        self._outputs.watched(meeting.node) if meeting.multiplies else None,
                    )
            elif (node := self.graph.beside(name)) is not None:
                self._whole[name] = self._outputs.watched(node)
        self.graph.let_go()

    def _give(self, name: str, tensor: Tensor) -> None:
        """Mark what a module gives, and of a layer in question note how long it is kept."""
        node: Any = tensor.grad_fn
        if node is None:
            return
        notes: dict[object, Any] = node.metadata
        notes.setdefault(self._mark, name)
        if self.suspects and name in self._owners:
            token = notes.setdefault((self._mark, "token"), Token())
            mine = self._seen.outputs.setdefault(name, Outputs())
            mine.nodes.append(weakref.ref(token))
            with contextlib.suppress(Exception):  # as above
                storage = _weak(tensor)
                self._seen.weak.append(storage)
                mine.storages.add(storage.cdata)

    def _note_copies(self, name: str, node: Any) -> None:  # noqa: ANN401  (nodes have no common type)
        """Note how often weights were written to since autocast made the copy of them that a module has used.

        It keeps its copies until it is left, and with each the node of the graph that has made it.
        """
        for one in near(node, _TO_WEIGHTS) if node is not None else ():
            leaf = getattr(before(one)[0], "variable", None) if one.name() == "ToCopyBackward0" else None
            if isinstance(leaf, nn.Parameter) and id(leaf) in self._owners_of:
                made: int = one.metadata.setdefault((self._mark, "version"), leaf._version)
                self._behind[name] = max(leaf._version - made, self._behind.get(name, 0))

    def made(self, loss: Tensor) -> None:
        """Take note of how a loss is made of what the model gave."""
        node = loss.grad_fn
        if self._names and node is not None:
            self._squashed = self._squashed or squashed(node, lambda scores: self.graph.nearest(scores)[0])
            self._crossed = self._crossed or crossed(node, self.graph.name_of)
            known = chance(node)
            fact = Fact(self.graph.nearest(known[0])[0] or "", "chance", known[1]) if known is not None else None
            self._entropies.append((loss.detach(), fact))

    # --- the step ---

    def collect(self, step: StepView, transfer: Transfer) -> Part:
        """Return where layers in question stand, once the gradients are there."""
        reached, broken = self._outputs.reached, self._attempts.broken
        found = () if reached is None else tuple(cuts(self._seen, step, reached, self.suspects))
        calls, met = self._seen.calls, self._met
        names = [name for name in (*calls, *sorted(met.keys() - calls.keys())) if name in self.suspects]
        flows = [self._flow(name, step.modules.get(name), broken, transfer) for name in names]
        uncalled = {call.source for call in calls.values() if call.source is not None} - calls.keys() - met.keys()
        beside = [Flow(name, fed=False) for name in sorted(uncalled)]
        self.applied = self.graph.applied
        twice, pairs = self._squashed, self._crossed
        told = [Fact(name, "steps_behind", float(times)) for name, times in self._behind.items() if times]
        guess = next((fact for _, fact in self._entropies), None)
        alike = guess is not None and all(fact == guess for _, fact in self._entropies)
        mean = transfer.add(torch.stack([loss for loss, _ in self._entropies]).mean()) if alike else None
        self._begin()

        def part() -> ProbeValues:
            if mean is not None and guess is not None:
                told.extend((guess, Fact(guess.place, "cross_entropy", mean.value)))
            return ProbeValues(
                cuts=found,
                flows=(*(f for flow in flows if (f := flow()) is not None), *beside),
                squashed=twice,
                crossed=pairs,
                facts=tuple(told),
            )

        return part

    def _flow(
        self, name: str, module: nn.Module | None, broken: Collection[int], transfer: Transfer
    ) -> Callable[[], Flow | None]:
        """Return what tells how the gradient comes to a layer, once the numbers are here; None: nothing to tell."""
        call, met = self._seen.calls.get(name, Call()), self._met.get(name)
        if met is not None:
            share = _through(module, met.product.norm(broken) if met.product is not None else None, met.given, broken)
        else:
            share = _through(module, self._outputs.sizes.get(name), call.given, broken)
        whole = self._whole[name].norm(broken) if name in self._whole else None
        measured = (share, self.graph.peak(name), whole)
        pending = [transfer.add(number) if number is not None else None for number in measured]
        known = Flow(
            name,
            source=met.source if met is not None else call.source,
            fed=met.fed if met is not None else call.fed,
            joined=met is None and call.joined,
            added=met is not None and met.added,
            state_of=self.graph.state(name),
            barrier=self.graph.barrier(name),
        )

        def flow() -> Flow | None:
            through, peak, whole = (number.value if number is not None else None for number in pending)
            found = replace(known, through=through, peak=peak, whole=whole)
            return None if found == Flow(name) else found

        return flow


def _through(
    module: nn.Module | None, mine: Tensor | None, given: Output | None, broken: Collection[int]
) -> Tensor | None:
    """Return the largest share of the gradient at what a layer takes that can have come through it.

    That is `||W|| ||dL/dy|| / ||dL/dx||`, with the Frobenius norm of W, which is never below the spectral norm.

    Args:
        module: the layer.
        mine: the norm of the gradient at what it gives.
        given: what is known of the gradient at what it takes.
        broken: backward passes that do not count.

    """
    named = module._parameters.items() if module is not None else ()
    weights = [p.detach() for name, p in named if p is not None and not name.startswith("bias")]
    there = given.norm(broken) if given is not None else None
    if not weights or mine is None or there is None or any(hasattr(w, "placements") for w in weights):
        return None
    size = torch.stack([norms.norm(norms.plain(w)) for w in weights]).square().sum().sqrt()
    return (size * mine / there.clamp(min=torch.finfo(there.dtype).tiny)).to(torch.float64)


def _weak(tensor: Tensor) -> Any:  # noqa: ANN401  (a class without types)
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch's


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape; of what is the same for all rows, as positions are, no rows."""
    return tuple(tensor.shape) if tensor.dim() and tensor.stride(0) else (0, *tensor.shape[1:])


def _in_a_checkpoint() -> bool:
    return any(frame.f_code is _CHECKPOINT for frame in callers())
