"""Which module calls of a step came to nothing, because an exception ended them or the backward pass after them."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__
_engine: Any = torch.autograd.Variable._execution_engine


@dataclass
class _Open:
    """An outermost call that has not ended."""

    module: int
    """By `id`."""
    depth: int
    """How many calls of modules are on the stack within it, itself included."""
    thread: int


class Attempts:
    """Numbers the outermost module calls of a step, and tells which are void.

    A call that an exception ends calls no hook, and neither does a backward pass. But a call that is still under way is
    on the stack, and a backward pass that comes to its end calls back: what does neither is void as soon as something
    else begins. What probes see of a call they keep under its number, and leave it out once it is void.
    """

    def __init__(self) -> None:
        """Begin with no call."""
        self.now = 0
        """Number of the last outermost call that began."""
        self.void: set[int] = set()
        """Numbers of those that came to nothing."""
        self.broken: set[int] = set()
        """Backward passes that did, by their number."""
        self._first = 1
        """Number of the first call since the last backward pass that came to its end."""
        self._open: _Open | None = None
        self._running: set[int] = set()
        self._called: dict[int, weakref.ref[nn.Module]] = {}

    def entered(self, module: nn.Module) -> None:
        """Take note of a call that begins."""
        self._called[id(module)] = weakref.ref(module)
        elsewhere = self._open is not None and self._open.thread != threading.get_ident()
        if elsewhere or torch._C._current_graph_task_id() != -1:  # a checkpoint computes once more
            return
        depth = _calls_on_the_stack()
        if self._open is not None and depth > self._open.depth:
            return
        self.settle(depth - 1)
        self.now += 1
        self._open = _Open(id(module), depth, threading.get_ident())

    def left(self, module: nn.Module) -> None:
        """Take note of a call that ends."""
        if self._open is not None and self._open.module == id(module):
            self._open = None

    def called(self) -> Iterator[nn.Module]:
        """Yield the modules that were called in this step, of the model or not."""
        for ref in self._called.values():
            if (module := ref()) is not None:
                yield module

    @property
    def running(self) -> bool:
        """Whether an outermost call is under way."""
        return self._open is not None

    def backward(self) -> int:
        """Return the number of the backward pass that runs now, whose end is waited for."""
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self._running:
            _engine.queue_callback(functools.partial(self._ended, task))
            self._running.add(task)
        return task

    def _ended(self, task: int) -> None:
        self._running.discard(task)
        if not self._running:
            self._first = self.now + 1

    def settle(self, depth: int | None = None) -> None:
        """Find out what came to nothing until now; within a backward pass, where nobody can tell, nothing did.

        `depth` is how many calls of modules are on the stack; None: look.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        if self._open is not None and (_calls_on_the_stack() if depth is None else depth) < self._open.depth:
            self.void.add(self.now)
            self._open = None
        if self._running:
            self.void.update(range(self._first, self.now + 1))
            self.broken |= self._running
            self._running.clear()
            self._first = self.now + 1

    def clear(self) -> None:
        """Forget what was, before a step that is looked at."""
        self.void.clear()
        self.broken.clear()
        self._running.clear()
        self._called.clear()
        self._open, self._first = None, self.now + 1


def callers() -> Iterator[FrameType]:
    """Yield the frames of the functions that have led to this call, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _calls_on_the_stack() -> int:
    return sum(frame.f_code is _CALL for frame in callers())
