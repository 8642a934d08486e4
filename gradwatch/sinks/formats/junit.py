"""Runs -> JUnit XML: a suite for each run, a case for each rule."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from gradwatch.sinks.formats.judged import Judged, gravest, lines, place_of, rule_of
from gradwatch.sinks.log import one_line, printable
from gradwatch.sinks.terminal.page import notes, verdict

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run


def junit(found: Sequence[Judged], rules: Mapping[str, str]) -> str:
    """Return XML.

    Args:
        found: the runs.
        rules: the kinds of all rules, by code; one that has nothing to judge by in a run is skipped there.

    """
    root = ET.Element("testsuites", name="gradwatch")
    for one in found:
        _suite(root, one, rules)
    return written(root)


def written(root: ET.Element) -> str:
    """Return suites as XML, with their counts, and without what XML cannot hold."""
    for element in root.iter():
        element.text = _clean(element.text) if element.text else element.text
        element.attrib.update({key: _clean(value) for key, value in element.attrib.items()})
    _count(root)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}'


def _suite(root: ET.Element, one: Judged, rules: Mapping[str, str]) -> None:
    name = f"gradwatch {one_line(one.name)}" if one.name else "gradwatch"
    suite = ET.SubElement(root, "testsuite", name=name)
    codes = dict(rules) | {a.finding.code: a.finding.kind for a in one.run.alerts}
    for code, kind in sorted(codes.items()):
        case = ET.SubElement(suite, "testcase", classname=name, name=one_line(f"{code} {kind}"))
        mine = [a for a in one.failing if a.finding.code == code]
        if mine:
            gravest_of = max(map(gravest, mine)).value
            places = ", ".join(map(place_of, mine))
            failure = ET.SubElement(case, "failure", type=gravest_of, message=f"{rule_of(mine[0])}: {places}")
            failure.text = "\n\n".join("\n".join([place_of(a), *lines(a)]) for a in mine)
        elif not any(a.finding.code == code for a in one.run.alerts) and (why := _nothing_to_judge(code, one.run)):
            ET.SubElement(case, "skipped", message=why)
    ET.SubElement(suite, "system-out").text = "\n".join([verdict(one.run), *(f"Note: {n}." for n in notes(one.run))])


def _nothing_to_judge(code: str, run: Run) -> str:
    """Say why a rule could not judge a run; "" where it could."""
    if not run.snapshots:
        return "no step was recorded"
    if code.startswith("GW3") and not any(s.sequences for s in run.snapshots):
        return "no gradients through time were recorded"
    if code.startswith("GW8") and all(s.loss is None for s in run.snapshots):
        return "no loss was recorded"
    if code == "GW601" and not any(s.activations for s in run.snapshots):
        return "what modules give was not recorded"
    return ""


def _count(root: ET.Element) -> None:
    for element in (*root.findall("testsuite"), root):
        cases = list(element.iter("testcase"))
        element.set("tests", str(len(cases)))
        element.set("failures", str(sum(case.find("failure") is not None for case in cases)))
        element.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
        element.set("errors", "0")


def _clean(text: str) -> str:
    """Leave out what XML cannot hold: control characters, and half of a pair of surrogates."""
    shown = "\n".join(map(printable, text.split("\n")))
    return re.sub("[\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", shown)
