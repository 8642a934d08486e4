"""Gradients and updates that are lost to the number format or to the optimizer's epsilon."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import Snapshot


def underflow(history: History) -> Iterator[Finding]:
    """GW701: gradients flushed to zero. GW702: updates rounded away. GW703: gradients below the optimizer's epsilon."""
    if history.snapshot.skipped:
        return
    probes = [s for s in history.window() if s.zeros is not None and not s.skipped]
    yield from _flushed(history, probes)
    yield from _rounded(history, probes)
    yield from _epsilon(history)


def _flushed(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Most entries are exactly 0, and nearly all others are below what the format can hold in full: the rest has been rounded to 0."""
    t = history.thresholds
    last = probes[-t.underflow_probes :]
    if len(last) < t.underflow_probes:
        return
    share = t.flushed / (1.5 if history.is_open("GW701", "") else 1.0)
    pooled = [_pooled(history, s) for s in last]
    flushed = [zeros >= share and small >= t.flushed_small for zeros, small in pooled]
    swallowed = [history.improved is not True and _swallowed(s) for s in last]
    if not all(a or b for a, b in zip(flushed, swallowed, strict=True)):
        return
    evidence: dict[str, float | str] = {"format": _format(last[-1])}
    if flushed[-1]:
        evidence |= {"zeros": pooled[-1][0], "small": pooled[-1][1]}
    else:
        evidence |= {
            "zeros": 1.0,
            "outside": max((a.grad_norm or 0.0 for a in last[-1].activations or ()), default=0.0),
        }
    yield Finding("GW701", "underflow", Severity.WARNING, "", onset=last[0].step, evidence=evidence)


def _pooled(history: History, snapshot: Snapshot) -> tuple[float, float]:
    """Return the share of entries that are 0, and of the others that are too small for the format, over all parameters that got anything at all."""
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
    """Tell whether in float16 nothing at all arrived at a parameter, though a gradient came in, or the loss is not 0, and no dead layer stands in the way."""
    if _format(snapshot) != "float16" or any(snapshot.norm) or all(n is None for n in snapshot.norm):
        return False
    activations = snapshot.activations or ()
    if any((a.dead or 0.0) >= 1.0 for a in activations):
        return False
    return any(a.grad_norm for a in activations) or bool(snapshot.loss)


def _format(snapshot: Snapshot) -> str:
    if any(f.name == "float16" for f in snapshot.facts or ()):
        return "float16"
    formats = [p.dtype for p, n in zip(snapshot.model.parameters, snapshot.norm, strict=True) if n is not None]
    return max(set(formats), key=formats.count) if formats else ""


def _rounded(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Most entries of low-precision weights stay as they were, though they have a gradient: the update is less than half a unit in their last place."""
    t = history.thresholds
    last = [s for s in probes if s.lost is not None][-t.underflow_probes :]
    if len(last) < t.underflow_probes:
        return
    limit = t.lost_updates / (1.5 if history.is_open("GW702", "") else 1.0)
    shares = [_lost(s) for s in last]
    if statistics.median(shares) >= limit and shares[-1] >= limit:
        formats = [
            p.dtype for p, lost in zip(last[-1].model.parameters, last[-1].lost or (), strict=True) if lost is not None
        ]
        evidence: dict[str, float | str] = {"lost": shares[-1], "format": max(set(formats), key=formats.count)}
        yield Finding("GW702", "underflow", Severity.WARNING, "", onset=last[0].step, evidence=evidence)


def _lost(snapshot: Snapshot) -> float:
    known = [
        (p.elements, lost)
        for p, lost in zip(snapshot.model.parameters, snapshot.lost or (), strict=True)
        if lost is not None and p.role != "bias"
    ]
    total = sum(n for n, _ in known)
    return sum(n * lost for n, lost in known) / total if total else 0.0


def _epsilon(history: History) -> Iterator[Finding]:
    """Under Adam-like optimizers: a typical entry is below epsilon, which then divides in its place, and the steps are shorter by as much."""
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
    if len(sizes) < t.window or not 0 < max(sizes) < limit:
        return
    # A model that has converged has small gradients too: without a loss, only what never was above counts for more than information.
    first = max(history.first_norms, default=math.inf)
    elements = sum(
        p.elements for p, n in zip(history.model.parameters, history.snapshot.norm, strict=True) if n is not None
    )
    always = first / math.sqrt(max(elements, 1)) < limit
    severity = Severity.WARNING if history.improved is False or always else Severity.INFO
    evidence: dict[str, float | str] = {"rms": sizes[-1], "eps": info.eps, "optimizer": info.kind}
    yield Finding("GW703", "underflow", severity, "", onset=window[0].step, evidence=evidence)


def _largest(history: History, snapshot: Snapshot) -> float:
    """Return the largest root mean square over the weights."""
    import numpy as np

    elements = history.elements("weight", "normalization", "gain", "embedding")
    squares = np.square(np.nan_to_num(np.array(snapshot.norm, dtype=float))) / np.where(elements > 0, elements, np.inf)
    return float(np.sqrt(squares.max(initial=0.0)))


def explain_underflow(finding: Finding) -> Explanation:
    """Say what is lost, and to what."""
    evidence, since = finding.evidence, f"since step {finding.onset}"
    if finding.code == "GW702":
        name = evidence["format"]
        return Explanation(
            f"{float(evidence['lost']):.0%} of the weights stay as they were at a step, though they have a gradient, {since}",
            f"their updates are less than {name} can add to a weight of their size ({'8' if name == 'bfloat16' else '11'} bits), and are rounded away",
            "keep the weights in float32 and compute under torch.autocast, or round stochastically, or raise the learning rate",
        )
    if finding.code == "GW703":
        rms, eps = float(evidence["rms"]), float(evidence["eps"])
        return Explanation(
            f"the typical gradient entry is {rms:.1g}, below the eps of {eps:.1g} of {evidence['optimizer']}, {since}: its steps are {eps / rms:.2g} times shorter than its learning rate says",
            "the loss, or its weight, is so small that epsilon and not the gradient's own size divides",
            f"multiply the loss, or set eps={rms / 1e3:.0e} or less in {evidence['optimizer']}",
        )
    if "small" in evidence:
        message = f"{float(evidence['zeros']):.0%} of the gradient's entries are exactly 0, and {float(evidence['small']):.0%} of the others too small for {evidence['format']} to hold in full, {since}"
    else:
        came = f", though one of norm {float(evidence['outside']):.1g} came in" if evidence.get("outside") else ""
        message = f"every gradient is exactly 0{came}, {since}"
    smallest = {"float16": "6e-8", "bfloat16": "9e-41"}.get(str(evidence["format"]), "1e-45")
    return Explanation(
        message,
        f"the gradient is computed in {evidence['format']}, which rounds what is below {smallest} to 0",
        "scale the loss (torch.amp.GradScaler), or compute in bfloat16, which has the range of float32"
        if evidence["format"] == "float16"
        else "multiply the loss, and divide the learning rate by as much",
    )
