"""One stock model, how it is trained, and what gradwatch said of it."""

from __future__ import annotations

import random
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch import Alert, Report, Severity, watch

CAME_DOWN = 0.95
"""The last losses over the first ones, below which the loss came down: fresh batches scatter by 1 or 2 %."""
ENDS = 10
"""How many first and last losses are compared, by their medians."""


@dataclass
class Heard:
    """What a watcher said: a sink, handed to `watch` or to the callback of Lightning."""

    losses: list[float] = field(default_factory=list)
    alerts: dict[tuple[Any, ...], Alert] = field(default_factory=dict)
    """The newest form of each alert, which has the cause that a later probe measured."""
    worst: dict[tuple[Any, ...], Severity] = field(default_factory=dict)

    def __call__(self, report: Report) -> None:
        """Note the loss of the step, and what is said with it."""
        if report.snapshot.loss is not None and report.snapshot.norm is not None:
            self.losses.append(report.snapshot.loss)
        for alert in (*report.began, *report.open, *report.cleared):
            key = (*alert.finding.key, alert.began)
            self.alerts[key] = alert
            self.worst[key] = max(alert.severity, self.worst.get(key, Severity.INFO))


Train = Callable[[int, int, Heard], object]
"""Width, steps and the sink; returns what need not outlive the training."""


@dataclass(frozen=True)
class Stock:
    """A stock model."""

    name: str
    train: Train


@dataclass
class Outcome:
    """How the training went, and what was said."""

    library: str
    name: str
    width: int
    steps: int
    seconds: float = 0.0
    first: float | None = None
    last: float | None = None
    came_down: bool = False
    alerts: list[dict[str, Any]] = field(default_factory=list)
    """Those of severity warning or error, at their worst."""
    infos: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What gradwatch could not do."""
    failed: str = ""
    """The exception, where the training did not run."""

    def __str__(self) -> str:
        """Say it in a line, and in one more for each accusation."""
        if self.failed:
            return f"{self.name:32} {self.width:4}  FAILED {self.failed.splitlines()[-1][:160]}"
        loss = "no loss" if self.first is None or self.last is None else f"{self.first:9.4g} -> {self.last:9.4g}"
        head = f"{self.name:32} {self.width:4}  {loss}{'' if self.came_down else ' (stood still)'}"
        lines = [f"{head}  {len(self.alerts)} accused, {len(self.infos)} infos, {self.seconds:.1f} s"]
        lines += [
            f"    {a['severity']} {a['code']} {a['place'] or '(model)'} at {a['began']}"
            + ("" if a["cleared"] is None else f" to {a['cleared']}")
            + f": {a['message']}. {a['cause']}"
            for a in self.alerts
        ]
        return "\n".join([*lines, *(f"    gradwatch: {text}" for text in self.warnings)])


def judged(library: str, stock: Stock, width: int, steps: int) -> Outcome:
    """Train a stock model with gradwatch watching, at its default settings."""
    outcome, heard = Outcome(library, stock.name, width, steps), Heard()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    began = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            stock.train(width, steps, heard)
        except Exception:  # noqa: BLE001  (one model that does not run leaves the others)
            outcome.failed = traceback.format_exc()
    outcome.seconds = time.process_time() - began
    outcome.warnings = sorted({str(w.message) for w in caught if "gradwatch" in w.category.__module__})
    if heard.losses:
        outcome.first = statistics.median(heard.losses[:ENDS])
        outcome.last = statistics.median(heard.losses[-ENDS:])
        outcome.came_down = outcome.last < outcome.first - (1 - CAME_DOWN) * abs(outcome.first)
    for key, alert in heard.alerts.items():
        said = {
            "code": alert.finding.code,
            "severity": heard.worst[key].value,
            "place": alert.finding.place,
            "began": alert.began,
            "cleared": alert.cleared,
            "message": alert.message,
            "cause": alert.cause,
            "remedy": alert.remedy,
            "evidence": dict(alert.finding.evidence),
        }
        (outcome.alerts if heard.worst[key] > Severity.INFO else outcome.infos).append(said)
    return outcome


def fit(model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, heard: Heard, *, lr: float) -> None:
    """Train in a plain loop, as docs/loops.md says."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    with watch(model, optimizer, sinks=[heard], on_alert=unsaid) as watcher:
        for step in range(steps):
            loss = loss_of(step)
            watcher.record(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def unsaid(alert: Alert) -> None:
    """Take an alert that the sink has heard."""
