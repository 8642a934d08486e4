"""How far back and ahead a network sees, by torch.autograd.grad alone: what gradwatch is held against, and not in here.

In float64, where the network can be cast, with eight random cotangents for each row; for each floating-point input that
it was called with, dimension 1 is time, as all of these libraries have it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

DIRECTIONS = 8
SHARE = 1e-3


def horizons(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Return the horizon by each input of two or more dimensions, 0 of one on which the output does not depend.

    The output is the first tensor that the network gives. Where it has as many timesteps as the longest input, or the
    words, only the newest counts. Of whole numbers that is asked of what the network's own embedding of words gives.
    """
    try:
        return _horizons(model.double(), args, kwargs, torch.float64)
    except RuntimeError:  # kernels that know float32 alone
        return _horizons(model.float(), args, kwargs, torch.float32)
    finally:
        model.float()


def looks_ahead(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool | None:
    """Tell whether the output at some timestep has a derivative by a later one of an input as long; None: it has none.

    In float64, at eight timesteps, with a random cotangent; rounding is what is below 1e-9 of the largest derivative.
    """
    try:
        return _looks_ahead(model.double(), args, kwargs)
    finally:
        model.float()


def _looks_ahead(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool | None:
    output, leaves = _run(model, args, kwargs, torch.float64)
    steps = output.shape[1] if output.dim() > 2 else 0
    same = {name: leaf for name, leaf in leaves.items() if leaf.shape[1] == steps}
    if not same:
        return None
    draw = torch.Generator().manual_seed(1)
    ahead = False
    for t in range(0, steps - 1, max((steps - 1) // 8, 1)):
        direction = torch.zeros_like(output)
        direction[:, t] = torch.randn(output[:, t].shape, generator=draw, dtype=torch.float64)
        found = torch.autograd.grad(output, list(same.values()), direction, retain_graph=True, allow_unused=True)
        for gradient in found:
            if gradient is not None:
                sizes = gradient.abs().movedim(1, 0).flatten(1).amax(1)
                ahead |= bool((sizes[t + 1 :] > 1e-9 * sizes.max()).any())
    return ahead


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run it, and return what it gives and what to differentiate by."""
    leaves: dict[str, Tensor] = {}
    names = list(inspect.signature(model.forward).parameters)
    mine = [_leaf(names[i], value, leaves, dtype) for i, value in enumerate(args)]
    keywords = {name: _leaf(name, value, leaves, dtype) for name, value in kwargs.items()}
    ids = kwargs.get("input_ids", next((a for a in args if isinstance(a, Tensor) and not a.is_floating_point()), None))
    handle = None if ids is None else _words(model, leaves, ids)
    state = torch.get_rng_state()
    output = first_output(model(*mine, **keywords))
    torch.set_rng_state(state)
    if handle is not None:
        handle.remove()
    return output, leaves


def _horizons(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, int]:
    output, leaves = _run(model, args, kwargs, dtype)
    longest = max(leaf.shape[1] for leaf in leaves.values())
    newest = output[:, -1] if output.dim() > 2 and output.shape[1] == longest else output
    draw = torch.Generator().manual_seed(1)
    squares = {name: torch.zeros(leaf.shape[1], dtype=torch.float64) for name, leaf in leaves.items()}
    single = newest.numel() == len(newest)  # of one number a row there is one direction
    for _ in range(1 if single else DIRECTIONS):
        direction = torch.randn(newest.shape, generator=draw, dtype=torch.float64).to(newest.dtype)
        if single:
            direction = torch.ones_like(newest)
        found = torch.autograd.grad(newest, list(leaves.values()), direction, retain_graph=True, allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                squares[name] += gradient.double().movedim(1, 0).flatten(1).square().sum(1)
    return {name: _horizon(square.sqrt().flip(0)) for name, square in squares.items()}


def _horizon(gain: Tensor) -> int:
    above = (gain >= SHARE * gain.max()).nonzero()
    return int(above.max()) + 1 if gain.any() else 0


def _leaf(name: str, value: Any, leaves: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Copy a value, with leaves to differentiate by in place of its floating-point tensors."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value.clone()
        leaf = value.detach().to(dtype).clone().requires_grad_()
        if leaf.dim() > 1:
            leaves[name] = leaf
        return leaf.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_leaf(f"{name}.{n}", p, leaves, dtype) for n, p in zip(value._fields, value, strict=True)))
    if isinstance(value, list | tuple):
        return type(value)(_leaf(f"{name}[{i}]", part, leaves, dtype) for i, part in enumerate(value))
    made = copy.copy(value)
    if isinstance(value, dict):
        made.update({key: _leaf(f"{name}[{key!r}]", part, leaves, dtype) for key, part in value.items()})
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            if hasattr(value, each.name):
                part = _leaf(f"{name}.{each.name}", getattr(value, each.name), leaves, dtype)
                object.__setattr__(made, each.name, part)
    return made


def _words(model: Any, leaves: dict[str, Tensor], ids: Tensor) -> Any:
    """Take what the first call of the embedding of words gives as a leaf."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if "input_ids" in leaves:
            return None
        turned = inputs[0].shape != ids.shape  # time comes first
        leaves["input_ids"] = (output.transpose(0, 1) if turned else output).detach().clone().requires_grad_()
        leaf = leaves["input_ids"].clone()
        return leaf.transpose(0, 1) if turned else leaf

    return model.get_input_embeddings().register_forward_hook(hook)


def first_output(value: Any) -> Tensor:
    """Return the first tensor with a gradient and a dimension, of a distribution its mean."""
    if isinstance(value, torch.distributions.Distribution):
        return value.mean
    found = list(_tensors(value))
    if not found:
        raise ValueError(f"no output with a gradient in {type(value).__name__}")
    return found[0]


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.requires_grad and value.dim():
            yield value
        return
    names = [each.name for each in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    parts = (
        list(value.values())
        if isinstance(value, Mapping)
        else value
        if isinstance(value, list | tuple)
        else [getattr(value, name, None) for name in names]
    )
    for part in parts:
        yield from _tensors(part)
