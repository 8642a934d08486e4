"""Alerts -> lines of a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from gradwatch.sinks.log import one_line
from gradwatch.values.report import Alert, Severity

COLOURS = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


def alert_lines(alerts: Iterable[Alert], *, began: bool = True) -> list[RenderableType]:
    """Return each alert with its cause and remedy, and when it `began`, gravest first."""
    lines: list[RenderableType] = []
    for alert in sorted(alerts, key=lambda a: a.severity, reverse=True):
        finding = alert.finding
        lines.append(Text(""))
        lines.append(
            Text.assemble(
                (one_line(f"{finding.code} {finding.kind}"), COLOURS[alert.severity]),
                f" ({finding.severity.value}) ",
                (one_line(finding.place) or "the whole model", "bold"),
            )
        )
        until = f"cleared at step {alert.cleared}" if alert.cleared is not None else f"last seen at step {alert.last}"
        when = f"alert began at step {alert.began}, {until}" if began else ""
        for label, said in (("", alert.message), ("why: ", alert.cause), ("try: ", alert.remedy), ("", when)):
            if said:
                lines.append(Padding(Text.assemble((label, "bold"), one_line(said)), (0, 0, 0, 2)))
    return lines
