"""A loss that stands still, for no reason that gradients show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from gradwatch.values.history import KEPT, History
from gradwatch.values.report import UNKNOWN, Explanation, Finding, Severity

_SAY_NOTHING = ("GW303", "GW304")
"""Codes that tell of what is meant or not known, and not why a loss stands."""


def stalled(history: History) -> Iterator[Finding]:
    """GW801: over the last 50 losses nothing has changed, the loss is near where it began, and no other alert tells why. For information."""
    losses = history.losses(KEPT)
    if any(code not in ("GW801", *_SAY_NOTHING) for code, *_ in history.open):
        return
    if (
        history.improved is not False
        or history.count < history.thresholds.stalled_after
        or len(losses) < KEPT
        or not all(map(math.isfinite, losses))
    ):
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
        f"{UNKNOWN}: the gradients show none",
        "fit a single batch by heart first: if that works, the gradients do, and the data or the learning rate is to look at",
    )
