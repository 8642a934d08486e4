"""One snapshot -> the history, the findings of the detectors, and the alerts that begin, last and clear."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from gradwatch.detectors import DETECTORS, explain, rules_of
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import Detector, History
from gradwatch.values.report import UNKNOWN, Alert, Explanation, Finding, Report
from gradwatch.values.snapshot import Snapshot


def judge(
    history: History,
    snapshot: Snapshot,
    open_alerts: Iterable[Alert] = (),
    *,
    detectors: Iterable[Detector] = DETECTORS,
    ignore: Sequence[str] = (),
    failed: Callable[[Detector, Exception], object] | None = None,
) -> Report:
    """Fold a snapshot into the history and return what follows from it. The live run and a replay both judge by this.

    Args:
        history: of the snapshots before; the snapshot is added to it.
        snapshot: what one step has measured.
        open_alerts: those of the report before.
        detectors: what judges; the rules that they carry give the alerts their words.
        ignore: what to mute, such as "GW101" or "GW101:encoder.*".
        failed: is told of a detector that raises, and what it found before it did counts; None: the error is passed on.

    """
    detectors, open_alerts = tuple(detectors), tuple(open_alerts)
    rules = rules_of(detectors)
    codes = {alert.finding.code for alert in open_alerts} | history.muted
    history.note_open(
        (alert.finding.key for alert in open_alerts),
        explained=any(code not in rules or rules[code].explains_a_stall for code in codes),
    )
    history.add(snapshot)
    found: list[Finding] = []
    said: dict[int, Explanation] = {}
    onsets = {alert.finding.key: alert.finding.onset for alert in open_alerts}
    history.muted = frozenset()
    for detector in detectors:
        try:
            for finding in detector(history):
                if muted(finding, ignore, history.columns.module_of(finding.place)):
                    history.muted |= {finding.code}
                else:
                    known = replace(_with_cause(history, finding, rules), optimizer=snapshot.optimizer)
                    known = replace(known, onset=onsets.get(known.key, known.onset))
                    # Words that fail are a failure of this detector, and not of all alerts later.
                    said[id(known)] = explain(known, rules)
                    found.append(known)
        except Exception as error:  # a detector of the user's, perhaps
            if failed is None:
                raise
            failed(detector, error)
    began, still, cleared = advance(
        open_alerts,
        found,
        [s.step for s in history.window()] if open_alerts else [snapshot.step],
        optimizer=snapshot.optimizer,
        patience=history.thresholds.window,
        rules=rules,
        said=said,
    )
    before = {(alert.finding.key, alert.began): alert.worst for alert in open_alerts}
    worsened = tuple(a for a in still if a.worst > before.get((a.finding.key, a.began), a.worst))
    return Report(snapshot, began, still, cleared, worsened)


def findings(history: History, detectors: Iterable[Detector] = DETECTORS) -> list[Finding]:
    """Return what the detectors find in a history now, with what was measured of the causes."""
    detectors = tuple(detectors)
    rules = rules_of(detectors)
    return [_with_cause(history, finding, rules) for detector in detectors for finding in detector(history)]


def _with_cause(history: History, finding: Finding, rules: Mapping[str, Rule]) -> Finding:
    rule = rules.get(finding.code)
    return finding if rule is None or rule.cause is None else rule.cause(history, finding)


def muted(finding: Finding, ignore: Iterable[str], module: str | None = None) -> bool:
    """Tell whether one of `ignore` ("GW101", or "GW101:encoder.*" for places that match) mutes the finding.

    Args:
        finding: what was found.
        ignore: the patterns.
        module: that holds the place, which its name stands for too; None: the place itself.

    """
    parts = (pattern.partition(":") for pattern in ignore)
    names = (finding.place, finding.place if module is None else module)
    return any(
        fnmatch.fnmatchcase(finding.code, code)
        and (not place or any(fnmatch.fnmatchcase(name, place) for name in names))
        for code, _, place in parts
    )


def advance(
    open_alerts: Iterable[Alert],
    findings: Iterable[Finding],
    recent: Sequence[int],
    *,
    optimizer: int | None,
    patience: int,
    rules: Mapping[str, Rule],
    said: Mapping[int, Explanation] = MappingProxyType({}),
) -> tuple[tuple[Alert, ...], tuple[Alert, ...], tuple[Alert, ...]]:
    """Let alerts begin, last and clear; pure.

    Args:
        open_alerts: the alerts that are open.
        findings: what was found now.
        recent: steps of the measured snapshots of this optimizer, oldest first, the newest last.
        optimizer: the one that took this step; alerts of the others stay as they are.
        patience: an alert clears after so many snapshots in a row without its finding.
        rules: by code, those that put findings into words.
        said: the words of those findings, by `id`, that have some already.

    Returns:
        The alerts that began now, all that are open, and those that cleared now.

    """
    now = recent[-1]
    found = {f.key: f for f in findings}
    still: list[Alert] = []
    cleared: list[Alert] = []
    for alert in open_alerts:
        finding = found.pop(alert.finding.key, None)
        if finding is not None:
            worst = max(finding.severity, alert.worst)
            if finding.onset != alert.finding.onset:
                finding = replace(finding, onset=alert.finding.onset)
            still.append(_tell(replace(alert, finding=finding, last=now, worst=worst), rules, said))
        elif alert.finding.optimizer == optimizer and sum(step > alert.last for step in recent) >= patience:
            cleared.append(replace(alert, cleared=now))
        else:
            still.append(alert)
    began = [_tell(Alert(finding=f, began=now, last=now, worst=f.severity), rules, said) for f in found.values()]
    return tuple(began), (*still, *began), tuple(cleared)


def _tell(alert: Alert, rules: Mapping[str, Rule], said: Mapping[int, Explanation]) -> Alert:
    words = said.get(id(alert.finding)) or explain(alert.finding, rules)
    rule = rules.get(alert.finding.code)
    if rule is not None and rule.event and alert.cause not in ("", UNKNOWN):
        return replace(alert, message=words.message)
    return replace(alert, message=words.message, cause=words.cause, remedy=words.remedy)
