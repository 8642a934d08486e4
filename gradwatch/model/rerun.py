"""Runs a model and leaves it as it was: its state, its gradients, the random states, and without its hooks if asked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as home

from gradwatch.model.nested import parts

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OWNERS = ("torch.", "transformers.")
"""Packages whose hooks are a part of what a model computes."""
_CONTAINERS = (dict, list, set, deque)
_PLAIN = (bool, int, float, str, type)
"""Nothing in these can change."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextlib.contextmanager
def as_it_was(model: nn.Module, generators: Sequence[torch.Generator] | None = None) -> Iterator[None]:
    """Put back, at the end, all that a pass through the model may have changed; within, no tensor has a gradient.

    That is: attributes of all modules (modes, hooks, counters), also of those that a module hides in a list;
    parameters, buffers and tensors that modules keep as attributes or in lists, tuples, dicts, sets and dataclasses,
    bit for bit; random generators that they keep; gradients; and the random states of torch (of other devices only if
    they were drawn from: writing one makes cuDNN begin a new dropout sequence), numpy and Python. What a module keeps
    in an object of another kind is not known here, nor what it does outside of Python. It takes as many bytes as all
    these tensors.

    Args:
        model: what will run.
        generators: torch's; None: all of its own, see `torch_generators`.

    Raises:
        ValueError: parameters have no shape yet; nothing could take their coming back.
        RuntimeError: something could not be put back; the text says what.

    """
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ValueError(
            "the parameters of model must have their shapes: lazy modules get them when a batch has gone through once"
        )
    backup = _ModelBackup(model)
    generators = torch_generators() if generators is None else generators
    before = [g.get_state() for g in generators]
    # Newer ones import it when somebody first draws, which may be the model: each pass is to draw the same.
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        backup.remove_gradients()
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for generator, drawn in zip(generators, before, strict=True):
            if not torch.equal(generator.get_state(), drawn):
                generator.set_state(drawn)
        backup.restore()


@contextlib.contextmanager
def once_more(model: nn.Module) -> Iterator[None]:
    """Leave the model as it was after one more pass with gradients; what fails in it is nobody's concern."""
    with contextlib.suppress(Exception), as_it_was(model), torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Keep the hooks of the model's modules, and global ones, from running.

    But for those of `_OWNERS`: weight_norm, spectral_norm and pruning compute in theirs, and models of transformers
    collect in theirs what they make a loss of.
    The tables are exchanged and not emptied, so that a hook that is removed meanwhile stays removed.
    """
    tables = [
        (vars(module), name, table)
        for module in model.modules()
        for name in _HOOKS
        if (table := vars(module).get(name))
    ]
    tables += [(vars(home), f"_global{name}", table) for name in _HOOKS if (table := getattr(home, f"_global{name}"))]
    try:
        for owner, name, table in tables:
            owner[name] = OrderedDict((key, hook) for key, hook in table.items() if _computes(hook))
        yield
    finally:
        for owner, name, table in tables:
            owner[name] = table


def _computes(hook: Any) -> bool:  # noqa: ANN401  (any callable)
    while isinstance(hook, functools.partial):
        hook = hook.func
    # An object with __call__ may be of a class derived from torch's, as one's own way of pruning is.
    kinds = (hook, *type(hook).__mro__) if not isinstance(hook, nn.Module | types.MethodType) else (hook,)
    return any(str(getattr(kind, "__module__", "")).startswith(_OWNERS) for kind in kinds)


class _TensorBackup(NamedTuple):
    """A tensor as it was."""

    tensor: Tensor
    place: Tensor
    """Shares its storage: somebody may give it another by `.data = `."""
    copy: Tensor
    requires_grad: bool
    gradient: Tensor | None


class _ModelBackup:
    """What modules hold, and how to put it back."""

    def __init__(self, model: nn.Module) -> None:
        """Copy it."""
        self._tensors: list[_TensorBackup] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._generators: list[tuple[Callable[[Any], object], Any]] = []
        self._scripted: list[tuple[torch.jit.ScriptModule, dict[str, Any]]] = []
        seen: set[int] = set()
        waiting: list[Any] = [model]
        while waiting:
            value = waiting.pop()
            if value is None or isinstance(value, _PLAIN) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, _CONTAINERS):
                self._containers.append((value, _content(value) if value else []))
                waiting += value.values() if isinstance(value, dict) else value
            else:
                self._remember(value)
                waiting += self._held_by(value)

    def _remember(self, value: Any) -> None:  # noqa: ANN401  (whatever a module keeps)
        """Copy one thing that is no container; what is in it is a thing of its own."""
        if isinstance(value, Tensor):
            gradient = value.grad if value.is_leaf else None
            # `.data` and not `.detach()`: what is written there does not count as an edit, over which a graph that
            # waits for its backward pass would stumble.
            self._tensors.append(
                _TensorBackup(value, value.data, value.detach().clone(), value.requires_grad, gradient)
            )
        elif isinstance(value, torch.jit.ScriptModule):
            self._scripted.append((value, _scripted_attributes(value)))
        elif isinstance(value, torch.Generator):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._generators.append((value.setstate, value.getstate()))
        elif (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.random.Generator):
            bits = value.bit_generator
            self._generators.append((functools.partial(setattr, bits, "state"), bits.state))

    @staticmethod
    def _held_by(value: Any) -> Iterable[Any]:  # noqa: ANN401
        """Return what is in one thing, which may be more than what a model takes and gives."""
        if isinstance(value, Tensor):
            return ()
        if isinstance(value, torch.jit.ScriptModule):
            return [*value.parameters(), *value.buffers(), *_scripted_attributes(value).values(), *value.children()]
        if isinstance(value, nn.Module) or (dataclasses.is_dataclass(value) and hasattr(value, "__dict__")):
            return [vars(value)]  # which may get other keys
        return parts(value)

    def remove_gradients(self) -> None:
        """Leave no tensor with a gradient."""
        for backup in self._tensors:
            if backup.gradient is not None:
                backup.tensor.grad = None

    def restore(self) -> None:
        """Put it back."""
        for container, content in self._containers:
            if (container or content) and not _same(_content(container), content):
                _refill(container, content)
        for module, kept in self._scripted:
            for name, value in kept.items():
                setattr(module, name, value)
        failed = []
        for backup in self._tensors:
            try:
                _put_back(backup)
            except RuntimeError as error:
                failed.append(f"{tuple(backup.copy.shape)}: {error}")
        for put, state in self._generators:
            put(state)
        if failed:
            what = "1 tensor of the model could not be put back as it was, of shape"
            if len(failed) > 1:
                what = f"{len(failed)} tensors of the model could not be put back as they were, the first of shape"
            raise RuntimeError(f"{what} {failed[0]}")


def _scripted_attributes(module: torch.jit.ScriptModule) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module._concrete_type.get_attributes()}


def _content(container: Any) -> list[Any]:  # noqa: ANN401  (a dict, list, set or deque)
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _refill(container: Any, content: list[Any]) -> None:  # noqa: ANN401
    container.clear()
    if isinstance(container, dict):
        many = len(content) // 2
        container.update(zip(content[:many], content[many:], strict=True))
    else:
        (container.update if isinstance(container, set) else container.extend)(content)


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _put_back(backup: _TensorBackup) -> None:
    tensor, place, copy = backup.tensor, backup.place, backup.copy
    # Sparse, or made of several: it has no storage of its own.
    if tensor.layout is not torch.strided or hasattr(tensor, "__tensor_flatten__"):
        with torch.no_grad():
            tensor.copy_(copy)
    else:
        if tensor.data_ptr() != place.data_ptr() or tensor.shape != place.shape or tensor.stride() != place.stride():
            tensor.data = place
        # On other devices comparing would wait for them. What overlaps itself nobody can have written to.
        if not (place.device.type == "cpu" and _equal(place, copy)):
            place.copy_(copy)
    if tensor.is_leaf:
        if tensor.requires_grad != backup.requires_grad:
            tensor.requires_grad_(backup.requires_grad)
        if tensor.grad is not backup.gradient:
            tensor.grad = backup.gradient


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same bits: NaN is NaN, and 0.0 is not -0.0."""
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    bits = _BITS.get(one.element_size())
    if bits is None or one.is_quantized:
        return False
    return torch.equal(one.view(bits), other.view(bits))


def torch_generators() -> list[torch.Generator]:
    """Return torch's own generators, of all devices that have begun."""
    found = [torch.default_generator]
    for device in ("cuda", "xpu"):
        found += list(getattr(getattr(torch, device, None), "default_generators", ()))
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found
