"""Hooks on an optimizer: tells a listener of each executed step, and takes itself off again."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from gradwatch.model.attempts import callers
from gradwatch.model.compiled import graphs
from gradwatch.model.optimizers import Sweep, all_of, nested, parameters_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class StepListener(Protocol):
    """What hears of the steps of an optimizer, in forked children too. It must not raise."""

    def on_begin(self, *, early: bool) -> None:
        """Take note: a step has been called; `early`: it may do whatever it likes before its gradients are looked at.

        Of one that may not, this is told where the step before it may have been.
        """

    def on_look(self, part: Sequence[Tensor] | None = None) -> None:
        """Take note: the gradients of a step are complete, and those weights have not moved; of a `part`, or of all."""

    def on_more(self, part: Sequence[Tensor]) -> None:
        """Take note: those of a further part of the same step are complete, and these weights have not moved."""

    def on_loss(self, loss: object) -> None:
        """Take note: a closure returned this."""

    def on_stepped(self) -> None:
        """Take note: the step is done."""


class StepHooks:
    """Tells a listener once of each executed step of an optimizer, whatever its closures, subclasses and wrappers do.

    A step begins and ends with the outermost of what is nested, and its gradients are those that the innermost takes.
    One that is made in parts (a call for each parameter, or an optimizer for each, perhaps within backward) is a sweep:
    it ends when all have stepped that do, or when one steps again, or in another backward pass.

    The optimizer holds its hooks, and they the listener: a watcher that nobody keeps lives as long as its optimizer.
    """

    def __init__(self, optimizer: Any, listener: StepListener) -> None:  # noqa: ANN401  (any with step(), or a sweep)
        """Attach."""
        self._listener: StepListener | None = listener
        self._begun = self._seen = self._told = False
        """Of the step that is under way: whether the listener knows of it, of its gradients, of its loss."""
        self._early = False
        """Whether anything might come before the gradients of the last step that began were looked at."""
        self._outer: object = None
        self._outside = False
        """Whether what wraps the optimizer has been called, and has not returned."""
        self._stepped = False
        """Whether the optimizer has stepped since."""
        self._evaluating = False
        self._sweep = _Parts(optimizer)
        if isinstance(optimizer, Sweep):
            self._calls = [_Calls(member, self._before, self._after) for member in optimizer.members]
        else:
            outer, inner = (every := nested(optimizer))[0], every[-1]
            self._calls = [_Calls(inner, self._before, self._after)]
            if outer is not inner:
                self._outer = outer
                self._calls.append(_Calls(outer, self._entered, self._left, inside=inner))

    def join(self, optimizer: object) -> None:
        """Attach to one more optimizer of the sweep that this is."""
        self._calls.append(_Calls(all_of(optimizer)[-1], self._before, self._after))
        self._sweep.forget()

    def detach(self) -> None:
        """Take the hooks off; a step that is under way is not told of any more."""
        self._listener = None
        for calls in self._calls:
            calls.detach()

    def end(self) -> None:
        """End a sweep that is under way: what has stepped in it is what does."""
        if self._sweep.stepped:
            self._sweep.learn()
            self._done()

    @property
    def looked(self) -> bool:
        """Whether a closure is being evaluated for a step whose gradients have been looked at already."""
        return self._evaluating and self._seen

    # --- what wraps the optimizer ---

    def _entered(self, _outer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self._stepped:  # what wraps it has raised, after it had stepped
            self._done()
        self._outside = True
        self._begin(early=True)
        return _with_closure(args, kwargs, lambda closure: self._heard(closure, look=False))

    def _left(self) -> None:
        self._outside = self._begun = False
        if self._stepped:
            self._done()

    # --- the optimizer ---

    def _before(self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        usual = len(args) == 1 and not kwargs  # nearly always
        if (self._sweep.several or not usual) and (part := self._sweep.part(optimizer, kwargs)) is not None:
            self._before_part(part)
            return None
        if self._stepped:  # a second step in one call of what wraps it, or that has raised
            self._done()
        if self._outside and not _runs(self._outer):
            self._outside = False
        changed = None if usual else _with_closure(args, kwargs, lambda closure: self._heard(closure, look=True))
        if not (self._outside and self._begun):
            self._begin(early=changed is not None)
        if changed is None:
            self._look()
        return changed

    def _after(self) -> None:
        if self._sweep.stepped:
            if self._sweep.complete:
                self._done()
            return
        if not self._begun:  # a part that came late
            return
        if not self._seen:  # a closure that the optimizer never called
            self._look()
        if self._outside:
            self._stepped = True
        else:
            self._done()

    def _before_part(self, part: Sequence[Tensor]) -> None:
        task: int = torch._C._current_graph_task_id()
        if self._sweep.stepped and self._sweep.ends_before(part, task):
            self._sweep.learn()
            self._done()
        if self._sweep.late(task):
            self._sweep.learn(part)
            return
        first = not self._sweep.stepped
        self._sweep.add(part, task)
        if first:
            self._begin(early=True)
            self._seen = True
        if self._listener is not None:
            (self._listener.on_look if first else self._listener.on_more)(part)

    # --- both ---

    def _heard(self, closure: Callable[..., object], *, look: bool) -> Callable[..., object]:
        """Return a closure whose first evaluation is heard and, to `look`, seen: at the weights it begins with."""

        def heard(*args: object, **kwargs: object) -> object:
            self._evaluating = True
            try:
                loss = closure(*args, **kwargs)
            finally:
                self._evaluating = False
            if not self._told and self._listener is not None:
                self._told = True
                self._listener.on_loss(loss)
            if look and not self._seen:
                self._look()
            return loss

        return heard

    def _begin(self, *, early: bool) -> None:
        self._begun, self._seen, self._told = True, False, False
        if (early or self._early) and self._listener is not None:
            self._listener.on_begin(early=early)
        self._early = early

    def _look(self) -> None:
        self._seen = True
        if self._listener is not None:
            self._listener.on_look()

    def _done(self) -> None:
        self._begun = self._stepped = False
        if self._sweep.stepped:
            self._sweep.end()
        if self._listener is not None:
            self._listener.on_stepped()


class _Parts:
    """The parts of a sweep: parameters, by `id`, that step one after the other and belong to one step."""

    def __init__(self, optimizer: Any) -> None:  # noqa: ANN401
        self.several = isinstance(optimizer, Sweep)
        self._grows = isinstance(optimizer, Sweep) and optimizer.grows
        self._expected: frozenset[int] | None = None
        """What steps in a sweep; None: all that is trained."""
        self._trained = frozenset[int]()
        self._all = optimizer
        self.stepped: set[int] = set()
        """Of the one that is under way."""
        self._task = -1
        """The backward pass that it is made in; -1: outside of any."""

    @property
    def complete(self) -> bool:
        if self._expected is None and self._grows:
            return False
        return (self._trained if self._expected is None else self._expected) <= self.stepped

    def part(self, optimizer: Any, kwargs: dict[str, Any]) -> list[Tensor] | None:  # noqa: ANN401
        """Return what a call steps of all; None where it is no part."""
        if self.several:
            return parameters_of(optimizer)
        only = kwargs.get("param")
        return [only] if isinstance(only, Tensor) else None

    def ends_before(self, part: Sequence[Tensor], task: int) -> bool:
        return task != self._task or not self.stepped.isdisjoint(map(id, part))

    def late(self, task: int) -> bool:
        """Tell whether the sweep that such a part belongs to has ended already."""
        return not self.stepped and task != -1 and task == self._task

    def add(self, part: Sequence[Tensor], task: int) -> None:
        if not self.stepped and not self._grows:
            trained = frozenset(id(p) for p in parameters_of(self._all) if p.requires_grad)
            if trained != self._trained:  # some were frozen, or are no more
                self._trained, self._expected = trained, None
        self._task = task
        self.stepped.update(map(id, part))

    def learn(self, more: Sequence[Tensor] = ()) -> None:
        """Expect what has stepped, or more than was expected."""
        known = self.stepped or self._expected or frozenset()
        self._expected = frozenset(known) | frozenset(map(id, more))

    def end(self) -> None:
        self.stepped.clear()

    def forget(self) -> None:
        """Expect nothing any more: another takes part."""
        self._expected = None


class _Calls:
    """The outermost calls of an optimizer's `step`, by hooks where it has them."""

    def __init__(
        self,
        optimizer: Any,  # noqa: ANN401  (any object with step())
        before: Callable[[object, tuple[Any, ...], dict[str, Any]], Arguments | None],
        after: Callable[[], None],
        inside: object = None,
    ) -> None:
        """Attach; what is `inside` of it may share its hooks, which are then not its own."""
        self._begun, self._ended = before, after
        self._depth = 0
        untraced: Any = torch.compiler.disable  # for a step that is compiled
        if _has_hooks(optimizer, inside):
            handles = (
                optimizer.register_step_pre_hook(untraced(self._before)),
                optimizer.register_step_post_hook(untraced(self._after)),
            )
            self._detach: Callable[[], object] = lambda: [handle.remove() for handle in handles]
        else:
            self._detach = _wrap_step(optimizer, self._before, self._after)

    def detach(self) -> None:
        self._detach()

    def _before(self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        # super().step() of a subclass fires the hooks again; a step that raised never came back to count down.
        self._depth = self._depth + 1 if self._depth and _nested(optimizer) else 1
        if self._depth > 1:
            return None
        changed = self._begun(optimizer, args, kwargs)
        if changed is None:  # what a closure compiles is the model's
            graphs.step_begins()
        return changed

    def _after(self, optimizer: object, _args: object, _kwargs: object) -> None:
        if self._depth == 0:  # it began before we came
            return
        if self._depth > 1 and _nested(optimizer):
            self._depth -= 1
            return
        self._depth = 0
        graphs.step_ends()
        self._ended()


def _with_closure(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    change: Callable[[Callable[..., object]], Callable[..., object]],
) -> Arguments | None:
    """Return the arguments of a step with its closure changed; None where there is none."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None
    changed = change(closure)
    return ((args[0], changed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": changed})


def _has_hooks(optimizer: object, inside: object) -> bool:
    """Tell whether an optimizer calls hooks of its own: one that never called torch's `__init__` does not."""
    own = getattr(optimizer, "__dict__", {}).get("_optimizer_step_pre_hooks")
    shared = getattr(inside, "__dict__", {}).get("_optimizer_step_pre_hooks")
    return own is not None and own is not shared and getattr(getattr(type(optimizer), "step", None), "hooked", False)


def _runs(outer: object) -> bool:
    """Tell whether a method of this object has led here."""
    return any(frame.f_locals.get("self") is outer for frame in callers())


def _nested(optimizer: object) -> bool:
    """Tell, from a hook, whether the `step` that calls it was called by another `step` of the same optimizer.

    Only the stack knows: which classes of an optimizer call hooks depends on the order in which they were instantiated.
    """
    frame: FrameType | None = sys._getframe(2)
    caller = None
    while frame is not None:
        if frame.f_locals.get("self") is optimizer and (caller is None or frame.f_code is caller):
            if caller is not None:
                return True
            caller = frame.f_code
        frame = frame.f_back
    return False


def _wrap_step(
    optimizer: Any,  # noqa: ANN401  (any object with step())
    before: Callable[..., Any],
    after: Callable[..., None],
) -> Callable[[], None]:
    """Do by hand, for what has no step hooks, what torch's own `profile_hook_step` does; return what undoes it."""
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

    step.__dict__.update(getattr(original, "__dict__", {}))  # where a scheduler sees that the step is its own still
    bound = step.__get__(optimizer)  # a bound method, because schedulers read `step.__func__`
    optimizer.step = bound

    def undo() -> None:
        if (
            vars(optimizer).get("step") is not bound
        ):  # somebody wrapped it after us: theirs stays, and ours only passes on
            return
        if own:
            optimizer.step = original
        else:
            del optimizer.step

    return undo
