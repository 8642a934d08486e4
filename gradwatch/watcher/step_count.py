"""The number of an optimizer's next step, and whether that is to be measured."""

from __future__ import annotations

from collections.abc import Callable

from gradwatch.values.snapshot import Snapshot
from gradwatch.watcher.cadence import Cadence

_BETWEEN_LOOKS = 10
"""Steps between probes out of turn that gradients ask for which are not finite: as many as between early probes."""


class StepCount:
    """Counts the steps of one optimizer, and knows which are measured, and which are probes, perhaps out of turn."""

    def __init__(self, cadence: Cadence, clock: Callable[[], int] | None) -> None:
        """Begin at step 0; `clock` numbers the steps where the loop has an axis of its own."""
        self._cadence, self._clock = cadence, clock
        self.number = 0
        """Of the next step."""
        self.stride = 1
        """From one step to the next."""
        self.extra = False
        """Whether the next step is a probe out of turn, because an alert has begun or a gradient was not finite."""
        self._again = False
        """Whether the step after the one that is under way is one, because what it waits for is behind it already."""
        self._next_look = 0
        """The step from which on a gradient that is not finite, and was not stepped, asks for such a probe again."""

    @property
    def measured(self) -> bool:
        """Whether the next step is."""
        return self.extra or self._cadence.measured(self.number)

    @property
    def probed(self) -> bool:
        """Whether the next step is a probe."""
        return self.extra or self._cadence.probed(self.number)

    def is_turn(self, number: int) -> bool:
        """Tell whether a step is a probe in its turn."""
        return self._cadence.probed(number)

    def tell(self, number: int | None = None) -> None:
        """Take the number of this step, or ask the clock; the distance to the last one is that to the next."""
        if number is None and self._clock is not None:
            number = self._clock()
        if number is not None:
            self.stride = max(number - (self.number - self.stride), 1)
            self.number = number

    def advance(self) -> None:
        """Count a step."""
        self.number += self.stride
        if self._again:
            self._again, self.extra = False, True

    def take_back(self) -> None:
        """Count one step less: it was none."""
        self.number -= self.stride

    def probe_next(self) -> None:
        """Make the next step a probe."""
        self.extra = True

    def begin(self) -> bool:
        """Begin the next step, and tell whether it is a probe."""
        probe, self.extra = self.probed, False
        return probe

    def resume(self, number: int, stride: int, *, extra: bool) -> None:
        """Go on where another process has stopped."""
        self.number, self.stride, self.extra = number, stride, extra

    def probe_after_next(self) -> None:
        """Make the step after the next one a probe."""
        self._again = True

    def may_show_origin(self, snapshot: Snapshot) -> bool:
        """Tell whether the next pass may show what made a gradient infinite or NaN: the weights are as they were."""
        if not snapshot.skipped or snapshot.norm_global is None or snapshot.finite:
            return False
        if self._cadence.probe_every is not None or self.number < self._next_look:
            return False
        self._next_look = self.number + _BETWEEN_LOOKS
        return True
