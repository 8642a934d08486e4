"""Gradients and updates that grow beyond what training survives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from gradwatch.history import EDGE, History
from gradwatch.report import Explanation, Finding, Severity


def exploding(history: History) -> Iterator[Finding]:
    """GW201: gradients far above their own beginning. GW202: updates larger than the weights. GW203: the loss has jumped and stays up."""
    yield from _growth(history)
    yield from _updates(history)
    yield from _loss(history)


def _growth(history: History) -> Iterator[Finding]:
    t = history.thresholds
    window = [s for s in history.window(EDGE) if not s.skipped]
    total = [n for s in window if (n := s.norm_global) is not None and math.isfinite(n)]
    if t.norm_above is not None and total and total[-1] > t.norm_above:
        yield Finding("GW204", "exploding", Severity.WARNING, "", onset=window[-1].step, evidence={"norm": total[-1], "limit": t.norm_above})
    if len(history.first_norms) < t.window or len(total) < EDGE or history.improved:
        return
    base = statistics.median(history.first_norms)
    limit = t.explosion_growth / (t.clear_factor if history.is_open("GW201", "") else 1.0)
    growth = statistics.median(total) / base if base > 0 else 0.0
    if growth >= limit:
        yield Finding("GW201", "exploding", _unless_unknown(history), "", onset=window[0].step, evidence={"growth": growth, "norm": total[-1], "limit": limit})


def _updates(history: History) -> Iterator[Finding]:
    t = history.thresholds
    probes = [s for s in history.window(t.window) if s.update_ratio is not None]
    if not probes or probes[-1] is not history.snapshot or history.improved:
        return
    model = history.model
    largest: dict[str, list[float]] = {}
    for s in probes:
        for p, r in zip(model.parameters, s.update_ratio or (), strict=True):
            if r is not None and p.role == "weight" and math.isfinite(r):
                largest.setdefault(p.layer, []).append(r)
    for layer, ratios in largest.items():
        often = sum(r > t.explosion_update for r in ratios)
        if often >= 3 or max(ratios) > t.explosion_update_at_once:  # noqa: PLR2004  (three times is a pattern)
            yield Finding(
                "GW202", "exploding", Severity.WARNING, layer, onset=probes[0].step, evidence={"update": max(ratios), "times": float(often), "limit": t.explosion_update}
            )


def _loss(history: History) -> Iterator[Finding]:
    t = history.thresholds
    losses = history.losses(EDGE)
    best = history.best_loss
    if best is None or len(losses) < EDGE or best <= 0:
        return
    level = statistics.median(losses)
    limit = t.explosion_loss / (t.clear_factor if history.is_open("GW203", "") else 1.0)
    if level > limit * best or math.isinf(level):
        yield Finding("GW203", "exploding", Severity.ERROR, "", onset=history.window(EDGE)[0].step, evidence={"jump": level / best, "loss": level, "limit": limit})


def _unless_unknown(history: History) -> Severity:
    return Severity.INFO if history.improved is None else Severity.WARNING


def explain_exploding(finding: Finding) -> Explanation:
    """Say what grew, by how much, and what holds it."""
    evidence = finding.evidence
    remedy = "clip the gradient norm (torch.nn.utils.clip_grad_norm_), lower the learning rate or warm it up, or normalize between the layers"
    if finding.code == "GW202":
        return Explanation(
            f"a step changes the weights of {finding.place} by {float(evidence['update']):.3g} times their own size",
            "the learning rate is far too large for these gradients",
            f"lower the learning rate of {finding.place} by that factor or more, or clip the gradient norm",
        )
    if finding.code == "GW203":
        return Explanation(
            f"the loss has jumped to {float(evidence['jump']):.3g} times its best level and stays there since step {finding.onset}",
            "a step was too large, and the weights are now where gradients no longer lead back",
            f"go back to a checkpoint before step {finding.onset}; {remedy}",
        )
    if finding.code == "GW204":
        return Explanation(f"the global gradient norm is {float(evidence['norm']):.3g}, above the {float(evidence['limit']):.3g} that you set")
    return Explanation(
        f"the global gradient norm is {float(evidence['growth']):.3g} times that of the first steps, since step {finding.onset}",
        "weights have grown, or the learning rate is too large for the curvature",
        remedy,
    )
