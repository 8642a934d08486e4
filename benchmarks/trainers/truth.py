"""The truth, without gradwatch: what each step consumed, as norms in float64, and the weights at the end."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

When = Literal["step", "before clip", "backward", "reading", "telling"]
"""At which moment the gradients are those that gradwatch promises.

step: `optimizer.step()` begins, or, where it is given a closure, the closure returns.
before clip: as of the last `backward()` before that.
backward: each `backward()` returns, of libraries without an optimizer of torch.
telling: when gradwatch tells of a step, of what a library keeps elsewhere than in `.grad`, asked of the library.
reading: as of the last `backward()` before gradwatch tells of a step, of fits that run several for each iteration.
"""
Norms = dict[Tensor, float]


class Truth:
    """Measures every step of every optimizer of the process."""

    def __init__(self, when: When) -> None:
        """Begin to measure."""
        self.steps: list[Norms] = []
        self._when = when
        self._latest: Norms = {}
        """As of the last `backward()`."""
        self._leaves: set[Tensor] = set()
        """What any `backward()` has reached so far."""
        self._backward = torch.autograd.backward
        if when != "step":
            torch.autograd.backward = self._after_backward
        if when in ("step", "before clip"):
            register_optimizer_step_pre_hook(self._before_step)

    def read(self) -> None:
        """Take note: gradwatch tells of a step."""
        if self._when == "reading":
            self.steps.append(self._latest)
        elif self._when == "telling":
            self.steps.append(norms(self._leaves))

    def _after_backward(self, tensors: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        self._leaves |= leaves([tensors] if isinstance(tensors, Tensor) else tensors)
        self._backward(tensors, *args, **kwargs)
        self._latest = norms(self._leaves)
        if self._when == "backward":
            self.steps.append(self._latest)

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._take(optimizer)
            return None
        return (args[0], self._measured(optimizer, closure)), {}

    def _measured(self, optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
        evaluations = 0

        def run() -> Any:
            nonlocal evaluations
            loss = closure()
            evaluations += 1
            if evaluations == 1:  # a further one is of weights that the step has moved
                self._take(optimizer)
            return loss

        return run

    def _take(self, optimizer: Any) -> None:
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        unclipped = {p: self._latest[p] for p in mine if p in self._latest}
        self.steps.append(unclipped if self._when == "before clip" else norms(mine))

    def weights(self) -> str:
        """Return one SHA-1 for the final values of all parameters that were stepped or that a module still has."""
        gc.collect()
        modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]  # not what pretends to be of a class
        every = {p for module in modules for p in module.parameters()} | {p for step in self.steps for p in step}
        digests = {hashlib.sha1(as_bytes(p)).hexdigest() for p in every}
        return hashlib.sha1("".join(sorted(digests)).encode()).hexdigest()


def leaves(tensors: Sequence[Tensor]) -> set[Tensor]:
    """Return the tensors at which the graph behind some others ends."""
    found, seen, left = set(), set(), [tensor.grad_fn for tensor in tensors]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        left += [after for after, _ in node.next_functions]
    return found


def norms(parameters: Iterable[Tensor]) -> Norms:
    """Return the norms of the gradients that are there."""
    return {p: float(g.detach().double().norm()) for p in parameters if (g := gradient(p)) is not None}


def gradient(parameter: Tensor) -> Tensor | None:
    """Return a gradient; of a parameter whose gradient DeepSpeed parts, what its own function gives."""
    if parameter.grad is not None or not hasattr(parameter, "_hp_mapping"):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def as_bytes(parameter: Tensor) -> bytes:
    """Return shape and bits."""
    values = parameter.detach().cpu().contiguous()
    return str(tuple(values.shape)).encode() + values.reshape(-1).view(torch.uint8).numpy().tobytes()
