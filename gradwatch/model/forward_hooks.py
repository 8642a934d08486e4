"""Hooks on the forward pass: shows probes what chosen modules take and give, and takes itself off again."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from gradwatch.model.attempts import Attempts
from gradwatch.model.compiled import graphs
from gradwatch.model.gradient_hooks import has_unknown_scale, of_others
from gradwatch.values.autograd import Cut, Flow, Squashed, Stray
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import ActivationStats, Fact, Origin


class Pending(Protocol):
    """Numbers that are on their way from a device."""

    @property
    def values(self) -> Sequence[float]:
        """The entries of the tensor, once they have been copied."""
        ...

    @property
    def value(self) -> float:
        """The only entry."""
        ...


class Transfer(Protocol):
    """Copies tensors from their device, all at once, and when it is told to."""

    def add(self, tensor: Tensor) -> Pending:
        """Return a handle at which the entries of the tensor will stand."""
        ...


@dataclass(frozen=True, eq=False)
class ModelView:
    """The modules of a model as they are when probes are armed. Nobody keeps it: that would keep the model."""

    modules: Mapping[str, nn.Module]
    """By name; the model itself is ""."""
    names: Mapping[int, str]
    """By `id` of the module."""
    compiled: bool = False
    """Whether torch.compile is in use, so that hooks can only go on fused recurrent modules."""


@dataclass(frozen=True, eq=False)
class StepView:
    """The step for which probes are asked what they have seen."""

    modules: Mapping[str, nn.Module]
    """Of the model as it is now, by name; the model itself is ""."""
    mine: AbstractSet[int]
    """What the optimizer of this step steps, parameters by `id`."""
    others: AbstractSet[int]
    """What the others step; of those they will ask."""
    scale: Pending | None = None
    """The loss scale of the backward pass; None: nobody said."""
    changed: Pending | None = None
    """How far a parameter's gradient at the step is from what arrived; None: nothing could be compared."""

    def of_others(self, parameters: AbstractSet[int]) -> bool:
        """Tell whether what holds these parameters is none of this step: only other optimizers step some of them."""
        return of_others(parameters, self.mine, self.others)

    @property
    def factor(self) -> float:
        """The loss scale that is known to be on the gradients that arrived, once it has been copied; else 1.

        Of one that has fallen to 0 nothing can be divided out.
        """
        return (self.scale.value if self.scale is not None else 1.0) or 1.0

    def scaled(self, changed: float | None = None) -> bool:
        """Tell whether an unknown factor may be on the gradients that arrived, once the numbers have been copied.

        Args:
            changed: as `self.changed`, of a parameter nearer to what is asked about.

        """
        if changed is None and self.changed is not None:
            changed = self.changed.value
        return has_unknown_scale(self.scale, changed) or (self.scale is not None and not self.scale.value)


@dataclass(frozen=True)
class ProbeValues:
    """What a probe has seen in one step, as values."""

    activations: tuple[ActivationStats, ...] = ()
    sequences: tuple[SequenceStats, ...] = ()
    facts: tuple[Fact, ...] = ()
    cuts: tuple[Cut, ...] = ()
    origin: Origin | None = None
    left_over: float | None = None
    flows: tuple[Flow, ...] = ()
    strays: tuple[Stray, ...] = ()
    squashed: Squashed | None = None
    crossed: int | None = None


Part = Callable[[], ProbeValues]
"""What a probe has seen in one step; to be called once its numbers have been copied."""


class Probe(Protocol):
    """What sees inputs and outputs of chosen modules in the forward pass of a step, and tells of it at the step."""

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose the modules to see, by `id`, and let go of what was seen before."""
        ...

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Take note of the inputs; what is returned takes their place."""
        ...

    def left(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,  # noqa: ANN401  (whatever a module gives)
    ) -> None:
        """Take note of the output."""
        ...

    def collect(self, step: StepView, transfer: Transfer) -> Part:
        """Work out what was seen in this step, and hand its numbers over; what comes now belongs to the next step."""
        ...

    def clear(self) -> None:
        """Let go of what was seen, and look no more."""
        ...


_alone: ForwardTrace | None = None


class ForwardTrace:
    """Sees which modules run, in which order, between `arm` and `disarm`, through global hooks; and takes probes along.

    A hook on the modules themselves would travel with `torch.save(model)`, `deepcopy` and pickle; a global one does
    not. A disarmed hook costs as much as an armed one, so between probes none is registered. Where torch.compile is in
    use, a global hook would be traced, cost a recompilation when it leaves, and never fire: there the modules that
    probes choose are hooked by themselves, by objects that leave no trace in a copy, and nothing else is seen.
    """

    def __init__(
        self,
        probes: Sequence[Probe] = (),
        failed: Callable[[Exception], object] = lambda _: None,
        attempts: Attempts | None = None,
    ) -> None:
        """Begin disarmed.

        Args:
            probes: what looks.
            failed: is told why a probe could not look at a call.
            attempts: what the probes know the calls by.

        """
        self.probes, self._failed, self._attempts = tuple(probes), failed, attempts or Attempts()
        self._chosen: list[tuple[Probe, frozenset[int]]] = []
        """Each probe that looks, with its modules, by `id`: a watcher that is kept must not keep a model."""
        self._undo: weakref.finalize[..., Any] | None = None
        self._names: Mapping[int, str] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._ran: dict[str, None] = {}
        self.half = False
        """Whether autocast to float16 was on in what was seen."""
        self.compiled = False
        """Whether torch.compile was in use, so that only what the probes chose is seen."""

    @property
    def armed(self) -> bool:
        """Whether it is looking now."""
        return self._undo is not None

    def arm(self, modules: Mapping[str, nn.Module]) -> bool:
        """Begin to look; False where torch.compile is in use, and only what the probes choose is seen."""
        self.disarm()
        self.compiled = graphs.may_be_of_models()
        self._attempts.clear()
        self._model = weakref.ref(modules[""]) if "" in modules else None
        view = ModelView(modules, {id(module): name for name, module in modules.items()}, self.compiled)
        self._names = {} if self.compiled else view.names
        chosen = [(probe, probe.arm(view)) for probe in self.probes]
        self._chosen = [(probe, frozenset(its)) for probe, its in chosen]
        seen = {key: module for _, its in chosen for key, module in its.items()}
        self._ran = {}
        self.half = False
        before: Callable[..., Any] = (_untraced(_Before) if self.compiled else _Before)(self)
        after: Callable[..., None] = (_untraced(_After) if self.compiled else _After)(self)
        handles: list[RemovableHandle] = []
        if self.compiled:
            for module in seen.values():
                handles += [
                    module.register_forward_pre_hook(before),
                    module.register_forward_hook(after, with_kwargs=True),
                ]
        else:
            handles.append(register_module_forward_pre_hook(before))
            if seen:
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
        for probe in self.probes:
            probe.clear()
        self._chosen, self._names = [], {}

    @property
    def ran(self) -> tuple[str, ...]:
        """Names of the modules that ran, in the order in which they began."""
        return tuple(self._ran)

    def _sees(self) -> bool:
        """Tell whether it may look: once its model is gone, others may have the `id` of its modules."""
        return _alone in (None, self) and (self._model is None or self._model() is not None)

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Note that a module runs, and let the probes see its inputs; what one returns takes their place."""
        if not self._sees():
            return None
        if not self.compiled:
            self._attempts.entered(module)
        key = id(module)
        name = self._names.get(key)
        # A pass without gradients is a validation, unless the module is in training mode: then somebody cut it off.
        if name is not None and name not in self._ran and (torch.is_grad_enabled() or module.training):
            given = [value for value in inputs if isinstance(value, torch.Tensor)]
            if not given or any(map(torch.Tensor.numel, given)):  # else an expert that no row was routed to
                self._ran[name] = None
                self.half = self.half or _autocast_to_half()
        changed = None
        for probe, modules in self._chosen:
            if key in modules:
                try:
                    changed = probe.entered(module, inputs if changed is None else changed) or changed
                except Exception as error:  # noqa: BLE001  (this runs inside of the user's forward pass)
                    self._failed(error)
        return changed

    def left(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Let the probes see what a module gives."""
        if not self._sees():
            return
        if not self.compiled:
            self._attempts.left(module)
        key = id(module)
        for probe, modules in self._chosen:
            if key in modules:
                try:
                    probe.left(module, inputs, kwargs, output)
                except Exception as error:  # noqa: BLE001  (as above)
                    self._failed(error)


def _autocast_to_half() -> bool:
    return any(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
        for device in ("cuda", "cpu")
    )


class _Before:
    """A forward pre-hook that passes on to a trace. A copy of a model that it hangs on carries a harmless builtin."""

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
    """The same after the forward pass; it returns nothing, because torch would take that for the output."""

    def __init__(self, trace: ForwardTrace) -> None:
        self._trace = weakref.ref(trace)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], *kwargs_and_output: Any) -> None:  # noqa: ANN401
        # A hook that ran before this one may have taken it off, as when a watcher is collected there: torch calls it
        # all the same, and without keywords.
        if len(kwargs_and_output) < 2:
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
    """Make hooks that torch.compile calls as they are; else it would compile them, and never call them again."""
    call = torch.compiler.disable(kind.__call__)  # type: ignore[no-untyped-call]  # torch's
    return type(kind.__name__, (kind,), {"__call__": call})


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
        _global_forward_hooks_with_kwargs.pop(handle.id, None)  # torch forgets this one


@contextlib.contextmanager
def listening(modules: Iterable[nn.Module], before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Call `before(module, args, kwargs)` and `after(module, args, kwargs, output)` around the calls of these modules.

    For a pass of our own, without all other hooks (`rerun.without_hooks`): on the modules themselves, because global
    hooks are not shown keywords. What torch.compile has made runs as it was written meanwhile, because compiled code
    calls no hooks.
    """
    with contextlib.ExitStack() as stack:
        if graphs.may_be_of_models():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield
