"""A run in a sentence or two: what to see at the first glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.values.report import Alert, Severity
from gradwatch.values.sequences import sentences

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run

_WITHOUT = ("GW101", "GW102", "GW401", "GW901")
"""Codes of alerts whose layers get no gradient, or next to none."""
_DEAD = "GW601"


def headline(run: Run, layers: int) -> list[dict[str, str]]:
    """Return sentences, the gravest first, each with its severity ("ok", "info", "warning", "error") and a remedy."""
    if not run.snapshots:
        return [{"severity": "info", "text": "nothing was recorded", "remedy": ""}]
    said = [*_of_layers(run, layers), *_of_time(run), *_of_others(run)]
    order = ("error", "warning", "ok", "info")
    found = sorted(said, key=lambda one: order.index(one["severity"]))
    if not any(one["severity"] in ("error", "warning") for one in found):
        count = len(run.snapshots)
        steps = f"{count} measured step{'s' * (count > 1)}"
        text = f"no alert in {steps}: every layer gets its share of the gradient"
        found.insert(0, {"severity": "ok", "text": text, "remedy": ""})
    return found


def _still(alert: Alert) -> bool:
    return alert.cleared is None


def _since(alerts: list[Alert]) -> int:
    return min(a.finding.onset if a.finding.onset is not None else a.began for a in alerts)


def _remedy(alerts: list[Alert]) -> str:
    """Return what the gravest of some alerts advises; "" where there is none."""
    return max(alerts, key=lambda a: a.worst).remedy if alerts else ""


def _of_layers(run: Run, layers: int) -> list[dict[str, str]]:
    """Say how many layers get no gradient."""
    alerts = [a for a in run.alerts if a.finding.code in _WITHOUT and a.worst > Severity.INFO]
    found = [a for a in alerts if _still(a)] or alerts
    if not found:
        return []
    count = min(int(sum(a.finding.evidence.get("layers", 1.0) for a in found)), layers)
    worst = max(a.worst for a in found)
    was = "get" if _still(found[0]) else "got"
    text = f"{count} of {layers} layers {was} next to no gradient since step {_since(found)}"
    if not _still(found[0]):
        text += f", until step {max(a.cleared or 0 for a in found)}"
    return [{"severity": worst.value, "text": text, "remedy": _remedy(found)}]


def _of_time(run: Run) -> list[dict[str, str]]:
    """Say how far back the model learns."""
    newest = next((s.sequences for s in reversed(run.snapshots) if s.sequences), ())
    told = list(sentences(newest))
    whole = [(stats, words) for stats, words in told if stats.part == "model"] or told[:1]
    alerts = [a for a in run.alerts if a.finding.code == "GW301" and _still(a) and a.worst > Severity.INFO]
    short = bool(alerts)
    said: list[dict[str, str]] = []
    for stats, words in whole[:2]:
        since = f"since step {_since(alerts)} " if short else ""
        need = f", and the declared need is {stats.need}" if short and stats.need else ""
        remedy = _remedy(alerts) if not said else ""
        said.append({"severity": "warning" if short else "info", "text": f"{since}{words}{need}", "remedy": remedy})
    return said


def _of_others(run: Run) -> list[dict[str, str]]:
    """Say what else is wrong, one sentence a kind."""
    kinds: dict[str, list[Alert]] = {}
    for alert in run.alerts:
        if alert.worst > Severity.INFO and alert.finding.code not in (*_WITHOUT, "GW301"):
            kinds.setdefault(alert.finding.kind, []).append(alert)
    said = []
    for kind, alerts in kinds.items():
        open_ = [a for a in alerts if _still(a)]
        first = min(open_ or alerts, key=lambda a: a.began)
        worst = max(a.worst for a in alerts)
        over = "" if open_ else f" (over since step {max(a.cleared or 0 for a in alerts)})"
        more = f", and {len(alerts) - 1} more of this kind" if len(alerts) > 1 else ""
        text = f"{kind}: {first.message}{more}{over}"
        said.append({"severity": worst.value, "text": text, "remedy": _remedy([first]) if open_ else ""})
    return said
