"""Layers that come to a standstill: saturated all over, or without a gradient where they had one."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.causes import of_vanishing
from gradwatch.detectors.measured import saturation
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.layer_columns import around
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.thresholds import ALL_SATURATED, FALLEN_SILENT, KEPT, MOSTLY_DEAD, ZERO_STEPS


def standstill(history: History) -> Iterator[Finding]:
    """GW105: a layer is saturated all over. GW908: most of what an optimizer steps has no gradient any more."""
    yield from _saturated(history)
    yield from _silent(history)


def _saturated(history: History) -> Iterator[Finding]:
    """Find layers that are saturated at look after look, and whose gradient is exactly zero again and again.

    While the loss does not come down: units that give nothing but -1 and 1 may be what the task takes.
    """
    if history.improved is not False or history.count < history.thresholds.window:
        return
    shut = {name: share for name, (share, _) in saturation(history).items() if share >= MOSTLY_DEAD}
    looks = history.looks(ALL_SATURATED) if shut else []
    if len(looks) < ALL_SATURATED:
        return
    layer_of = history.columns.layer_of
    always = [{layer_of(a.module) for a in s.activations or () if (a.saturated or 0) >= MOSTLY_DEAD} for s in looks]
    window = history.window(history.thresholds.window)
    for name in (layer.name for layer in history.model.layers if layer.name in shut):
        told = any((code, place) in (("GW101", name), ("GW401", name)) for code, place, *_ in history.open)
        mine = [c for c, p in enumerate(history.model.parameters) if p.layer == name and p.role == "weight"]
        zeros = [all(s.norm[c] == 0 for c in mine) for s in window]
        share = sum(zeros) / len(zeros)
        if not told and mine and all(name in seen for seen in always) and ZERO_STEPS <= share < 1:
            yield Finding(
                "GW105",
                "vanishing-depth",
                Severity.WARNING,
                name,
                onset=looks[0].step,
                evidence={"share": shut[name], "zeros": share, "layers": 1.0},
            )


def _silent(history: History) -> Iterator[Finding]:
    """Find that most of the tensors that an optimizer steps had a gradient once, and have none for long."""
    snapshot, window = history.snapshot, history.window()
    if snapshot.silence is not None or len(window) < KEPT:
        return
    model, mine = snapshot.model, snapshot.optimizer
    own = [(c, p) for c, p in enumerate(model.parameters) if p.optimizer == mine and mine is not None]
    if sum(snapshot.norm[c] is None for c, _ in own) < FALLEN_SILENT * len(own) or not own:  # nearly always
        return
    absent = snapshot.absent or (None,) * len(model.parameters)
    silent = [
        p
        for c, p in own
        if absent[c] != "frozen"
        and history.sound_once(history.numbers[p.layer])
        and all(s.norm[c] is None for s in window if s.silence is None)
    ]
    if len(silent) < FALLEN_SILENT * len(own):
        return
    layers = {p.layer for p in silent}
    names = [name for i in history.order if (name := history.model.layers[i].name) in layers]
    yield Finding(
        "GW908",
        "disconnected",
        Severity.WARNING,
        around(names),
        onset=window[0].step,
        evidence={"parameters": float(len(silent)), "of": float(len(own))},
        names={"optimizer": model.optimizers[mine or 0].kind, "which": model.named(silent)},
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
        f"{evidence['parameters']:.0f} of the {evidence['of']:.0f} parameters that {names['optimizer']} steps had a"
        f" gradient, and have had none at any of the steps since {finding.onset}: {names['which']}",
        "they are not used any more (adapters that are merged or switched off, a branch that is passed by), or a"
        " detach() or no_grad() has come into play",
        "look at what changed at that step; where they are to rest, call requires_grad_(False) on them",
    )


RULES = (
    Rule("GW105", "vanishing-depth", _explain_saturated, of_vanishing),
    Rule("GW908", "disconnected", _explain_silent),
)
