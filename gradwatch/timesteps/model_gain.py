"""The gain by lag of a model as a whole, on its way from the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gradwatch.model.forward_hooks import Transfer
from gradwatch.timesteps.padding import told
from gradwatch.values.sequences import SequenceStats, horizon_of
from gradwatch.values.thresholds import HORIZON_GAIN

Timesteps = Literal["auto"] | Mapping[str, int | None]
"""Sequence modules beside the recurrent ones: by name, the dimension of time; None where each call is one timestep."""


@dataclass(frozen=True)
class ModelGain:
    """The gain by lag of a model on one batch, still on the device."""

    place: str
    """Name of the module whose input is meant; "" is the model's own."""
    rows: int
    numbers: Tensor
    """Float64: what `padding_of` gives, timesteps of the longest sequence, and then the gain by lag from lag 0 on."""
    note: str | None = None

    def collect(self, transfer: Transfer, share: float) -> Callable[[], SequenceStats]:
        """Hand the numbers over, and return what makes a value of them once they have been copied."""
        pending = transfer.add(self.numbers)
        return lambda: self.stats(pending.values, share)

    def stats(self, numbers: Sequence[float], share: float = HORIZON_GAIN) -> SequenceStats:
        """Make the copied `numbers` a value; below this share of its maximum a gain counts as gone."""
        (padding, data), length = told(numbers[:2]), int(numbers[2])
        gain = tuple(numbers[3 : 3 + length])
        found = horizon_of(gain, share)
        return SequenceStats(
            "",
            "model",
            length,
            self.rows,
            lag_gain=gain,
            censored=None if found is None else found.censored,
            note=self.note,
            padding=padding,
            grad_data=data,
        )
