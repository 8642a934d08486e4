"""Hears, in one step, the gradients that arrive at what modules give."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from gradwatch.measurement import norms as stats
from gradwatch.model.gradient_hooks import Sentinel, at_output, has_unknown_scale, of_others, transformed
from gradwatch.model.nested import floats
from gradwatch.values.snapshot import ActivationStats


@dataclass(eq=False)
class Output:
    """A tensor that a module gave, and often the modules around it too."""

    handle: RemovableHandle | None = None
    """Of the hook on its node."""
    holders: int = 0
    """How many have it in their list, and want the hook."""
    task: int | None = None
    """The backward pass that reached it."""
    norm: Tensor | None = None
    """Of what that brought."""
    again: bool = False
    """Whether a second one came: of the sum of both only the norms of its parts are known."""


@dataclass
class Heard:
    """What arrived at the outputs of some modules, on its way from the device."""

    norms: Mapping[str, Tensor] = field(default_factory=dict)
    """By module."""
    unknown: Sequence[str] = ()
    """Modules of which an output was reached by several backward passes."""
    changed: Tensor | None = None
    """How far a parameter's gradient at the step is from what arrived."""
    scale: float | Tensor | None = None
    """The loss scale of the backward pass; None: nobody said."""

    def tensors(self) -> dict[tuple[object, ...], Tensor]:
        """Return everything that is to be copied."""
        found: dict[tuple[object, ...], Tensor] = {("activation", name): norm for name, norm in self.norms.items()}
        if found and self.scale is not None:
            found["activations", "scale"] = stats.number(self.scale)
        elif found and self.changed is not None:
            found["activations", "changed"] = self.changed
        return found

    def values(self, numbers: Mapping[tuple[object, ...], float]) -> tuple[ActivationStats, ...]:
        """Make values of what was copied."""
        scale = numbers.get(("activations", "scale"), 1.0)
        scaled = has_unknown_scale(self.scale, numbers.get(("activations", "changed")))
        found = [ActivationStats(name, numbers["activation", name] / scale, scaled=scaled) for name in self.norms]
        return (*found, *map(ActivationStats, self.unknown))


class Activations:
    """Visits the forward pass of one step; see `gradwatch.hooks.Visitor`.

    The norm of a module is that of the gradient of everything that it gave in the step: of several outputs, calls and micro-batches the root of the sum of
    squares. A backward pass counts if it adds to the gradient of a parameter; one for a gradient penalty, or of a validation, does not.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._model: weakref.ref[nn.Module] | None = None
        self._names: Mapping[int, str] = {}
        self._outputs: dict[str, list[Output]] = {}
        self._without_graph: set[int] = set()
        self._mark = object()
        """What this one writes at nodes, beside what other watchers write there."""
        self._counts: dict[int, bool] = {}
        """By backward pass, whether it counts."""
        self._sentinel = Sentinel(self._counts)
        self._changed: Tensor | None = None

    def arm(self, modules: Mapping[str, nn.Module], *, compiled: bool) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work."""
        self.clear()
        if compiled:
            return {}
        self._model = weakref.ref(modules[""])
        self._names = {id(module): name for name, module in modules.items()}
        return {id(module): module for module in modules.values()}

    def entered(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Take note of what runs without a graph: reentrant checkpointing runs it once more within the backward pass, and that is the real run."""
        if not torch.is_grad_enabled():
            self._without_graph.add(id(module))
        elif torch._C._current_graph_task_id() == -1:
            self._without_graph.discard(id(module))

    def left(self, module: nn.Module, _inputs: tuple[Any, ...], _kwargs: Mapping[str, Any], output: Any) -> None:  # noqa: ANN401
        """Hang hooks on the nodes behind what a module gives."""
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
        if given:
            self._sentinel.watch(module)

    def _hang(self, tensor: Tensor, name: str) -> None:
        node: Any = tensor.grad_fn
        notes: dict[object, Any] = node.metadata
        number = tensor.output_nr
        seen: Output | None = notes.get((self._mark, number))
        if seen is None or not seen.holders:
            seen = notes[self._mark, number] = self._heard_at(tensor)
        seen.holders += 1
        self._outputs.setdefault(name, []).append(seen)

    def _heard_at(self, tensor: Tensor) -> Output:
        me, seen = weakref.ref(self), Output()

        def hook(gradient: Tensor | None) -> None:
            activations = me()
            if activations is not None and gradient is not None:
                try:
                    activations._arrived(seen, gradient)
                except Exception:  # noqa: BLE001  (this runs inside of the user's backward pass)
                    activations.clear()

        seen.handle = at_output(tensor, hook)
        return seen

    def _arrived(self, seen: Output, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self._counts:
            self._counts[task] = self._trains()
        if not self._counts[task]:
            return
        seen.norm = stats.norm(stats.plain(gradient))  # which is detached, so that nothing of this gets a graph
        seen.again, seen.task = seen.task is not None, task

    def _trains(self) -> bool:
        """Tell whether the backward pass that runs now adds to the gradient of a parameter."""
        model = self._model() if self._model is not None else None
        nodes = (
            get_gradient_edge(p).node
            for p in (model.parameters() if model is not None else ())
            if p.requires_grad and p.is_leaf
        )
        return any(torch._C._will_engine_execute_node(node) for node in nodes)

    def take(
        self,
        modules: Mapping[str, nn.Module],
        scale: float | Tensor | None,
        mine: AbstractSet[int],
        others: AbstractSet[int],
    ) -> Heard:
        """Return what this step has brought.

        Args:
            modules: of the model, by name.
            scale: the loss scale of the backward pass; None: nobody said.
            mine: what the optimizer of this step steps, parameters by `id`.
            others: what the others step.

        """
        norms: dict[str, Tensor] = {}
        unknown = []
        for name in tuple(self._outputs):
            if others and name in modules and of_others(set(map(id, modules[name].parameters())), mine, others):
                continue
            reached = [seen for seen in self._pop(name) if seen.norm is not None]
            if any(seen.again for seen in reached):
                unknown.append(name)
            elif reached:
                parts = [seen.norm for seen in reached if seen.norm is not None]
                norms[name] = parts[0] if len(parts) == 1 else stats.norm(torch.stack(parts))
        if (changed := self._sentinel.difference()) is not None:
            self._changed = changed
        if not others or self._sentinel.of(mine):  # what arrives from now on is of the next step
            self._sentinel.remove()
        self._counts.clear()
        return Heard(norms, unknown, self._changed, scale)

    def clear(self) -> None:
        """Let go of everything, and look no more."""
        for name in tuple(self._outputs):
            self._pop(name)
        self._sentinel.remove()
        self._names, self._without_graph, self._changed = {}, set(), None
        self._counts.clear()

    def _pop(self, name: str) -> list[Output]:
        outputs = self._outputs.pop(name)
        for output in outputs:
            output.holders -= 1
            if output.handle is not None and not output.holders:
                output.handle.remove()
        return outputs
