"""A loss that stands still, for no reason that gradients show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import UNKNOWN, Explanation, Finding, Severity
from gradwatch.values.thresholds import KEPT, LOOKS_AT_LOSS


def stalled(history: History) -> Iterator[Finding]:
    """GW801: over the last 50 losses nothing has changed, near where the loss began, and no other alert tells why.

    GW802: the loss holds each forecast against each target.
    """
    yield from _crossed(history)
    losses = history.losses(KEPT)
    if (
        history.explained
        or history.improved is not False
        or history.count < history.thresholds.stalled_after
        or len(losses) < KEPT
        or not all(map(math.isfinite, losses))
    ):
        return
    half = KEPT // 2
    before, after = statistics.median(losses[:half]), statistics.median(losses[half:])
    spread = statistics.median(abs(loss - before) for loss in losses[:half])
    if abs(after - before) <= max(spread, history.thresholds.stalled * abs(before)):
        evidence = {"loss": after, "first": float(history.first_loss or 0.0)}
        yield Finding("GW801", "stalled", Severity.INFO, "", onset=history.window(KEPT)[0].step, evidence=evidence)


def _crossed(history: History) -> Iterator[Finding]:
    yield from history.lasting(_with_all_targets)


def _with_all_targets(history: History) -> tuple[Finding, ...]:
    found = [s for s in history.looks(LOOKS_AT_LOSS) if s.crossed]
    if not found:
        return ()
    evidence = {"rows": float(found[-1].crossed or 0)}
    return (Finding("GW802", "stalled", Severity.WARNING, "", onset=found[0].step, evidence=evidence),)


def _explain_crossed(finding: Finding) -> Explanation:
    rows = f"{finding.evidence['rows']:.0f}"
    return Explanation(
        f"the loss holds each of {rows} forecasts against each of {rows} targets: its errors have the shape"
        f" ({rows}, {rows}), and the best that it can learn is the mean of the targets",
        f"forecasts of shape ({rows}, 1) and targets of shape ({rows},), or the other way round, are broadcast",
        "give both the same shape: squeeze(-1) the forecasts, or unsqueeze(-1) the targets",
    )


def _explain(finding: Finding) -> Explanation:
    loss, first = finding.evidence["loss"], finding.evidence["first"]
    return Explanation(
        f"the loss has stood still at {loss:.3g} since step {finding.onset}; it began at {first:.3g}",
        f"{UNKNOWN}: the gradients show none",
        "overfit a single batch first: if that works, the gradients are sound, and the data or the learning rate"
        " is to blame",
    )


RULES = (
    Rule("GW801", "stalled", _explain, explains_a_stall=False),
    Rule("GW802", "stalled", _explain_crossed),
)
