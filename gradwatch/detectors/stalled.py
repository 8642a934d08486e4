"""A loss that stands still, for no reason that gradients show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from gradwatch.history import KEPT, History
from gradwatch.report import Explanation, Finding, Severity


def stalled(history: History) -> Iterator[Finding]:
    """GW801: over the last 50 losses nothing has changed, and the loss is near where it began. For information."""
    losses = history.losses(KEPT)
    if history.improved is not False or len(losses) < KEPT or not all(map(math.isfinite, losses)):
        return
    half = KEPT // 2
    before, after = statistics.median(losses[:half]), statistics.median(losses[half:])
    spread = statistics.median(abs(loss - before) for loss in losses[:half])
    if abs(after - before) <= max(spread, history.thresholds.stalled * abs(before)):
        evidence: dict[str, float | str] = {"loss": after, "first": float(history.first_loss or 0.0)}
        yield Finding("GW801", "stalled", Severity.INFO, "", onset=history.window(KEPT)[0].step, evidence=evidence)


def explain_stalled(finding: Finding) -> Explanation:
    """Say where it stands."""
    loss, first = (float(finding.evidence[name]) for name in ("loss", "first"))
    return Explanation(
        f"the loss stands still at {loss:.3g} since step {finding.onset}; it began at {first:.3g}",
        "where no other alert is open, the gradients are sound: the learning rate, or data without a signal",
        "fit a single batch by heart first: if that works, the gradients do, and the data or the learning rate is to look at",
    )
