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

from gradwatch.values.thresholds import LEFT_OVER

CHANGED = 1e-3
"""Share by which a gradient may differ between the backward pass and the step: sums in another order."""


def has_unknown_scale(scale: object | None, changed: float | None) -> bool:
    """Tell whether an unknown factor, as a loss scale is, may be on the gradients that arrived in a backward pass.

    It is taken to be there unless it can be excluded: where nothing could be compared, and where what was compared is
    NaN, a norm may be thousands of times too large, and to say that it is exact would be wrong. Whoever is told so
    loses only sizes: ratios, shares and lag gains are free of the factor.

    Args:
        scale: the loss scale that was told and is divided out; None: nobody said whether there is one.
        changed: how far a gradient at the step is from what arrived, see `Sentinel.difference`; None: nothing could be
            compared.

    """
    return scale is None and (changed is None or not changed <= CHANGED)


def transformed() -> bool:
    """Tell whether what runs now is inside of a functional transform, whose tensors are none of the training's."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def batched(gradient: Tensor) -> bool:
    """Tell whether a gradient stands for many, as where a backward pass is vmapped: its numbers cannot be read."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def of_others(parameters: AbstractSet[int], mine: AbstractSet[int], others: AbstractSet[int]) -> bool:
    """Tell whether only other optimizers than those of a step train what holds these parameters, all by `id`."""
    return not parameters & mine and not parameters.isdisjoint(others)


def at_output(node: Any, number: int, hook: Callable[[Tensor | None], None]) -> RemovableHandle:  # noqa: ANN401
    """Let `hook` take what arrives at an output of a node of the graph, after all hooks on the tensor.

    Of a tensor that is edited in place later, it is what arrives at the tensor as it is now.
    """
    handle: RemovableHandle = node.register_prehook(lambda gradients: hook(gradients[number]))
    return handle


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class _Arrivals:
    """What arrives at one parameter, by backward pass."""

    def __init__(self, parameter: Tensor, passes: Mapping[int, bool] | None) -> None:
        """Put a hook on it; `passes` as for `Sentinel`."""
        self.parameter = parameter
        self._before = parameter.grad.detach().clone() if parameter.grad is not None else None
        self._passes = passes
        self._sums: dict[int, Tensor] = {}
        me = weakref.ref(self)

        def hook(gradients: Sequence[Tensor | None]) -> None:
            mine, arrived = me(), gradients[0]
            if mine is not None and arrived is not None and type(arrived) is Tensor:
                mine._add(arrived)

        # On the parameter's node in the graph: what hangs on the parameter itself would travel with the model when that
        # is saved or copied.
        self._node: Any = get_gradient_edge(parameter).node
        self._handle: Any = self._node.register_prehook(hook)

    def _add(self, arrived: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if (
            arrived.layout is not torch.strided
            or batched(arrived)
            or (self._passes is not None and not self._passes.get(task))
        ):
            return
        try:
            arrived, before = arrived.detach(), self._sums.get(task)
            self._sums[task] = arrived.clone() if before is None else before + arrived
        except Exception:  # noqa: BLE001  (this runs inside of the user's backward pass)
            self._sums.clear()

    def forget(self, passes: AbstractSet[int]) -> None:
        """Leave out what these backward passes brought."""
        self._sums = {task: arrived for task, arrived in self._sums.items() if task not in passes}

    def _compared(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return the gradient now, what arrived, and what was there before, in a wide format; None: nothing arrived."""
        gradient = self.parameter.grad
        # A class of its own may refuse arithmetic.
        if gradient is None or not self._sums or type(gradient) is not Tensor or gradient.layout is not torch.strided:
            return None
        whole = sum(self._sums.values(), torch.zeros_like(next(iter(self._sums.values()))))
        if gradient.shape != whole.shape or gradient.device != whole.device:
            return None
        wide = torch.float32 if whole.device.type == "mps" else torch.float64  # which that device lacks
        now, arrived, before = (None if t is None else _real(t).to(wide) for t in (gradient, whole, self._before))
        return None if now is None or arrived is None else (now, arrived, before)

    def difference(self) -> Tensor | None:
        """Return how far the gradient now is from what arrived, as a share of that; None where nothing arrived."""
        if (compared := self._compared()) is None:
            return None
        now, arrived, before = compared
        # What was there before the forward pass is still in it, or has been zeroed since.
        expected = [arrived] if before is None else [arrived, arrived + before]
        size = torch.linalg.vector_norm(arrived).clamp(min=torch.finfo(arrived.dtype).tiny)
        difference: Tensor = torch.stack([torch.linalg.vector_norm(now - e) for e in expected]).min() / size
        return difference

    def left_over(self) -> Tensor | None:
        """Return the share of the gradient now that was there before the forward pass; 0 where it has been zeroed.

        It is there where the gradient is the sum of that and of what arrived, and not what arrived alone: in direction,
        because clipping and unscaling divide both, or in size, because a single number has no direction.
        """
        if (compared := self._compared()) is None:
            return None
        now, arrived, before = compared
        if before is None:
            return torch.zeros((), dtype=now.dtype, device=now.device)
        size, both = torch.linalg.vector_norm(now), arrived + before

        def apart(other: Tensor) -> Tensor:
            along = (now * other).sum() / other.square().sum()  # NaN where there is nothing, which compares as False
            distance: Tensor = torch.linalg.vector_norm(now - along * other) / size
            return distance

        by_direction = (apart(both) <= CHANGED) & (apart(arrived) > LEFT_OVER)
        by_size = (torch.linalg.vector_norm(now - both) <= CHANGED * size) & (
            torch.linalg.vector_norm(now - arrived) > LEFT_OVER * size
        )
        old = torch.linalg.vector_norm(before)
        share = old / (old + torch.linalg.vector_norm(arrived))
        return torch.where(by_direction | by_size, share, torch.zeros_like(share))

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()


class Sentinel:
    """Sees the gradients of two small parameters of a module as they arrive: one of them may get none."""

    def __init__(self, passes: Mapping[int, bool] | None = None) -> None:
        """Begin without a parameter.

        Args:
            passes: whether a backward pass counts, by its number; None: each does.

        """
        self._passes = passes
        self._seen: list[_Arrivals] = []

    @property
    def watching(self) -> bool:
        """Whether a parameter is seen already."""
        return bool(self._seen)

    def watch(self, module: nn.Module) -> None:
        """Put hooks on the smallest trained parameters of two shapes, unless some are seen already."""
        if self._seen:
            return
        # A sparse gradient, as an embedding may have, has no arithmetic.
        dense = [m for m in module.modules() if not getattr(m, "sparse", False)]
        trained = [p for m in dense for p in m.parameters(recurse=False) if p.requires_grad and p.is_leaf]
        # What gets no gradient, as the projection of an LSTM where the loss takes cell states alone, has the same shape
        # in every layer and direction.
        smallest: dict[torch.Size, Tensor] = {}
        for parameter in sorted(trained, key=torch.Tensor.numel):
            smallest.setdefault(parameter.shape, parameter)
        self._seen = [_Arrivals(parameter, self._passes) for parameter in list(smallest.values())[:2]]

    def forget(self, passes: AbstractSet[int]) -> None:
        """Leave out what these backward passes brought."""
        for arrivals in self._seen:
            arrivals.forget(passes)

    def difference(self) -> Tensor | None:
        """Return how far a gradient now is from what arrived, as a share of that; None where nothing arrived."""
        found = (arrivals.difference() for arrivals in self._seen)
        return next((difference for difference in found if difference is not None), None)

    def left_over(self, parameters: AbstractSet[int]) -> Tensor | None:
        """Return the share of a gradient that was there before the forward pass, the larger of those that are seen.

        Of these parameters, by `id`; None where nothing arrived at any.
        """
        mine = (arrivals for arrivals in self._seen if id(arrivals.parameter) in parameters)
        found = [share for arrivals in mine if (share := arrivals.left_over()) is not None]
        return torch.stack(found).max() if found else None

    def remove(self, parameters: AbstractSet[int] | None = None) -> None:
        """Take the hooks off; only those on these parameters, by `id`, if any are named."""
        done = [a for a in self._seen if parameters is None or id(a.parameter) in parameters]
        for arrivals in done:
            arrivals.remove()
        self._seen = [arrivals for arrivals in self._seen if arrivals not in done]
