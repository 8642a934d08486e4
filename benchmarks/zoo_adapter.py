"""The labelled runs of the zoo, watched by gradwatch in the hook form: `evaluate(case)` gives the alerts.

PYTHONPATH=../shared python -m zoo.run --adapter benchmarks.zoo_adapter --adapter benchmarks.zoo_adapter_without_loss -v
"""

from __future__ import annotations

from typing import Any

from gradwatch import Alert, watch

Alarm = tuple[str, str, int, str]


class Observer:
    """Attaches at the start of a run, hands over the loss, and collects what begins."""

    def __init__(self, *, loss: bool, horizon: int | None) -> None:
        """Tell the watcher the loss of each step, or not, and how many of the newest timesteps matter, where known."""
        self._loss, self._horizon = loss, horizon
        self.alarms: list[Alarm] = []

    def start(self, run: Any) -> None:
        """Attach to the model and all of its optimizers, with the defaults."""
        self._step = 0
        self._watcher = watch(run.model, run.optimizers, horizon=self._horizon, on_alert=self._heard)

    def before_step(self, run: Any, i: int) -> None:
        """Note the number of the step."""
        self._step = i

    def after_backward(self, run: Any, i: int) -> None:
        """Hand over the loss where the loop has it: after backward, before the optimizer's step."""
        if self._loss and run.loss is not None:
            self._watcher.record(run.loss)

    def after_step(self, run: Any, i: int) -> None:
        """Leave the rest to the hooks."""

    def _heard(self, alert: Alert) -> None:
        self.alarms.append((alert.finding.kind, alert.finding.place, self._step, alert.severity.value))


def evaluate(case: Any, *, loss: bool = True) -> list[Alarm]:
    """Watch one run from its beginning to its end."""
    lag = case.hints.get("horizon")  # the largest that matters, so one more timestep does
    observer = Observer(loss=loss, horizon=None if lag is None else lag + 1)
    case.open().go(observer)
    return observer.alarms
