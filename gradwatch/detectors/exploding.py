"""Gradients and updates that grow beyond what training survives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.causes import of_explosion
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import EDGE, LARGEST_EXPONENT, LINE_CORRELATION, LINE_LAYERS, UPDATE_PROBES


def exploding(history: History) -> Iterator[Finding]:
    """GW201: gradients far above their beginning. GW202: updates above the weights. GW203: a loss that jumped up.

    GW204: a norm above a limit of the user's. GW205: growth up to infinity. GW206: growth by depth.
    """
    yield from _growth(history)
    yield from _runaway(history)
    yield from _updates(history)
    yield from _loss(history)
    yield from _depth(history)


def _growth(history: History) -> Iterator[Finding]:
    t = history.thresholds
    window = [s for s in history.window(EDGE) if not s.skipped]
    total = [n for s in window if (n := s.norm_global) is not None and math.isfinite(n)]
    if t.norm_above is not None and total and total[-1] > t.norm_above:
        yield Finding(
            "GW204",
            "exploding",
            Severity.WARNING,
            "",
            onset=window[-1].step,
            evidence={"norm": total[-1], "limit": t.norm_above},
        )
    if len(history.first_norms) < t.window or len(total) < EDGE or history.improved or history.at_best:
        return
    base = statistics.median(history.first_norms)
    limit = t.explosion_growth / (t.clear_factor if history.is_open("GW201", "") else 1.0)
    growth = statistics.median(total) / base if base > 0 else 0.0
    if growth >= limit:
        yield Finding(
            "GW201",
            "exploding",
            _unless_unknown(history),
            "",
            onset=window[0].step,
            evidence={"growth": growth, "norm": total[-1], "limit": limit},
        )


def _runaway(history: History) -> Iterator[Finding]:
    """Find that what is not finite now had grown before: it exploded, and the NaN is the end of it."""
    now = history.snapshot
    if now.skipped or all(n is None or math.isfinite(n) for n in now.norm):
        return
    before = [
        (s.step, n) for s in history.window() if not s.skipped and (n := s.norm_global) is not None and math.isfinite(n)
    ]
    if not before:
        return
    base = statistics.median_low([n for _, n in before[: max(len(before) // 2, 1)]])
    step, last = before[-1]
    growth = last / base if base > 0 else 0.0
    what, grown = "global gradient norm", growth
    if growth < history.thresholds.explosion_growth:
        weights = [s.weight_norm for s in history.window() if s.weight_norm is not None]
        ratios = (b / a for a, b in zip(weights[0], weights[-1], strict=True) if a and b) if weights else ()
        what, grown = "norm of a weight", max(ratios, default=0.0)
        if not (grown >= history.thresholds.explosion_update_at_once or math.isinf(grown)):
            return
    yield Finding(
        "GW205", "exploding", Severity.ERROR, "", onset=step, evidence={"growth": grown}, names={"what": what}
    )


def _updates(history: History) -> Iterator[Finding]:
    import numpy as np

    t = history.thresholds
    probes = [s for s in history.window(t.window) if s.update_ratio is not None]
    if not probes or probes[-1] is not history.snapshot or history.improved:
        return
    model = history.model
    rows = np.array([s.update_ratio for s in probes], dtype=float)
    if not (rows[:, history.elements("weight") > 0] > t.explosion_update).any():  # nearly always; False for NaN
        return
    ratios: dict[int, list[float]] = {}
    numbers = history.numbers
    for s in probes:
        for p, r in zip(model.parameters, s.update_ratio or (), strict=True):
            if r is not None and p.role == "weight" and math.isfinite(r):
                ratios.setdefault(numbers[p.layer], []).append(r)
    wild = {
        i
        for i, mine in ratios.items()
        if sum(r > t.explosion_update for r in mine) >= UPDATE_PROBES or max(mine) > t.explosion_update_at_once
    }
    for run in history.runs(wild, ratios):
        worst = max(run, key=lambda i: max(ratios[i]))
        yield Finding(
            "GW202",
            "exploding",
            Severity.WARNING,
            model.layers[run[0]].name,
            onset=probes[0].step,
            evidence={"update": max(ratios[worst]), "layers": float(len(run)), "limit": t.explosion_update},
            names={"worst": model.layers[worst].name, "last": model.layers[run[-1]].name},
        )


def _loss(history: History) -> Iterator[Finding]:
    t = history.thresholds
    losses = history.losses(2 * EDGE)  # twice as many as for the best level: a jump that lasts
    best, first = history.best_loss, history.first_loss
    if best is None or first is None or len(losses) < 2 * EDGE or best <= 0:
        return
    level = statistics.median(losses)
    limit = t.explosion_loss / (t.clear_factor if history.is_open("GW203", "") else 1.0)
    if level > max(
        limit * best, first
    ):  # a loss near 0 may waver by such a factor; it has not exploded while it is below its beginning
        yield Finding(
            "GW203",
            "exploding",
            Severity.ERROR,
            "",
            onset=history.window(2 * EDGE)[0].step,
            evidence={"jump": level / best, "loss": level, "limit": limit},
        )


def _depth(history: History) -> Iterator[Finding]:
    """Find that the gradient at what layers give grows layer upon layer on its way back, at the last two probes."""
    t = history.thresholds
    probes = history.looks(2)
    if len(probes) < 2 or history.improved:
        return
    limit = t.explosion_depth / (t.clear_factor if history.is_open("GW206", "") else 1.0)
    climbs = [_climb(history.inner, s, t.explosion_depth_gap) for s in probes]
    if all(c is not None and c[0] >= limit for c in climbs) and (last := climbs[-1]) is not None:
        growth, first, top = last
        yield Finding(
            "GW206",
            "exploding",
            _unless_unknown(history),
            "",
            onset=probes[0].step,
            evidence={"growth": growth, "limit": t.explosion_depth},
            names={"first": first, "top": top},
        )


def _climb(names: Sequence[str], snapshot: Snapshot, gap: float) -> tuple[float, str, str] | None:
    """Return how the gradient grows on its way back, with the first layer and the last; None where it follows no line.

    The growth is that along a line fitted through its logarithm.

    That leaves out branches, whose gradient is small beside that of the trunk, and single layers of another scale.
    """
    import numpy as np

    known = {a.module: a.grad_norm for a in snapshot.activations or ()}
    norms = [(name, n) for name in names if (n := known.get(name)) and math.isfinite(n)]
    if len(norms) < LINE_LAYERS:
        return None
    logs = np.log([n for _, n in norms])
    at = np.arange(len(logs)) - (len(logs) - 1) / 2
    spread, total = float(np.linalg.norm(logs - logs.mean())), float(logs[0] - logs[-1])
    law = float(at @ logs / (at @ at))
    straight = spread > 0 and law * float(np.linalg.norm(at)) / spread <= -LINE_CORRELATION  # the correlation
    if not straight or total <= 0 or float(-np.diff(logs).min()) > gap * total:
        return None
    return math.exp(min(-law * (len(logs) - 1), LARGEST_EXPONENT)), norms[0][0], norms[-1][0]


def _unless_unknown(history: History) -> Severity:
    return Severity.INFO if history.improved is None else Severity.WARNING


# --- in words ---

_CLIP = (
    "clip the gradient norm (torch.nn.utils.clip_grad_norm_), lower the learning rate or warm it up, or normalize"
    " between the layers"
)


def _explain_growth(finding: Finding) -> Explanation:
    cause, remedy = said(finding, _CLIP)
    return Explanation(
        f"the global gradient norm has been {finding.evidence['growth']:.3g} times that of the first steps"
        f" since step {finding.onset}",
        cause,
        remedy,
    )


def _explain_updates(finding: Finding) -> Explanation:
    evidence, names, place = finding.evidence, finding.names, finding.place
    whose = place
    if evidence["layers"] > 1:
        whose = f"{place} to {names['last']} ({evidence['layers']:.0f} layers; worst: {names['worst']})"
    cause, remedy = said(
        finding, f"lower the learning rate of {place} by that factor or more, or clip the gradient norm"
    )
    message = f"a step changes the weights of {whose} by {evidence['update']:.3g} times their own size"
    return Explanation(message, cause, remedy)


def _explain_loss(finding: Finding) -> Explanation:
    cause, remedy = said(finding, _CLIP)
    return Explanation(
        f"the loss has jumped to {finding.evidence['jump']:.3g} times its best level and has stayed there since step"
        f" {finding.onset}",
        cause,
        f"go back to a checkpoint before step {finding.onset}; {remedy}",
    )


def _explain_absolute(finding: Finding) -> Explanation:
    norm, limit = finding.evidence["norm"], finding.evidence["limit"]
    return Explanation(f"the global gradient norm is {norm:.3g}, above the {limit:.3g} that you set")


def _explain_runaway(finding: Finding) -> Explanation:
    cause, remedy = said(finding, _CLIP)
    return Explanation(
        f"the {finding.names['what']} grew {finding.evidence['growth']:.3g} times up to step {finding.onset},"
        " and the gradient has not been finite since",
        cause,
        remedy,
    )


def _explain_depth(finding: Finding) -> Explanation:
    first, top = finding.names["first"], finding.names["top"]
    cause, remedy = said(
        finding, f"normalize between the layers, or scale what residual branches add (1/sqrt of their number); {_CLIP}"
    )
    return Explanation(
        f"the gradient grows {finding.evidence['growth']:.2g} times on its way back from {top} to {first}, layer by"
        f" layer, since step {finding.onset}",
        cause,
        remedy,
    )


RULES = (
    Rule("GW201", "exploding", _explain_growth, of_explosion, event=True),
    Rule("GW202", "exploding", _explain_updates, of_explosion, event=True),
    Rule("GW203", "exploding", _explain_loss, of_explosion, event=True),
    Rule("GW204", "exploding", _explain_absolute, event=True),
    Rule("GW205", "exploding", _explain_runaway, of_explosion, event=True),
    Rule("GW206", "exploding", _explain_depth, of_explosion, event=True),
)
