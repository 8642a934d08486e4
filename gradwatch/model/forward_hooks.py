"""Hooks on the forward pass: shows visitors what chosen modules take and give, and takes itself off again."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle


class Visitor(Protocol):
    """What sees chosen modules take their inputs and give their outputs, in the forward pass of a step."""

    def arm(self, modules: Mapping[str, nn.Module], *, compiled: bool) -> dict[int, nn.Module]:
        """Choose the modules to visit, by `id`."""
        ...

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Take note of the inputs; what is returned takes their place."""
        ...

    def left(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:  # noqa: ANN401
        """Take note of the output."""
        ...

    def clear(self) -> None:
        """Let go of what was seen."""
        ...


_alone: ForwardTrace | None = None


class ForwardTrace:
    """Sees which modules run, in which order, between `arm` and `disarm`, through global hooks; and takes a visitor along.

    A hook on the modules themselves would travel with `torch.save(model)`, `deepcopy` and pickle; a global one does not.
    A disarmed hook costs as much as an armed one, so between probes none is registered. Where torch.compile is in use, a
    global hook would be traced, cost a recompilation when it leaves, and never fire: there the visitor's modules are hooked
    by themselves, by objects that leave no trace in a copy, and nothing else is seen.
    """

    def __init__(self, visitors: Sequence[Visitor] = ()) -> None:
        """Begin disarmed."""
        self._visitors = [(visitor, frozenset[int]()) for visitor in visitors]
        """Each with the modules that it wants to see, by `id`: not the modules, because a watcher that is kept must not keep a model."""
        self._undo: weakref.finalize[..., Any] | None = None
        self._names: Mapping[int, str] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._ran: dict[str, None] = {}
        self.half = False
        """Whether autocast to float16 was on in what was seen."""
        self.compiled = False
        """Whether torch.compile was in use, so that only the visitor's modules are seen."""

    @property
    def armed(self) -> bool:
        """Whether it is looking now."""
        return self._undo is not None

    def arm(self, modules: Mapping[str, nn.Module]) -> bool:
        """Begin to look for these modules; False where torch.compile is in use, and all but the visitors' are left out."""
        self.disarm()
        self.compiled = _compiled()
        self._model = weakref.ref(modules[""]) if "" in modules else None
        self._names = {} if self.compiled else {id(module): name for name, module in modules.items()}
        chosen = [visitor.arm(modules, compiled=self.compiled) for visitor, _ in self._visitors]
        self._visitors = [(visitor, frozenset(its)) for (visitor, _), its in zip(self._visitors, chosen, strict=True)]
        visited = {key: module for its in chosen for key, module in its.items()}
        self._ran = {}
        self.half = False
        before: Callable[..., Any] = (_untraced(_Before) if self.compiled else _Before)(self)
        after: Callable[..., None] = (_untraced(_After) if self.compiled else _After)(self)
        handles: list[RemovableHandle] = []
        if self.compiled:
            for module in visited.values():
                handles += [
                    module.register_forward_pre_hook(before),
                    module.register_forward_hook(after, with_kwargs=True),
                ]
        else:
            handles.append(register_module_forward_pre_hook(before))
            if visited:
                handles.append(register_module_forward_hook(after, with_kwargs=True))
        self._undo = weakref.finalize(self, _remove, handles)  # gone with the trace, even when nobody disarms it
        return not self.compiled

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only trace that sees: what runs here is no business of a training that is watched."""
        global _alone  # noqa: PLW0603  (the hooks are global, so who may see is)
        before, _alone = _alone, self
        try:
            yield
        finally:
            _alone = before

    def disarm(self) -> None:
        """Stop looking; which modules ran stays known."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        for visitor, _ in self._visitors:
            visitor.clear()
        self._visitors = [(visitor, frozenset()) for visitor, _ in self._visitors]

    @property
    def ran(self) -> tuple[str, ...]:
        """Names of the modules that ran, in the order in which they began."""
        return tuple(self._ran)

    def _sees(self) -> bool:
        """Tell whether it may look: once its model is gone, others may have the `id` of its modules."""
        return _alone in (None, self) and (self._model is None or self._model() is not None)

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Note that a module runs, and let the visitors see its inputs; what one returns takes their place."""
        if not self._sees():
            return None
        key = id(module)
        name = self._names.get(key)
        # A pass without gradients is a validation, unless the module is in training mode: then somebody cut it off.
        if name is not None and name not in self._ran and (torch.is_grad_enabled() or module.training):
            given = [value for value in inputs if isinstance(value, torch.Tensor)]
            if not given or any(map(torch.Tensor.numel, given)):  # else an expert that no row was routed to
                self._ran[name] = None
                if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.float16:
                    self.half = True
                if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.float16:
                    self.half = True
        changed = None
        for visitor, modules in self._visitors:
            if key in modules:
                changed = visitor.entered(module, inputs if changed is None else changed) or changed
        return changed

    def left(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Let the visitors see what a module gives."""
        if not self._sees():
            return
        key = id(module)
        for visitor, modules in self._visitors:
            if key in modules:
                visitor.left(module, inputs, kwargs, output)


class _Before:
    """A forward pre-hook that passes on to a trace. A copy or a saved model that it hangs on carries a builtin that does nothing."""

    def __init__(self, trace: ForwardTrace) -> None:
        self._trace = weakref.ref(trace)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        trace = self._trace()
        if trace is None or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return None
        try:
            return trace.entered(module, inputs)
        except Exception:  # noqa: BLE001  (this runs inside of the user's forward pass)
            trace.disarm()
            return None

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (sys.audit, "gradwatch")


class _After:
    """The same behind the forward pass; it returns nothing, because torch would take that for the output."""

    def __init__(self, trace: ForwardTrace) -> None:
        self._trace = weakref.ref(trace)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], *kwargs_and_output: Any) -> None:  # noqa: ANN401  (any module's)
        if (
            len(kwargs_and_output) < 2
        ):  # taken off by a hook in front of it, as a watcher may be that is collected there: torch calls it all the same
            return
        kwargs, output = kwargs_and_output
        trace = self._trace()
        if trace is None or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        try:
            trace.left(module, inputs, kwargs, output)
        except Exception:  # noqa: BLE001  (this runs inside of the user's forward pass)
            trace.disarm()

    __reduce__ = _Before.__reduce__


@functools.cache
def _untraced(kind: type[Any]) -> type[Any]:
    """Make hooks of this kind that torch.compile calls as they are; else it would compile what they do, and nothing would ever be called again."""
    return type(kind.__name__, (kind,), {"__call__": torch.compiler.disable(kind.__call__)})  # type: ignore[no-untyped-call]  # torch's


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
        _global_forward_hooks_with_kwargs.pop(handle.id, None)  # torch forgets this one


def _compiled() -> bool:
    dynamo = sys.modules.get("torch._dynamo")
    counters = getattr(getattr(dynamo, "utils", None), "counters", None)
    return bool(counters is not None and sum(counters["frames"].values()))


@contextlib.contextmanager
def listening(modules: Iterable[nn.Module], before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Call `before(module, args, kwargs)` and `after(module, args, kwargs, output)` around the calls of these modules.

    For a pass of our own, without all other hooks (`intact.without_hooks`): on the modules themselves, because global hooks are not shown keywords. What
    torch.compile has made runs as it was written meanwhile, because compiled code calls no hooks.
    """
    with contextlib.ExitStack() as stack:
        if _compiled() and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield
