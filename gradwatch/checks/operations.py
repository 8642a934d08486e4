"""The operation that makes NaN or infinity of finite numbers, forward or on the way back, in a pass of our own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwatch.measurement.origins import BAD, MINUS, SOUND, extremes, soundness
from gradwatch.model.forward_hooks import listening
from gradwatch.model.layers import named_modules
from gradwatch.model.nested import floats, parts
from gradwatch.model.rerun import once_more
from gradwatch.values.snapshot import NotFinite, Origin

_UNWRITTEN = ("empty", "empty_like", "new_empty")
"""Operations whose result means nothing before it is written to."""


def first_bad_operation(
    model: nn.Module, given: Iterable[tuple[str, Tensor]], loss: Callable[[], Tensor]
) -> Origin | None:
    """Run a model and its loss once more, and return where the first number that is not finite comes from.

    The model and all random states stay as they were. Where the pass cannot be followed, that is None.

    Args:
        model: what runs.
        given: the tensors of the batch, by name.
        loss: runs the model and returns the loss.

    """
    modules = named_modules(model)
    operations = _Operations(modules, given)
    with once_more(model):
        with listening(modules.values(), operations.entered, operations.left), operations:
            value = loss()
        if operations.found is None:
            operations.follow(value)
            value.backward()  # type: ignore[no-untyped-call]  # torch's
    return operations.found


class _Operations(TorchFunctionMode):
    """Sees what every operation takes and gives until one gives what is not finite."""

    def __init__(self, modules: Mapping[str, nn.Module], given: Iterable[tuple[str, Tensor]]) -> None:
        """Begin with nothing found."""
        super().__init__()
        self.found: Origin | None = None
        self._names = {id(module): name for name, module in modules.items()}
        self._given = {id(tensor): name for name, tensor in given}
        held = [(name, t) for name, m in modules.items() for t in (*m._parameters.values(), *m._buffers.values())]
        self._held = {id(t): name for name, t in held if t is not None}
        self._running: list[str] = []
        self._seen: dict[int, tuple[Tensor, int]] = {}
        """What operations gave, which stays until the end so that its `id` does."""
        self._minus: Origin | None = None
        """The first operation that gave minus infinity and was not told to."""
        self._mark = object()

    def entered(self, module: nn.Module, args: object, kwargs: object) -> None:
        """Note which module runs."""
        self._own([args, kwargs])
        self._running.append(self._names[id(module)])

    def left(self, _module: nn.Module, _args: object, _kwargs: object, output: object) -> None:
        """Note that it has ended."""
        self._own(output)
        self._running.pop()

    def _own(self, value: object) -> None:
        """Write at nodes that no operation of torch has made, as those of a checkpoint, which module did."""
        for tensor in floats(value):
            node: Any = tensor.grad_fn
            if node is not None:
                node.metadata.setdefault(self._mark, (self._module, _kind(node)))

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401  (any operation of torch)
        types: Any,  # noqa: ANN401
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Do the operation, and look at it."""
        kwargs = kwargs or {}
        if self.found is not None or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        taken = [(tensor, _soundness(tensor)) for tensor in floats((*args, *kwargs.values()))]
        given = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        told = any(_infinite(v) for v in (*args, *kwargs.values()))
        self._judge(name, [] if name in _UNWRITTEN else taken, floats(given), told=told)
        for tensor in floats(given):
            node: Any = tensor.grad_fn
            if node is not None:
                node.metadata.setdefault(self._mark, (self._module, name))
        return given

    @property
    def _module(self) -> str | None:
        return self._running[-1] if self._running else None

    def _judge(self, name: str, taken: list[tuple[Tensor, int]], given: list[Tensor], *, told: bool) -> None:
        results = [(tensor, _soundness(tensor)) for tensor in given]
        worst = max((rank for _, rank in taken), default=SOUND)
        for tensor, rank in taken:
            if rank == BAD and id(tensor) not in self._seen:
                self.found = self._minus or self._brought(tensor)
                return
        self._seen |= {id(tensor): (tensor, rank) for tensor, rank in results}
        gave = max(results, key=lambda result: result[1], default=None)
        if gave is None or not taken or gave[1] <= worst:
            return
        origin = Origin("forward", self._module, _bad_value(gave[0]), operation=name)
        if gave[1] == BAD and worst < BAD:
            self.found = self._minus or origin
        elif gave[1] == MINUS and not told and not any(bool(t.isinf().any()) for t, _ in taken):
            self._minus = self._minus or origin

    def _brought(self, tensor: Tensor) -> Origin:
        """Return the origin of what no operation gave: of the batch, the model's own, or from elsewhere."""
        value = _bad_value(tensor)
        if id(tensor) in self._given:
            return Origin("data", "", value, argument=self._given[id(tensor)])
        if id(tensor) in self._held:
            return Origin("weights", self._held[id(tensor)], value)
        return Origin("data", self._module, value)

    def follow(self, loss: Tensor) -> None:
        """See what each operation gives back in the backward pass to come."""
        if self._minus is not None and not bool(loss.isfinite()):
            self.found = self._minus
            return
        waiting: list[tuple[Any, tuple[str | None, str]]] = [(loss.grad_fn, (None, ""))]
        seen = set()
        while waiting:
            node, after = waiting.pop(0)
            if node is None or node in seen:
                continue
            seen.add(node)
            mark = node.metadata.get(self._mark)
            node.register_hook(self._hook(*(mark or (after[0], _kind(node)))))
            waiting += [(n, mark or after) for n, _ in node.next_functions]

    def _hook(self, module: str | None, name: str) -> Callable[[Any, Any], None]:
        def hook(given: Any, taken: Any) -> None:  # noqa: ANN401  (gradients, some of them None)
            if self.found is None and not any(map(_not_finite, _there(taken))):
                bad = next(filter(_not_finite, _there(given)), None)
                if bad is not None:
                    self.found = Origin("backward", module, _bad_value(bad), operation=name)

        return hook


def _kind(node: Any) -> str:  # noqa: ANN401  (nodes have no common type that tells of this)
    """Return the operation that a node is the derivative of."""
    return re.sub(r"Backward\w*$", "", node.name())


def _there(gradients: Iterable[Tensor | None]) -> Iterator[Tensor]:
    return (gradient for gradient in gradients if gradient is not None and gradient.is_floating_point())


def _not_finite(gradient: Tensor) -> bool:
    return not bool(gradient.isfinite().all())


def _soundness(tensor: Tensor) -> int:
    found = extremes(tensor)
    return SOUND if found is None else soundness(float(found[0]), float(found[1]))


def _bad_value(tensor: Tensor) -> NotFinite:
    """Return what is not finite in a tensor that has such an entry: NaN before infinity."""
    if bool(tensor.isnan().any()):
        return "nan"
    return "inf" if bool((tensor == math.inf).any()) else "-inf"


def _infinite(value: object) -> bool:
    """Tell whether infinity is among the numbers that an operation is told."""
    return (isinstance(value, float) and math.isinf(value)) or any(map(_infinite, parts(value)))
