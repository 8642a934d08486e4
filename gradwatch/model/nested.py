"""Nested values -> the tensors in them, and copies of the same shape."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def floats(value: object) -> list[Tensor]:
    """Return the floating-point tensors in what a module takes or gives."""
    if isinstance(value, PackedSequence):
        value = value.data
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if type(value) is tuple:  # what modules take: at once, because this runs at every call of a probe
        return [t for v in value for t in floats(v)]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [t for v in value for t in floats(v)] if isinstance(value, list | tuple) else []


def differentiable(value: Any) -> Any:  # noqa: ANN401  (whatever a model takes)
    """Copy the tensors in a value; floating-point ones are not leaves, so that they may be edited in place, but have a leaf behind them."""
    return _copied(value, _with_leaf)


def detached(value: Any) -> Any:  # noqa: ANN401
    """Return the same value with tensors that keep no graph."""
    return _copied(value, Tensor.detach)


def _with_leaf(tensor: Tensor) -> Tensor:
    mine = tensor.detach()
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_nested:
        return mine.clone()
    return (mine.clone() if mine.is_inference() else mine).requires_grad_().clone()


def _copied(value: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401  (a line for each kind)
    if isinstance(value, PackedSequence):
        return PackedSequence(change(value.data), value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    if isinstance(value, Tensor):
        return change(value)
    copied: Any
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for key in value:
            copied[key] = _copied(value[key], change)
        return copied
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for each in dataclasses.fields(value):
            object.__setattr__(copied, each.name, _copied(getattr(value, each.name), change))
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(v, change) for v in value))
    return type(value)(_copied(v, change) for v in value) if type(value) in (list, tuple) else value


def tensors_of(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Return the tensors in a value, but for packed ones."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        return
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(item)
