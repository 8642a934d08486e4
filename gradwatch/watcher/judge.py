"""What follows a measurement: history, findings, alerts, and the report to the sinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradwatch.detectors.alerts import judge
from gradwatch.detectors.suspects import suspects
from gradwatch.sinks.log import log_end, log_report
from gradwatch.sinks.reading import Run, read_run
from gradwatch.values.history import Detector, History
from gradwatch.values.plain import alert_from_plain, to_plain
from gradwatch.values.report import GradientHealthError, Report, Severity, Sink
from gradwatch.values.snapshot import Snapshot
from gradwatch.watcher.options import Options
from gradwatch.watcher.warn_once import WarnOnce, name_of, said


class Judge:
    """Folds snapshots into the history and tells the sinks what the detectors make of it."""

    def __init__(
        self, first: Snapshot, options: Options, sinks: Sequence[Sink], warn: WarnOnce, *, strict: bool
    ) -> None:
        """Begin with a report without numbers, on the snapshot `first`."""
        self.history = History(options.thresholds)
        self.sinks = list(sinks)
        self.report = Report(first)
        self._detectors, self._ignore, self._on_alert = list(options.detectors), options.ignore, options.on_alert
        self._warn, self._strict = warn, strict

    def __call__(self, snapshot: Snapshot) -> tuple[Report, GradientHealthError | None]:
        """Hand a snapshot to the history, what the detectors find to the alerts, and the report to the sinks.

        Returns:
            The report, and what `on_alert="raise"` wants to be raised for it.

        """
        self.report = report = judge(
            self.history,
            snapshot,
            self.report.open,
            detectors=self._detectors,
            ignore=self._ignore,
            failed=None if self._strict else self._without,
        )
        for sink in tuple(self.sinks):
            try:
                sink(report)
            except Exception as error:  # noqa: BLE001  (a full disk, a closed writer, a sink of the user's)
                self.sinks.remove(sink)
                self._warn(f"sink {id(sink)}", f"the sink {name_of(sink)} failed and is switched off: {said(error)}")
        return report, self._tell(report)

    def end(self) -> None:
        """Say what is still open, unless a function of the user's takes the alerts."""
        if not callable(self._on_alert):
            log_end(self.report)

    def suspects(self) -> frozenset[str]:
        """Return the layers of which the next probe is to measure more."""
        return suspects(self.history, self.report.snapshot.model, self.report.open)

    def run(self, directory: Path | None) -> Run:
        """Return the run up to now: all that is recorded, or without a record what verdicts remember."""
        if directory is not None:
            run = read_run(directory)
            newest = {(*alert.finding.key, alert.began): alert for alert in (*run.alerts, *self.report.open)}
            return dataclasses.replace(run, alerts=tuple(newest.values()))
        snapshots = self.history.remembered
        models = {id(s.model): s.model for s in snapshots}
        return Run(tuple(models.values()), tuple(snapshots), self.report.open)

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the open alerts as plain values."""
        return {"history": self.history.state_dict(), "alerts": [to_plain(alert) for alert in self.report.open]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the files too, instead of beginning anew.

        Raises:
            KeyError, IndexError, TypeError, ValueError, AttributeError: it is not what that gives; nothing has changed.

        """
        written = state["history"].get("format", 1)
        alerts = tuple(alert_from_plain(alert, written) for alert in state["alerts"])
        history = History(self.history.thresholds)
        history.load_state_dict(state["history"])
        self.history, self.report = history, dataclasses.replace(self.report, open=alerts)
        for sink in self.sinks:
            getattr(sink, "resume", lambda: None)()

    def _without(self, detector: Detector, error: Exception) -> None:
        self._detectors.remove(detector)
        self._warn(
            f"detector {id(detector)}", f"the detector {name_of(detector)} failed and is switched off: {said(error)}"
        )

    def _tell(self, report: Report) -> GradientHealthError | None:
        if callable(self._on_alert):
            try:
                for alert in (*report.began, *report.worsened):
                    self._on_alert(alert)
            except Exception as error:  # noqa: BLE001  (the user's own function)
                self._on_alert = "warn"
                self._warn("on_alert", f"on_alert failed; alerts go to the logger from now on: {said(error)}")
        if not callable(self._on_alert):
            log_report(report)
        errors = [a for a in (*report.began, *report.worsened) if a.severity is Severity.ERROR]
        if self._on_alert != "raise" or not errors:
            return None
        return GradientHealthError("\n".join(map(str, errors)), errors)
