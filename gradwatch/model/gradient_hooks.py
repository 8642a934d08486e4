"""Hooks on the backward pass: what arrives at the tensors that modules give, and at parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

CHANGED = 1e-3
"""Share by which a gradient may differ between the backward pass and the step: sums in another order."""


def has_unknown_scale(scale: object | None, changed: float | None) -> bool:
    """Tell whether an unknown factor, as a loss scale is, may be on the gradients that arrived in a backward pass.

    It is taken to be there unless it can be excluded: where nothing could be compared, and where what was compared is
        NaN, a
    norm may be thousands of times too large, and to say that it is exact would be wrong. Whoever is told so loses only
    sizes: ratios, shares and lag gains are free of the factor.

    Args:
        scale: the loss scale that was told and is divided out; None: nobody said whether there is one.
        changed: how far a gradient at the step is from what arrived, see `Sentinel.difference`; None: nothing could be
            compared.

    """
    return scale is None and (changed is None or not changed <= CHANGED)


def transformed() -> bool:
    """Tell whether what runs now is inside of a functional transform, whose tensors are none of the training's."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def of_others(parameters: AbstractSet[int], mine: AbstractSet[int], others: AbstractSet[int]) -> bool:
    """Tell whether only other optimizers than those of a step train what holds these parameters, all by `id`."""
    return not parameters & mine and not parameters.isdisjoint(others)


def at_output(tensor: Tensor, hook: Callable[[Tensor | None], None]) -> RemovableHandle:
    """Let `hook` take what arrives at a tensor that is not a leaf, after all hooks on it.

    Of a tensor that is edited in place later, it is what arrives at the tensor as it is now.
    """
    node, number = tensor.grad_fn, tensor.output_nr
    assert node is not None
    handle: RemovableHandle = node.register_prehook(lambda gradients: hook(gradients[number]))
    return handle


class Sentinel:
    """Sees one parameter's gradient as it arrives."""

    def __init__(self, passes: Mapping[int, bool] | None = None) -> None:
        """Begin without a parameter.

        Args:
            passes: whether a backward pass counts, by its number; None: each does.

        """
        self._passes = passes
        self._handle: Any = None
        self._node: Any = None
        self._parameter: Tensor | None = None
        self._before: Tensor | None = None
        self._sums: dict[int, Tensor] = {}
        """Of what arrived, by backward pass."""

    @property
    def watching(self) -> bool:
        """Whether a parameter is seen already."""
        return self._handle is not None

    def watch(self, module: nn.Module) -> None:
        """Put a hook on the smallest trained parameter of the module, unless there is one already."""
        if self._handle is not None:
            return
        dense = [
            m for m in module.modules() if not getattr(m, "sparse", False)
        ]  # as an embedding may be, whose gradient has no arithmetic
        trained = [p for m in dense for p in m.parameters(recurse=False) if p.requires_grad and p.is_leaf]
        if not trained:
            return
        self._parameter = parameter = min(trained, key=torch.Tensor.numel)
        self._before = parameter.grad.detach().clone() if parameter.grad is not None else None
        me = weakref.ref(self)

        def hook(gradients: Sequence[Tensor | None]) -> None:
            sentinel, arrived = me(), gradients[0]
            if (
                sentinel is None
                or arrived is None
                or arrived.layout is not torch.strided
                or hasattr(arrived, "placements")
            ):
                return
            task = torch._C._current_graph_task_id()
            if sentinel._passes is not None and not sentinel._passes.get(task):
                return
            try:
                arrived, before = arrived.detach(), sentinel._sums.get(task)
                sentinel._sums[task] = arrived.clone() if before is None else before + arrived
            except Exception:  # noqa: BLE001  (this runs inside of the user's backward pass)
                sentinel._sums.clear()

        # On the parameter's node in the graph: what hangs on the parameter itself would travel with the model when that
        # is saved or copied.
        self._node = get_gradient_edge(parameter).node
        self._handle = self._node.register_prehook(hook)

    def forget(self, passes: AbstractSet[int]) -> None:
        """Leave out what these backward passes brought."""
        self._sums = {task: arrived for task, arrived in self._sums.items() if task not in passes}

    def difference(self) -> Tensor | None:
        """Return how far the gradient now is from what arrived, as a share of that; None where nothing arrived."""
        parameter = self._parameter
        if parameter is None or parameter.grad is None or not self._sums:
            return None
        if (
            type(parameter.grad) is not Tensor or parameter.grad.layout is not torch.strided
        ):  # a class of its own may refuse
            return None
        whole = sum(self._sums.values(), torch.zeros_like(next(iter(self._sums.values()))))
        if parameter.grad.shape != whole.shape:
            return None
        now, arrived = parameter.grad.detach().double(), whole.double()
        # What was there before the forward pass is still in it, or has been zeroed since.
        expected = [arrived] if self._before is None else [arrived, arrived + self._before.double()]
        size = torch.linalg.vector_norm(arrived).clamp(min=1e-300)
        difference: Tensor = torch.stack([torch.linalg.vector_norm(now - e) for e in expected]).min() / size
        return difference

    def of(self, parameters: AbstractSet[int]) -> bool:
        """Tell whether it is one of these parameters, by `id`, that is seen."""
        return id(self._parameter) in parameters

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._node = self._parameter = self._before = None
        self._sums = {}
