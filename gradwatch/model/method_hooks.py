"""Hooks on a method of one object: tells listeners of each call before it is made, and takes itself off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

Listener = Callable[..., object]
"""Takes the arguments of the call. It must not raise."""


def before_call(home: Any, name: str, listener: Listener) -> Callable[[], None]:  # noqa: ANN401  (any object)
    """Have a listener called before a method of this one object; return what undoes it.

    The last one that goes leaves the object as it was, unless somebody has wrapped the method since: theirs stays, and
    ours only passes on.
    """
    method = getattr(home, name)
    hooked = method if isinstance(method, _Hooked) else _Hooked(method)
    if hooked is not method:
        setattr(home, name, hooked)
    token = object()
    hooked.listeners[token] = listener
    object_there, hooked_there = weakref.ref(home), weakref.ref(hooked)  # what can undo it keeps neither alive

    def undo() -> None:
        home, hooked = object_there(), hooked_there()
        if hooked is None:
            return
        del hooked.listeners[token]
        if home is None or hooked.listeners or vars(home).get(name) is not hooked:
            return
        delattr(home, name)
        if getattr(home, name) != hooked.method:  # it was not of the class
            setattr(home, name, hooked.method)

    return undo


class _Hooked:
    """Stands for a method."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.listeners: dict[object, Listener] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        for listener in tuple(self.listeners.values()):
            listener(*args, **kwargs)
        return self.method(*args, **kwargs)
