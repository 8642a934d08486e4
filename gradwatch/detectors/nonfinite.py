"""NaN and infinite gradients that reach the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import ParameterInfo, Snapshot


def nonfinite(history: History) -> Iterator[Finding]:
    """GW501: a gradient holds NaN or infinity. GW502: a GradScaler has skipped every step for long."""
    snapshot = history.snapshot
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
    if snapshot.skipped:
        return
    if not _bad(snapshot):
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
    yield Finding("GW501", "non-finite", Severity.ERROR, culprit.layer, culprit.name, onset=onset, evidence=evidence)


def _bad(snapshot: Snapshot) -> list[ParameterInfo]:
    return [
        p
        for p, n in zip(snapshot.model.parameters, snapshot.norm, strict=True)
        if n is not None and not math.isfinite(n)
    ]


def _explain(finding: Finding) -> Explanation:
    evidence, loss = finding.evidence, finding.evidence.get("loss")
    what = f"the gradient of {finding.parameter} is"
    if "entries" in evidence:
        entries, elements = evidence["entries"], evidence["elements"]
        what = f"{entries:.0f} of {elements:.0f} entries of the gradient of {finding.parameter} are"
    if loss is None:
        cause = "an operation without a finite derivative, or a loss that is not finite"
    elif math.isfinite(loss):
        cause = "the loss is finite, its derivative is not (sqrt or norm at 0, log of 0, 0 * inf masked by torch.where)"
    else:
        cause = "the loss itself is not finite"
    return Explanation(
        f"{what} NaN or infinite, and so are gradients of {evidence['layers']:.0f} of {evidence['of']:.0f} layers,"
        f" since step {finding.onset}",
        cause,
        f"look at what follows {finding.place or 'the model'}: torch.autograd.set_detect_anomaly(True) for one step"
        " names the operation; add an epsilon there, or clip the gradient norm with error_if_nonfinite=True",
    )


def _explain_skipped(finding: Finding) -> Explanation:
    return Explanation(
        f"the GradScaler has skipped {finding.evidence['skipped']:.0f} steps in a row",
        "gradients overflow at any loss scale: the loss is infinite or NaN, and the scale is not to blame",
        "look at the loss and the inputs of such a step in float32, without autocast",
    )


RULES = (
    Rule("GW501", "non-finite", _explain, event=True),
    Rule("GW502", "non-finite", _explain_skipped, event=True),
)
