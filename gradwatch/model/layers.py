"""Modules and parameters -> names, kinds, roles and order, as a `ModelInfo`."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gradwatch.model.optimizers import optimizer_info, replaced
from gradwatch.values.snapshot import LayerInfo, ModelInfo, ParameterInfo, Role

_WRAPPERS = frozenset({"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OUTERMOST = ("module", "_module")  # of DistributedDataParallel and its like; of Opacus
_NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
    nn.LocalResponseNorm,
)
_LIBRARIES = frozenset({"torch", "lightning", "pytorch_lightning"})  # also where they run from their sources
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
_OF_RECURRENT = re.compile(r"_l(\d+)")  # torch's own way of naming: weight_ih_l0, weight_ih_l0_reverse
_OF_CONTAINER = re.compile(r"(.+)[./][^./]*")


def clean(name: str) -> str:
    """Remove what wrappers (torch.compile, Fabric, FSDP, checkpointing) put into the name of a module or parameter."""
    steps = name.split(".")
    return name if _WRAPPERS.isdisjoint(steps) else ".".join(step for step in steps if step not in _WRAPPERS)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module under its clean name, the model itself as ""; one that stands twice has its first name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found[clean(name)] = module  # a wrapper comes before what it wraps, and shares its name
    for wrapper in _OUTERMOST * 2:  # one within the other, perhaps
        below = [name for name in found if name]
        if below and all(name == wrapper or name.startswith(f"{wrapper}.") for name in below):
            found = {name.removeprefix(wrapper).removeprefix("."): module for name, module in found.items()}
    return found


def flattened(model: nn.Module) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return shape and ranks, by `id`, of the parameters of which this process has a piece that looks whole.

    That is what `FullyShardedDataParallel` leaves outside of a pass. There are no ranks where the wrapper is outside of
    the model, and does not tell.
    """
    wrapper: Any = getattr(
        sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None
    )  # imported by whoever uses it
    found: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
        id(p): (tuple(p.shape), ()) for p in model.parameters() if getattr(p, "_fsdp_flattened", False)
    }
    for module in model.modules() if wrapper is not None else ():
        handle = module._handle if isinstance(module, wrapper) else None
        if handle is None:
            continue
        ranks, flat = tuple(torch.distributed.get_process_group_ranks(handle.process_group)), handle.flat_param
        shapes = {id(flat): flat._unpadded_unsharded_size} | dict(
            zip(map(id, flat._params or ()), flat._shapes, strict=False)
        )
        for key, shape in shapes.items():
            if handle.uses_sharded_strategy:
                found[key] = (tuple(shape), ranks)
            else:
                found.pop(key, None)
    return found


def describe(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    order: Mapping[str, int],
    shapes: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[ModelInfo, dict[int, int]]:
    """Describe the model as it is now.

    Args:
        model: the watched model.
        optimizers: those that step its parameters; what they step outside of the model is left out.
        order: position of each layer that was seen to run, by name.
        shapes: of parameters of which only a piece is here, by `id`.

    Returns:
        The description, and the column of each parameter by its `id`, good as long as nobody replaces parameters.

    """
    stepped = {
        id(p): index
        for index, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    modules, every = named_modules(model), {id(p): p for p in model.parameters()}
    late = set().union(*(replaced(optimizer, every) for optimizer in optimizers))
    alike: dict[tuple[int, ...], tuple[int, ...]] = {}  # of many layers most have one of few shapes
    layers: list[LayerInfo] = []
    parameters: list[ParameterInfo] = []
    columns: dict[int, int] = {}
    for layer, module in modules.items():
        own = [(name, p) for name, p in module._parameters.items() if p is not None and id(p) not in columns]
        if not own:
            continue
        steps = {name: _step_of(module, name) for name, _ in own}
        several = len(set(steps.values())) > 1
        within = layer if several else None
        of = {name: ".".join(filter(None, (layer, step if several else ""))) for name, step in steps.items()}
        kind: Any = type(module)
        location, names = _location(modules, layer), dict.fromkeys(of.values())
        layers.extend(LayerInfo(name, kind.__name__, order.get(name), location, within) for name in names)
        for name, parameter in own:
            if id(parameter) in columns:
                continue
            columns[id(parameter)] = len(parameters)
            shape = shapes.get(id(parameter), () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape))
            parameters.append(
                ParameterInfo(
                    name=f"{layer}.{name}" if layer else name,
                    layer=of[name],
                    shape=alike.setdefault(shape, shape),
                    dtype=_format(parameter.dtype),
                    optimizer=stepped.get(id(parameter)),
                    role=_role(kind, name, len(shape)),
                    trainable=parameter.requires_grad,
                    replaced=id(parameter) in late,
                )
            )
    return ModelInfo(tuple(layers), tuple(parameters), tuple(map(optimizer_info, optimizers))), columns


@functools.cache
def _format(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step_of(module: nn.Module, name: str) -> str:
    """Return which step of depth inside of its module a parameter belongs to.

    That is the layer of a recurrent module, or the entry of a container, by its name up to the last dot or slash: other
    libraries keep the parameters of all their layers in one container. "" where the module is one step.
    """
    if hasattr(module, "_all_weights"):  # torch's list of names by layer, which every recurrent module of its own has
        layer = _OF_RECURRENT.search(name)
        return f"l{layer[1]}" if layer is not None else ""
    entry = _OF_CONTAINER.fullmatch(name)
    return entry[1] if entry is not None else name if isinstance(module, _CONTAINERS) else ""


@functools.lru_cache(maxsize=4096)
def _role(kind: type[Any], name: str, dimensions: int) -> Role:
    name = re.split("[./]", name)[-1]
    if name.startswith("bias") or name.endswith("_bias"):  # torch's own way of naming, for RNNs and attention too
        return "bias"
    if issubclass(kind, _NORMALIZATIONS):
        return "normalization"
    if issubclass(kind, _EMBEDDINGS):
        return "embedding"
    return "weight" if dimensions > 1 else "gain"


def _location(modules: Mapping[str, nn.Module], layer: str) -> str | None:
    """Return file and line of the nearest class around a layer that is no library's: of its first method of its own."""
    kinds: Iterator[Any] = (type(modules[name]) for name in ancestry(layer) if name in modules)
    return next((place for kind in kinds if (place := _written_at(kind)) is not None), None)


@functools.lru_cache(maxsize=1024)
def _written_at(kind: type[Any]) -> str | None:
    """Return file and line of a class; None of a library's, or where it has no method of its own."""
    if kind.__module__.partition(".")[0] in _LIBRARIES:
        return None
    methods = (
        inspect.unwrap(m) for m in (vars(kind).get("forward"), vars(kind).get("__init__")) if m is not None
    )  # under its decorators
    code = next((m.__code__ for m in methods if inspect.isfunction(m)), None)
    if code is None or not _INSTALLED.isdisjoint(Path(code.co_filename).parts):
        return None
    return f"{code.co_filename}:{code.co_firstlineno}"


def ancestry(name: str) -> Iterable[str]:
    """Return a module's name, and those of the modules that it is in, up to the model's own, which is ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
