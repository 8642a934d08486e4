"""When the weights of an optimizer are copied, so that its update can be measured: before it has moved any."""

from __future__ import annotations

from typing import Any

from gradwatch.measurement.measurement import Measurement
from gradwatch.measurement.parameters import undisturbed
from gradwatch.measurement.travel import Travel
from gradwatch.measurement.updates import Updates
from gradwatch.watcher.stepped_parameters import SteppedParameters


class WeightCopies:
    """Copies where the gradients are looked at, or before, if the optimizer moves weights first.

    Where a closure is evaluated in between, copies would lie beside its activations, so that is learned, once a step
    has moved the weights: until then the averages of schedule-free optimizers are where the weights are.
    """

    def __init__(self, stepped: SteppedParameters) -> None:
        """Begin without copies of what is `stepped`."""
        self._stepped = stepped
        self.updates, self._travel = Updates(), Travel()
        self._early = False
        """Whether it was copied before the gradients were looked at."""
        self._has_moved = False
        """Whether a step was seen to move the weights, while it is learned what moves before."""
        self._moves_first: bool | None = None
        """Whether the optimizer moves weights before that, as SAM does; None: nobody has looked."""

    @property
    def wanted_early(self) -> bool:
        """Whether the optimizer moves weights before it has gradients, or may do so."""
        return self._moves_first is not False

    def begin(self, optimizer: Any) -> None:  # noqa: ANN401  (any with step())
        """Copy before anything else."""
        self._early = True
        self._copy(optimizer, complete=False)

    def look(self, optimizer: Any, *, complete: bool) -> None:  # noqa: ANN401
        """Copy now, unless that is done; `complete`: all gradients are there."""
        if not self._early:
            self._copy(optimizer, complete=complete)
        elif self._moves_first is None and self._has_moved:
            self._moves_first = self.updates.moved()

    def _copy(self, optimizer: Any, *, complete: bool) -> None:  # noqa: ANN401
        parameters = self._stepped.now(optimizer)
        with undisturbed():
            self.updates.copy(self._stepped.columns, parameters, complete=complete)
            self._travel.begin(self._stepped.columns, parameters)

    def end(self, measurement: Measurement, optimizer: Any) -> None:  # noqa: ANN401
        """Measure how far the weights with a gradient have moved."""
        with undisturbed():
            if measurement.probe:
                parameters = self._stepped.now(optimizer)
                measurement.came(self._travel.end(measurement.step, self._stepped.columns, parameters))
            if self._early and self._moves_first is None:
                self._has_moved = self._has_moved or self.updates.moved()
            self._early = False
            self.updates.measure(measurement.parameters, measurement.parameters.read, probe=measurement.probe)

    def drop(self) -> None:
        """Let go of the copies."""
        self._early = False
        self.updates.drop()
