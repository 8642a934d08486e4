"""Optimizers as they are given: unwrapped, put together where they step as one, and described."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwatch.values.snapshot import OptimizerInfo

# What divides the gradient by a running measure of its own size. Optimizers of others are known by their state, below.
_ADAPTIVE = (
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "SparseAdam",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "Rprop",
    "Adafactor",
    "Muon",
    "Lion",
    "LAMB",
)
_ADAPTIVE_STATE = frozenset({"exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta"})
_DEEPEST = 10
"""Wrappers, one within the other."""


def optimizer_info(optimizer: Any) -> OptimizerInfo:  # noqa: ANN401  (an optimizer, or what merely acts as one)
    """Describe an optimizer; whether it is adaptive is told by its class and those it derives from, or by its state."""
    if isinstance(optimizer, Sweep):
        return optimizer_info(optimizer.members[0])
    kind = type(optimizer).__name__
    names = {base.__name__ for base in type(optimizer).__mro__}
    states, defaults = getattr(optimizer, "state", None), getattr(optimizer, "defaults", None)
    first = next(iter(states.values()), None) if isinstance(states, Mapping) else None
    kept = set(first) if isinstance(first, Mapping) else set()
    groups = [group for group in getattr(optimizer, "param_groups", ()) if isinstance(group, Mapping)]
    options = [*groups, *([defaults] if isinstance(defaults, Mapping) else [])]
    eps = next((group["eps"] for group in options if "eps" in group), None)
    rates = [rate for group in groups if isinstance(rate := group.get("initial_lr"), int | float)]
    return OptimizerInfo(
        kind,
        bool(names & set(_ADAPTIVE) or kept & _ADAPTIVE_STATE),
        float(eps) if isinstance(eps, int | float) else None,
        _empty(groups),
        float(max(rates)) if rates else None,
    )


def _empty(groups: Sequence[Mapping[str, Any]]) -> int:
    """Count the groups without a parameter, but for one of what is not decayed: a model may have nothing of that."""
    decays = {group.get("weight_decay") for group in groups}
    return sum(not group.get("params") and not (len(decays) > 1 and not group.get("weight_decay")) for group in groups)


def replaced(optimizer: Any, own: Mapping[int, Tensor]) -> set[int]:  # noqa: ANN401
    """Return, by `id`, parameters in whose place an optimizer has others, as it has after a layer was replaced.

    Those have never had a gradient, stand between the same neighbours, and differ in one dimension at most.

    Args:
        optimizer: what steps some of the model's parameters.
        own: all of those by their `id`, in the model's order.

    """
    stepped = parameters_of(optimizer)
    if all(id(p) in own for p in stepped) or all(p.grad is None for p in stepped if id(p) in own):
        return set()  # nearly always
    state, known = getattr(optimizer, "state", {}), set(map(id, stepped))
    idle = [p.requires_grad and p.grad is None and p not in state and id(p) not in own for p in stepped]
    old = _between(stepped, idle, own)
    new = _between([*own.values()], [i not in known and p.grad is not None for i, p in own.items()], known)
    return {id(p) for place, p in new if any(place == at and _alike(p.shape, q.shape) for at, q in old)}


def _between(
    every: Sequence[Tensor], chosen: Sequence[bool], among: Container[int]
) -> list[tuple[tuple[int | None, int | None], Tensor]]:
    """Return the chosen ones, each with the `id` of the nearest of some others before it and after it."""
    ids = [id(p) if id(p) in among else None for p in every]
    before, after = _last(ids), _last(ids[::-1])[::-1]
    return [((before[k], after[k]), p) for k, p in enumerate(every) if chosen[k]]


def _last(ids: Sequence[int | None]) -> list[int | None]:
    """Return of each place the last before it that is not None."""
    found: list[int | None] = []
    last = None
    for now in ids:
        found.append(last)
        last = last if now is None else now
    return found


def _alike(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) <= (len(one) > 1)


def steps(candidate: object) -> bool:
    """Tell whether this is an optimizer, or acts as one."""
    return hasattr(candidate, "param_groups") and callable(getattr(candidate, "step", None))


def parameters_of(optimizer: Any) -> list[Tensor]:  # noqa: ANN401
    """Return what an optimizer steps now."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def nested(optimizer: object) -> list[Any]:
    """Return an optimizer and what it wraps, outermost first; the last is the one that moves the weights.

    A wrapper keeps what it wraps in an attribute, whatever that is called (`.optimizer` of Accelerate and Lightning,
    `.original_optimizer` of Opacus, `.base_optimizer` of SAM).

    Raises:
        ValueError: it is no optimizer, and holds several.

    """
    found: list[Any] = []
    inner: object | None = optimizer
    seen = set[int]()
    while inner is not None and id(inner) not in seen and len(seen) < _DEEPEST:
        seen.add(id(inner))
        if isinstance(inner, Sweep) or steps(inner):
            found.append(inner)
        inner = _held(inner)
    return found or [optimizer]


def unwrap(optimizer: object) -> Any:  # noqa: ANN401
    """Return the optimizer that moves the weights in the end; see `nested`."""
    return nested(optimizer)[-1]


def _held(outer: object) -> object | None:
    """Return the one optimizer that this holds, or what may hold one in its turn; None where there is none."""
    if isinstance(outer, Sweep):
        return None
    named = _named(outer)
    values = dict(getattr(outer, "__dict__", {}))
    inside = {name: one for name, value in values.items() for one in _entries(value) if one is not outer and _is(one)}
    several = {id(one) for one in inside.values()}
    if named is None and len(several) > 1 and not steps(outer):
        raise ValueError(
            f"optimizer must be one optimizer or a list of several, got a {type(outer).__name__} that holds"
            f" {len(several)} ({', '.join(f'.{name}' for name in inside)}): give those that train the model"
        )
    if named is None:
        named = next(iter(inside.values())) if len(several) == 1 else None
    if named is None or not steps(outer) or not steps(named):
        return named
    # What steps others, or not all of them, is no more than a part of it.
    return named if set(map(id, parameters_of(outer))).issubset(map(id, parameters_of(named))) else None


def _named(outer: object) -> object | None:
    """Return what an object has as `.optimizer`, if it has that: not what one gives that answers to everything."""
    if inspect.getattr_static(outer, "optimizer", None) is None:
        return None
    try:
        named: object = outer.optimizer  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001  (a property of somebody's)
        return None
    return named if steps(named) or hasattr(named, "__dict__") else None  # not "adam"


def _is(entry: object) -> bool:
    """Tell whether something that an object happens to hold is an optimizer, without asking it for anything."""
    if isinstance(entry, torch.optim.Optimizer):
        return True
    kind = type(entry)
    has = hasattr(kind, "param_groups") or "param_groups" in getattr(entry, "__dict__", {})
    return has and callable(getattr(kind, "step", None))


def _entries(value: object) -> Iterable[object]:
    if isinstance(value, list | tuple):
        return value
    return value.values() if type(value) is dict else (value,)  # not what loads its values when it is asked


class Sweep:
    """Several optimizers, each of a single parameter, that step one after the other as one optimizer would."""

    def __init__(self, members: Sequence[Any], *, grows: bool = False) -> None:
        """Put them together, unwrapped; `grows`: more may come."""
        self.members, self.grows = list(members), grows

    def takes_in(self, optimizer: object) -> bool:
        """Take one more, or those of a sweep of one; False where it is not of their kind."""
        inner = all_of(optimizer)[-1]
        if not self.grows or type(inner) is not type(self.members[0]) or len(parameters_of(inner)) != 1:
            return False
        self.members.append(inner)
        return True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for member in self.members for group in member.param_groups]


def swept(optimizers: Iterable[Any], trained: int) -> list[Any]:
    """Put those of one class and of a single parameter each together: one after the other they make one step.

    But only where they are most of the parameters that are `trained`; two of a few have rhythms of their own.
    """
    found: dict[object, list[Any]] = {}
    for one in optimizers:
        inner = unwrap(one)
        alone = len(parameters_of(inner)) != 1
        found.setdefault(id(one) if alone else type(inner), []).append(one)
    apart = [[[one] for one in several] if len(several) <= trained / 2 else [several] for several in found.values()]
    groups = [group for groups in apart for group in groups]
    return [group[0] if len(group) == 1 else Sweep(list(map(unwrap, group))) for group in groups]


def all_of(optimizer: Any) -> list[torch.optim.Optimizer]:  # noqa: ANN401
    """Return every object whose steps are those of this one: what it wraps, and the members of a sweep."""
    return optimizer.members if isinstance(optimizer, Sweep) else nested(optimizer)
