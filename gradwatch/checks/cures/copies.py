"""Copies of what is trained: a model, its optimizers, its batches, and a loss that is an object."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

L = TypeVar("L")


def copied(model: nn.Module, optimizers: Sequence[Any], loss: L) -> tuple[nn.Module, Sequence[Any], L]:
    """Copy a model, its optimizers, and a loss that is an object; a function stays what it is.

    Raises:
        ValueError: they cannot be copied.

    """
    memo: dict[int, Any] = {}
    try:
        mine, theirs = copy.deepcopy(model, memo), [_copied_optimizer(one, memo) for one in optimizers]
    except Exception as error:
        raise ValueError(f"model must be one that copy.deepcopy can copy, with its optimizer: {error}") from error
    try:
        return mine, theirs, copy.deepcopy(loss, memo)
    except Exception:  # noqa: BLE001  (it holds a file, a logger)
        return mine, theirs, loss


def _copied_optimizer(optimizer: Any, memo: dict[int, Any]) -> Any:  # noqa: ANN401
    """Copy an optimizer with all that it keeps, but for hooks, and for what a scheduler has put upon its `step`.

    `copy.deepcopy` keeps nothing but groups, state and defaults.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return copy.deepcopy(optimizer, memo)
    kept = {
        k: v for k, v in vars(optimizer).items() if k not in ("step", "_zero_grad_profile_name") and "_hooks" not in k
    }
    twin = type(optimizer).__new__(type(optimizer))
    memo[id(optimizer)] = twin
    twin.__setstate__(copy.deepcopy(kept, memo))
    return twin


def own(value: L, *shared: object) -> L:
    """Return a copy of a batch, which a loss may edit, or of a loss; the thing itself where it cannot be copied.

    Args:
        value: what is copied.
        shared: what the copy refers to as the original does.

    """
    try:
        return copy.deepcopy(value, {id(one): one for one in shared})
    except Exception:  # noqa: BLE001  (a tensor with a graph, a file)
        return value


def modules_of(loss: Any, model: nn.Module) -> list[nn.Module]:  # noqa: ANN401
    """Return the modules that a function knows by its closure, but for the model."""
    found = []
    for held in _enclosed(loss):
        if isinstance(held, nn.Module) and held is not model:
            found.append(held)
        elif callable(held):
            found += modules_of(held, model)
    return found


def generators_of(*sources: Any) -> list[torch.Generator]:  # noqa: ANN401
    """Return the random generators that data loaders and their samplers, and functions by their closures, draw from."""
    found: dict[int, torch.Generator] = {}
    for source in sources:
        for held in _held(source):
            if isinstance(held, torch.Generator):
                found[id(held)] = held
    return list(found.values())


def _held(source: Any) -> Iterable[Any]:  # noqa: ANN401
    for name in ("generator", "sampler", "batch_sampler"):
        inner = getattr(source, name, None)
        if isinstance(inner, torch.Generator):
            yield inner
        elif inner is not None and name != "generator":
            yield from _held(inner)
    yield from _enclosed(source)


def _enclosed(function: Any) -> Iterable[Any]:  # noqa: ANN401
    """Yield what a function knows by its closure; nothing of what is no function."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # it is empty
            yield cell.cell_contents
