"""A run and what of it fails, as every format says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.sinks.log import one_line
from gradwatch.values.report import Alert, Severity

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run


@dataclass(frozen=True)
class Judged:
    """A run, its name where there are several, and the alerts by which it fails."""

    name: str
    run: Run
    failing: tuple[Alert, ...]
    shown: tuple[Alert, ...]
    """Those that are told, gravest first: what fails, and warnings and errors that do not."""


def judged(runs: Mapping[str, Run], fail_on: str, *, every: bool = False) -> list[Judged]:
    """Tell which alerts of runs fail them.

    Args:
        runs: by name.
        fail_on: one of `gradwatch.values.configuration.FAIL_ON`.
        every: whether alerts for information are shown too.

    """
    least = Severity.INFO if every or fail_on == "info" else Severity.WARNING
    found = []
    for name, run in runs.items():
        failing = tuple(a for a in run.alerts if fails(gravest(a), fail_on))
        shown = tuple(sorted((a for a in run.alerts if gravest(a) >= least), key=gravest, reverse=True))
        found.append(Judged(name if len(runs) > 1 else "", run, failing, shown))
    return found


def fails(severity: Severity, fail_on: str) -> bool:
    """Tell whether what has this severity fails."""
    return fail_on != "never" and severity >= Severity(fail_on)


def gravest(alert: Alert) -> Severity:
    """Return the highest severity that an alert ever had."""
    return max(alert.severity, alert.worst)


def place_of(alert: Alert) -> str:
    """Return where an alert is, in words."""
    return one_line(alert.finding.place) or "the whole model"


def title(alert: Alert) -> str:
    """Return code, kind and place."""
    return f"{rule_of(alert)}: {place_of(alert)}"


def rule_of(alert: Alert) -> str:
    """Return code and kind."""
    return one_line(f"{alert.finding.code} {alert.finding.kind}")


def when(alert: Alert) -> str:
    """Say from when to when an alert was there."""
    until = f"cleared at step {alert.cleared}" if alert.cleared is not None else f"last seen at step {alert.last}"
    return f"alert began at step {alert.began}, {until}"


def lines(alert: Alert) -> list[str]:
    """Return what an alert says, why, what to do, and when it was there."""
    parts = [(alert.message, ""), (alert.cause, "why: "), (alert.remedy, "try: "), (when(alert), "")]
    return [f"{label}{one_line(said)}" for said, label in parts if said]
