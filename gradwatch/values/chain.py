"""Where on its way through a model a horizon is won, and where it is narrowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from gradwatch.values.sequences import SequenceStats, reach_of
from gradwatch.values.thresholds import HORIZON_GAIN


def mixing(places: Sequence[SequenceStats], share: float = HORIZON_GAIN) -> tuple[SequenceStats, ...]:
    """Return at which of the places on the way of an input its horizon changes: what the modules there do to it.

    Args:
        places: what enters modules, in the order of the forward pass.
        share: see `horizon_of`.

    """
    kept: list[SequenceStats] = []
    low, high = 1, 1  # of the newest output itself
    for one in reversed(places):
        found = reach_of(one, share)
        if found is None:
            continue
        before = found.low * one.clock, found.high * one.clock
        if before[0] > high or before[1] < low:
            kept.append(one)
        low, high = before
    return tuple(reversed(kept))


class Narrowing(NamedTuple):
    """What enters a module reaches far back, and what the model makes of its input before that does not."""

    entered: str
    """Name of the module."""
    reaches: int
    """How far what enters it reaches, in timesteps of the model's input."""
    before: str = ""
    """Name of the last module before it of which what enters does not reach so far; "" where there is none."""
    around: str = ""
    """Name of the module that holds it and of which what enters does not: what passes it by is larger than what it
    gives."""


def narrowed_before(stats: SequenceStats, share: float = HORIZON_GAIN) -> Narrowing | None:
    """Return the first module of which what enters reaches more than twice as far as the model's input; None: of none.

    Both in timesteps of that input: of what enters the module there may be fewer.
    """
    own = reach_of(stats, share)
    before = around = ""
    for one in stats.chain:
        found = reach_of(one, share)
        if own is None or found is None:
            continue
        reaches = found.timesteps * one.clock
        if reaches > 2 * own.timesteps:
            return Narrowing(one.module, reaches, before, around if one.module.startswith(f"{around}.") else "")
        holds = any(other.module.startswith(f"{one.module}.") for other in stats.chain)
        before, around = ("", one.module) if holds else (one.module, "")
    return None


def limiting(stats: SequenceStats, share: float = HORIZON_GAIN) -> str | None:
    """Return the module on the way of the input that most of its horizon comes from; None where none is known.

    That is the one whose input reaches farthest beyond what enters the next.
    """
    won: dict[str, int] = {}
    after = 1
    for one in reversed(stats.chain):
        found = reach_of(one, share)
        if found is not None:
            reaches = found.timesteps * one.clock
            if reaches:
                won[one.module], after = reaches - after, reaches
    return max(won, key=lambda name: won[name], default=None)


def resampled(one: SequenceStats, length: int, columns: int) -> list[float]:
    """Return a gain by lag over its maximum in so many columns, each the largest of its lags; 0 where it has none.

    Args:
        one: what enters a module, or the input itself.
        length: timesteps of the input, on whose clock the columns are.
        columns: how many.

    """
    gain = one.lag_gain or ()
    top = max((g for g in gain if math.isfinite(g)), default=0.0)
    edges = [column * length / columns / one.clock for column in range(columns + 1)]
    spans = ((int(first), max(math.ceil(last), int(first) + 1)) for first, last in itertools.pairwise(edges))
    return [max(gain[first:last], default=0.0) / top if top > 0 else 0.0 for first, last in spans]


def places(stats: SequenceStats) -> list[tuple[str, SequenceStats]]:
    """Return what to draw of the way of a model's input: it and what enters each module, with names.

    Nothing where there is but one place.
    """
    if not stats.chain:
        return []
    first, *others = stats.chain
    if first.lag_gain == stats.lag_gain:
        found = [(f"{stats.input} into {first.module}", stats)]
    else:
        found, others = [(stats.input or "the input", stats)], [first, *others]
    found += [(one.module, one) for one in others]
    return found if len(found) > 1 else []
