"""The model behind an optimizer, found among all objects of the process."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def model_of(parameters: Sequence[Tensor], optimizer: object) -> nn.Module:
    """Return the outermost module that holds all these parameters; one made for them, where there is none.

    That one names its parts as the program does, where it does, and lives as long as the optimizer.
    """
    wanted = set(map(id, parameters))
    modules = _modules(wanted)
    above: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            if child is not None:
                above.setdefault(id(child), []).append(module)
    owners = [m for m in modules if any(id(p) in wanted for p in m._parameters.values())]
    lines = [_ancestors(owner, above) for owner in owners]
    held = {id(p) for owner in owners for p in owner._parameters.values()}
    loose = [p for p in parameters if id(p) not in held]
    common = set.intersection(*(set(line) for line in lines)) if lines and not loose else set()
    if common:
        known = {key: module for line in lines for key, module in line.items()}
        return _outermost([known[key] for key in common], above)
    return _holder(_tops(lines, above), loose, optimizer)


def held_by_modules(parameters: Sequence[Tensor]) -> bool:
    """Tell whether any of these is a parameter of a module."""
    wanted = set(map(id, parameters))
    return any(id(p) in wanted for module in _modules(wanted) for p in module._parameters.values())


def _modules(wanted: AbstractSet[int]) -> list[nn.Module]:
    """Return all modules of the process, also frozen ones (`gc.freeze`) where a parameter would be in none else."""
    found = _unfrozen_modules()
    if gc.get_freeze_count() and not {id(p) for m in found for p in m._parameters.values()}.issuperset(wanted):
        gc.unfreeze()
        found = _unfrozen_modules()
        gc.collect()  # what is garbage must not be kept for good
        gc.freeze()
    return found


def _unfrozen_modules() -> list[nn.Module]:
    from torch import nn

    # The class is asked, not the object: proxies and lazy modules answer for others, or warn.
    return [o for o in gc.get_objects() if issubclass(type(o), nn.Module) and "_parameters" in vars(o)]


def _ancestors(module: nn.Module, above: dict[int, list[nn.Module]]) -> dict[int, nn.Module]:
    found, todo = {id(module): module}, [module]
    while todo:
        for parent in above.get(id(todo.pop()), ()):
            if id(parent) not in found:
                found[id(parent)] = parent
                todo.append(parent)
    return found


def _outermost(candidates: Sequence[nn.Module], above: dict[int, list[nn.Module]]) -> nn.Module:
    """Return the one that is in none of the others; of several the smallest."""
    ids = set(map(id, candidates))
    tops = [m for m in candidates if not any(id(parent) in ids for parent in above.get(id(m), ()))]
    return min(tops or candidates, key=lambda m: sum(1 for _ in m.parameters()))


def _tops(lines: Iterable[dict[int, nn.Module]], above: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """Return one outermost module for each owner, each once."""
    found = {}
    for line in lines:
        top = _outermost(list(line.values()), above)
        found[id(top)] = top
    return list(found.values())


def _holder(tops: Sequence[nn.Module], loose: Sequence[Tensor], optimizer: object) -> nn.Module:
    from torch import nn

    holder = nn.Module()
    for module in tops:
        holder._modules[_free(_name_of(module) or type(module).__name__, holder)] = module
    for parameter in loose:  # not by register_parameter, which refuses a tensor that is no nn.Parameter
        parameters: dict[str, Any] = holder._parameters
        parameters[_free(_name_of(parameter) or "parameter", holder)] = parameter
    weakref.finalize(optimizer, lambda _: None, holder).atexit = False
    return holder


def _name_of(thing: object) -> str | None:
    names = [name for name, value in vars(sys.modules["__main__"]).items() if value is thing]
    return min(names, key=len, default=None)


def _free(name: str, holder: nn.Module) -> str:
    taken = {*holder._modules, *holder._parameters}
    name = name.replace(".", "_")
    return next(n for n in (name, *(f"{name}_{k}" for k in range(2, len(taken) + 3))) if n not in taken)
