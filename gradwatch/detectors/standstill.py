"""Layers that come to a standstill: saturated all over, no more moved, or without a gradient where they had one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.causes import of_vanishing
from gradwatch.detectors.measured import once_sound, saturation
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.layer_columns import around, counts
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import (
    AMONG_OTHERS,
    EDGE,
    KEPT,
    LEFT_OUT,
    MOSTLY_DEAD,
    STANDING_PROBES,
    UNMOVED,
    ZERO_STEPS,
)


def standstill(history: History) -> Iterator[Finding]:
    """GW105: a layer is saturated all over. GW908: most of what an optimizer steps has no gradient any more.

    GW909: steps leave some layers where they are.
    """
    yield from _saturated(history)
    yield from _silent(history)
    yield from _unmoved(history)


def _saturated(history: History) -> Iterator[Finding]:
    """Find layers that are saturated at look after look, and whose gradient is exactly zero again and again.

    While the loss does not come down: units that give nothing but -1 and 1 may be what the task takes. Where a gradient
    that vanishes or ends is told already, that is the fault.
    """
    known, window = saturation(history), history.window(history.thresholds.window)
    shut = {history.numbers[name] for name, (share, _) in known.items() if share >= MOSTLY_DEAD}
    if not shut or history.improved is not False or history.count <= history.thresholds.window + EDGE:
        return
    looks = history.looks(STANDING_PROBES)
    if len(looks) < STANDING_PROBES or any(code in ("GW101", "GW401") for code, *_ in history.open):
        return
    layers, layer_of = history.model.layers, history.columns.layer_of
    for look in looks:
        saturated = {layer_of(a.module) for a in look.activations or () if (a.saturated or 0.0) >= MOSTLY_DEAD}
        shut = {i for i in shut if layers[i].name in saturated}
    zeros = {i: _zeros(history, layers[i].name, window) for i in shut}
    for run in history.runs({i for i, share in zeros.items() if ZERO_STEPS <= share < 1}, shut):
        name = layers[run[0]].name
        numbers = {"share": known[name][0], "zeros": zeros[run[0]], "layers": float(len(run))}
        yield Finding("GW105", "vanishing-depth", Severity.WARNING, name, onset=looks[0].step, evidence=numbers)


def _zeros(history: History, layer: str, window: Sequence[Snapshot]) -> float:
    """Return the share of these steps at which the gradient of a layer's weights was exactly zero."""
    mine = [c for c, p in enumerate(history.model.parameters) if p.layer == layer and p.role == "weight"]
    return sum(all(s.norm[c] == 0 for c in mine) for s in window) / len(window) if mine else 0.0


def _silent(history: History) -> Iterator[Finding]:
    """Find that most of the weights that an optimizer steps had a gradient once, and have none for long."""
    import numpy as np

    snapshot, window = history.snapshot, history.window()
    if (
        snapshot.silence is not None
        or len(window) < KEPT
        or any(code in ("GW401", "GW901") for code, *_ in history.open)
    ):
        return
    model, mine, norm = snapshot.model, snapshot.optimizer, snapshot.norm
    if mine is None or None not in norm:  # nearly always
        return
    own, norms = history.lasting(_stepped, mine), list(norm)
    least = LEFT_OUT * len(own)
    without = [c for c in own if norms[c] is None]
    if len(without) < least or not without:
        return
    gone = set(np.flatnonzero(np.isnan(history.sensitivities(KEPT)).all(axis=0)).tolist())
    absent = snapshot.absent or (None,) * len(norms)
    parameters = [model.parameters[c] for c in without if absent[c] != "frozen"]
    numbers = history.numbers
    gone &= once_sound(history, {numbers[p.layer] for p in parameters} & gone)
    silent = [p for p in parameters if numbers[p.layer] in gone]
    if len(silent) < least:
        return
    layers = {p.layer for p in silent}
    names = [name for i in history.order if (name := history.model.layers[i].name) in layers]
    which = model.named([p for p in model.parameters if p.layer in layers])
    yield Finding(
        "GW908",
        "disconnected",
        Severity.WARNING,
        around(names),
        onset=window[0].step,
        evidence={"parameters": float(len(silent)), "of": float(len(own))},
        names={"optimizer": model.optimizers[mine].kind, "which": which},
    )


def _stepped(history: History, optimizer: int) -> Sequence[int]:
    """Return the columns of the weights that an optimizer steps."""
    return [c for c, p in enumerate(history.model.parameters) if p.optimizer == optimizer and counts(p)]


def _unmoved(history: History) -> Iterator[Finding]:
    """Find layers that get a gradient as others do, and that steps leave where they are while they move those."""
    told = any(code in ("GW101", "GW205", "GW401", "GW501", "GW502", "GW903", "GW907") for code, *_ in history.open)
    if history.count > history.thresholds.window and not told:
        yield from history.lasting(_left_behind)


def _left_behind(history: History) -> Sequence[Finding]:
    """Return what the newest probes tell of layers that steps leave where they are."""
    t, model = history.thresholds, history.model
    probes = [s for s in history.probed if s.update_ratio is not None and s.model is model and not s.skipped]
    last = probes[-STANDING_PROBES:]
    if len(last) < STANDING_PROBES or not all(s.finite and s.lost is None for s in last):
        return ()
    if not any(ratio is not None and ratio < UNMOVED for ratio in last[-1].update_ratio or ()):  # nearly always
        return ()
    moved, sizes = [_moved(s) for s in last], [_sizes(s) for s in last]
    if any(max(m.values(), default=0.0) < t.ordinary_update for m in moved):
        return ()
    largest = [max(s.values(), default=0.0) for s in sizes]
    still = {
        history.numbers[name]
        for name in moved[0]
        if all(m.get(name, 1.0) < UNMOVED for m in moved)
        and all(s.get(name, 0.0) >= AMONG_OTHERS * most for s, most in zip(sizes, largest, strict=True))
    }
    found = []
    for run in history.runs(still, {history.numbers[name] for name in moved[0]}):
        names = [model.layers[i].name for i in run]
        before = any(_moved(s).get(names[0], 0.0) > t.slow_update for s in probes)
        severity = Severity.WARNING if before else Severity.INFO
        numbers = {"update": moved[-1][names[0]], "others": max(moved[-1].values()), "layers": float(len(run))}
        found.append(
            Finding(
                "GW909",
                "unstepped",
                severity,
                names[0],
                onset=last[0].step,
                evidence=numbers,
                names={"last": names[-1]},
            )
        )
    return found


def _moved(snapshot: Snapshot) -> dict[str, float]:
    """Return, by layer, how far a step has moved its weights, over their norm: infinity where it threw them to NaN."""
    found: dict[str, float] = {}
    for p, ratio in zip(snapshot.model.parameters, snapshot.update_ratio or (), strict=True):
        if ratio is not None and counts(p):
            found[p.layer] = max(found.get(p.layer, 0.0), ratio if math.isfinite(ratio) else math.inf)
    return found


def _sizes(snapshot: Snapshot) -> dict[str, float]:
    """Return, by layer, the norm of its largest gradient."""
    found: dict[str, float] = {}
    for p, norm in zip(snapshot.model.parameters, snapshot.norm, strict=True):
        if norm is not None and counts(p):
            found[p.layer] = max(found.get(p.layer, 0.0), norm)
    return found


def _explain_unmoved(finding: Finding) -> Explanation:
    evidence, last = finding.evidence, finding.names["last"]
    through = f" to {last} ({evidence['layers']:.0f} layers)" if evidence["layers"] > 1 else ""
    return Explanation(
        f"steps leave {finding.place or 'the model'}{through} where they are since step {finding.onset}, though a"
        f" gradient comes: a step moves them by {evidence['update']:.1g} of themselves, and others by"
        f" {evidence['others']:.1g}",
        "the learning rate of their group is 0, or next to it: a factor for each depth that is multiplied in at every"
        " step, or a schedule of their own",
        "print optimizer.param_groups: each group's lr; requires_grad_(False) on what is to rest",
    )


def _explain_saturated(finding: Finding) -> Explanation:
    evidence = finding.evidence
    cause, remedy = said(finding, "standardize the input; smaller weights (xavier_uniform_) or a lower learning rate")
    return Explanation(
        f"{evidence['share']:.0%} of what the activation after {finding.place} gives is at an end of its range, at"
        f" look after look since step {finding.onset}, and at {evidence['zeros']:.0%} of the last steps the gradient of"
        f" {finding.place} was exactly zero",
        cause,
        remedy,
    )


def _explain_silent(finding: Finding) -> Explanation:
    evidence, names = finding.evidence, finding.names
    return Explanation(
        f"{evidence['parameters']:.0f} of the {evidence['of']:.0f} weights that {names['optimizer']} steps had a"
        f" gradient, and have had none at any of the steps since {finding.onset}: {names['which']}",
        "they are not used any more (adapters that are merged or switched off, a branch that is passed by), or a"
        " detach() or no_grad() has come into play",
        "look at what changed at that step; where they are to rest, call requires_grad_(False) on them",
    )


RULES = (
    Rule("GW105", "vanishing-depth", _explain_saturated, of_vanishing),
    Rule("GW908", "disconnected", _explain_silent),
    Rule("GW909", "unstepped", _explain_unmoved),
)
