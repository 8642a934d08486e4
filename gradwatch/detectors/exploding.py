"""Gradients and updates that grow, in training, beyond what it survives."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradwatch.detectors.cause_words import CLIP, said
from gradwatch.detectors.causes import of_explosion
from gradwatch.detectors.origins import broken_by, epsilon_lost
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import ModelInfo, Snapshot
from gradwatch.values.thresholds import (
    BEYOND_LOSS,
    EDGE,
    KEPT,
    LARGEST_EXPONENT,
    LOSS_SCATTER,
    ORDINARY_GAIN,
    ORDINARY_SENSITIVITY,
    RUN_AWAY,
    SPIKE,
    SPIKES,
    UPDATE_PROBES,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

THROWN = ("GW202", "GW203", "GW205", "GW501")
"""Rules that say that the weights have been thrown, after which nothing that is measured of them is news."""


def exploding(history: History) -> Iterator[Finding]:
    """GW201: gradients far above their beginning. GW202: updates above the weights. GW203: a loss that jumped up.

    GW204: a norm above a limit of the user's. GW205: growth up to infinity. GW208: gradients that spike.
    """
    yield from _growth(history)
    yield from _spikes(history)
    yield from _runaway(history)
    yield from _updates(history)
    yield from _loss(history)


def _growth(history: History) -> Iterator[Finding]:
    t = history.thresholds
    recent = itertools.islice(zip(reversed(history.window(EDGE)), reversed(history.totals), strict=False), EDGE)
    window = [(s, n) for s, n in recent if not s.skipped][::-1]
    total = [n for _, n in window if n is not None and math.isfinite(n)]
    if t.norm_above is not None and total and total[-1] > t.norm_above:
        yield Finding(
            "GW204",
            "exploding",
            Severity.WARNING,
            "",
            onset=window[-1][0].step,
            evidence={"norm": total[-1], "limit": t.norm_above},
        )
    if len(history.first_norms) < t.window or len(total) < EDGE or history.improved:
        return
    base = statistics.median(history.first_norms)
    limit = t.explosion_growth / (t.clear_factor if history.is_open("GW201", "") else 1.0)
    growth = statistics.median(total) / base if base > 0 else 0.0
    if growth >= limit and not history.at_best and not _wakes(history):
        yield Finding(
            "GW201",
            "exploding",
            Severity.WARNING if _runs_away(history) else _unless_unknown(history),
            "",
            onset=window[0][0].step,
            evidence={"growth": growth, "norm": total[-1], "limit": limit},
        )


def _spikes(history: History) -> Iterator[Finding]:
    """Find that again and again the gradient is many times what it usually is, while the loss does not come down.

    As the optimizer takes it: clipping makes that harmless. Where the usual one has faded, an ordinary one is no spike;
    nor is that of another loss, or of the few batches with something in them: there the loss is as far above its own.
    """
    losses, first = history.losses(KEPT), history.first_loss
    if history.improved or history.count < KEPT or not losses or first is None or not history.first_norms:
        return
    level = statistics.median(losses)
    if not 0 < first <= level:  # also where a loss crosses 0, and nobody can say by which factor it fell
        return
    norms = [
        (s, n * min(s.clip_factor or 1.0, 1.0))
        for s, n in zip(history.window(), history.totals, strict=True)
        if n is not None and math.isfinite(n) and not s.skipped and s.loss is not None
    ]
    usual, before = statistics.median(n for _, n in norms or ((0, 0.0),)), statistics.median(history.first_norms)
    spikes = [s.step for s, n in norms if n >= SPIKE * usual and n >= BEYOND_LOSS * usual * abs(s.loss or 0.0) / level]
    if usual >= before > 0 and len(spikes) >= SPIKES:
        yield Finding(
            "GW208",
            "exploding",
            Severity.WARNING,
            "",
            onset=spikes[0],
            evidence={"times": max(n for _, n in norms) / usual, "spikes": float(len(spikes)), "of": float(len(norms))},
        )


def _wakes(history: History) -> bool:
    """Tell whether gradients have grown to no more than what is ordinary: then the training began where it is flat."""
    import numpy as np

    rows = history.sensitivities(EDGE)
    first = history.first_loss
    if not first or np.isnan(rows).all():
        return False
    return float(np.nanmax(rows)) <= ORDINARY_SENSITIVITY * abs(first)


def _runs_away(history: History) -> bool:
    """Tell whether a loss below 0 goes on and on: that it falls is no progress then."""
    losses, first = history.losses(EDGE), history.track.first_losses
    if not losses or not first or not all(map(math.isfinite, (*losses, *first))):
        return False
    return statistics.median(losses) < -RUN_AWAY * max(map(abs, first))


def _runaway(history: History) -> Iterator[Finding]:
    """Find that what is not finite now had grown before: it exploded, and the NaN is the end of it."""
    now, total = history.snapshot, history.totals[-1]
    if now.skipped or total is None or math.isfinite(total) or now.finite:
        return
    both = zip(history.window(), history.totals, strict=True)
    before = [(s.step, n) for s, n in both if not s.skipped and n is not None and math.isfinite(n)]
    if not before:
        return
    first = next((s for s in history.window() if s.step > before[-1][0]), now)
    if epsilon_lost(first) and broken_by(history, first) is not None:  # it has not grown
        return
    base = statistics.median_low([n for _, n in before[: max(len(before) // 2, 1)]])
    step, last = before[-1]
    growth = last / base if base > 0 else 0.0
    what, grown = "global gradient norm", growth
    if growth < history.thresholds.explosion_growth:
        weights = [s.weight_norm for s in history.window() if s.weight_norm is not None]
        ratios = (b / a for a, b in zip(weights[0], weights[-1], strict=True) if a and b) if weights else ()
        what, grown = "norm of a weight", max(ratios, default=0.0)
        thrown = max((float(_changes(history, s)[1].max(initial=0.0)) for s in history.window(2)), default=0.0)
        if thrown > history.thresholds.explosion_update:  # by the very step before
            grown = max(grown, thrown)
        elif not (grown >= history.thresholds.explosion_update_at_once or math.isinf(grown)):
            return
    yield Finding(
        "GW205", "exploding", Severity.ERROR, "", onset=step, evidence={"growth": grown}, names={"what": what}
    )


def _updates(history: History) -> Iterator[Finding]:
    t = history.thresholds
    if history.snapshot.update_ratio is None or history.improved:
        return
    probes = [s for s in history.window(t.window) if s.update_ratio is not None]
    model, wide = history.model, history.lasting(_wide)
    if not any(s is w for s in probes for w in wide):  # nearly always
        return
    import numpy as np

    steps, layers, moved = history.lasting(_by_number)
    recent = steps >= probes[0].step
    layers, moved = layers[recent], moved[recent]
    largest = np.zeros(len(model.layers))
    np.maximum.at(largest, layers, moved)
    often = np.bincount(layers[moved > t.explosion_update], minlength=len(largest)) >= UPDATE_PROBES
    wild = set(np.flatnonzero(often | (largest > t.explosion_update_at_once)).tolist())
    for run in history.runs(wild, set(layers.tolist())) if wild else ():
        worst = max(run, key=largest.__getitem__)
        yield Finding(
            "GW202",
            "exploding",
            Severity.WARNING,
            model.layers[run[0]].name,
            onset=probes[0].step,
            evidence={"update": float(largest[worst]), "layers": float(len(run)), "limit": t.explosion_update},
            names={"worst": model.layers[worst].name, "last": model.layers[run[-1]].name},
        )


def _changes(history: History, snapshot: Snapshot) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return by how much of itself a step has changed each weight, and the number of its layer.

    Weights that are smaller than ordinary ones count as of ordinary size.
    """
    import numpy as np

    if snapshot.update_ratio is None:
        return np.zeros(0, dtype=np.intp), np.zeros(0)
    columns, layers, ordinary = _weights_of(history, snapshot.model)
    ratio = np.asarray(snapshot.update_ratio, dtype=float)[columns]
    moved, there = ratio, np.isfinite(ratio)
    if snapshot.weight_norm is not None:
        with np.errstate(invalid="ignore"):
            moved = ratio * np.fmin(np.asarray(snapshot.weight_norm, dtype=float)[columns] / ordinary, 1.0)
    return layers[there], moved[there]


_Weights = tuple["NDArray[np.intp]", "NDArray[np.intp]", "NDArray[np.float64]"]


def _weights_of(history: History, model: ModelInfo) -> _Weights:
    """Return the columns of a model's weights, the numbers of their layers now, and norms of ordinary size."""
    known = history.lasting(_no_weights)  # by `id`: snapshots that are remembered hold these models
    if id(model) not in known:
        import numpy as np

        numbers = history.numbers
        weights = [(c, p) for c, p in enumerate(model.parameters) if p.role == "weight" and p.layer in numbers]
        known[id(model)] = (
            np.array([column for column, _ in weights], dtype=np.intp),
            np.array([numbers[p.layer] for _, p in weights], dtype=np.intp),
            np.array([ORDINARY_GAIN * math.sqrt(max((*p.shape, 1)[0], 1)) for _, p in weights]),
        )
    return known[id(model)]


def _no_weights(_: History) -> dict[int, _Weights]:
    return {}


def _throws(history: History, snapshot: Snapshot) -> bool:
    """Tell whether a step has changed a weight by more than itself."""
    return snapshot.update_ratio is not None and any(snapshot is s for s in history.lasting(_throwing))


def _throwing(history: History) -> list[Snapshot]:
    limit = history.thresholds.explosion_update
    return [s for s in history.lasting(_wide) if bool((_changes(history, s)[1] > limit).any())]


def _wide(history: History) -> list[Snapshot]:
    """Return what of `probed` may throw: what counts is at most the ratio itself, and that is nearly never so large."""
    limit = history.thresholds.explosion_update
    return [s for s in history.probed if max(filter(None, s.update_ratio or ()), default=0.0) > limit]


def _by_number(history: History) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return what all probes have seen of changes, oldest first: the step, the number of the layer, and the change."""
    import numpy as np

    probes = [s for s in history.probed if s.update_ratio is not None]
    seen = [_changes(history, s) for s in probes]
    steps = np.repeat(np.array([s.step for s in probes], dtype=np.intp), [len(moved) for _, moved in seen])
    layers, moved = (np.concatenate([one[at] for one in seen]) if seen else np.zeros(0) for at in (0, 1))
    return steps, layers.astype(np.intp), moved


def _loss(history: History) -> Iterator[Finding]:
    t = history.thresholds
    best, first = history.best_loss, history.first_loss
    if best is None or first is None:
        return
    thrown = _before_a_throw(history)
    if thrown is not None:
        best, first = min(best, thrown[1]), min(first, thrown[1])
    losses = history.losses(2 * EDGE)
    level, clear = statistics.median(losses), t.clear_factor if history.is_open("GW203", "") else 1.0
    if level <= first or level <= t.explosion_loss / clear * best:  # nearly always
        return
    # Twice as many as for the best level: a jump that lasts.
    last = [s for s in history.window() if s.loss is not None and not s.skipped][-2 * EDGE :]
    scatter = history.scatter
    if scatter is None or len(last) < 2 * EDGE:
        return
    if math.isinf(level) and (history.is_open("GW205", "") or any(code == "GW501" for code, *_ in history.open)):
        return
    # By more than its scatter, unless there is an update that accounts for the jump.
    accounted = thrown is not None or any(_throws(history, s) for s in history.window(2 * EDGE + 1))
    wavers = 1.0 if accounted else math.exp(min(LOSS_SCATTER * scatter, LARGEST_EXPONENT))
    limit = t.explosion_loss * wavers / clear
    if best > 0 and level > max(
        limit * best, first
    ):  # a loss near 0 may waver by such a factor; it has not exploded while it is below its beginning
        yield Finding(
            "GW203",
            "exploding",
            Severity.ERROR,
            "",
            onset=thrown[0]
            if thrown is not None
            else next(s.step for s, loss in zip(last, losses, strict=True) if loss > limit * best),
            evidence={"jump": level / best, "loss": level, "limit": limit},
        )


def _before_a_throw(history: History) -> tuple[int, float] | None:
    """Return the step after an update that threw the weights, and the loss before it.

    None where there was none so early that no best level was known.
    """
    if history.count > KEPT or not history.lasting(_throwing):
        return None
    early = history.window()[: EDGE + 1]
    for at, (s, after) in enumerate(itertools.pairwise(early)):
        if _throws(history, s):
            told = [x.loss for x in early[: at + 1] if x.loss is not None]
            return (after.step, statistics.median(told)) if told else None
    return None


def _unless_unknown(history: History) -> Severity:
    return Severity.INFO if history.improved is None else Severity.WARNING


# --- in words ---


def _explain_growth(finding: Finding) -> Explanation:
    cause, remedy = said(finding, CLIP)
    return Explanation(
        f"the global gradient norm has been {finding.evidence['growth']:.3g} times that of the first steps"
        f" since step {finding.onset}",
        cause,
        remedy,
    )


def _explain_spikes(finding: Finding) -> Explanation:
    evidence = finding.evidence
    return Explanation(
        f"at {evidence['spikes']:.0f} of the last {evidence['of']:.0f} steps the global gradient norm is {SPIKE:.0f} to"
        f" {max(evidence['times'], SPIKE):.2g} times what it usually is, again and again since step {finding.onset}",
        "something in the loss or the model has a derivative without bounds near values that batches come to: a"
        " quotient whose denominator crosses zero (a Dice loss of logits in place of probabilities), a root or"
        " logarithm near 0; or single rows are many times as large as others",
        f"a sigmoid or softmax before such a sum, an epsilon in the denominator that is not lost beside it; look for"
        f" outliers in the batches of these steps; {CLIP}",
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
    cause, remedy = said(finding, CLIP)
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
    cause, remedy = said(finding, CLIP)
    return Explanation(
        f"the {finding.names['what']} grew {finding.evidence['growth']:.3g} times up to step {finding.onset},"
        " and the gradient has not been finite since",
        cause,
        remedy,
    )


RULES = (
    Rule("GW201", "exploding", _explain_growth, of_explosion, event=True),
    Rule("GW202", "exploding", _explain_updates, of_explosion, event=True),
    Rule("GW203", "exploding", _explain_loss, of_explosion, event=True),
    Rule("GW204", "exploding", _explain_absolute, event=True),
    Rule("GW205", "exploding", _explain_runaway, of_explosion, event=True),
    Rule("GW208", "exploding", _explain_spikes),
)
