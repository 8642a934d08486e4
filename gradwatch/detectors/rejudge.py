"""Recorded snapshots -> what today's rules say of them, without the model and without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from gradwatch.detectors.alerts import judge
from gradwatch.values.history import History
from gradwatch.values.report import UNKNOWN, Alert
from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import Thresholds

NOT_RECORDED = "cause not recorded"
"""What is said where the probes of the run had no reason to look for it: they ask about layers in an alert."""


def rejudged(
    snapshots: Iterable[Snapshot], thresholds: Thresholds | None = None, ignore: Sequence[str] = ()
) -> tuple[Alert, ...]:
    """Return the alerts that the rules of this version give, each as it was last, in the order in which they began.

    Args:
        snapshots: of a run, in their order.
        thresholds: as for `gradwatch.watch`.
        ignore: as for `gradwatch.watch`.

    """
    history = History(Thresholds() if thresholds is None else thresholds)
    still: tuple[Alert, ...] = ()
    found: dict[tuple[object, ...], Alert] = {}
    for snapshot in snapshots:
        report = judge(history, snapshot, still, ignore=ignore)
        still = report.open
        for alert in (*report.open, *report.cleared):
            found[*alert.finding.key, alert.began] = alert
    return tuple(dataclasses.replace(a, cause=NOT_RECORDED) if a.cause == UNKNOWN else a for a in found.values())
