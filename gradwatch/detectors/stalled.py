"""A loss that stands still, for no reason that gradients show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from gradwatch.detectors.measured import newest_update, same_loss
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.layer_columns import counts
from gradwatch.values.report import UNKNOWN, Explanation, Finding, Severity
from gradwatch.values.thresholds import CONSTANT_LOSS, FALLING, KEPT, LOOKS_AT_LOSS, SLOW_STANDING, TOLD


def stalled(history: History) -> Iterator[Finding]:
    """GW801: over the last 50 losses nothing has changed, near where the loss began, and no other alert tells why.

    GW802: the loss holds each forecast against each target. GW803: it does not change, though its gradient says so.
    """
    yield from _crossed(history)
    yield from _along(history)
    losses = history.losses(KEPT)
    if (
        history.explained
        or history.improved is not False
        or history.count < history.thresholds.stalled_after
        or len(losses) < KEPT
        or not all(map(math.isfinite, losses))
    ):
        return
    half = KEPT // 2
    before, after = statistics.median(losses[:half]), statistics.median(losses[half:])
    spread = statistics.median(abs(loss - before) for loss in losses[:half])
    if abs(after - before) <= max(spread, history.thresholds.stalled * abs(before)) and not _falls(losses):
        evidence = {"loss": after, "first": float(history.first_loss or 0.0), **_slow_steps(history)}
        yield Finding("GW801", "stalled", Severity.INFO, "", onset=history.window(KEPT)[0].step, evidence=evidence)


def _falls(losses: Sequence[float]) -> bool:
    """Tell whether losses follow a line downwards, by more than their scatter around it explains."""
    middle, mean = (len(losses) - 1) / 2, statistics.fmean(losses)
    wide = sum((k - middle) ** 2 for k in range(len(losses)))
    slope = sum((k - middle) * loss for k, loss in enumerate(losses)) / wide
    rest = sum((loss - mean - slope * (k - middle)) ** 2 for k, loss in enumerate(losses))
    return slope < -FALLING * math.sqrt(rest / (len(losses) - 2) / wide)


def _slow_steps(history: History) -> dict[str, float]:
    """Return how far the last measured step has moved weights, at most, and the rate; nothing where steps are ordinary.

    Nor where they are so small that GW903 tells of them, or where another optimizer may move the rest.
    """
    probe = newest_update(history)
    if probe is None or probe.update_ratio is None or len(probe.model.optimizers) > 1:
        return {}
    known = zip(probe.model.parameters, probe.update_ratio, strict=True)
    speed = max((u for p, u in known if u is not None and counts(p) and math.isfinite(u)), default=0.0)
    if not history.thresholds.slow_update <= speed < SLOW_STANDING:
        return {}
    return {"update": speed, "rate": next((s.rate for s in reversed(history.probed) if s.rate), 0.0)}


def _crossed(history: History) -> Iterator[Finding]:
    yield from history.lasting(_with_all_targets)


def _with_all_targets(history: History) -> tuple[Finding, ...]:
    found = [s for s in history.looks(LOOKS_AT_LOSS) if s.crossed]
    if not found:
        return ()
    evidence = {"rows": float(found[-1].crossed or 0)}
    return (Finding("GW802", "stalled", Severity.WARNING, "", onset=found[0].step, evidence=evidence),)


def _along(history: History) -> Iterator[Finding]:
    """Find a loss that is the same at each batch though, by its gradient and the steps, it should come down.

    Terms that are divided by their own value, or whose logarithm has its own value taken off, do so by design, and
    their gradients are sound: whole numbers are left out, and others but the logarithm of 2 are information.
    """
    loss = same_loss(history)
    if not loss or abs(loss - round(loss)) <= CONSTANT_LOSS * abs(loss):
        return
    alike = abs(loss - math.log(2)) <= CONSTANT_LOSS  # what a logistic loss gives where both sides are the same
    probe = newest_update(history)
    if probe is None or probe.weight_norm is None or probe.update_ratio is None:
        return
    known = zip(probe.norm, probe.weight_norm, probe.update_ratio, strict=True)
    change = max((n * w * r for n, w, r in known if n is not None and w is not None and r is not None), default=0.0)
    if change >= TOLD * CONSTANT_LOSS * abs(loss):
        onset = history.window(history.thresholds.window)[0].step
        severity = Severity.WARNING if alike else Severity.INFO
        yield Finding("GW803", "stalled", severity, "", onset=onset, evidence={"loss": loss, "change": change})


def _explain_along(finding: Finding) -> Explanation:
    loss, change = finding.evidence["loss"], finding.evidence["change"]
    return Explanation(
        f"the loss has been {loss:.6g} at every batch since step {finding.onset}, though by its gradient one step of"
        f" one tensor alone should change it by {change:.1g}",
        "what the loss compares the model with moves along with it: a reference, a target network or a normalization"
        " that is the model itself, without a graph, and no copy of it; or the loss is made so that its value tells"
        " nothing (loss / loss.detach()), or is not the one that is differentiated",
        "keep a frozen copy to compare with (copy.deepcopy(model).requires_grad_(False)), or targets from the data;"
        " record the loss that backward() is called on",
    )


def _explain_crossed(finding: Finding) -> Explanation:
    rows = f"{finding.evidence['rows']:.0f}"
    return Explanation(
        f"the loss holds each of {rows} forecasts against each of {rows} targets: its errors have the shape"
        f" ({rows}, {rows}), and the best that it can learn is the mean of the targets",
        f"forecasts of shape ({rows}, 1) and targets of shape ({rows},), or the other way round, are broadcast",
        "give both the same shape: squeeze(-1) the forecasts, or unsqueeze(-1) the targets",
    )


def _explain(finding: Finding) -> Explanation:
    loss, first = finding.evidence["loss"], finding.evidence["first"]
    message = f"the loss has stood still at {loss:.3g} since step {finding.onset}; it began at {first:.3g}"
    if (update := finding.evidence.get("update")) is not None:
        rate = f" (the learning rate is {r:.2g})" if (r := finding.evidence["rate"]) else ""
        return Explanation(
            message,
            f"steps are small: the last that was measured moved no weight by more than {update:.1g} of itself{rate}",
            "raise the learning rate tenfold; look at its schedule: a warm-up that counts epochs for steps, a rate that"
            " is multiplied by itself",
        )
    return Explanation(
        message,
        f"{UNKNOWN}: the gradients show none",
        "overfit a single batch first: if that works, the gradients are sound, and the data or the learning rate"
        " is to blame",
    )


RULES = (
    Rule("GW801", "stalled", _explain, explains_a_stall=False),
    Rule("GW802", "stalled", _explain_crossed),
    Rule("GW803", "stalled", _explain_along),
)
