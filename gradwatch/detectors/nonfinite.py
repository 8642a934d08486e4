"""NaN and infinite gradients that reach the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.origins import broken_by, entered, of_skips, origin_of, with_origin, with_step
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import ParameterInfo, Snapshot
from gradwatch.values.thresholds import EDGE, MOSTLY_FLAT


def nonfinite(history: History) -> Iterator[Finding]:
    """GW501: a gradient holds NaN or infinity. GW502: a GradScaler has skipped every step for long. GW504: the loss."""
    snapshot = history.snapshot
    yield from _of_the_loss(history)
    limit = history.thresholds.skipped_steps
    if history.skipped >= limit:
        yield Finding(
            "GW502",
            "non-finite",
            Severity.ERROR,
            "",
            onset=history.window(limit)[0].step,
            evidence={"skipped": float(history.skipped)},
        )
    total = history.totals[-1]
    if snapshot.skipped or total is None or math.isfinite(total) or not _bad(snapshot):
        return
    onset = history.since(bool(_bad(s)) for s in history.window())
    # What came first tells the cause: a step later the weights themselves are not finite.
    first = next(s for s in history.window() if s.step >= onset and _bad(s))
    bad = _bad(first)
    # NaN spreads from where it arose to everything before: the layer nearest to the loss is the one to look at.
    position = {history.model.layers[i].name: at for at, i in enumerate(history.order)}
    culprit = max(bad, key=lambda p: position[p.layer])
    layers = len({p.layer for p in bad})
    evidence = {"layers": float(layers), "of": float(len(snapshot.model.layers))}
    if first.nonfinite is not None:
        column = first.model.parameters.index(culprit)
        evidence["entries"] = float(first.nonfinite[column] or 0)
        evidence["elements"] = float(culprit.elements)
    if first.loss is not None:
        evidence["loss"] = first.loss
    yield _with_place(
        history,
        first,
        Finding(
            "GW501",
            "non-finite",
            Severity.ERROR,
            culprit.layer,
            culprit.name,
            onset=onset,
            evidence=evidence,
            names={"gradient": culprit.name},
        ),
    )


def _of_the_loss(history: History) -> Iterator[Finding]:
    """Find that a loss that is told is not finite again and again, and that every gradient is."""
    window = history.window(history.thresholds.window)
    bad = [s for s in window if s.loss is not None and not math.isfinite(s.loss) and s.finite and not s.skipped]
    told = any(code in ("GW501", "GW205") for code, *_ in history.open)
    share = len(bad) / max(len(window), 1)
    if len(bad) < EDGE or share < MOSTLY_FLAT or bad[-1].step != history.snapshot.step or told:
        return
    evidence = {"loss": bad[-1].loss or math.nan, "share": share}
    yield Finding("GW504", "non-finite", Severity.WARNING, "", onset=bad[0].step, evidence=evidence)


def _with_place(history: History, first: Snapshot, finding: Finding) -> Finding:
    """Return the finding at the origin, where that was seen; else with what the loss and the gradients tell of it."""
    if first is history.window()[0]:  # what came before it is forgotten
        for code, place, parameter, optimizer in history.open:
            if (code, optimizer) == (finding.code, first.optimizer):
                return dataclasses.replace(finding, place=place, parameter=parameter)
    origin = origin_of(history, first)
    if origin is not None:
        if origin.module is not None:
            finding = dataclasses.replace(finding, place=origin.module, parameter=None)
        if origin.phase == "weights" and (step := broken_by(history, first)) is not None:
            return with_step(finding, step)
        return with_origin(finding, first, origin)
    layer = entered(history, first)
    if layer is not None:
        names = {**finding.names, "entered": layer}
        return dataclasses.replace(finding, place=layer, parameter=None, cause="origin_gone", names=names)
    gone = not math.isfinite(finding.evidence.get("loss", 0.0))
    return dataclasses.replace(finding, cause="origin_gone" if gone else "")


def _bad(snapshot: Snapshot) -> list[ParameterInfo]:
    return [
        p
        for p, n in zip(snapshot.model.parameters, snapshot.norm, strict=True)
        if n is not None and not math.isfinite(n)
    ]


def _explain(finding: Finding) -> Explanation:
    evidence, gradient = finding.evidence, finding.names["gradient"]
    what = f"the gradient of {gradient} is"
    if "entries" in evidence:
        what = f"{evidence['entries']:.0f} of {evidence['elements']:.0f} entries of the gradient of {gradient} are"
    message = (
        f"{what} NaN or infinite, and so are gradients of {evidence['layers']:.0f} of {evidence['of']:.0f} layers,"
        f" since step {finding.onset}"
    )
    if finding.cause:
        return Explanation(message, *said(finding, ""))
    cause = "an operation without a finite derivative, or a loss that is not finite"
    if "loss" in evidence:
        cause = (
            "the loss is finite, its derivative is not (sqrt or norm at 0, log of 0, 0 * inf masked by torch.where, a"
            " softmax over nothing that is masked before the loss)"
        )
    return Explanation(
        message,
        cause,
        f"look at what follows {finding.place or 'the model'}: torch.autograd.set_detect_anomaly(True) for one step, or"
        " gradwatch.check(model, batch, loss=...), names the operation; add an epsilon there, or clip the gradient norm"
        " with error_if_nonfinite=True",
    )


def _explain_skipped(finding: Finding) -> Explanation:
    message = f"the GradScaler has skipped {finding.evidence['skipped']:.0f} steps in a row"
    if finding.cause:
        return Explanation(message, *said(finding, ""))
    return Explanation(
        message,
        "gradients overflow at any loss scale: the loss is infinite or NaN, and the scale is not to blame",
        "look at the loss and the inputs of such a step in float32, without autocast",
    )


def _explain_loss(finding: Finding) -> Explanation:
    what = "NaN" if math.isnan(finding.evidence["loss"]) else "infinite"
    often = "" if finding.evidence["share"] >= 1 else f" at {finding.evidence['share']:.0%} of the steps"
    return Explanation(
        f"the loss has been {what}{often} since step {finding.onset}, and every gradient is finite",
        "the loss function gives that where it takes no derivative of it: the logarithm of a number below 0, an average"
        " over no target at all (all are masked, or ignore_index), a term that is cut off by clamp or where; or a term"
        " that is only told",
        "look at each term of the loss alone; keep what a logarithm takes above 0 (softplus, exp, clamp), and leave out"
        " batches without a target",
    )


RULES = (
    Rule("GW501", "non-finite", _explain, event=True),
    Rule("GW502", "non-finite", _explain_skipped, of_skips, event=True),
    Rule("GW504", "non-finite", _explain_loss),
)
