"""Runs -> a JSON document of a stated format, for programs; docs/report.schema.json describes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradwatch.sinks.formats.judged import Judged, gravest
from gradwatch.sinks.terminal.page import notes
from gradwatch.values.history import History
from gradwatch.values.layer_columns import norms
from gradwatch.values.report import Alert
from gradwatch.values.sequences import SequenceStats

FORMAT = 1
"""Grows when a field goes or changes its meaning; new fields may come at any time."""


def document(found: Sequence[Judged], fail_on: str, version: str) -> dict[str, Any]:
    """Return what is known of runs as objects, lists, strings, numbers and null; what is not finite is a string."""
    return {
        "format": FORMAT,
        "gradwatch": version,
        "fail_on": fail_on,
        "failed": any(one.failing for one in found),
        "runs": [_run(one) for one in found],
    }


def _run(one: Judged) -> dict[str, Any]:
    run, failing = one.run, set(map(id, one.failing))
    steps = [s.step for s in run.snapshots]
    losses = [s.loss for s in run.snapshots if s.loss is not None]
    return {
        "name": one.name,
        "path": run.path,
        "failed": bool(one.failing),
        "measured": len(steps),
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "first_loss": number(losses[0]) if losses else None,
        "last_loss": number(losses[-1]) if losses else None,
        "thinned": run.thinned,
        "broken_lines": run.broken,
        "notes": notes(run),
        "alerts": [_alert(alert, fails=id(alert) in failing) for alert in run.alerts],
        "horizons": [_horizon(s) for s in _sequences(one)],
        "layers": _layers(one),
    }


def _alert(alert: Alert, *, fails: bool) -> dict[str, Any]:
    finding = alert.finding
    return {
        "code": finding.code,
        "kind": finding.kind,
        "severity": alert.severity.value,
        "worst": gravest(alert).value,
        "fails": fails,
        "place": finding.place,
        "parameter": finding.parameter,
        "optimizer": finding.optimizer,
        "began": alert.began,
        "last": alert.last,
        "cleared": alert.cleared,
        "onset": finding.onset,
        "message": alert.message,
        "cause": alert.cause,
        "remedy": alert.remedy,
        "evidence": {name: number(value) for name, value in finding.evidence.items()},
    }


def _sequences(one: Judged) -> Sequence[SequenceStats]:
    return next((s.sequences for s in reversed(one.run.snapshots) if s.sequences), ())


def _horizon(stats: SequenceStats) -> dict[str, Any]:
    interval = stats.interval
    return {
        "module": stats.module,
        "part": stats.part,
        "input": stats.input,
        "length": stats.length,
        "horizon": stats.horizon,
        "low": None if interval is None else interval[0],
        "high": None if interval is None else interval[1],
        "censored": stats.censored,
        "need": stats.need,
        "half_life": None if stats.half_life is None else number(stats.half_life),
    }


def _layers(one: Judged) -> list[dict[str, Any]]:
    """Return the layers at the newest step of each optimizer, in the order of the forward pass."""
    history, found = History(), []
    newest = {s.optimizer: s for s in one.run.snapshots}
    for snapshot in newest.values():
        history.add(snapshot)
        ratios = history.ratios(1)[-1].tolist()
        ratio_of = {layer.name: r for layer, r in zip(snapshot.model.layers, ratios, strict=True)}
        norm_of = norms(snapshot.model, snapshot.norm)
        mine = {p.layer for p in snapshot.model.parameters if p.optimizer in (None, snapshot.optimizer)}
        found += [
            {
                "name": layer.name,
                "kind": layer.kind,
                "optimizer": snapshot.optimizer,
                "step": snapshot.step,
                "gradient_norm": None if (n := norm_of[layer.name]) is None else number(n),
                "of_later_layers": None if math.isnan(r := ratio_of[layer.name]) else number(r),
            }
            for layer in (snapshot.model.layers[i] for i in snapshot.model.forward_order)
            if layer.name in mine
        ]
    return found


def number(value: float) -> float | int | str:
    """Return a number as JSON has it; "nan", "inf" or "-inf" as a string."""
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else str(value)
