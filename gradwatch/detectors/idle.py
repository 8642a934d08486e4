"""Steps that are taken and do nothing, or not what the gradient asks for."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import UNKNOWN, Explanation, Finding, Severity
from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import KEPT, LEFT_OVER_PROBES, SAME_NORM, STANDING_PROBES


def idle(history: History) -> Iterator[Finding]:
    """GW903: no weight moves. GW904: clipping takes nearly everything. GW905: gradients are not zeroed."""
    if history.snapshot.skipped:
        return
    found = list(_unmoved(history))
    yield from found or _clipped(history)
    yield from _left_over(history)


# --- no weight moves ---


def _unmoved(history: History) -> Iterator[Finding]:
    """Find that at probe after probe a step had a gradient and left all weights as they were.

    The findings of gradients that are too small to move anything are others.
    """
    t, now, moved = history.thresholds, history.snapshot, history.moved
    if history.standing < STANDING_PROBES or history.count < t.window or not any(now.norm) or _bad(now):
        return
    probes = [s for s in history.window() if s.update_ratio is not None and not s.skipped]
    rates = [s.rate for s in probes if s.rate is not None]
    rate = rates[-1] if rates else None
    if rate and rates[-1] > rates[0]:  # a warm-up
        return
    cut = share_left(history)
    if rate != 0 and (history.improved or _rounded(probes) or (cut is None and not _asks(history))):
        return
    evidence = {"update": (probes[-1].update_global if probes else None) or 0.0}
    cause = "rate" if rate == 0 else "clipped" if cut is not None else "small_rate" if rate else ""
    evidence |= {} if rate is None else {"rate": rate}
    evidence |= {} if cut is None else cut
    evidence |= {} if moved is None else {"moved": float(moved)}
    onset = probes[-history.standing].step if history.standing <= len(probes) else moved + 1 if moved is not None else 0
    yield Finding("GW903", "unstepped", _severity(history), "", onset=onset, evidence=evidence, cause=cause)


def _severity(history: History) -> Severity:
    """A schedule that has run out at the end of a training is no fault; one that did so before half of it is."""
    moved = history.moved
    if moved is not None and history.improved is not False and history.snapshot.step - moved < moved:
        return Severity.INFO
    return Severity.WARNING


def _asks(history: History) -> bool:
    """Tell whether the gradient asks for more than the steps give: small gradients make small steps by themselves.

    Of an Adam-like optimizer the size of the gradient does not matter, but for epsilon; of another, the loss tells.
    """
    import numpy as np

    now, t = history.snapshot, history.thresholds
    info = history.model.optimizers[now.optimizer] if now.optimizer is not None else None
    if info is not None and info.adaptive:
        return max((r for r in now.rms if r is not None), default=0.0) >= (info.eps or 0.0)
    losses = history.losses(1)
    sensitivity = float(np.nanmax(history.sensitivities(1), initial=0.0))
    return bool(losses) and sensitivity >= t.flat_sensitivity * abs(losses[-1])


def _rounded(probes: Sequence[Snapshot]) -> bool:
    """Tell whether there are weights in a format of less than 32 bits, which may be rounded back."""
    return any(s.lost is not None for s in probes[-1:])


def _bad(snapshot: Snapshot) -> bool:
    return any(n is not None and not math.isfinite(n) for n in snapshot.norm)


# --- clipping ---


def share_left(history: History) -> dict[str, float] | None:
    """Return what clipping leaves of the gradient where that is next to nothing, or where it is always the same norm.

    `clip_factor` where gradients were read before clipping, else `norm`; None where neither can be said.
    """
    t = history.thresholds
    window = [s for s in history.window(t.window) if not s.skipped]
    factors = [s.clip_factor for s in window if s.clip_factor is not None]
    if len(window) < t.window:
        return None
    if len(factors) == len(window):
        # One factor at each step is a loss scale that was divided out in between.
        limit = t.clipped * (t.clear_factor if history.is_open("GW904", "") else 1.0)
        return None if _same(factors) or statistics.median(factors) > limit else {"clip_factor": factors[-1]}
    norms = [s.norm_global for s in window]
    # Where the gradient of a whole model does not change, that of each parameter does not either.
    if factors or not _same(norms) or all(map(_same, zip(*(s.norm for s in window), strict=True))):
        return None
    return {"norm": norms[-1] or 0.0}


def _same(numbers: Sequence[float | None]) -> bool:
    """Tell whether all are the same number, above 0, up to rounding; or there are none."""
    known = [n for n in numbers if n is not None]
    return not known or (0 < max(known) < math.inf and min(known) >= max(known) * (1 - SAME_NORM))


def _clipped(history: History) -> Iterator[Finding]:
    """Find that clipping leaves so little that no weight gets anywhere, while the loss stands still."""
    t = history.thresholds
    if history.improved or (left := share_left(history)) is None:
        return
    update = next((u for s in reversed(history.window()) if (u := s.update_global) is not None), math.inf)
    slow = update < t.slow_update * (t.clear_factor if history.is_open("GW904", "") else 1.0)
    severity = Severity.WARNING if slow and history.improved is False else Severity.INFO
    if severity is Severity.INFO and ("norm" in left or not history.is_open("GW904", "")) and history.count < KEPT:
        return  # a clip that is reached at each step is what the beginning of many a sound training looks like
    evidence = {**left, **({"update": update} if math.isfinite(update) else {})}
    onset = history.window(t.window)[0].step
    yield Finding("GW904", "unstepped", severity, "", onset=onset, evidence=evidence)


# --- gradients that are not zeroed ---


def _left_over(history: History) -> Iterator[Finding]:
    seen = [s for s in history.window() if s.left_over is not None]
    run = list(itertools.takewhile(lambda s: s.left_over, reversed(seen)))
    if len(run) >= LEFT_OVER_PROBES:
        evidence = {"share": run[0].left_over or 0.0}
        yield Finding("GW905", "unstepped", Severity.WARNING, "", onset=run[-1].step, evidence=evidence)


# --- in words ---


def _explain_unmoved(finding: Finding) -> Explanation:
    evidence = finding.evidence
    update, rate, moved = evidence.get("update", 0.0), evidence.get("rate"), evidence.get("moved")
    how = f"by more than {update:.1g} of themselves" if update else "at all"
    message = f"the optimizer steps, and the weights have not moved {how} since step {finding.onset}"
    if finding.cause == "rate":
        if moved is None:
            cause = "its learning rate is 0"
            return Explanation(message, cause, "look at what sets the learning rate: a schedule, or its units of time")
        return Explanation(
            message,
            "its learning rate is 0: the schedule has run out",
            "a schedule over as many steps as the training has: count what its step() is called for, batches or epochs",
        )
    if finding.cause == "clipped":
        return Explanation(message, *_said_of_clipping(finding))
    if finding.cause == "small_rate":
        return Explanation(
            message, f"its learning rate of {rate or 0.0:.2g} is too small to change them", "raise the learning rate"
        )
    return Explanation(
        message, UNKNOWN, "look at what the optimizer's step() does, and whether something puts the weights back"
    )


def _explain_clipped(finding: Finding) -> Explanation:
    evidence, cause_and_remedy = finding.evidence, _said_of_clipping(finding)
    update = evidence.get("update")
    moves = "" if update is None else f": a step moves the weights by {update:.1g} of themselves"
    if "clip_factor" in evidence:
        message = f"clipping leaves {evidence['clip_factor']:.1g} of the gradient at each step"
    else:
        message = f"the global gradient norm is {evidence.get('norm', 0.0):.3g} at each step"
    return Explanation(f"{message} since step {finding.onset}{moves}", *cause_and_remedy)


def _said_of_clipping(finding: Finding) -> tuple[str, str]:
    left = finding.evidence.get("clip_factor")
    if left is None:
        norm = finding.evidence.get("norm", 0.0)
        cause = f"the gradients are clipped or normalized to {norm:.3g} before the step, however large they were"
    else:
        cause = f"the gradients are clipped to {left:.1g} of what they were"
    return cause, (
        "under a GradScaler call scaler.unscale_(optimizer) before clipping, or scaled gradients are clipped; else clip"
        " at the norm that the gradients mostly have, which watcher.step() before clipping shows"
    )


def _explain_left_over(finding: Finding) -> Explanation:
    return Explanation(
        f"{finding.evidence['share']:.0%} of the gradient that the optimizer takes was there before the forward pass,"
        f" since step {finding.onset}",
        "the gradients of the steps before are not zeroed, and add up",
        "optimizer.zero_grad() after each optimizer.step()",
    )


RULES = (
    Rule("GW903", "unstepped", _explain_unmoved),
    Rule("GW904", "unstepped", _explain_clipped),
    Rule("GW905", "unstepped", _explain_left_over),
)
