"""Gradients and updates that are lost to the number format or to the optimizer's epsilon."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from gradwatch.detectors.measured import constant_loss
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import Snapshot


def underflow(history: History) -> Iterator[Finding]:
    """GW701: gradients flushed to zero. GW702: updates rounded away. GW703: gradients below the optimizer's epsilon."""
    if history.snapshot.skipped:
        return
    probes = [s for s in history.probed if s.zeros is not None and not s.skipped]
    yield from _flushed(history, probes)
    yield from _rounded(history, probes)
    yield from _epsilon(history)


def _flushed(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Find that most entries are exactly 0, and nearly all others below what the format can hold in full."""
    t = history.thresholds
    last = probes[-t.underflow_probes :]
    if len(last) < t.underflow_probes:
        return
    share = t.flushed / (t.clear_share_factor if history.is_open("GW701", "") else 1.0)
    swallowed = [history.improved is not True and _swallowed(s) for s in last]
    if not swallowed[-1] and history.lasting(_most_zeros) < share:  # nearly always
        return
    pooled = [_pooled(history, s) for s in last]
    flushed = [zeros >= share and small >= t.flushed_small for zeros, small in pooled]
    if not all(a or b for a, b in zip(flushed, swallowed, strict=True)):
        return
    if flushed[-1]:
        evidence = {"zeros": pooled[-1][0], "small": pooled[-1][1]}
    else:
        outside = max((a.grad_norm or 0.0 for a in last[-1].activations or ()), default=0.0)
        evidence = {"zeros": 1.0, "outside": outside}
    names = {"format": _format(last[-1])}
    yield Finding("GW701", "underflow", Severity.WARNING, "", onset=last[0].step, evidence=evidence, names=names)


def _most_zeros(history: History) -> float:
    """Return the largest share of zeros of any gradient, at the newest probe that counted them."""
    zeros = next((s.zeros for s in reversed(history.probed) if s.zeros is not None and not s.skipped), None)
    return max(filter(None, zeros or ()), default=0.0)


def _pooled(history: History, snapshot: Snapshot) -> tuple[float, float]:
    """Return the share of entries that are 0, and of the others that are too small for the format.

    Over all parameters that got anything at all.
    """
    import numpy as np

    norm, zero = np.array(snapshot.norm, dtype=float), np.array(snapshot.zeros, dtype=float)
    tiny = (
        np.nan_to_num(np.array(snapshot.subnormal, dtype=float))
        if snapshot.subnormal is not None
        else np.zeros(len(norm))
    )
    entries = np.where(
        (np.nan_to_num(norm) != 0) & ~np.isnan(zero), history.elements("weight", "bias", "normalization", "gain"), 0.0
    )
    total, zeros = float(entries.sum()), float((entries * np.nan_to_num(zero)).sum())
    return (
        (zeros / total, float((tiny * entries * (1 - np.nan_to_num(zero))).sum()) / max(total - zeros, 1.0))
        if total
        else (0.0, 0.0)
    )


def _swallowed(snapshot: Snapshot) -> bool:
    """Tell whether in float16 nothing at all arrived at a parameter, though a gradient came in, or the loss is not 0.

    A dead layer in the way would explain it too.
    """
    if any(snapshot.norm) or _format(snapshot) != "float16" or all(n is None for n in snapshot.norm):
        return False
    activations = snapshot.activations or ()
    if any((a.dead or 0.0) >= 1.0 for a in activations):
        return False
    return any(a.grad_norm for a in activations) or bool(snapshot.loss)


def _format(snapshot: Snapshot) -> str:
    if snapshot.computed_in is not None:
        return snapshot.computed_in
    formats = [p.dtype for p, n in zip(snapshot.model.parameters, snapshot.norm, strict=True) if n is not None]
    return max(set(formats), key=formats.count) if formats else ""


def _rounded(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Find that most entries of low-precision weights stay as they were, though they have a gradient.

    Their update is less than half a unit in their last place.
    """
    t = history.thresholds
    last = [s for s in probes if s.lost is not None][-t.underflow_probes :]
    if len(last) < t.underflow_probes or last[-1].rate == 0:  # then there is nothing to be rounded away
        return
    limit = t.lost_updates / (t.clear_share_factor if history.is_open("GW702", "") else 1.0)
    shares = [_lost(s) for s in last]
    if statistics.median(shares) >= limit and shares[-1] >= limit:
        formats = [
            p.dtype for p, lost in zip(last[-1].model.parameters, last[-1].lost or (), strict=True) if lost is not None
        ]
        yield Finding(
            "GW702",
            "underflow",
            Severity.WARNING,
            "",
            onset=last[0].step,
            evidence={"lost": shares[-1]},
            names={"format": max(set(formats), key=formats.count)},
        )


def _lost(snapshot: Snapshot) -> float:
    known = [
        (p.elements, lost)
        for p, lost in zip(snapshot.model.parameters, snapshot.lost or (), strict=True)
        if lost is not None and p.role != "bias"
    ]
    total = sum(n for n, _ in known)
    return sum(n * lost for n, lost in known) / total if total else 0.0


def _epsilon(history: History) -> Iterator[Finding]:
    """Find that under an Adam-like optimizer a typical entry is below epsilon, which then divides in its place.

    The steps are shorter by as much.
    """
    t = history.thresholds
    optimizer = history.snapshot.optimizer
    info = history.model.optimizers[optimizer] if optimizer is not None else None
    if info is None or not info.adaptive or not info.eps or history.improved:
        return
    window = history.window(t.window)
    limit = t.below_epsilon * info.eps * (t.clear_factor if history.is_open("GW703", "") else 1.0)
    if len(window) < t.window or _largest(history, history.snapshot) >= limit:
        return
    sizes = [_largest(history, s) for s in window if not s.skipped]
    if len(sizes) < t.window or not 0 < max(sizes) < limit or not sizes[-1]:  # of exactly 0 nothing is divided
        return
    if constant_loss(history):  # what arrives is rounding, and GW402 says so
        return
    # A model that has converged has small gradients too: without a loss, only what never was above counts for more
    # than information.
    first = max(history.first_norms, default=math.inf)
    elements = sum(
        p.elements for p, n in zip(history.model.parameters, history.snapshot.norm, strict=True) if n is not None
    )
    always = first / math.sqrt(max(elements, 1)) < limit
    severity = Severity.WARNING if history.improved is False or always else Severity.INFO
    yield Finding(
        "GW703",
        "underflow",
        severity,
        "",
        onset=window[0].step,
        evidence={"rms": sizes[-1], "eps": info.eps},
        names={"optimizer": info.kind},
    )


def _largest(history: History, snapshot: Snapshot) -> float:
    """Return the largest root mean square over the weights."""
    import numpy as np

    elements = history.elements("weight", "normalization", "gain", "embedding")
    sizes = np.nan_to_num(np.array(snapshot.norm, dtype=float), posinf=np.inf)[elements > 0]
    return float((sizes / np.sqrt(elements[elements > 0])).max(initial=0.0))


# --- in words ---

_SMALLEST = {"float16": "6e-8", "bfloat16": "9e-41"}
"""The smallest number above 0 of a format; of float32 it is 1e-45."""
_BITS = {"float16": 11, "bfloat16": 8}


def _explain_flushed(finding: Finding) -> Explanation:
    evidence, name = finding.evidence, finding.names["format"]
    if "small" in evidence:
        message = (
            f"{evidence['zeros']:.0%} of the gradient's entries are exactly 0, and {evidence['small']:.0%} of the"
            f" others are too small for {name} to hold in full, since step {finding.onset}"
        )
    else:
        came = f", though one of norm {evidence['outside']:.1g} came in" if evidence["outside"] else ""
        message = f"every gradient has been exactly 0 since step {finding.onset}{came}"
    return Explanation(
        message,
        f"the gradient is computed in {name}, which rounds what is below {_SMALLEST.get(name, '1e-45')} to 0",
        "scale the loss (torch.amp.GradScaler), or compute in bfloat16, which has the range of float32"
        if name == "float16"
        else "multiply the loss, and divide the learning rate by as much",
    )


def _explain_lost(finding: Finding) -> Explanation:
    name = finding.names["format"]
    return Explanation(
        f"{finding.evidence['lost']:.0%} of the weights stay as they were at a step, though they have a gradient,"
        f" since step {finding.onset}",
        f"their updates are less than {name} can add to a weight of their size ({_BITS.get(name, 11)} bits), and are"
        " rounded away",
        "keep the weights in float32 and compute under torch.autocast, or round stochastically, or raise the learning"
        " rate",
    )


def _explain_epsilon(finding: Finding) -> Explanation:
    rms, eps, optimizer = finding.evidence["rms"], finding.evidence["eps"], finding.names["optimizer"]
    return Explanation(
        f"the typical gradient entry is {rms:.1g}, below the eps of {eps:.1g} of {optimizer}, since step"
        f" {finding.onset}: its steps are {eps / rms if rms else math.inf:.2g} times smaller than the learning rate"
        " implies",
        "the loss, or its weight, is so small that epsilon divides in place of the gradient's own size",
        f"multiply the loss, or set eps={rms / 1e3:.0e} or less in {optimizer}",
    )


RULES = (
    Rule("GW701", "underflow", _explain_flushed),
    Rule("GW702", "underflow", _explain_lost),
    Rule("GW703", "underflow", _explain_epsilon),
)
