"""Steps at which no parameter had a gradient: each moves nothing and says nothing, and several in a row say that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from gradwatch.measurement.measurement import Measurement
from gradwatch.values.snapshot import Silence

Key = TypeVar("Key")


class SilentSteps:
    """Counts such steps of one optimizer, as long as they follow one another, and tells when they are worth a word."""

    def __init__(self, patience: int) -> None:
        """Begin with none; every `patience` in a row are told of."""
        self._patience = patience
        self.count = 0
        self.since = 0
        """The first of them."""
        self._weights: Mapping[str, float] = {}
        """Norms of the parameters at the first of them."""

    def add(self, measurement: Measurement, columns: Sequence[int]) -> bool:
        """Count a step, and tell whether its snapshot is to tell of all of them; `columns` are those stepped."""
        if not self.count:
            self.since, self._weights = measurement.step, _weights(measurement, columns)
        self.count += 1
        if self.count % self._patience:
            return False
        measurement.silence = Silence(self.since, self.count, self._moved(_weights(measurement, columns)))
        return True

    def end(self) -> None:
        """Note a step with gradients."""
        self.count, self._weights = 0, {}

    def resume(self, since: int, count: int) -> None:
        """Go on where another process has stopped."""
        self.since, self.count = since, count

    @property
    def due(self) -> bool:
        """Whether the next of them would be told of."""
        return bool(self.count) and (self.count + 1) % self._patience == 0

    def _moved(self, now: Mapping[str, float]) -> bool | None:
        """Tell whether parameters have changed since the first step; None where they were not measured twice."""
        return changed(self._weights, now) if self.count > 1 else None


def changed(before: Mapping[Key, float], now: Mapping[Key, float]) -> bool | None:
    """Tell whether a norm that was measured both times has changed; None where there is none."""
    both = now.keys() & before.keys()
    return any(now[key] != before[key] for key in both) if both else None


def _weights(measurement: Measurement, columns: Sequence[int]) -> dict[str, float]:
    found = measurement.weights()
    return {measurement.model.parameters[column].name: found[column] for column in columns if column in found}
