"""The gain by lag of a model as a whole, on its way from the device."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gradwatch.model.forward_hooks import Transfer
from gradwatch.timesteps.padding import told
from gradwatch.values.chain import mixing
from gradwatch.values.sequences import SequenceStats, reach_of
from gradwatch.values.thresholds import HORIZON_GAIN

Timesteps = Literal["auto"] | Mapping[str, int | None]
"""Sequence modules beside the recurrent ones, and inputs of the model: by name, the dimension of time; None where each
call of a module is one timestep."""


_WIDE = 0.25
"""Width of the interval of a horizon, as a share of it, up to which one direction is enough; two steps always are."""


@dataclass(frozen=True)
class InputGain:
    """The gain by lag of a model from one of its inputs, or from what enters one of its modules."""

    module: str
    """The module whose input it is; "" is the model itself."""
    input: str
    """The input of the model; "" is what enters the module."""
    time: int | None
    """The input's dimension of time."""
    assumed: bool
    """Whether nothing tells that, and it was assumed."""
    rows: int
    numbers: Tensor
    """Float64: the spread of the input, how far rows are mixed (NaN: nobody knows), what `padding_of` gives, what
    `gain_and_error` does, and by lag what the timesteps add to the output."""
    on_the_way: frozenset[str] = frozenset()
    into: str = ""
    clock: int = 1
    """See `Source` for all three."""

    @functools.cached_property
    def copied(self) -> list[float]:
        """The numbers; this waits for them."""
        values: list[float] = self.numbers.tolist()
        return values

    def is_sure(self) -> bool:
        """Tell whether one more direction would tell nothing new of the horizon; this waits for the numbers."""
        found = reach_of(self.stats(self.copied, HORIZON_GAIN))
        return found is None or found.high - found.low <= max(2, _WIDE * found.timesteps)

    def stats(self, numbers: Sequence[float], share: float) -> SequenceStats:
        """Make the copied `numbers` a value; below this share of its maximum a gain counts as gone."""
        _, mixed, *numbers = numbers
        (padding, data), length = told(numbers[:2]), int(numbers[2])
        steps = (len(numbers) - 3) // 3
        gain, error, used = (tuple(numbers[at : at + length]) for at in (3, 3 + steps, 3 + 2 * steps))
        stats = SequenceStats(
            self.module,
            "model",
            length,
            self.rows,
            lag_gain=gain,
            lag_gain_error=error if any(error) else None,
            lag_use=used if all(map(math.isfinite, used)) else None,
            padding=padding,
            grad_data=data,
            input=self.input,
            time=self.time,
            time_assumed=self.assumed,
            clock=self.clock,
            mixes_rows=mixed if math.isfinite(mixed) else None,
        )
        found = reach_of(stats, share)
        return stats if found is None else dataclasses.replace(stats, censored=found.censored)


@dataclass(frozen=True)
class ModelGain:
    """The gain by lag of a model on one batch, still on the device."""

    place: str
    """Name of the first sequence module; "" where none ran."""
    gains: Sequence[InputGain]
    """By each input of the model, or where there is none, by what enters that module; then by that beside them."""
    note: str | None = None

    def collect(self, transfer: Transfer, share: float) -> Callable[[], SequenceStats]:
        """Hand the numbers over, and return what makes a value of them once they have been copied."""
        pending = [transfer.add(gain.numbers) for gain in self.gains]
        return lambda: self._stats([p.values for p in pending], share)

    def stats(self, share: float = HORIZON_GAIN) -> SequenceStats:
        """Copy the numbers, and make a value of them.

        It is that of the input with the longest horizon; `beside` has the others, and what enters the sequence module.
        """
        return self._stats([gain.copied for gain in self.gains], share)

    def _stats(self, numbers: Sequence[Sequence[float]], share: float) -> SequenceStats:
        pairs = list(zip(self.gains, numbers, strict=True))
        asked = [(gain.stats(its, share), its[0]) for gain, its in pairs if not gain.on_the_way]
        every = [s for s, _ in asked]
        into = [gain.into for gain in self.gains if not gain.on_the_way]
        effects = [spread * max(s.lag_gain or (0.0,)) for s, spread in asked]
        of_inputs = [at for at, s in enumerate(every) if s.input and effects[at] != 0]
        # Where no gradient comes to what the model was given, what enters the module counts.
        reached = of_inputs or [at for at, effect in enumerate(effects) if effect != 0] or list(range(len(every)))
        unknown = next((at for at in reached if reach_of(every[at], share) is None), None)
        first = self._main(every, effects, reached, share) if unknown is None else unknown
        others = tuple(s for at, s in enumerate(every) if at != first and (not s.input or at in reached))
        own = every[first]
        way = [g.stats(its, share) for g, its in pairs if own.input in g.on_the_way]
        if into[first]:
            way.insert(0, dataclasses.replace(own, module=into[first], input="", time=None, lag_use=None))
        return dataclasses.replace(own, module="", note=self.note, beside=others, chain=mixing(way, share))

    @staticmethod
    def _main(every: Sequence[SequenceStats], effects: Sequence[float], among: Sequence[int], share: float) -> int:
        """Return which input's horizon is the model's.

        It is the one that is called a target; else the longest horizon of those that are of about the length of the
        longest, and without which the output would change by more than next to nothing.
        """
        felt = [at for at in among if effects[at] >= share**2 * max(effects[i] for i in among)]
        long = [at for at in felt if 2 * every[at].length >= max(every[i].length for i in felt)]
        targets = [at for at in felt if "target" in every[at].input]
        reach = {at: found for at in targets or long if (found := reach_of(every[at], share)) is not None}
        lowest = max(found.low for found in reach.values())
        return next(at for at, found in reach.items() if found.high >= lowest or found.censored)  # as far as is sure
