"""A run in a sentence or two: what to see at the first glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gradwatch.values.report import Alert, Severity
from gradwatch.values.sequences import sentences
from gradwatch.values.thresholds import Thresholds

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run

_WITHOUT = ("GW101", "GW102", "GW401", "GW901")
"""Codes of alerts whose layers get no gradient, or next to none."""
_SHORT = "GW301"
_ORDER = ("error", "warning", "ok", "info")

Sentence = dict[str, str]
"""Its severity ("ok", "info", "warning", "error"), the text, and a remedy or ""."""


def headline(run: Run, layers: Sequence[str], rows: Mapping[int, Sequence[int]]) -> list[Sentence]:
    """Return sentences, the gravest first.

    Args:
        run: what is told of.
        layers: names of all layers, in the order of the forward pass.
        rows: by `id` of an alert, the layers that it is about.

    """
    if not run.snapshots:
        return [_said("info", "nothing was recorded")]
    said = sorted(
        [*_of_layers(run, layers, rows), *_of_time(run), *_of_others(run)], key=lambda s: _ORDER.index(s["severity"])
    )
    if not any(one["severity"] in ("error", "warning") for one in said):
        said.insert(0, _nothing_found(run))
    return said


def _said(severity: str, text: str, remedy: str = "") -> Sentence:
    return {"severity": severity, "text": text, "remedy": remedy}


def _nothing_found(run: Run) -> Sentence:
    steps = len({s.step for s in run.snapshots})
    counted = f"{steps:,} measured step{'s' * (steps != 1)}"
    infos = len(run.alerts)
    more = f" ({infos} for information, below)" if infos else ""
    if steps < Thresholds().window:
        return _said("info", f"no alert in {counted}, too few for most verdicts{more}")
    return _said("ok", f"no warning and no error in {counted}{more}")


def _since(alerts: Sequence[Alert]) -> int:
    return min(a.since for a in alerts)


def _grave(run: Run) -> list[Alert]:
    return [alert for alert in run.alerts if alert.worst > Severity.INFO]


def _of_layers(run: Run, layers: Sequence[str], rows: Mapping[int, Sequence[int]]) -> list[Sentence]:
    """Say how many layers get no gradient, and which."""
    alerts = [a for a in _grave(run) if a.finding.code in _WITHOUT]
    still = [a for a in alerts if a.cleared is None]
    found = still or alerts
    if not found:
        return []
    worst, mine = max(found, key=lambda a: a.worst), sorted({row for a in found for row in rows[id(a)]})
    if not mine:
        return [_said(worst.worst.value, f"since step {_since(found)} {worst.message}", worst.remedy)]
    first, last = layers[mine[0]] or "the model", layers[mine[-1]] or "the model"
    which = (
        first
        if len(mine) == 1
        else f"{first} to {last}"
        if mine[-1] - mine[0] + 1 == len(mine)
        else f"{first} ... {last}"
    )
    get = ("gets" if len(mine) == 1 else "get") if still else "got"
    text = f"{len(mine)} of {len(layers)} layers ({which}) {get} next to no gradient since step {_since(found)}"
    if not still:
        text += f", until step {max(a.cleared or 0 for a in found)}"
    return [_said(worst.worst.value, text, worst.remedy if still else "")]


def _of_time(run: Run) -> list[Sentence]:
    """Say how far back the model learns: as its alerts say it, or as the newest probe does."""
    short = [a for a in _grave(run) if a.finding.code == _SHORT and a.cleared is None]
    if short:
        return [_said(a.worst.value, f"since step {_since([a])} {a.message}", a.remedy) for a in short[:2]]
    newest = next((s.sequences for s in reversed(run.snapshots) if s.sequences), ())
    told = list(sentences(newest))
    whole = [words for stats, words in told if stats.part == "model"] or [words for _, words in told[:1]]
    return [_said("info", words) for words in whole[:2]]


def _of_others(run: Run) -> list[Sentence]:
    """Say what else is wrong, one sentence a kind."""
    kinds: dict[str, list[Alert]] = {}
    for alert in _grave(run):
        if alert.finding.code not in _WITHOUT and (alert.finding.code != _SHORT or alert.cleared is not None):
            kinds.setdefault(alert.finding.kind, []).append(alert)
    said = []
    for kind, alerts in kinds.items():
        still = [a for a in alerts if a.cleared is None]
        first = min(still or alerts, key=lambda a: a.began)
        over = "" if still else f" (over since step {max(a.cleared or 0 for a in alerts)})"
        more = f", and {len(alerts) - 1} more of this kind" if len(alerts) > 1 else ""
        worst = max(a.worst for a in alerts).value
        said.append(_said(worst, f"{kind}: {first.message}{more}{over}", first.remedy if still else ""))
    return said
