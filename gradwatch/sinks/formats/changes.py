"""Comparisons -> text, JSON, Markdown, annotations and JUnit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from gradwatch.sinks.formats import judged
from gradwatch.sinks.formats.document import number
from gradwatch.sinks.formats.github import LEVELS, command
from gradwatch.sinks.formats.junit import written
from gradwatch.sinks.formats.markdown import escaped, table
from gradwatch.sinks.log import one_line
from gradwatch.values.comparison import Change, Comparison

FORMAT = 1
_CASES = ("horizon", "gradient", "sensitivity", "dead", "gone", "new", "kind", "renamed", "alert", "cleared", "cost")


def fails(change: Change, fail_on: str) -> bool:
    """Tell whether a change is grave enough to fail."""
    return judged.fails(change.severity, fail_on)


def text(found: Mapping[str, Comparison]) -> str:
    """Return a line for each change, gravest first."""
    lines = []
    for name, one in found.items():
        lines += [f"{one_line(name)}:"] if len(found) > 1 else []
        lines += [f"{change.severity.value:8}{one_line(str(change))}" for change in one.changes]
        lines += [] if one.changes else [f"no change in {one.layers} layers"]
        if abs(one.scale) > 1:
            lines.append(f"all gradients are x{10**one.scale:.2g}, which is no change: another scale of the loss")
    return "\n".join(lines)


def document(found: Mapping[str, Comparison], fail_on: str, version: str) -> str:
    """Return JSON, as docs/diff.schema.json describes it."""
    runs = [
        {
            "name": name if len(found) > 1 else "",
            "layers": one.layers,
            "scale": number(one.scale),
            "changes": [_change(change, fail_on) for change in one.changes],
        }
        for name, one in found.items()
    ]
    failed = any(fails(change, fail_on) for one in found.values() for change in one.changes)
    whole = {"format": FORMAT, "gradwatch": version, "fail_on": fail_on, "failed": failed, "runs": runs}
    return json.dumps(whole, indent=2)


def _change(change: Change, fail_on: str) -> dict[str, Any]:
    return {
        "what": change.what,
        "place": change.place,
        "severity": change.severity.value,
        "fails": fails(change, fail_on),
        "text": change.text,
        "before": None if change.before is None else number(change.before),
        "after": None if change.after is None else number(change.after),
    }


def markdown(found: Mapping[str, Comparison], fail_on: str) -> str:
    """Return a table for each pair of runs."""
    lines: list[str] = []
    for name, one in found.items():
        failed = "changed" if any(fails(change, fail_on) for change in one.changes) else "as before"
        lines += [f"### gradwatch diff{f' {escaped(name)}' if len(found) > 1 else ''}: {failed}"]
        rows = [[c.severity.value, escaped(c.place or "the model"), escaped(c.text)] for c in one.changes]
        lines += table(["severity", "where", "what"], rows) if rows else ["", f"No change in {one.layers} layers."]
        lines += [""]
    return "\n".join(lines)


def commands(found: Mapping[str, Comparison]) -> str:
    """Return annotations of GitHub's workflows."""
    return "\n".join(
        command(LEVELS[change.severity], {"title": f"{change.what}: {change.place or 'the model'}"}, str(change))
        for one in found.values()
        for change in one.changes
    )


def junit(found: Mapping[str, Comparison], fail_on: str) -> str:
    """Return XML: a suite for each pair of runs, a case for each kind of change."""
    root = ET.Element("testsuites", name="gradwatch diff")
    for name, one in found.items():
        title = f"gradwatch diff {one_line(name)}" if len(found) > 1 else "gradwatch diff"
        suite = ET.SubElement(root, "testsuite", name=title)
        for what in _CASES:
            case = ET.SubElement(suite, "testcase", classname=title, name=what)
            mine = [c for c in one.changes if c.what == what and fails(c, fail_on)]
            if mine:
                worst = max(c.severity for c in mine).value
                failure = ET.SubElement(case, "failure", type=worst, message=one_line(str(mine[0])))
                failure.text = "\n".join(one_line(str(c)) for c in mine)
    return written(root)


def seconds_a_step(steps: list[int], times: list[float]) -> float | None:
    """Return the median time from one step to the next, over the pauses between measured ones; None of too few."""
    pairs = zip(steps, steps[1:], times, times[1:], strict=False)
    each = sorted((later - before) / (b - a) for a, b, before, later in pairs if b > a)
    middle = each[len(each) // 2] if len(each) >= 10 else math.nan
    return middle if middle > 0 else None
