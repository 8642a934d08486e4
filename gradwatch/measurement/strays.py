"""Weights that a model uses and does not own: of modules in a Python list, or made in the forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from gradwatch.measurement import norms
from gradwatch.model.attempts import Attempts
from gradwatch.model.forward_hooks import ModelView, Part, ProbeValues, StepView, Transfer
from gradwatch.model.gradient_hooks import batched, transformed
from gradwatch.model.nested import floats, tensors
from gradwatch.values.autograd import Stray
from gradwatch.values.thresholds import UPDATE_PROBES

_LEAF = "torch::autograd::AccumulateGrad"
_MOST = 30_000
"""Nodes that are looked at in one call."""
_WEIGHED = 100
"""Tensors that are measured in one step."""


@dataclass
class _Leaf:
    """Such a tensor, as it was met in a step."""

    ref: Any
    number: int
    shape: tuple[int, ...]
    parameter: bool
    arrived: list[Tensor] = field(default_factory=list)
    """Of each backward pass that came to it, whether it brought anything but zeros."""


class Strays:
    """Sees the leaves of the graph of what the model gives that are none of its parameters; a `Probe`.

    What the outermost call was given is the user's, and so is all that stands before it: other networks, prompts,
    inputs that are differentiated by. A tensor that is no `nn.Parameter` counts only where it cannot be data: with
    another number of rows than all that the model gives. Where several probes have found none, nobody looks any more.
    """

    def __init__(self, attempts: Attempts) -> None:
        """Begin with nothing; `attempts` knows which calls are outermost, and what was called."""
        self._attempts = attempts
        self._own: frozenset[int] = frozenset()
        self._root = 0
        self._leaves: dict[int, _Leaf] = {}
        self._handles: list[Any] = []
        self._known: dict[int, tuple[Any, int]] = {}
        """What was met before, by `id`, with its number."""
        self._numbers = itertools.count()
        self._walked = False
        self._clean = 0
        """Probes in a row that have found nothing."""

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work, or where there was nothing to find."""
        self.clear()
        if view.compiled or self._clean >= UPDATE_PROBES:
            return {}
        self._own = frozenset(
            id(p)
            for m in view.modules.values()
            for p in (*m._parameters.values(), *m._buffers.values())
            if p is not None
        )
        self._root = id(view.modules.get(""))
        return {id(module): module for module in view.modules.values()}

    def clear(self) -> None:
        """Let go of what was seen in this step, and look no more."""
        self._own = frozenset()
        self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._leaves, self._walked = [], {}, False

    def entered(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Need nothing of the inputs before the module has run."""

    def left(self, module: nn.Module, inputs: object, kwargs: Mapping[str, Any], output: Any) -> None:  # noqa: ANN401
        """Go through the graph of what an outermost call gave, as far as what it was given."""
        if (self._attempts.running and id(module) != self._root) or transformed():
            return
        given = floats(output)
        roots = [t.grad_fn for t in given if t.grad_fn is not None]
        if not roots or torch._C._current_graph_task_id() != -1:
            return
        self._walked = True
        taken = [*tensors(inputs), *tensors(kwargs)]
        rows = {t.shape[:1] for t in given if t.dim()}
        outside = self._own | set(map(id, taken))
        for node in _leaves(roots, {t.grad_fn for t in taken}):
            leaf = node.variable
            if id(leaf) not in outside and _readable(leaf):
                parameter = isinstance(leaf, nn.Parameter)
                if parameter or (rows and leaf.shape[:1] not in rows):
                    self._meet(node, leaf, parameter=parameter)

    def _meet(self, node: Any, leaf: Tensor, *, parameter: bool) -> None:  # noqa: ANN401
        met = self._leaves.get(id(leaf))
        if met is not None and met.ref() is leaf:
            return
        ref, number = self._known.get(id(leaf), (None, -1))
        if ref is None or ref() is not leaf:
            ref, number = TensorWeakRef(leaf), next(self._numbers)
            self._known[id(leaf)] = ref, number
        met = self._leaves[id(leaf)] = _Leaf(ref, number, tuple(leaf.shape), parameter)
        arrived = met.arrived

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[0]
            if (
                gradient is not None
                and type(gradient) is Tensor
                and gradient.layout is torch.strided
                and not batched(gradient)
            ):
                arrived.append((gradient.detach() != 0).any())

        self._handles.append(node.register_prehook(hook))

    def collect(self, _step: StepView, transfer: Transfer) -> Part:
        """Return the tensors that got a gradient, what each weighs, and of which module it is."""
        leaves, walked = list(self._leaves.values()), self._walked
        self._let_go()
        if walked:
            self._clean = 0 if leaves else self._clean + 1
        self._known = {key: (ref, number) for key, (ref, number) in self._known.items() if ref() is not None}
        if not leaves:
            return ProbeValues
        owners = {
            id(p): module
            for module in self._attempts.called()
            for p in module._parameters.values()
            if p is not None and id(p) not in self._own
        }
        found = []
        for leaf in leaves[:_WEIGHED]:
            tensor = leaf.ref()
            owner = owners.get(id(tensor)) if tensor is not None else None
            size = transfer.add(norms.norm(norms.plain(tensor))) if tensor is not None and _readable(tensor) else None
            version = tensor._version if tensor is not None else 0
            found.append((leaf, owner, size, version, [transfer.add(a) for a in leaf.arrived]))

        def part() -> ProbeValues:
            return ProbeValues(
                strays=tuple(
                    Stray(
                        leaf.number,
                        leaf.shape,
                        parameter=leaf.parameter,
                        kind="" if owner is None else type(owner).__name__,
                        training=owner is None or owner.training,
                        weight_norm=None if size is None else size.value,
                        version=version,
                    )
                    for leaf, owner, size, version, arrived in found
                    if any(a.value for a in arrived)
                )
            )

        return part


def _leaves(roots: Iterable[Any], ends: set[Any]) -> list[Any]:
    """Return the nodes at which gradients are accumulated, on the way back from `roots` and not beyond `ends`."""
    seen: set[Any] = {*ends}
    stack, found = list(roots), []
    while stack and len(seen) < _MOST:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == _LEAF:  # a function of one's own may have any attribute
            found.append(node)
        stack += [n for n, _ in node.next_functions if n is not None]
    return found


def _readable(tensor: Tensor) -> bool:
    """Tell whether its numbers are here: not in a class that keeps them elsewhere, nor put away meanwhile."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    there = tensor.untyped_storage().nbytes() // tensor.element_size()
    return bool(tensor.numel()) and tensor.storage_offset() + last < there
