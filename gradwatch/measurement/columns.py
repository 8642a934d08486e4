"""The raw columns: what is measured of a parameter, how pieces of several processes combine, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

from gradwatch.values.column import rounded
from gradwatch.values.snapshot import Column, ModelInfo


def _root(norms: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)


class Raw(NamedTuple):
    """A number that is measured of a parameter, and how that of the whole follows from those of its pieces."""

    name: str
    whole: Callable[[Sequence[float]], float]


NORM = Raw("norm", _root)
"""Of the gradient, as it is read first."""
APPLIED = Raw("applied", _root)
"""Of the gradient as the optimizer takes it, after clipping."""
WEIGHT = Raw("weight_norm", _root)
UPDATE = Raw("update", _root)
"""Norm of the difference of the parameter after the step and before."""
NONFINITE = Raw("nonfinite", sum)
"""Number of NaN and infinite entries of the gradient."""
NONZERO = Raw("nonzero", sum)
"""Number of entries of the gradient that are not 0."""
TINY = Raw("tiny", sum)
"""Number of those that are below the smallest normal number of the format."""
LOST = Raw("lost", sum)
"""Number of those whose weight the step left as it was."""

RAW = (NORM, APPLIED, WEIGHT, UPDATE, NONFINITE, NONZERO, TINY, LOST)

Numbers = dict[Raw, dict[int, float]]
"""By raw column and by the column of the parameter; what was not measured is not there."""


class Columns(TypedDict):
    """The columns of a `Snapshot`."""

    norm: Column
    nonfinite: Column | None
    weight_norm: Column | None
    zeros: Column | None
    subnormal: Column | None
    update_ratio: Column | None
    lost: Column | None


def columns(numbers: Numbers, model: ModelInfo, *, skipped: bool) -> Columns:
    """Return the columns of a snapshot.

    Args:
        numbers: what was measured.
        model: whose parameters the columns run along.
        skipped: whether a scaler skipped the step, so that what moved says nothing.

    """
    weight, nonzero = numbers.get(WEIGHT, {}), numbers.get(NONZERO, {})
    every = list(range(len(model.parameters)))

    def column(values: Mapping[int, float]) -> Column:
        numbers = rounded([*values.values()])
        if list(values) == every:  # nearly always
            return tuple(numbers)
        return tuple(map(dict(zip(values, numbers, strict=True)).get, every))

    def optional(raw: Raw, value: Callable[[int, float], float]) -> Column | None:
        return column({c: value(c, n) for c, n in numbers[raw].items()}) if raw in numbers else None

    updates = {c: _ratio(n, weight[c]) for c, n in numbers.get(UPDATE, {}).items() if c in weight}

    def elements(c: int) -> int:
        parameter = model.parameters[c]
        return max(parameter.elements * (1 + parameter.dtype.startswith("complex")), 1)

    return Columns(
        norm=column(numbers.get(NORM, {})),
        nonfinite=optional(NONFINITE, lambda _, n: n),
        weight_norm=column(weight) if weight else None,
        zeros=optional(NONZERO, lambda c, n: 1.0 - n / elements(c)) if nonzero else None,
        subnormal=optional(TINY, lambda c, n: n / max(nonzero[c], 1.0)) if numbers.get(TINY) else None,
        update_ratio=column(updates) if UPDATE in numbers and not skipped else None,
        lost=None if skipped else optional(LOST, lambda c, n: n / max(nonzero.get(c, 0.0), 1.0)),
    )


def _ratio(change: float, weight: float) -> float:
    return change / weight if weight else math.inf if change else 0.0
