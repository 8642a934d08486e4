"""The gradients that arrive, in one step, at the outputs of modules."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from gradwatch.measurement import norms
from gradwatch.model.attempts import Attempts
from gradwatch.model.forward_hooks import ModelView, Part, Pending, ProbeValues, StepView, Transfer
from gradwatch.model.gradient_hooks import at_output, batched, transformed
from gradwatch.model.nested import floats
from gradwatch.values.snapshot import ActivationStats


@dataclass(eq=False)
class Output:
    """A tensor that a module gave, and often the modules around it too."""

    handle: RemovableHandle | None = None
    """Of the hook on its node."""
    holders: int = 0
    """How many have it in their list, and want the hook."""
    norms: dict[int, Tensor] = field(default_factory=dict)
    """Of what arrived, by backward pass: of the sum of several only the norms of its parts are known."""

    def arrived(self, broken: Collection[int]) -> list[Tensor]:
        """Return the norms of what arrived, but for what the `broken` backward passes brought."""
        return [norm for task, norm in self.norms.items() if task not in broken]

    def norm(self, broken: Collection[int]) -> Tensor | None:
        """Return the norm of what one backward pass brought; None where none did, or several."""
        arrived = self.arrived(broken)
        return arrived[0] if len(arrived) == 1 else None


class OutputGradients:
    """Sees the gradients at the outputs of all modules; a `Probe`.

    The norm of a module is that of the gradient of everything that it gave in the step: of several outputs, calls and
    micro-batches the root of the sum of squares. A backward pass counts if it adds to the gradient of a parameter; one
    for a gradient penalty, or of a validation, does not.
    """

    def __init__(self, attempts: Attempts) -> None:
        """Begin with nothing; `attempts` knows which backward passes an exception ended."""
        self._attempts = attempts
        self._model: weakref.ref[nn.Module] | None = None
        self._names: Mapping[int, str] = {}
        self._outputs: dict[str, list[Output]] = {}
        self._without_graph: set[int] = set()
        self._mark = object()
        """What this one writes at nodes, beside what other watchers write there."""
        self.passes: dict[int, bool] = {}
        """By backward pass, whether it counts."""
        self.reached: frozenset[str] | None = None
        """Modules at whose output a gradient arrived in the step that was collected last; None where nobody looked."""
        self.arrived: Mapping[str, Pending] = {}
        """By module, the norm of the gradient at its output in the step that was collected last, a loss scale in it."""
        self.sizes: dict[str, Tensor] = {}
        """By module, the norm of what arrived, of that step; those of other optimizers are left out."""

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work."""
        self.clear()
        if view.compiled:
            return {}
        self._model = weakref.ref(view.modules[""])
        self._names = view.names
        return {id(module): module for module in view.modules.values()}

    def entered(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Take note of what runs without a graph: reentrant checkpoints run it within the backward pass again."""
        if not torch.is_grad_enabled():
            self._without_graph.add(id(module))
        elif torch._C._current_graph_task_id() == -1:
            self._without_graph.discard(id(module))

    def left(self, module: nn.Module, _inputs: object, _kwargs: object, output: Any) -> None:  # noqa: ANN401
        """Hang hooks on the nodes of what a module gives."""
        name = self._names.get(id(module))
        if name is None or not torch.is_grad_enabled() or transformed():
            return
        if (
            torch._C._current_graph_task_id() != -1 and id(module) not in self._without_graph
        ):  # computed once more, by a checkpoint
            return
        given = {
            id(t): t for t in floats(output) if t.grad_fn is not None and not hasattr(t, "placements")
        }  # of a DTensor there is only a piece
        for tensor in given.values():
            self._hang(tensor, name)

    def _hang(self, tensor: Tensor, name: str) -> None:
        node: Any = tensor.grad_fn
        notes: dict[object, Any] = node.metadata
        number = tensor.output_nr
        seen: Output | None = notes.get((self._mark, number))
        if seen is None or not seen.holders:
            seen = notes[self._mark, number] = self._hooked(node, number)
        seen.holders += 1
        self._outputs.setdefault(name, []).append(seen)

    def watched(self, node: Any) -> Output:  # noqa: ANN401  (nodes have no common type that tells of this)
        """Return what will be known of the gradient at the only output of a node, whoever made that.

        The hook goes with the node.
        """
        return self.at(node) or self._hooked(node, 0)

    def _hooked(self, node: Any, number: int) -> Output:  # noqa: ANN401
        me, seen = weakref.ref(self), Output()

        def hook(gradient: Tensor | None) -> None:
            probe = me()
            if probe is not None and gradient is not None and not batched(gradient):
                try:
                    probe._arrived(seen, gradient)
                except Exception:  # noqa: BLE001  (this runs inside of the user's backward pass)
                    probe.clear()

        seen.handle = at_output(node, number, hook)
        return seen

    def _arrived(self, seen: Output, gradient: Tensor) -> None:
        task = self._attempts.backward()
        if task not in self.passes:
            self.passes[task] = self._trains()
        if not self.passes[task]:
            return
        seen.norms[task] = norms.norm(norms.plain(gradient))  # which is detached, so that nothing of this gets a graph

    def _trains(self) -> bool:
        """Tell whether the backward pass that runs now adds to the gradient of a parameter."""
        model = self._model() if self._model is not None else None
        nodes = (
            get_gradient_edge(p).node
            for p in (model.parameters() if model is not None else ())
            if p.requires_grad and p.is_leaf
        )
        return any(torch._C._will_engine_execute_node(node) for node in nodes)

    def collect(self, step: StepView, transfer: Transfer) -> Part:
        """Return the norms that this step has brought, by module."""
        sizes: dict[str, Pending] = {}
        self.sizes = {}
        unknown = []
        broken = self._attempts.broken
        outputs = self._outputs.items()  # those of other optimizers too: the gradient did come by
        came = {name for name, given in outputs if any(one.arrived(broken) for one in given)}
        for name in tuple(self._outputs):
            module = step.modules.get(name)
            if step.others and module is not None and step.of_others(set(map(id, module.parameters()))):
                continue
            arrived = [output.arrived(broken) for output in self._pop(name)]
            parts = [norm for of_output in arrived for norm in of_output]
            if any(len(of_output) > 1 for of_output in arrived):
                unknown.append(name)
            elif parts:
                self.sizes[name] = parts[0] if len(parts) == 1 else norms.norm(torch.stack(parts))
                sizes[name] = transfer.add(self.sizes[name])
        self.passes.clear()
        self.reached, self.arrived = frozenset(came) if self._names else None, sizes

        def part() -> ProbeValues:
            scaled = step.scaled()
            found = [ActivationStats(name, norm.value / step.factor, scaled=scaled) for name, norm in sizes.items()]
            return ProbeValues((*found, *map(ActivationStats, unknown)))

        return part

    def at(self, node: Any) -> Output | None:  # noqa: ANN401  (nodes have no common type that tells of this)
        """Return what is known of the gradient at the only output of a node that a module gave."""
        found = [
            seen
            for key, seen in node.metadata.items()
            if isinstance(key, tuple) and key[0] is self._mark and isinstance(seen, Output)
        ]
        return found[0] if len(found) == 1 else None

    def clear(self) -> None:
        """Let go of everything, and look no more."""
        for name in tuple(self._outputs):
            self._pop(name)
        self._names, self._without_graph, self.reached, self.arrived = {}, set(), None, {}
        self.sizes = {}
        self.passes.clear()

    def _pop(self, name: str) -> list[Output]:
        outputs = self._outputs.pop(name)
        for output in outputs:
            output.holders -= 1
            if output.handle is not None and not output.holders:
                output.handle.remove()
        return outputs
