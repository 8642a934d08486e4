"""What the visitors of one forward pass have seen of it, brought together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch import Tensor, nn

from gradwatch.measurement.output_gradients import Activations, Heard
from gradwatch.measurement.units import Causes, Seen
from gradwatch.model.forward_hooks import Visitor
from gradwatch.model.layers import named_modules
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import ActivationStats, Cut, Fact
from gradwatch.watcher.through_time import Key, Sequences, ThroughTime
from gradwatch.watcher.warn_once import Once, said


@dataclass
class Forward:
    """What was worked out of one step, on its way from the device."""

    sequences: Sequences = field(default_factory=Sequences)
    heard: Heard = field(default_factory=Heard)
    seen: Seen = field(default_factory=Seen)

    def tensors(self) -> dict[Key, Tensor]:
        """Return everything that is to be copied."""
        return {**self.sequences.tensors(), **self.heard.tensors(), **self.seen.tensors()}

    def values(
        self, numbers: Mapping[Key, Sequence[float]]
    ) -> tuple[tuple[ActivationStats, ...], tuple[SequenceStats, ...], tuple[Fact, ...], tuple[Cut, ...]]:
        """Make values of what was copied."""
        single = {key: values[0] for key, values in numbers.items() if values}
        sequences, facts = self.sequences.values(numbers, single.get(("activations", "changed")))
        activations, more = self.seen.values(single, self.heard.values(single))
        return activations, sequences, (*facts, *more), self.seen.cuts


class Visitors:
    """The visitors of a watcher; one that fails is left out of the step."""

    def __init__(self, time: ThroughTime | None, warn: Once, *, strict: bool) -> None:
        """Begin with nothing seen."""
        self._activations, self._causes, self._time = Activations(), Causes(), time
        self._warn, self._strict = warn, strict

    def all(self) -> list[Visitor]:
        """Return them in the order in which they are called."""
        return [self._activations, self._causes, *([self._time] if self._time is not None else [])]

    def suspect(self, layers: Collection[str]) -> None:
        """Look more closely at these layers, in the forward pass to come."""
        self._causes.suspects = layers

    def take(
        self, model: nn.Module, scale: float | Tensor | None, mine: AbstractSet[int], others: AbstractSet[int]
    ) -> Forward:
        """Return what was seen of the forward pass of this step, and of what came back through it.

        Args:
            model: the watched one.
            scale: the loss scale of the backward pass; None: nobody said.
            mine: what the optimizer of this step steps, parameters by `id`.
            others: what the others step.

        """
        modules = named_modules(model)
        found = Forward()
        try:
            found.heard = self._activations.take(modules, scale, mine, others)
            found.seen = self._causes.take(modules, {*found.heard.norms, *found.heard.unknown}, mine, others)
        except Exception as error:  # the gradients of the parameters are there all the same
            if self._strict:
                raise
            found = Forward()
            self._warn("activations", f"the gradients of what modules give are left out: {said(error)}")
        if self._time is not None:
            found.sequences = self._time.work_out(model, scale, mine, others)
        return found
