"""NaN and infinite gradients that reach the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    evidence: dict[str, float | str] = {"layers": float(layers), "of": float(len(snapshot.model.layers))}
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


def explain_nonfinite(finding: Finding) -> Explanation:
    """Say what is not finite, and where to look."""
    evidence = finding.evidence
    if finding.code == "GW502":
        return Explanation(
            f"the GradScaler has skipped {evidence['skipped']:.0f} steps in a row",
            "gradients overflow at any loss scale: an infinite or NaN loss, not too large a scale",
            "look at the loss and the inputs of such a step in float32, without autocast",
        )
    entries = f"{evidence['entries']:.0f} of {evidence['elements']:.0f} entries of " if "entries" in evidence else ""
    loss = evidence.get("loss")
    known = isinstance(loss, float)
    finite = known and math.isfinite(float(loss or 0))
    return Explanation(
        f"{entries}the gradient of {finding.parameter} are NaN or infinite, and so {evidence['layers']:.0f} of {evidence['of']:.0f} layers since step {finding.onset}",
        "the loss is finite, its derivative is not (sqrt or norm at 0, log of 0, 0 * inf behind torch.where)"
        if finite
        else "the loss itself is not finite"
        if known
        else "an operation without a finite derivative, or a loss that is not finite",
        f"look at what follows {finding.place or 'the model'}: torch.autograd.set_detect_anomaly(True) for one step names the operation; add an epsilon there, or clip the gradient norm with error_if_nonfinite=True",
    )
