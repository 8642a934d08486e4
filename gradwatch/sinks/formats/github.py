"""What fails -> annotations of GitHub's workflows, and the step's summary."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradwatch.sinks.formats.judged import Judged, gravest, lines, title
from gradwatch.sinks.log import printable
from gradwatch.values.report import Alert, Severity

LEVELS = {Severity.INFO: "notice", Severity.WARNING: "warning", Severity.ERROR: "error"}
SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file to which a step's summary is appended."""


def commands(found: Sequence[Judged]) -> list[str]:
    """Return a line for each alert that is shown: an error, a warning or a notice, at the class of its layer."""
    return [_annotation(one, alert) for one in found for alert in one.shown]


def _annotation(one: Judged, alert: Alert) -> str:
    properties = {**_location(one, alert), "title": title(alert)}
    said = "\n".join([*([f"run {one.name}"] if one.name else []), *lines(alert)])
    return command(LEVELS[gravest(alert)], properties, said)


def command(name: str, properties: Mapping[str, str], message: str) -> str:
    """Return a workflow command, which nothing in a name or a text can end or begin."""
    given = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
    return f"::{name} {given}::{_escaped(message)}"


def _escaped(text: str, also: str = "") -> str:
    clean = "\n".join(map(printable, text.split("\n")))
    for sign in "%\r\n" + also:
        clean = clean.replace(sign, f"%{ord(sign):02X}")
    return clean


def _location(one: Judged, alert: Alert) -> dict[str, str]:
    """Return file and line of the class of a layer, relative to the working folder; nothing where it is not in it."""
    for model in reversed(one.run.models):
        for layer in model.layers:
            if alert.finding.place in (layer.name, layer.module) and layer.location:
                file, _, line = layer.location.rpartition(":")
                within = Path(file)
                if within.is_relative_to(Path.cwd()) and line.isdigit():
                    return {"file": within.relative_to(Path.cwd()).as_posix(), "line": line}
    return {}


def append_summary(text: str) -> None:
    """Append Markdown to the step's summary, where there is one."""
    path = os.environ.get(SUMMARY)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
