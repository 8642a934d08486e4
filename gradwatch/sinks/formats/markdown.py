"""Runs -> Markdown, as step summaries, comments and wikis show it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradwatch.sinks.formats.judged import Judged, gravest, place_of, rule_of, when
from gradwatch.sinks.log import printable
from gradwatch.sinks.terminal.page import notes, verdict
from gradwatch.values.report import Severity
from gradwatch.values.sequences import sentences

_MARKED = re.compile(r"[\\`*_{}\[\]<>|~#!&$@]|:(?=\S)|(?<=www)\.", re.IGNORECASE)
"""What Markdown, HTML or a chat of GitHub's takes for more than itself: emphasis, links, mentions, headings."""
_SIGNS = {Severity.INFO: "info", Severity.WARNING: "**warning**", Severity.ERROR: "**error**"}


def escaped(text: str) -> str:
    """Return the text so that Markdown, and the HTML in it, shows it as it is; in one line."""
    flat = " ".join(printable(text).split())
    return _MARKED.sub(lambda found: f"&#{ord(found[0])};", flat)


def markdown(found: Sequence[Judged]) -> str:
    """Return the verdict on each run, how far back it learns, and its alerts as a table."""
    return "\n".join(line for one in found for line in _run(one))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table of cells that are escaped already."""
    marks = " | ".join("---" for _ in head)
    return ["", f"| {' | '.join(head)} |", f"| {marks} |", *(f"| {' | '.join(row)} |" for row in rows)]


def _run(one: Judged) -> list[str]:
    failed = "failed" if one.failing else "passed"
    name = f" {escaped(one.name)}" if one.name else ""
    said = [f"### gradwatch{name}: {failed}", "", escaped(verdict(one.run))]
    sequences = next((s.sequences for s in reversed(one.run.snapshots) if s.sequences), ())
    said += [f"- {escaped(sentence)}" for _, sentence in sentences(sequences)]
    rows = [
        [
            escaped(rule_of(a)),
            _SIGNS[gravest(a)],
            escaped(place_of(a)),
            "<br>".join(map(escaped, filter(None, [a.message, a.cause and f"why: {a.cause}", when(a)]))),
            escaped(a.remedy),
        ]
        for a in one.shown
    ]
    said += table(["rule", "severity", "where", "what", "try"], rows) if rows else []
    said += ["", *(f"Note: {escaped(note)}." for note in notes(one.run)), ""]
    return said
