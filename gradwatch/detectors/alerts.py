"""Open alerts and new findings -> the alerts that begin, last and clear."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from gradwatch.values.report import UNKNOWN, Alert, Explanation, Finding

_EVENTS = frozenset({"exploding", "dead-units", "non-finite"})
"""Kinds that something has set off: its cause is what was found first, and not what it made of the weights since."""


def muted(finding: Finding, rules: Iterable[str]) -> bool:
    """Tell whether one of `rules` ("GW101", or "GW101:encoder.*" for places that match) mutes the finding."""
    parts = (rule.partition(":") for rule in rules)
    return any(
        fnmatch.fnmatchcase(finding.code, code) and (not place or fnmatch.fnmatchcase(finding.place, place))
        for code, _, place in parts
    )


def advance(
    open_alerts: Iterable[Alert],
    findings: Iterable[Finding],
    recent: Sequence[int],
    *,
    optimizer: int | None,
    patience: int,
    explain: Callable[[Finding], Explanation],
) -> tuple[tuple[Alert, ...], tuple[Alert, ...], tuple[Alert, ...]]:
    """Let alerts begin, last and clear; pure.

    Args:
        open_alerts: the alerts that are open.
        findings: what was found now.
        recent: steps of the measured snapshots of this optimizer, oldest first, the newest last.
        optimizer: the one that took this step; alerts of the others stay as they are.
        patience: an alert clears after so many snapshots in a row without its finding.
        explain: puts a finding into words.

    Returns:
        The alerts that began now, all that are open, and those that cleared now.

    """
    now = recent[-1]
    found = {f.key: f for f in findings}
    began: list[Alert] = []
    still: list[Alert] = []
    cleared: list[Alert] = []
    for alert in open_alerts:
        finding = found.pop(alert.finding.key, None)
        if finding is not None:
            still.append(_tell(replace(alert, finding=replace(finding, onset=alert.finding.onset), last=now), explain))
        elif alert.finding.optimizer == optimizer and sum(step > alert.last for step in recent) >= patience:
            cleared.append(replace(alert, cleared=now))
        else:
            still.append(alert)
    began = [_tell(Alert(finding=f, began=now, last=now), explain) for f in found.values()]
    return tuple(began), (*still, *began), tuple(cleared)


def _tell(alert: Alert, explain: Callable[[Finding], Explanation]) -> Alert:
    said = explain(alert.finding)
    if alert.finding.kind in _EVENTS and alert.cause not in ("", UNKNOWN):
        return replace(alert, message=said.message)
    return replace(alert, message=said.message, cause=said.cause, remedy=said.remedy)
