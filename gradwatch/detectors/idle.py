"""Steps that are taken and do nothing, or not what the gradient asks for."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.causes import with_cause
from gradwatch.detectors.measured import newest_update
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import (
    BEHIND,
    LEFT_OVER_PROBES,
    SAME_NORM,
    SHRUNK,
    STANDING_PROBES,
    UNDONE,
    UNDONE_PROBES,
)


def idle(history: History) -> Iterator[Finding]:
    """GW903: no weight moves. GW904: clipping takes nearly everything. GW905: gradients are not zeroed.

    GW907: what the steps do is undone. GW910: what is used of the weights is an old copy.
    """
    if history.snapshot.skipped:
        return
    found = list(_unmoved(history))
    yield from found or _clipped(history)
    yield from _left_over(history)
    yield from _undone(history)
    yield from _old_copies(history)


# --- no weight moves ---


def _unmoved(history: History) -> Iterator[Finding]:
    """Find that at probe after probe a step had a gradient and left all weights as they were, or nearly.

    Where the gradient is too small to move anything, or clipping has made it so, that is another finding.
    """
    t, now, update = history.thresholds, history.snapshot, history.track.update
    if update is None or not update < t.slow_update or not any(now.norm) or not now.finite:
        return
    # A step later than others have their say: what leaves nothing of the gradient is not the step's fault.
    if history.count <= t.window or (history.explained and not history.is_open("GW903", "")):
        return
    stand = history.track.standing >= STANDING_PROBES
    if stand and last_rate(history) == 0:
        yield _standing(history, _severity(history), update)
        return
    long = history.improved is False and history.count >= t.stalled_after
    if not (stand or long) or history.improved or warming_up(history):
        return
    if _probe(history).lost is not None:  # what is rounded away is found by its share
        return
    if share_left(history) is not None or (asks := _asks(history)) is False:
        return
    if stand and asks:
        yield _standing(history, Severity.WARNING, update)
    elif (long and asks) or (stand and history.track.moved is None):
        yield _standing(history, Severity.WARNING if long and _shrunk(history) else Severity.INFO, update)


def _standing(history: History, severity: Severity, update: float) -> Finding:
    """Return the finding, since the first of the probes that belong to it."""
    probes = [s.step for s in history.probed if s.update_ratio is not None and not s.skipped]
    onset = probes[max(len(probes) - max(history.track.standing, 1), 0)] if probes else history.snapshot.step
    evidence = {"update": update, **({} if history.track.moved is None else {"moved": float(history.track.moved)})}
    return Finding("GW903", "unstepped", severity, "", onset=onset, evidence=evidence)


def _of_the_rate(history: History, finding: Finding) -> Finding:
    """Tell whether the learning rate is 0, or too small to move these weights by these gradients."""
    probe = _probe(history)
    weights = math.hypot(*(w for w in probe.weight_norm or () if w is not None))
    rate, norm = last_rate(history), probe.norm_global or 0.0
    if rate == 0:
        return with_cause(finding, "no_rate", {"rate": rate})
    if rate is None or not weights:
        return finding
    entries = sum(p.elements for p, n in zip(probe.model.parameters, probe.norm, strict=True) if n is not None)
    if rate * (math.sqrt(entries) if history.adaptive else norm) >= history.thresholds.slow_update * weights:
        return finding
    made = {"made_with": _first_rate(history) or 0.0} if _shrunk(history) else {}
    return with_cause(finding, "small_rate", {"rate": rate, **({} if history.adaptive else {"norm": norm}), **made})


def _shrunk(history: History) -> bool:
    """Tell whether a schedule has left next to nothing of the learning rate that the optimizer was made with, ever.

    One of 1 is a unit, and what the schedule returns the rate itself.
    """
    first, fastest = _first_rate(history), history.track.fastest
    return first is not None and first < 1 and 0 < fastest <= SHRUNK * first


def _first_rate(history: History) -> float | None:
    """Return the learning rate that the optimizer of this step was made with; None where nobody knows."""
    now = history.snapshot.optimizer
    return None if now is None else history.model.optimizers[now].first_rate


def _severity(history: History) -> Severity:
    """Judge a schedule that has run out: at the end of a training it is no fault, before half of it is over it is."""
    moved = history.track.moved
    if moved is not None and history.improved is not False and history.snapshot.step - moved < moved:
        return Severity.INFO
    return Severity.WARNING


def _probe(history: History) -> Snapshot:
    """Return the newest snapshot that tells how far the weights moved, or just the newest."""
    return newest_update(history) or history.snapshot


def warming_up(history: History) -> bool:
    """Tell whether the learning rate is rising."""
    rates = [s.rate for s in history.probed if s.rate is not None]
    return bool(rates) and rates[-1] > rates[0]


def last_rate(history: History) -> float | None:
    """Return the learning rate of the last probe; None where the optimizer has none."""
    return next((s.rate for s in reversed(history.probed) if s.rate is not None), None)


def _asks(history: History) -> bool | None:
    """Tell whether the gradient asks for more than the steps give; None: without the loss, nobody knows.

    Small gradients make small steps by themselves. Of an Adam-like optimizer the size of the gradient does not matter,
    but for epsilon; of another, the loss tells.
    """
    import numpy as np

    now, t = history.snapshot, history.thresholds
    if history.adaptive and now.optimizer is not None:
        eps = history.model.optimizers[now.optimizer].eps or 0.0
        return max((r for r in now.rms if r is not None), default=0.0) >= eps
    if not (losses := history.losses(1)):
        return None
    return bool(np.nanmax(history.sensitivities(1), initial=0.0) >= t.flat_sensitivity * abs(losses[-1]))


# --- clipping ---


def share_left(history: History) -> dict[str, float] | None:
    """Return what clipping leaves of the gradient where that is next to nothing, or where it is always the same norm.

    `clip_factor` where gradients were read before clipping, else `norm`; None where neither can be said.
    """
    t = history.thresholds
    window = [s for s in reversed(history.window(t.window)) if not s.skipped]
    if len(window) < t.window:
        return None
    factors = [s.clip_factor for s in window if s.clip_factor is not None]
    if factors:
        # One factor at each step is a loss scale that was divided out in between.
        limit = t.clipped * (t.clear_factor if history.is_open("GW904", "") else 1.0)
        low = len(factors) == len(window) and statistics.median(factors) <= limit
        return {"clip_factor": factors[0]} if low and not _same(factors) else None
    # Where the gradient of a whole model does not change, that of each parameter does not either.
    if not _same(s.norm_global for s in window) or all(map(_same, zip(*(s.norm for s in window), strict=True))):
        return None
    return {"norm": window[0].norm_global or 0.0}


def _same(numbers: Iterable[float | None]) -> bool:
    """Tell whether all are the same number, above 0, up to rounding; or there are none."""
    known = (n for n in numbers if n is not None)
    first = next(known, None)
    return first is None or (0 < first < math.inf and all(abs(n - first) <= SAME_NORM * first for n in known))


def _clipped(history: History) -> Iterator[Finding]:
    """Find that clipping leaves so little that no weight gets anywhere, while the loss stands still.

    A clip that is reached at each step, and weights that move, are what the beginning of many a sound training looks
    like: it is worth a word only where the loss stands still for long.
    """
    t, update = history.thresholds, history.track.update
    if history.improved or update is None:
        return
    slow = update < t.slow_update * (t.clear_factor if history.is_open("GW904", "") else 1.0)
    if not slow and (history.improved is None or history.count < t.stalled_after):
        return
    told = history.explained and not history.is_open("GW904", "")  # by another alert, why the loss stands still
    if told or history.count <= t.window or warming_up(history) or (left := share_left(history)) is None:
        return
    sure = history.improved is False or history.track.standing >= STANDING_PROBES
    severity = Severity.WARNING if slow and sure else Severity.INFO
    evidence = {**left, "update": update}
    if (scale := history.snapshot.loss_scale) is not None and scale != 1:
        evidence["loss_scale"] = scale
    onset = history.window(t.window)[0].step
    yield Finding("GW904", "unstepped", severity, "", onset=onset, evidence=evidence)


def _newest(
    history: History, number: Callable[[Snapshot], float | None], holds: Callable[[float], bool]
) -> list[Snapshot]:
    """Return the probes that know a number, the newest first, as far back as something holds of it."""
    known = ((s, value) for s in reversed(history.probed) if (value := number(s)) is not None)
    return [s for s, _ in itertools.takewhile(lambda pair: holds(pair[1]), known)]


# --- gradients that are not zeroed ---


def _left_over(history: History) -> Iterator[Finding]:
    run = _newest(history, lambda s: s.left_over, bool)
    if len(run) >= LEFT_OVER_PROBES:
        evidence = {"share": run[0].left_over or 0.0}
        yield Finding("GW905", "unstepped", Severity.WARNING, "", onset=run[-1].step, evidence=evidence)


# --- steps that are undone ---


def _undone(history: History) -> Iterator[Finding]:
    """Find that at probe after probe the weights are where they were at the one before, although steps move them."""
    run = _newest(history, lambda s: s.came, lambda came: came < UNDONE)
    update = history.track.update
    if history.improved or len(run) < UNDONE_PROBES or update is None or update < history.thresholds.slow_update:
        return
    severity = Severity.INFO if history.improved is None else Severity.WARNING
    evidence = {"came": max(s.came or 0.0 for s in run), "update": update}
    yield Finding("GW907", "unstepped", severity, "", onset=run[-1].step, evidence=evidence)


# --- copies of weights ---


def _old_copies(history: History) -> Iterator[Finding]:
    """Find that the forward pass computes with copies of the weights that were made many steps ago."""
    run = list(itertools.takewhile(_behind, reversed(history.looks())))
    if not run:
        return
    places = _behind(run[0])
    layers = [name for i in history.order if (name := history.model.layers[i].name) in places]
    yield Finding(
        "GW910",
        "unstepped",
        Severity.WARNING,
        layers[0] if layers else "",
        onset=run[-1].step,
        evidence={"times": max(places.values()), "layers": float(len(places))},
        names={"last": layers[-1] if layers else ""},
    )


def _behind(snapshot: Snapshot) -> dict[str, float]:
    """Return how often weights were written to since the copy was made that is used of them, where that is often."""
    return {f.place: f.value for f in snapshot.facts or () if f.name == "steps_behind" and f.value >= BEHIND}


# --- in words ---


def _explain_unmoved(finding: Finding) -> Explanation:
    update = finding.evidence["update"]
    how = f"a step moves the weights by {update:.1g} of themselves" if update else "no weight has moved"
    cause, remedy = said(finding, "look at what the optimizer's step() does, and whether something puts weights back")
    return Explanation(f"the optimizer steps, and {how}, since step {finding.onset}", cause, remedy)


def _explain_clipped(finding: Finding) -> Explanation:
    evidence = finding.evidence
    moves = f": a step moves the weights by {evidence['update']:.1g} of themselves"
    if "clip_factor" in evidence:
        message = f"clipping leaves {evidence['clip_factor']:.1g} of the gradient at each step"
        cause = "the gradients are mostly far above the norm at which they are clipped"
    else:
        message = f"the global gradient norm is {evidence['norm']:.3g} at each step"
        cause = "the gradients are clipped or normalized to that norm before the step, however large they were"
    if "loss_scale" in evidence:
        cause += f", and a loss scale of {evidence['loss_scale']:.3g} is in use"
        remedy = "scaler.unscale_(optimizer) before clipping: else it is the scaled gradient that is clipped"
    else:
        remedy = "clip at a norm that the gradients mostly do not reach; watcher.step() before clipping shows them"
    return Explanation(f"{message} since step {finding.onset}{moves}", cause, remedy)


def _explain_left_over(finding: Finding) -> Explanation:
    return Explanation(
        f"{finding.evidence['share']:.0%} of the gradient that the optimizer takes was there before the forward pass,"
        f" since step {finding.onset}",
        "the gradients of the steps before are not zeroed, and add up",
        "optimizer.zero_grad() after each optimizer.step()",
    )


def _explain_undone(finding: Finding) -> Explanation:
    evidence = finding.evidence
    return Explanation(
        f"what the steps do is undone since step {finding.onset}: each moves the weights by {evidence['update']:.1g} of"
        f" themselves, and from probe to probe they come no farther than {evidence['came']:.2g} of one such step",
        "something writes the weights between the steps (averages that are copied into the model and not taken out"
        " again, rounding to a coarser format, a clamp, weights that are loaded or tied anew), or the steps go to and"
        " fro",
        "write averages and rounded weights into a copy of the model, or put back what was there; if nothing writes,"
        " lower the learning rate",
    )


def _explain_old_copies(finding: Finding) -> Explanation:
    evidence, place, last = finding.evidence, finding.place or "the model", finding.names["last"]
    whose = f"{place} to {last} ({evidence['layers']:.0f} layers)" if evidence["layers"] > 1 else place
    return Explanation(
        f"the forward pass computes with old copies of the weights of {whose}: they have been written to"
        f" {evidence['times']:.0f} times since, at step {finding.onset} and after, and nothing of that is used",
        "one torch.autocast around the whole loop: it casts a weight once, and keeps that until it is left",
        "enter torch.autocast at each step, around the forward pass and the loss alone (or cache_enabled=False)",
    )


RULES = (
    Rule("GW903", "unstepped", _explain_unmoved, _of_the_rate),
    Rule("GW904", "unstepped", _explain_clipped),
    Rule("GW907", "unstepped", _explain_undone),
    Rule("GW905", "unstepped", _explain_left_over),
    Rule("GW910", "unstepped", _explain_old_copies),
)
