"""What a module is called with: its tensors, each by the name of its argument."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.nested import entries


def labelled(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor | PackedSequence]]:
    """Yield the tensors and packed sequences that a module is called with, each by the way to it.

    "x", "batch['series'][0]", "batch.past_target": an argument as its `forward` names it, and how to get from there to
    the tensor, as Python spells it.

    Args:
        module: what is called.
        args: its positional arguments.
        kwargs: its keyword arguments.

    """
    for name, value in zip(positional_names(module, len(args)), args, strict=False):
        yield from _labelled(name, value)
    for name, value in kwargs.items():
        yield from _labelled(name, value)


def positional_names(module: nn.Module, count: int) -> list[str]:
    """Return how the `forward` of a module calls its positional arguments: all it declares, and at least `count`."""
    own = getattr(module.forward, "__func__", None)
    # What an instance has in its place may hold the model, which nobody keeps.
    names, rest = _of_class(own) if own is not None and own is type(module).forward else _positional(module.forward)
    return [*names, *(f"{rest}[{i}]" for i in range(count - len(names)))]


@functools.lru_cache(maxsize=256)
def _of_class(method: Callable[..., Any]) -> tuple[Sequence[str], str]:
    """Return the same as `_positional` does of what a method is on an instance of its class."""
    return _positional(types.MethodType(method, object()))


def _positional(function: Callable[..., Any]) -> tuple[Sequence[str], str]:
    """Return how a function calls its positional arguments, and the rest of them."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # it is not written in Python
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names, next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")


def _labelled(name: str, value: object) -> Iterator[tuple[str, Tensor | PackedSequence]]:
    if isinstance(value, Tensor | PackedSequence):
        yield name, value
        return
    for way, part in entries(value):
        yield from _labelled(f"{name}{way}", part)


def takes(module: nn.Module, *args: object, **kwargs: object) -> bool:
    """Tell whether a module can be called with these arguments, as far as its `forward` declares them."""
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it is not written in Python
        return True
    return True


def is_called(label: str, name: str | tuple[str | int, ...]) -> bool:
    """Tell whether somebody means a tensor by this name.

    Args:
        label: the way to it, as `labelled` has it.
        name: all of that, or its last step, or its steps: "encoder_cont", ("x", "encoder_cont").

    """
    if isinstance(name, str):
        return label == name or label.endswith((f".{name}", f"[{name!r}]"))
    ways = [str(name[0])] if name else []
    for step in name[1:]:
        ways = [way + form for way in ways for form in ({f"[{step!r}]", f".{step}"})]
    return label in ways
