"""Gradients and updates that grow beyond what training survives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from gradwatch.history import EDGE, History
from gradwatch.report import Explanation, Finding, Severity


def exploding(history: History) -> Iterator[Finding]:
    """GW201: gradients far above their beginning. GW202: updates above the weights. GW203: a loss that jumped up. GW205: on to infinity."""
    yield from _growth(history)
    yield from _runaway(history)
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


def _runaway(history: History) -> Iterator[Finding]:
    """Find that what is not finite now had grown before: it exploded, and the NaN is the end of it."""
    now = history.snapshot
    if now.skipped or all(n is None or math.isfinite(n) for n in now.norm):
        return
    before = [(s.step, n) for s in history.window() if not s.skipped and (n := s.norm_global) is not None and math.isfinite(n)]
    if not before:
        return
    base = statistics.median_low([n for _, n in before[: max(len(before) // 2, 1)]])
    step, last = before[-1]
    growth = last / base if base > 0 else 0.0
    if growth >= history.thresholds.explosion_growth:
        yield Finding("GW205", "exploding", Severity.ERROR, "", onset=step, evidence={"growth": growth, "what": "global gradient norm"})
        return
    weights = [s.weight_norm for s in history.window() if s.weight_norm is not None]
    grown = max((b / a for a, b in zip(weights[0], weights[-1], strict=True) if a and b), default=0.0) if weights else 0.0
    if grown >= history.thresholds.explosion_update_at_once or math.isinf(grown):
        yield Finding("GW205", "exploding", Severity.ERROR, "", onset=step, evidence={"growth": grown, "what": "norm of a weight"})


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
        if often >= 3 or max(ratios) > t.explosion_update_at_once:
            yield Finding(
                "GW202",
                "exploding",
                Severity.WARNING,
                layer,
                onset=probes[0].step,
                evidence={"update": max(ratios), "times": float(often), "limit": t.explosion_update},
            )


def _loss(history: History) -> Iterator[Finding]:
    t = history.thresholds
    losses = history.losses(2 * EDGE)  # twice as many as for the best level: a jump that lasts
    best, first = history.best_loss, history.first_loss
    if best is None or first is None or len(losses) < 2 * EDGE or best <= 0:
        return
    level = statistics.median(losses)
    limit = t.explosion_loss / (t.clear_factor if history.is_open("GW203", "") else 1.0)
    if level > max(limit * best, first):  # a loss near 0 may waver by such a factor; it has not exploded while it is below its beginning
        yield Finding(
            "GW203", "exploding", Severity.ERROR, "", onset=history.window(2 * EDGE)[0].step, evidence={"jump": level / best, "loss": level, "limit": limit}
        )


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
    if finding.code == "GW205":
        return Explanation(
            f"the {evidence['what']} grew {float(evidence['growth']):.3g} times up to step {finding.onset}, and the gradient is not finite since",
            "the learning rate is too large, or activations grow from layer to layer (a large initialization, residual sums without normalization)",
            remedy,
        )
    if finding.code == "GW204":
        return Explanation(f"the global gradient norm is {float(evidence['norm']):.3g}, above the {float(evidence['limit']):.3g} that you set")
    return Explanation(
        f"the global gradient norm is {float(evidence['growth']):.3g} times that of the first steps, since step {finding.onset}",
        "weights have grown, or the learning rate is too large for the curvature",
        remedy,
    )
