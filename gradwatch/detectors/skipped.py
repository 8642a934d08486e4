"""Steps that a GradScaler skips now and then, and a loss scale that falls because of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.origins import of_skips
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import KEPT


def skipped(history: History) -> Iterator[Finding]:
    """GW503: a GradScaler skips steps again and again, by their share or by the halvings of its scale."""
    t, window = history.thresholds, history.window()
    if len(window) < KEPT or history.skipped >= t.skipped_steps:  # which is another finding
        return
    scales = [s.loss_scale for s in window if s.loss_scale is not None]
    half = len(window) // 2
    limit = t.skipped_share / (t.clear_share_factor if history.is_open("GW503", "") else 1.0)
    # Halvings outnumber the skipped steps that are seen where a skipped step calls no hook. A scale that grows again
    # was too large, and what it skips is as designed.
    shares = [max(_share(part), _halvings(part) / len(part)) for part in (window[:half], window[half:])]
    fallen = _halvings(window) if scales else math.inf
    if min(shares) < limit or fallen < limit * len(window):
        return
    evidence = {"share": _share(window), "of": float(len(window))}
    if scales:
        evidence |= {"from": scales[0], "to": scales[-1]}
    yield Finding("GW503", "non-finite", Severity.WARNING, "", onset=window[0].step, evidence=evidence)


def _share(window: Sequence[Snapshot]) -> float:
    return sum(s.skipped for s in window) / len(window)


def _halvings(window: Sequence[Snapshot]) -> float:
    """Return how many times the loss scale has been halved; 0 where it is not known, or has grown."""
    scales = [s.loss_scale for s in window if s.loss_scale is not None]
    if not scales or not 0 <= scales[-1] < scales[0] < math.inf:
        return 0.0
    return math.log2(scales[0]) - math.log2(scales[-1]) if scales[-1] > 0 else math.inf


def _explain(finding: Finding) -> Explanation:
    evidence = finding.evidence
    share, of = evidence["share"], evidence["of"]
    message = f"a GradScaler skips steps again and again since step {finding.onset}"
    if share:
        message = f"a GradScaler has skipped {share:.0%} of the last {of:.0f} measured steps"
    if "from" in evidence:
        message += f": its scale has fallen from {evidence['from']:.3g} to {evidence['to']:.3g}"
    if finding.cause:
        return Explanation(message, *said(finding, ""))
    return Explanation(
        message,
        "some steps have gradients that are not finite at any loss scale: the scale is not to blame, and falls without"
        " end",
        "look at the loss and the gradients of a batch that is skipped in float32, without autocast and scaler, and"
        " mend or leave out what is not finite there",
    )


RULES = (Rule("GW503", "non-finite", _explain, of_skips, event=True),)
