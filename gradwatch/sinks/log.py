"""Alerts -> the logger `gradwatch`."""

from __future__ import annotations

import logging
import re

from gradwatch.values.report import Alert, Report, Severity
from gradwatch.values.snapshot import ModelInfo

_log = logging.getLogger("gradwatch")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, and those that end a line or turn the direction of a whole sentence around."""
_LEVELS = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.ERROR: logging.ERROR}


def log_report(report: Report) -> None:
    """Send the alerts that began, worsened or cleared to the logger `gradwatch`."""
    for alert in (*report.began, *report.worsened):
        log_alert(alert)
    for alert in report.cleared:
        _log.info(
            "%s %s at %s cleared at step %d",
            alert.finding.code,
            alert.finding.kind,
            alert.finding.place or "the whole model",
            alert.cleared,
        )


def log_left_out(model: ModelInfo) -> None:
    """Say to the logger `gradwatch` which parameters are to be trained and in no optimizer, where some are."""
    if model.unstepped:
        count, of = len(model.unstepped), len(model.parameters)
        line = f"{count} of {of} parameters are in no optimizer that is watched: {model.named(model.unstepped)}"
        _log.info("%s", printable(line))


def log_alert(alert: Alert) -> None:
    """Send one alert to the logger `gradwatch`, at the level of its severity."""
    _log.log(_LEVELS[alert.severity], "%s", printable(str(alert)))


def log_end(report: Report) -> None:
    """Send the alerts that are open at the end to the logger `gradwatch`, worst first, in one line; none is no line."""
    still = sorted(report.open, key=lambda alert: alert.severity, reverse=True)
    if still:
        said = "; ".join(
            f"{a.finding.code} {a.finding.kind} at {a.finding.place or 'the whole model'} since step {a.finding.onset}"
            for a in still
        )
        line = f"at the end {len(still)} alert{'s are' if len(still) > 1 else ' is'} open: {said}"
        _log.log(_LEVELS[still[0].severity], "%s", printable(line))


def one_line(text: str) -> str:
    """Return a name or a sentence as one line that no terminal obeys, nor GitHub's runner, which looks for `::`."""
    return printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}").replace("::", ": :")


def printable(text: str) -> str:
    """Return the text with what a terminal would obey made visible, for instance in the names of a foreign record."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
