"""Hooks on an optimizer: tells a listener of each executed step, and takes itself off again."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch


class StepListener(Protocol):
    """What hears of the steps of an optimizer. It must not raise."""

    def on_look(self) -> None:
        """Take note: the gradients of a step are complete, and it has not moved the weights yet."""

    def on_loss(self, loss: object) -> None:
        """Take note: a closure returned this."""

    def on_stepped(self) -> None:
        """Take note: the step is done."""


def unwrap(optimizer: object) -> Any:  # noqa: ANN401  (an optimizer, or what merely acts as one)
    """Return the optimizer inside of wrappers that keep it as `.optimizer` (Accelerate, Lightning, and others)."""
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

    def __init__(self, optimizer: Any, listener: StepListener) -> None:  # noqa: ANN401  (any object with step())
        """Attach."""
        self._listener: StepListener | None = listener
        self._pid = os.getpid()
        self._depth = 0
        self._seen = False
        self._evaluating = False
        if hasattr(optimizer, "register_step_pre_hook") and hasattr(optimizer, "register_step_post_hook"):
            before, after = (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
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

    def _before(
        self,
        optimizer: object,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
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
                    listener.on_loss(loss)
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
            listener.on_stepped()

    def _look(self) -> None:
        self._seen = True
        if (listener := self._live()) is not None:
            listener.on_look()

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
