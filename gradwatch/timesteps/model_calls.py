"""Calls of a model that can be made again after the step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradwatch.model.attempts import Attempts
from gradwatch.model.gradient_hooks import transformed
from gradwatch.model.nested import detached


@dataclass
class RepeatableCall:
    """A call of a module that can be made again. It keeps neither the module nor a graph."""

    module: Callable[[], nn.Module | None]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    casts: Sequence[tuple[str, torch.dtype]]
    """By device, to what autocast casts; only where it does."""
    told: bool = False
    """Whether its horizon was asked for, for one of several optimizers."""

    def autocast(self) -> contextlib.ExitStack:
        """Compute in the formats in which the call did."""
        stack = contextlib.ExitStack()
        for device, dtype in self.casts:
            # Without its cache, in which weights would outlive the coming step.
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        return stack


class ModelCalls:
    """Keeps calls that can be made again: of chosen modules, and the outermost that held the first sequence module.

    Where no sequence module ran, the first outermost call.
    """

    def __init__(self, attempts: Attempts) -> None:
        """Begin with none; `attempts` knows which calls an exception ended."""
        self._attempts, self._attempt = attempts, 0
        self.calls: dict[str, RepeatableCall] = {}
        """By name of the chosen module; "" for the outermost call."""
        self._without: RepeatableCall | None = None
        """The first outermost call in which no sequence module ran."""
        self._wanted: Mapping[int, str] = {}
        self._targets: frozenset[int] = frozenset()
        self._outer: Callable[[], nn.Module | None] = lambda: None
        self._outermost: set[int] = set()
        """Modules with parameters that were called outermost, by `id`."""
        self._held = False

    def arm(self, wanted: Mapping[int, str], targets: frozenset[int]) -> None:
        """Look for modules `wanted`, and for a call that holds one of `targets`, by `id`; without any, for all."""
        self.clear()
        self._wanted, self._targets = wanted, targets

    def entered(self, module: nn.Module) -> None:
        """Note that a call begins."""
        if torch._C._current_graph_task_id() != -1 or transformed():
            return
        if torch.is_grad_enabled() and (self._outer() is None or self._attempt in self._attempts.void):
            self._attempt = self._attempts.now
            self._outer, self._held = weakref.ref(module), not self._targets
        # Also without gradients, as reentrant checkpoints run it.
        self._held = self._held or id(module) in self._targets

    def left(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the arguments of a call that is wanted."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1 or transformed():
            return
        if id(module) in self._wanted:
            self.calls[self._wanted[id(module)]] = _repeatable(module, args, kwargs)
        if self._outer() is module:
            self._outer = lambda: None
            if next(module.parameters(), None) is not None:
                self._outermost.add(id(module))
            if self._held:
                self.calls[""] = _repeatable(module, args, kwargs)
            elif self._without is None:
                self._without = _repeatable(module, args, kwargs)

    def of(self, name: str) -> RepeatableCall | None:
        """Return the call of a chosen module; of "" the outermost that held a sequence module, or else the first."""
        return self.calls.get(name, self._without if not name else None)

    @property
    def in_pieces(self) -> bool:
        """Whether the loop calls parts of the model one after the other, and never the model."""
        return len(self._outermost) > 1

    def forget(self) -> None:
        """Let go of the calls, and look on."""
        self.calls, self._without, self._outermost = {}, None, set()
        self._outer = lambda: None

    def clear(self) -> None:
        """Let go of everything, and look no more."""
        self.forget()
        self._wanted, self._targets = {}, frozenset()


def _repeatable(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RepeatableCall:
    casts = [
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    ]
    return RepeatableCall(weakref.ref(module), detached(args), detached(dict(kwargs)), casts)
