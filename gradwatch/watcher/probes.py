"""The probes of a watcher: what looks at the forward pass of a step, and is asked for what it saw at the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

from torch import Tensor, nn

from gradwatch.measurement import norms
from gradwatch.measurement.flow import FlowProbe
from gradwatch.measurement.loss_scale import ScaleSentinel
from gradwatch.measurement.origins import Origins
from gradwatch.measurement.output_gradients import OutputGradients
from gradwatch.measurement.strays import Strays
from gradwatch.measurement.transfer import Transfer
from gradwatch.measurement.units import Units
from gradwatch.model.attempts import Attempts
from gradwatch.model.forward_hooks import Part, Probe, StepView
from gradwatch.model.layers import named_modules
from gradwatch.timesteps.sequences import Sequences
from gradwatch.watcher.warn_once import WarnOnce, said


class Probes:
    """The probes of a watcher; one that fails is left out of the step, and a warning says so once."""

    def __init__(self, sequences: Sequences | None, attempts: Attempts, warn: WarnOnce, *, strict: bool) -> None:
        """Begin with nothing seen.

        Args:
            sequences: the probe of sequence modules, if they are to be seen.
            attempts: what the probes know calls by.
            warn: says what goes wrong.
            strict: raises what goes wrong at the step.

        """
        self.attempts = attempts
        outputs = OutputGradients(attempts)
        self._sentinel, self._units, self._flow = (
            ScaleSentinel(outputs.passes),
            Units(attempts),
            FlowProbe(outputs, attempts),
        )
        self._asked: list[Probe] = [outputs, self._units, self._flow, Origins(outputs, attempts), Strays(attempts)]
        if sequences is not None:
            self._asked.append(sequences)
        self._warn, self._strict = warn, strict

    def all(self) -> list[Probe]:
        """Return them in the order in which they look."""
        return [self._sentinel, *self._asked]

    @property
    def applied(self) -> Mapping[int, int]:
        """By weight, by `id`, when something was made of it in the step that was collected last, if that is known."""
        return self._flow.applied

    def made(self, loss: Tensor) -> None:
        """Look at how a loss is made of what the model gave."""
        try:
            self._flow.made(loss)
        except Exception as error:  # a node that torch has changed
            if self._strict:
                raise
            self.failed(error)

    def suspect(self, layers: Collection[str]) -> None:
        """Look more closely at these layers, in the forward pass to come."""
        self._units.suspects = self._flow.suspects = layers

    def collect(
        self,
        model: nn.Module,
        scale: float | Tensor | None,
        mine: AbstractSet[int],
        others: AbstractSet[int],
        transfer: Transfer,
    ) -> list[Part]:
        """Return what was seen of the forward pass of this step, and of what came back through it.

        Args:
            model: the watched one.
            scale: the loss scale of the backward pass; None: nobody said.
            mine: what the optimizer of this step steps, parameters by `id`.
            others: what the others step.
            transfer: takes their numbers along.

        """
        self.attempts.settle()
        told = transfer.add(norms.number(scale)) if scale is not None else None
        step = StepView(named_modules(model), mine, others, told)
        try:
            step = dataclasses.replace(step, changed=self._sentinel.changed(step, self.attempts.broken, transfer))
        except Exception as error:  # then it is not known whether a loss scale is on it
            if self._strict:
                raise
            self._sentinel.clear()
            self.failed(error)
        parts = [self._sentinel.collect(step, transfer)]
        for probe in self._asked:
            try:
                parts.append(probe.collect(step, transfer))
            except Exception as error:  # the gradients of the parameters are there all the same
                if self._strict:
                    raise
                probe.clear()
                self.failed(error)
        return parts

    def failed(self, error: Exception) -> None:
        """Say that something of a step could not be looked at."""
        self._warn("probe", f"a probe failed and is left out: {said(error)}")
