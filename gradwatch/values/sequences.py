"""Gradients through time as values: how far back something learns, in numbers and in one sentence."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gradwatch.values.thresholds import HORIZON_GAIN, INTERVAL, MIXED_ROWS, USED

RecurrenceName = Literal["LSTM", "GRU", "RNN"]
"""What carries a state from timestep to timestep: memory cell and gates, gates, or neither."""


Mixing = Literal["", "cell", "loop", "scan", "convolution", "attention"]
"""By what a module mixes timesteps that is none of torch's recurrent ones: its own calls, each of which takes what the
one before gave, or something within one call."""


class Horizon(NamedTuple):
    """How far back a gain by lag reaches, and how it shrinks on the way."""

    timesteps: int
    """The smallest n such that the gain stays below its share of the maximum for every lag >= n: the newest n
    timesteps are within reach."""
    censored: bool
    """Whether the sequence ends before the gain is gone; the horizon is then the sequence's length, and the true one
    may be longer."""
    decay_rate: float | None
    """The factor per timestep; None where fewer than two gains are there to tell."""
    half_life: float | None
    """Timesteps in which the gain halves, `ln 0.5 / ln decay_rate`; None where it does not shrink."""
    low: int = 0
    """The shortest horizon that goes with what was measured, in 19 of 20 cases."""
    high: int = 0
    """The longest."""

    @property
    def sure(self) -> bool:
        """Whether the interval is narrow enough to judge by: its end is at most twice its beginning."""
        return self.high <= INTERVAL * self.low or self.high <= INTERVAL


def horizon_of(
    lag_gain: Sequence[float], share: float = HORIZON_GAIN, error: Sequence[float] | None = None
) -> Horizon | None:
    """Return the horizon of a gain by lag and the rate at which it decays.

    The decay rate is that of a line fitted by least squares through the logarithm of the gain, over the lags from its
    maximum to the horizon, gains of exactly 0 left out. Its logarithm is the finite-time Lyapunov exponent of the
    backward pass.

    Args:
        lag_gain: gains from lag 0, the newest timestep, back; any unit.
        share: of the maximum, below which the gain counts as gone.
        error: of the logarithm of each gain over the maximum, half of a 95 % interval; None: they are exact.

    Returns:
        None where there are no gains, or one of them is not finite. Where all are 0 the horizon is 0, and not censored.
        It is censored where the sequence may end before the gain is gone, as far as that is sure.

    """
    if not lag_gain or not all(map(math.isfinite, lag_gain)):
        return None
    top = max(lag_gain)
    if top <= 0:
        return Horizon(0, censored=False, decay_rate=None, half_life=None)
    limit, length = share * top, len(lag_gain)
    horizon = _last(lag_gain, limit)
    low = high = horizon
    if error is not None:
        low = _last([gain * math.exp(-e) for gain, e in zip(lag_gain, error, strict=True)], limit)
        high = _last([gain * math.exp(min(e, 700.0)) for gain, e in zip(lag_gain, error, strict=True)], limit)
    peak = lag_gain.index(top)
    law = slope([(lag, math.log(gain)) for lag, gain in enumerate(lag_gain[peak : horizon + 1], peak) if gain > 0])
    half_life = math.log(0.5) / law if law is not None and law < 0 else None
    censored = high == length
    shown = length if censored else horizon
    return Horizon(shown, censored, None if law is None else math.exp(law), half_life, low, high)


def used_of(lag_use: Sequence[float], share: float = USED) -> int | None:
    """Return how many of the newest timesteps an output hangs on: all but older ones that next to nothing is due to.

    It is the smallest n such that the squares of what the timesteps from lag n on add are at most `share` of all of
    them: if the data at different lags are independent, that is their share of the output's variance, to first order.

    Args:
        lag_use: what the timestep at a lag adds to the output, from lag 0 back; any unit.
        share: of the squares.

    Returns:
        None where nothing adds anything, or a number is not finite.

    """
    top = max(lag_use, default=0.0)
    if not all(map(math.isfinite, lag_use)) or top <= 0:
        return None
    squares = [(use / top) ** 2 for use in lag_use]
    left = share * math.fsum(squares)
    used = len(squares)
    while used and (left := left - squares[used - 1]) >= 0:
        used -= 1
    return used


def _last(gains: Sequence[float], limit: float) -> int:
    """Return up to which entry one is at least the limit."""
    return next((lag for lag in range(len(gains), 0, -1) if gains[lag - 1] >= limit), 0)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the slope of the line that a least-squares fit puts through the points; None below two of them."""
    if len(points) < 2:
        return None
    x, y = (math.fsum(axis) / len(points) for axis in zip(*points, strict=True))
    return math.fsum((a - x) * (b - y) for a, b in points) / math.fsum((a - x) ** 2 for a, _ in points)


@dataclass(frozen=True, slots=True, repr=False)
class SequenceStats:
    """Gradients through the time of one sequence module, or of one layer and direction of it, or of the whole model.

    Series run from the oldest timestep to the newest, `length` entries; lag gains from lag 0, the newest timestep,
    back. Norms are Frobenius over the features and over rows of the batch: all of them for `grad_input`, and for the
    gradients at the states of a cell; else `rows` of them.
    """

    module: str
    """Name of the module; "" is the model itself."""
    part: str = ""
    """"" is the module as a whole; "l0", "l0_reverse", ... a layer and direction of it; "model" the horizon of the
    model as a whole."""
    length: int = 0
    """Timesteps of the longest sequence."""
    rows: int = 0
    """Rows of the batch over which the lag gains and the hidden series are taken."""
    grad_input: tuple[float, ...] | None = None
    """Norm of dL/dx_t."""
    grad_hidden: tuple[float, ...] | None = None
    """Norm of the total dL/dh_t, through the recurrence."""
    grad_hidden_direct: tuple[float, ...] | None = None
    """Norm of the part of dL/dh_t that does not come from later timesteps of this layer."""
    grad_cell: tuple[float, ...] | None = None
    """Norm of the total dL/dc_t of an LSTM."""
    carry_ratio: tuple[float, ...] | None = None
    """`length - 1` entries; entry t is the norm of the state's gradient carried from t+1 back to t, over that of the
    state's gradient at t+1 (Pascanu, 2013)."""
    lag_gain: tuple[float, ...] | None = None
    """`||d out_T / d x_{T-lag}||`, root mean square over random cotangents and rows; on parts "" and "model"."""
    lag_gain_hidden: tuple[float, ...] | None = None
    """The same from the module's newest output to this layer's h."""
    lag_gain_cell: tuple[float, ...] | None = None
    """The same to this layer's c."""
    censored: bool | None = None
    """Whether the sequence ends before `lag_gain` falls below `HORIZON_GAIN` of its maximum."""
    replay_residual: float | None = None
    """Largest difference of the recomputed hidden states from the module's own, over their largest entry."""
    adjoint_residual: float | None = None
    """Largest difference of the recomputed dL/dx_t from autograd's, over its largest entry."""
    scaled: bool = False
    """Whether an unknown factor (a loss scale) is on the gradients, or cannot be excluded.

    Only their ratios mean something then. Lag gains are free of it.
    """
    note: str | None = None
    """Why something is missing."""
    need: int | None = None
    """How many of the newest timesteps matter, as `horizon=` declares; on part "model" (one number) or on part "" (a
    need of the module)."""
    reached: int | None = None
    """How many of the newest timesteps a gradient can reach from the newest output, where the state that is carried on
    is detached; `length` where it is the state that was carried into the sequence. None where it is not detached, or
    that is not known. On part "". GW303 is judged by this alone."""
    padding: float | None = None
    """At the ends of rows of one length, how many timesteps are all the same, in the median row: padding, for the rows
    differ in that. On part "" of a recurrent module; None where there is none, or that is not known."""
    grad_data: float | None = None
    """Where there is padding: the largest gradient at a timestep of data over the largest at one of padding, in the
    median row; None where the padding gets none."""
    over_batch: bool = False
    """Whether the model's output has a row for each of the timesteps of this module and none for its rows, so that it
    takes the batch for time; on part "" of a recurrent module."""
    mixes_rows: float | None = None
    """On part "model", how much a row's data moves the newest outputs of the other rows, beside its own; 0 where rows
    know nothing of each other, about 1 where they are mixed up. None of fewer than 24 rows, and with batch
    normalization in training mode, which mixes them a little."""
    kind: RecurrenceName | None = None
    """What the module is, on part ""; None where it is no recurrent one, or an unknown one."""
    mixing: Mixing = ""
    """On part "", by what it was seen to mix timesteps; "" where it is a recurrent module of torch's, or was named."""
    reverse: bool = False
    """Whether this part runs from the newest timestep to the oldest."""
    lag_gain_error: tuple[float, ...] | None = None
    """On part "model", half of a 95 % interval of the logarithm of `lag_gain` over its maximum, from the spread over
    rows and cotangents; None where it is exact, or not known."""
    lag_use: tuple[float, ...] | None = None
    """On part "model", root mean square over the rows of what the timestep at a lag adds to the newest output, to first
    order: the derivative by it, along a random cotangent, times how far the input lies there from its mean. None where
    it is not known."""
    input: str = ""
    """On part "model", the input of the model by which the newest output is differentiated, as Python spells the way to
    it from the arguments; "" is what enters a module."""
    time: int | None = None
    """That input's dimension of time; None where it is packed, or a list."""
    time_assumed: bool = False
    """Whether nothing that the model does tells which dimension is time, so that it was assumed."""
    beside: tuple[SequenceStats, ...] = ()
    """On part "model", the same of the model's other inputs, and of what enters its first sequence module."""
    clock: int = 1
    """Of a place in `chain`: timesteps of the input from one of its own to the next, as behind a stride."""
    chain: tuple[SequenceStats, ...] = ()
    """On part "model", the same of what enters each module on the way of the input that mixes timesteps, in the order
    of the forward pass: at which of them the horizon changes."""

    @property
    def reads_padding(self) -> bool:
        """Whether next to nothing of the gradient arrives at the data, beside what arrives at the padding after it."""
        return self.grad_data is not None and self.grad_data < HORIZON_GAIN

    @property
    def misread(self) -> bool:
        """Whether something else than its data is read: padding, the batch as time, other rows."""
        return self.over_batch or self.reads_padding or (self.mixes_rows or 0.0) >= MIXED_ROWS

    def __repr__(self) -> str:
        """Return what is said of it in a report; the series are a wall of numbers."""
        said = "\n".join(text for _, text in sentences((self,)))
        return said or f"gradients of {subject(self)} through {self.length} timesteps"

    @property
    def why_unknown(self) -> str:
        """Why `lag_gain` is missing, in words; "" where that is not known."""
        return self.note or ""

    @property
    def reach(self) -> Horizon | None:
        """What `horizon_of` says of `lag_gain`; None where there is none."""
        return reach_of(self)

    @property
    def interval(self) -> tuple[int, int] | None:
        """Within which the horizon lies, as far as one batch and its cotangents tell: 19 times of 20."""
        return None if (found := self.reach) is None else (found.low, found.high)

    @property
    def horizon(self) -> int | None:
        """How many of the newest timesteps are within reach; `length` where the sequence ends first."""
        return None if (found := self.reach) is None else found.timesteps

    @property
    def used(self) -> int | None:
        """How many of the newest timesteps the output hangs on as things are: see `used_of`."""
        return None if self.lag_use is None else used_of(self.lag_use)

    @property
    def decay_rate(self) -> float | None:
        """Factor per timestep by which the gain shrinks on the way to the horizon."""
        return None if (found := self.reach) is None else found.decay_rate

    @property
    def half_life(self) -> float | None:
        """Timesteps in which the gain halves; None where it does not shrink."""
        return None if (found := self.reach) is None else found.half_life


_remembered = functools.lru_cache(maxsize=64)(horizon_of)
"""Between two probes the same horizons are asked for at every measured step."""


def reach_of(stats: SequenceStats, share: float = HORIZON_GAIN) -> Horizon | None:
    """Return the horizon that a gain by lag tells of; None where there is none, or it is not finite."""
    return None if stats.lag_gain is None else _remembered(stats.lag_gain, share, stats.lag_gain_error)


def subject(stats: SequenceStats) -> str:
    """Name what was measured."""
    return stats.module or "the model"


def sentence(who: str, found: Horizon, length: int, of: str = "") -> str:
    """Say how far back `who` learns.

    "rnn learns from the last 15 (14 to 16) of 250 timesteps (the gain shrinks to 0.64 of itself a step, half-life 1.6
    steps)".

    Args:
        who: what learns.
        found: how far.
        length: timesteps that there are.
        of: whose they are, as `whose` says it.

    """
    if not found.sure:
        much = f"somewhere between the last {found.low} and the last {found.high} of {length}"
    elif found.censored:
        much = f"at least {found.low or length} of {length}"
    elif not found.timesteps:
        much = f"none of its {length}"
    else:
        within = f" ({found.low} to {found.high})" if found.low < found.high else ""
        much = f"the last {found.timesteps}{within} of {length}"
    return f"{who} learns from {much} timesteps{of}{_pace(found)}"


def whose(stats: SequenceStats) -> str:
    """Say of which input of the model the timesteps are, and which of its dimensions is time; "" where there is none.

    " of past_target (time: dimension 1)".
    """
    if not stats.input:
        return ""
    assumed = ", assumed" if stats.time_assumed else ""
    return f" of {stats.input}" + ("" if stats.time is None else f" (time: dimension {stats.time}{assumed})")


def differing(stats: SequenceStats, share: float = HORIZON_GAIN) -> list[tuple[SequenceStats, Horizon]]:
    """Return what of `beside` has another horizon than the model's own, longest first.

    That is an input whose horizon is less than half of it, or more than twice, and what enters a module where the
    intervals of the two lie apart.
    """
    own = reach_of(stats, share)
    found = [(one, reach) for one in stats.beside if (reach := reach_of(one, share)) is not None]
    if own is None:
        return []
    apart = [
        (one, reach)
        for one, reach in found
        if (
            not own.timesteps <= 2 * reach.timesteps <= 4 * own.timesteps
            if one.input
            else reach.high < own.low or reach.low > own.high
        )
    ]
    return sorted(apart, key=lambda pair: -pair[1].timesteps)


def sentences(sequences: Iterable[SequenceStats], share: float = HORIZON_GAIN) -> Iterator[tuple[SequenceStats, str]]:
    """Return everything whose horizon was asked for with the sentence on it.

    The model itself comes first, then the modules as they ran. Where a horizon could not be measured, the sentence says
    why.
    """
    whole = [s for s in sequences if s.part in ("", "model")]
    for stats in sorted(whole, key=lambda s: s.part != "model"):
        found = reach_of(stats, share)
        if stats.over_batch:
            yield stats, f"{subject(stats)} runs over the batch: its timesteps are not those of the data"
        elif found is not None:
            yield stats, sentence(subject(stats), found, stats.length, whose(stats)) + _use(stats, found)
            shown = {s.module for s in whole if s.part == ""}  # these have a sentence of their own
            for one, reach in ((o, r) for o, r in differing(stats, share) if not o.module or o.module not in shown):
                who = f"{one.module}, from what enters it," if one.module else subject(stats)
                yield one, sentence(who, reach, one.length, whose(one)) + _use(one, reach)
        elif stats.lag_gain is not None:
            yield stats, f"{subject(stats)}: its gain by lag is not finite"
        elif stats.note is not None and not (stats.mixing and stats.need is None):  # it was not asked for
            yield stats, f"{subject(stats)}: how far back it learns is not measured: {stats.note}"


def _use(stats: SequenceStats, found: Horizon) -> str:
    """Say how many timesteps are used of those within reach, where that is known and not the same."""
    used = stats.used if stats.input else None
    return "" if used is None or used >= found.timesteps else f"; it uses the last {used}"


def _pace(found: Horizon) -> str:
    if found.decay_rate is None:
        return " (the gain does not shrink)" if found.censored and found.timesteps > 1 else ""
    rate = (
        f"{found.decay_rate:.2f}"
        if 0.1 <= found.decay_rate < 0.985
        else f"{found.decay_rate:.4g}"
        if found.decay_rate > 0.1
        else f"{found.decay_rate:.1g}"
    )
    grows = (
        found.censored
        and found.half_life is not None
        and found.half_life * math.log2(1 / HORIZON_GAIN) < found.timesteps
    )  # up to a maximum far back
    if found.half_life is None or rate == "1" or grows:
        return " (the gain does not shrink)"
    half_life = f"{found.half_life:.1f}" if found.half_life < 100 else f"{found.half_life:.0f}"
    return f" (the gain shrinks to {rate} of itself a step, half-life {half_life} steps)"


def shortest(sequences: Sequence[SequenceStats], share: float = HORIZON_GAIN) -> SequenceStats | None:
    """Return the sequence module with the shortest horizon, or the first that is recurrent or named.

    None where there is no such module.
    """
    modules = [s for s in sequences if s.part == "" and s.module and (not s.mixing or s.lag_gain is not None)]
    known = [(found.timesteps, i) for i, s in enumerate(modules) if (found := reach_of(s, share)) is not None]
    return modules[min(known)[1]] if known else next(iter(modules), None)
