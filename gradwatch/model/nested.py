"""Nested values, as modules take and give them -> the tensors in them, and the same values with other tensors.

One idea of what is nested: mappings (their values; a TensorDict is one), lists and tuples, named ones too, dataclasses
(their fields), and other objects that have tensors as attributes, within each other as deep as one likes. A packed
sequence is one tensor, its data: where its rows and timesteps lie is no value of the model's. Whatever else there is,
is left as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def parts(value: object) -> Iterable[Any]:
    """Return what is directly in a value, in its order; nothing where it is not nested."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    return [part for _, part in entries(value)]


def entries(value: object) -> Iterable[tuple[str, Any]]:
    """Return what is directly in a value, in its order, each with how Python spells the way to it."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", value[key]) for key in value.keys()]  # noqa: SIM118  (a TensorDict iterates over rows)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", part) for name, part in zip(value._fields, value, strict=True)]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        return [(f".{name}", getattr(value, name)) for name in names if hasattr(value, name)]
    return [(f".{name}", part) for name, part in _attributes(value).items()]


def _attributes(value: object) -> Mapping[str, Any]:
    """Return the attributes of an object of the user's own that holds tensors; of all others none."""
    if isinstance(value, nn.Module) or callable(value) or type(value).__module__.startswith("torch."):
        return {}
    held: Mapping[str, Any] = getattr(value, "__dict__", {})
    return held if any(isinstance(part, Tensor) for part in held.values()) else {}


def leaves(value: object, within: Callable[[object], Iterable[Any]] = parts) -> Iterator[Tensor | PackedSequence]:
    """Yield the tensors and packed sequences in a value.

    Args:
        value: to go through.
        within: returns what of a nested value is to be gone through.

    """
    if isinstance(value, Tensor | PackedSequence):
        yield value
        return
    for part in within(value):
        yield from leaves(part, within)


def data_of(leaf: Tensor | PackedSequence) -> Tensor:
    """Return the tensor in which the numbers are."""
    return leaf.data if isinstance(leaf, PackedSequence) else leaf


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in a value, of packed sequences their data."""
    return map(data_of, leaves(value))


def floats(value: object) -> list[Tensor]:
    """Return the floating-point tensors in a value, of packed sequences their data."""
    if isinstance(
        value, Tensor
    ):  # what modules take and give, nearly always: this runs at every call that a probe sees
        return [value] if value.is_floating_point() else []
    if type(value) is tuple:
        return [tensor for part in value for tensor in floats(part)]
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def storage_of(tensor: Tensor) -> int:
    """Return the number of what a tensor's entries lie in; of what has none (a sparse one) the tensor's own."""
    try:
        number: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)
    return number


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401  (whatever a model takes)
    """Return a value with other tensors. What holds one is copied; a type that cannot be made anew is left as it is.

    Args:
        value: it is not written to.
        change: takes a tensor, of a packed sequence its data, and returns what takes its place.

    """
    if isinstance(value, PackedSequence):
        return PackedSequence(change(value.data), value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(mapped(part, change) for part in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)
        for key in list(value.keys()):  # a TensorDict iterates over its rows
            mapping[key] = mapped(value[key], change)
        return mapping
    return _with_attributes(value, change)


def _with_attributes(value: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """Return a copy of a dataclass, or of another object that holds tensors, with other tensors in its attributes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value) if hasattr(value, each.name)]
    else:
        names = list(_attributes(value))
    record = copy.copy(value) if names else value
    for name in names:
        object.__setattr__(record, name, mapped(getattr(value, name), change))
    return record


def differentiable(value: Any) -> Any:  # noqa: ANN401
    """Copy the tensors in a value; a floating-point one comes from a leaf, so that it may be edited in place itself."""
    return mapped(value, _from_a_leaf)


def detached(value: Any) -> Any:  # noqa: ANN401
    """Return the same value with tensors that keep no graph."""
    return mapped(value, Tensor.detach)


def _from_a_leaf(tensor: Tensor) -> Tensor:
    mine = tensor.detach()
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_nested:
        return mine.clone()
    return (mine.clone() if mine.is_inference() else mine).requires_grad_().clone()
