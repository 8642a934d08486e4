"""Units that give 0 for every input."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch.detectors.why import said, with_cause
from gradwatch.history import History
from gradwatch.report import Explanation, Finding, Severity


def dead_units(history: History) -> Iterator[Finding]:
    """GW601: most units behind a layer were silent at probe after probe, for longer than chance explains. Between two probes the findings of the last one hold."""
    t = history.thresholds
    probes = [s for s in history.window() if s.activations is not None]
    if len(probes) < t.dead_probes:
        return
    for newest in probes[-1].activations or ():
        if newest.dead is None:
            continue
        limit = t.of(newest.module).dead_units / (1.5 if history.is_open("GW601", newest.module) else 1.0)
        if newest.dead < limit:
            continue
        series = [next((a.dead for a in s.activations or () if a.module == newest.module), None) for s in probes]
        if any(d is None or d < limit for d in series[-t.dead_probes :]):
            continue
        first = next(i for i in range(len(series)) if all(d is not None and d >= limit for d in series[i:]))
        evidence: dict[str, float | str] = {"dead": newest.dead, "units": float(newest.units or 0), "limit": t.of(newest.module).dead_units}
        yield with_cause(history, Finding("GW601", "dead-units", Severity.WARNING, newest.module, onset=probes[first].step, evidence=evidence))


def explain_dead_units(finding: Finding) -> Explanation:
    """Say how many are dead, and why."""
    share, units = float(finding.evidence["dead"]), float(finding.evidence["units"])
    cause, remedy = said(
        finding.evidence, finding.place, f"LeakyReLU behind {finding.place}, a bias of zero, a lower learning rate, or normalization in front of its ReLU"
    )
    return Explanation(
        f"{share * units:.0f} of the {units:.0f} units of {finding.place or 'the model'} are dead: behind their ReLU they give 0 for every input, since step {finding.onset}",
        cause,
        remedy,
    )
