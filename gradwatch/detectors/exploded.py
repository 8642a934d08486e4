"""Gradients that are exploded from the start: growth by depth, and a loss that hangs on its weights by far too much."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from gradwatch.detectors.cause_words import CLIP, said
from gradwatch.detectors.causes import of_explosion
from gradwatch.detectors.exploding import THROWN
from gradwatch.detectors.measured import facts, spectral_radius
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import (
    EDGE,
    EXPANDING,
    KEPT,
    LARGEST_EXPONENT,
    LINE_CORRELATION,
    LINE_LAYERS,
    OF_TWO_SIZES,
    ORDINARY_STEP,
)

_TOLD_ALREADY = (*THROWN, "GW206", "GW302")
"""Rules that say of a network that began exploded what GW207 would."""


def exploded(history: History) -> Iterator[Finding]:
    """GW206: growth by depth. GW207: a loss that hangs on its weights by far too much."""
    yield from _depth(history)
    yield from _steep(history)


def _depth(history: History) -> Iterator[Finding]:
    """Find that the gradient at what layers give grows layer upon layer on its way back.

    At the last two probes, or at the last by so much that one is enough, or in the one batch that there is.
    """
    t = history.thresholds
    probes = history.looks(min(2, t.window))
    thrown = any(code in THROWN for code, *_ in history.open) and not history.is_open("GW206", "")
    climbs = history.lasting(_climbs) if probes and not thrown else []
    if not climbs or (now := climbs[-1]) is None:
        return
    limit = t.explosion_depth / (t.clear_factor if history.is_open("GW206", "") else 1.0)
    lasts = len(probes) == min(2, t.window) and all(c is not None and c.growth >= limit for c in climbs)
    at_once = now.growth >= t.explosion_depth_at_once
    if (lasts or at_once) and not _came_down(history, now.growth):
        yield Finding(
            "GW206",
            "exploding",
            Severity.WARNING,
            "",
            onset=probes[0].step if lasts else probes[-1].step,
            evidence={"growth": now.growth, "limit": t.explosion_depth},
            names={"first": now.first, "top": now.top},
        )


def _steep(history: History) -> Iterator[Finding]:
    """Find that from the start a change of some weights by 1 in 1,000 moves the loss by more than itself."""
    import numpy as np

    t = history.thresholds
    if not t.window <= history.count <= KEPT or any(code in _TOLD_ALREADY for code, *_ in history.open):
        return
    snapshots = history.window()[:EDGE]
    losses = [s.loss for s in snapshots if s.loss is not None and math.isfinite(s.loss) and s.loss > 0]
    if len(losses) < len(snapshots):
        return
    # As clipping leaves it. Every loss is held against the largest of them: one that is small by chance proves nothing.
    clipped = np.array([min(1.0 if s.clip_factor is None else s.clip_factor, 1.0) for s in snapshots])
    with np.errstate(over="ignore"):  # of weights that have run away
        rows = history.track.sensitivities.oldest(EDGE) * clipped[:, None] / max(losses)
    rows[~np.isfinite(rows)] = 0.0
    rows[:, _of_two_sizes(history)] = 0.0
    worst = int(rows.max(axis=0).argmax())
    steepness = float(rows[:, worst].max())
    limit = t.explosion_sensitivity
    if steepness >= limit and not _came_down(history, steepness) and (t.window == 1 or history.scatter is not None):
        place = history.model.layers[worst].name
        # Of one batch nobody knows whether the training will clip; that does not help a matrix that multiplies.
        expands = (spectral_radius(history, place) or 0.0) >= EXPANDING
        yield Finding(
            "GW207",
            "exploding",
            Severity.WARNING if t.window > 1 or expands else Severity.INFO,
            place,
            onset=snapshots[0].step,
            evidence={"sensitivity": steepness, "limit": limit},
        )


def _of_two_sizes(history: History) -> list[int]:
    """Return the layers of whose weights some are far larger than others, as -10,000 in place of minus infinity is.

    Nothing can be said of a change of such weights by a share of themselves.
    """
    known = facts(history)
    layers = enumerate(history.model.layers)
    return [i for i, layer in layers if known.get((layer.module, "far_smaller"), 0.0) >= OF_TWO_SIZES]


def _came_down(history: History, times: float) -> bool:
    """Tell whether the loss has come down by that factor: then it is no more as far off as the explosion put it."""
    first, last = history.first_loss, history.losses(EDGE)
    return bool(history.improved) and first is not None and statistics.median(last) * times <= first


class _Climb(NamedTuple):
    """Growth by depth."""

    growth: float
    first: str
    top: str


def _climbs(history: History) -> list[_Climb | None]:
    """Return that of each of the last two looks, oldest first."""
    return [_climb(history, s) for s in history.looks(min(2, history.thresholds.window))]


def _climb(history: History, snapshot: Snapshot) -> _Climb | None:
    """Return how the gradient grows on its way back, with the first layer and the last; None where it follows no line.

    The growth is that along a line fitted through its logarithm.

    That leaves out branches, whose gradient is small beside that of the trunk, and single layers of another scale.
    """
    import numpy as np

    known = {a.module: a.grad_norm for a in snapshot.activations or ()}
    norms = [(name, n) for name in history.inner if (n := known.get(name)) and math.isfinite(n)]
    if len(norms) < LINE_LAYERS:
        return None
    logs = np.log([n for _, n in norms])
    at = np.arange(len(logs)) - (len(logs) - 1) / 2
    spread, total = float(np.linalg.norm(logs - logs.mean())), float(logs[0] - logs[-1])
    law = float(at @ logs / (at @ at))
    straight = spread > 0 and law * float(np.linalg.norm(at)) / spread <= -LINE_CORRELATION  # the correlation
    if not straight or total <= 0 or float(-np.diff(logs).min()) > history.thresholds.explosion_depth_gap * total:
        return None
    return _Climb(math.exp(min(-law * (len(logs) - 1), LARGEST_EXPONENT)), norms[0][0], norms[-1][0])


# --- in words ---


def _explain_depth(finding: Finding) -> Explanation:
    first, top = finding.names["first"], finding.names["top"]
    cause, remedy = said(
        finding, f"normalize between the layers, or scale what residual branches add (1/sqrt of their number); {CLIP}"
    )
    return Explanation(
        f"the gradient grows {finding.evidence['growth']:.2g} times on its way back from {top} to {first}, layer by"
        f" layer, since step {finding.onset}",
        cause,
        remedy,
    )


def _explain_steep(finding: Finding) -> Explanation:
    steepness, place = finding.evidence["sensitivity"], finding.place or "the model"
    cause, remedy = said(
        finding,
        f"smaller weights in {place} (of a recurrent network: torch.nn.init.orthogonal_ on weight_hh), standardized"
        f" inputs, or {CLIP}",
    )
    return Explanation(
        f"the loss hangs on the weights of {place} by far too much: since step {finding.onset} a change of them by 1 in"
        f" 1,000 moves it by {steepness * ORDINARY_STEP:.3g} times itself",
        cause,
        remedy,
    )


RULES = (
    Rule("GW206", "exploding", _explain_depth, of_explosion, event=True),
    Rule("GW207", "exploding", _explain_steep, of_explosion, event=True),
)
