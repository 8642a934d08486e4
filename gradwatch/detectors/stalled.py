"""A loss that stands still, for no reason that gradients show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import UNKNOWN, Explanation, Finding, Severity
from gradwatch.values.thresholds import KEPT


def stalled(history: History) -> Iterator[Finding]:
    """GW801: over the last 50 losses nothing has changed, near where the loss began, and no other alert tells why."""
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


def _explain(finding: Finding) -> Explanation:
    loss, first = finding.evidence["loss"], finding.evidence["first"]
    return Explanation(
        f"the loss has stood still at {loss:.3g} since step {finding.onset}; it began at {first:.3g}",
        f"{UNKNOWN}: the gradients show none",
        "overfit a single batch first: if that works, the gradients are sound, and the data or the learning rate"
        " is to blame",
    )


RULES = (Rule("GW801", "stalled", _explain, explains_a_stall=False),)
