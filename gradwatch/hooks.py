"""The only place that attaches anything to a model or an optimizer, and takes it off again."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks_with_kwargs, register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle


class StepListener(Protocol):
    """What hears of the steps of an optimizer. It must not raise."""

    def on_look(self, slot: int) -> None:
        """Take note: the gradients of a step are complete, and it has not moved the weights yet."""

    def on_loss(self, slot: int, loss: object) -> None:
        """Take note: a closure returned this."""

    def on_stepped(self, slot: int) -> None:
        """Take note: the step is done."""


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


def unwrap(optimizer: object) -> Any:  # noqa: ANN401  (an optimizer, or what merely acts as one)
    """Give the optimizer inside of wrappers that keep it as `.optimizer` (Accelerate, Lightning, and others)."""
    inner, seen = optimizer, set[int]()
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, torch.optim.Optimizer) or (hasattr(inner, "param_groups") and hasattr(inner, "step")):
            optimizer = inner
        inner = getattr(inner, "optimizer", None)
    return optimizer


class StepHooks:
    """Tells a listener once of each executed `step()` of an optimizer, whatever its closures and subclasses do.

    The optimizer holds its hooks, and they the listener: a watcher that nobody keeps lives as long as its optimizer.
    """

    def __init__(self, optimizer: Any, slot: int, listener: StepListener) -> None:  # noqa: ANN401  (any object with step())
        """Attach; `slot` is handed back to the listener."""
        self._slot = slot
        self._listener: StepListener | None = listener
        self._pid = os.getpid()
        self._depth = 0
        self._seen = False
        self._evaluating = False
        if hasattr(optimizer, "register_step_pre_hook") and hasattr(optimizer, "register_step_post_hook"):
            before, after = optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)
            self._detach: Callable[[], None] = lambda: (before.remove(), after.remove(), None)[-1]
        else:
            self._detach = _wrap_step(optimizer, self._before, self._after)

    def detach(self) -> None:
        """Take the hooks off; a step that is under way is not told of any more."""
        self._listener = None
        self._detach()

    @property
    def looked(self) -> bool:
        """Whether a closure is being evaluated for a step whose gradients have been looked at already."""
        return self._evaluating and self._seen

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:  # noqa: ANN401
        # super().step() of a subclass fires the hooks again; a step that raised never came back to count down.
        self._depth = self._depth + 1 if self._depth and _nested(optimizer) else 1
        if self._depth > 1:
            return None
        self._seen = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._look()
            return None

        def looked_at(*a: object, **k: object) -> object:
            self._evaluating = True
            try:
                loss = closure(*a, **k)
            finally:
                self._evaluating = False
            if not self._seen:  # the first evaluation: the gradient at the weights that the step starts from
                if (listener := self._live()) is not None:
                    listener.on_loss(self._slot, loss)
                self._look()
            return loss

        return ((args[0], looked_at, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": looked_at})

    def _after(self, optimizer: object, _args: object, _kwargs: object) -> None:
        if self._depth == 0:  # it began before we came
            return
        if self._depth > 1 and _nested(optimizer):
            self._depth -= 1
            return
        self._depth = 0
        if not self._seen:  # a closure that the optimizer never called
            self._look()
        if (listener := self._live()) is not None:
            listener.on_stepped(self._slot)

    def _look(self) -> None:
        self._seen = True
        if (listener := self._live()) is not None:
            listener.on_look(self._slot)

    def _live(self) -> StepListener | None:
        return self._listener if os.getpid() == self._pid else None  # a forked child is silent


def _nested(optimizer: object) -> bool:
    """Tell, from a hook, whether the `step` that calls it was called by another `step` of the same optimizer.

    Only the stack knows: which classes of an optimizer call hooks depends on the order in which they were instantiated.
    """
    caller = sys._getframe(2)
    frame = caller.f_back
    while frame is not None:
        if frame.f_code is caller.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _wrap_step(optimizer: Any, before: Callable[..., Any], after: Callable[..., None]) -> Callable[[], None]:  # noqa: ANN401
    """Do by hand, for an object without step hooks, what torch's own `profile_hook_step` does; give what undoes it."""
    original = optimizer.step
    own = "step" in vars(optimizer)

    def call(self: object, *args: object, **kwargs: object) -> object:
        # A copy of the optimizer carries a copy of its `step`, and steps itself.
        mine = isinstance(original, types.MethodType) and original.__self__ is optimizer
        return original.__func__(self, *args, **kwargs) if mine else original(*args, **kwargs)

    def step(self: object, *args: object, **kwargs: object) -> object:
        if self is not optimizer:
            return call(self, *args, **kwargs)
        changed = before(self, (self, *args), kwargs)
        all_args, all_kwargs = changed if changed is not None else ((self, *args), kwargs)
        result = call(*all_args, **all_kwargs)
        after(self, all_args, all_kwargs)
        return result

    bound = step.__get__(optimizer)  # a bound method, because schedulers read `step.__func__`
    optimizer.step = bound

    def undo() -> None:
        if vars(optimizer).get("step") is not bound:  # somebody wrapped it after us: theirs stays, and ours only passes on
            return
        if own:
            optimizer.step = original
        else:
            del optimizer.step

    return undo


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
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, with_kwargs=True)]
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
        name = self._names.get(id(module))
        given = [value for value in inputs if isinstance(value, torch.Tensor)]
        if given and not any(map(torch.Tensor.numel, given)):  # an expert that no row was routed to
            name = None
        # A pass without gradients is a validation, unless the module is in training mode: then somebody cut it off.
        if name is not None and name not in self._ran and (torch.is_grad_enabled() or module.training):
            self._ran[name] = None
            if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.float16:
                self.half = True
            if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.float16:
                self.half = True
        changed = None
        for visitor, modules in self._visitors:
            if id(module) in modules:
                changed = visitor.entered(module, inputs if changed is None else changed) or changed
        return changed

    def left(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Let the visitors see what a module gives."""
        for visitor, modules in self._visitors:
            if self._sees() and id(module) in modules:
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
        if len(kwargs_and_output) < 2:  # taken off by a hook in front of it, as a watcher may be that is collected there: torch calls it all the same
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
        if _compiled():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield
