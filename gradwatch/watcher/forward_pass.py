"""The forward pass before a probe: looked at when an optimizer's next step is one, and not a moment longer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet

from torch import Tensor

from gradwatch.measurement.model_map import ModelMap
from gradwatch.measurement.transfer import Transfer
from gradwatch.model.forward_hooks import ForwardTrace, Part
from gradwatch.model.layers import named_modules
from gradwatch.watcher.probes import Probes
from gradwatch.watcher.warn_once import WarnOnce


class ForwardPass:
    """Arms the probes of a watcher for the steps that wait for them, and disarms them when the last of those has come.

    Steps are told apart by the index of their optimizer.
    """

    def __init__(
        self, model_map: ModelMap, probes: Probes, suspects: Callable[[], Collection[str]], warn: WarnOnce
    ) -> None:
        """Begin without looking; `suspects` names the layers that are to be looked at more closely."""
        self._model_map, self._probes, self._suspects, self._warn = model_map, probes, suspects, warn
        self._trace = ForwardTrace(probes.all(), probes.failed, probes.attempts)
        self._waiting: set[int] = set()
        self._closely: dict[int, Collection[str]] = {}
        """By optimizer, layers that it wants looked at more closely, whatever else is in question."""
        self._closed = False

    def look_ahead(self, optimizer: int, closely: Collection[str] = ()) -> None:
        """Look at the forward pass of this optimizer's next step; under torch.compile, at recurrent modules alone.

        Args:
            optimizer: its index.
            closely: layers to look at more closely, beside those that are in question.

        """
        if self._closed:
            return
        self._closely[optimizer] = closely
        self._suspect()
        model = self._model_map.model
        if not self._trace.armed and model is not None:
            self._trace.arm(named_modules(model))
        if self._trace.armed:
            self._waiting.add(optimizer)
        if self._trace.compiled:
            reason = "torch.compile is in use, and compiled code calls no hooks"
            self._warn("compiled", f"the forward pass is not measured: {reason}")

    def look_closer(self, optimizer: int) -> None:
        """If this optimizer's next step waits for the probes, point them at what is in question by now."""
        if self.awaited_by(optimizer):
            self._suspect()

    def _suspect(self) -> None:
        self._probes.suspect({*self._suspects(), *(name for names in self._closely.values() for name in names)})

    def made(self, loss: Tensor) -> None:
        """If anybody looks at this step, look at how its loss is made of what the model gave."""
        if self._waiting and not self._trace.compiled:
            self._probes.made(loss)

    def awaited_by(self, optimizer: int) -> bool:
        """Tell whether the next step of this optimizer waits for what the probes see."""
        return optimizer in self._waiting

    def seen(
        self, scale: float | Tensor | None, mine: AbstractSet[int], others: AbstractSet[int], transfer: Transfer
    ) -> list[Part]:
        """Return what the probes have seen of the step that is at hand; see `Probes.collect`."""
        model = self._model_map.model
        return [] if model is None else self._probes.collect(model, scale, mine, others, transfer)

    def release(self, optimizer: int) -> tuple[str, ...] | None:
        """Look no more for this optimizer; return the modules that ran, in their order, None where nobody saw that."""
        if optimizer not in self._waiting:
            return None
        self._waiting.discard(optimizer)
        self._closely.pop(optimizer, None)
        if not self._waiting:
            self._trace.disarm()
        return None if self._trace.compiled else self._trace.ran

    @property
    def applied(self) -> Mapping[int, int]:
        """By weight, by `id`, when something was made of it in what was last looked at, where that is known."""
        return self._probes.applied

    @property
    def half(self) -> bool:
        """Whether autocast to float16 was on in what was last looked at."""
        return self._trace.half

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Let no other watcher see what runs within the block."""
        return self._trace.alone()

    def close(self) -> None:
        """Look no more, whoever asks."""
        self._closed = True
        self._trace.disarm()
