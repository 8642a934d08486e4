"""What is wrong through time, in words: what was measured, why, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.sequences import Horizon, RecurrenceName, SequenceStats, reach_of, sentence, subject
from gradwatch.values.snapshot import Fact, FactName
from gradwatch.values.thresholds import MOSTLY_DEAD, SATURATED_OUTPUTS

_UNKNOWN = "cause not measured"

FADES: Mapping[FactName, Callable[[Iterable[float]], float]] = {
    "forget_gate": min,
    "forget_bias": min,
    "update_gate": min,
    "spectral_radius": min,
    "saturation": max,
    "saturated_gates": max,
}
"""What may make a gradient fade through time, and which is the worst of several layers and directions."""
GROWS: Mapping[FactName, Callable[[Iterable[float]], float]] = {**FADES, "spectral_radius": max}
"""The same for one that grows."""


def worst(
    facts: Iterable[Fact], place: str, of: Mapping[FactName, Callable[[Iterable[float]], float]]
) -> dict[str, float]:
    """Return the worst of each fact over the layers and directions of the module at a place; "" is all modules."""
    mine = [f for f in facts if f.part and place in ("", f.place)]
    return {
        name: choose(values) for name, choose in of.items() if (values := [f.value for f in mine if f.name == name])
    }


def too_short(
    stats: SequenceStats,
    found: Horizon,
    facts: Iterable[Fact] = (),
    *,
    place: str = "",
    kind: RecurrenceName | None = None,
    need: int | None = None,
    severity: Severity = Severity.WARNING,
) -> Finding:
    """Return the finding that a horizon is too short, with all that its words need.

    Args:
        stats: what was measured.
        found: its horizon.
        facts: measured causes; those at `place` count, or all where there is no place.
        place: name of the sequence module.
        kind: what it is.
        need: how many of the newest timesteps matter.
        severity: how bad that is.

    """
    known = {"horizon": float(found.timesteps), "length": float(stats.length)}
    if found.censored:
        known["censored"] = 1.0
    if need is not None:
        known["need"] = float(need)
    if found.decay_rate is not None:
        known["decay_rate"] = found.decay_rate
    if found.half_life is not None:
        known["half_life"] = found.half_life
    return Finding(
        "GW301",
        "vanishing-time",
        severity,
        place,
        lag=found.timesteps,
        evidence={**known, **worst(facts, place, FADES)},
        names={"who": subject(stats), **({} if kind is None else {"kind": kind})},
    )


def words_of_horizon(
    stats: SequenceStats, need: int, facts: Iterable[Fact] = (), *, place: str = "", kind: RecurrenceName | None = None
) -> Explanation:
    """Return what a horizon that was measured on one batch means, where the need is longer.

    Args:
        stats: what was measured; with a finite `lag_gain`.
        need: how many of the newest timesteps matter.
        facts: measured causes.
        place: name of the sequence module, if it is known: only its facts count, and the remedy names it.
        kind: what it is.

    Raises:
        ValueError: there is no horizon to tell of.

    """
    facts = list(facts)
    found = reach_of(stats)
    if found is None:
        raise ValueError(f"stats must have a finite lag_gain, got {stats.lag_gain!r:.80}")
    place = place or stats.module or next((f.place for f in facts), "")
    return explain_short(too_short(stats, found, facts, place=place, kind=kind, need=need))


def explain_short(finding: Finding) -> Explanation:
    """Say what a short horizon is, where it comes from, and the cures."""
    evidence, names = finding.evidence, finding.names
    need = evidence.get("need")
    found = Horizon(
        int(evidence["horizon"]), "censored" in evidence, evidence.get("decay_rate"), evidence.get("half_life")
    )
    message = sentence(names["who"], found, int(evidence["length"]))
    if need is not None:
        message += f", and the need is {need:.0f}"
    if "reason" in names:
        message += f" (judged by this module alone: {names['reason']})"
    return Explanation(message, _why_it_fades(finding), _lengthen(finding))


def explain_growth(finding: Finding) -> Explanation:
    """Say how a gradient grows through time, where that comes from, and what holds it."""
    evidence, who, what = finding.evidence, finding.names["who"], finding.names["what"]
    lags, since = evidence["lags"], "" if finding.onset is None else f", since step {finding.onset}"
    if math.isinf(evidence["growth"]):
        message = f"{what} of {who} is not finite from {lags:.0f} timesteps back on{since}"
    else:
        message = (
            f"{what} of {who} grows to {evidence['growth']:.2g} times itself within {lags:.0f} timesteps on its way"
            f" back ({evidence['rate']:.2f} times a step){since}"
        )
    radius = evidence.get("spectral_radius")
    cause = _UNKNOWN
    if radius is not None and radius > 1:
        cause = f"the spectral radius of W_hh is {radius:.2f}, and above 1 it multiplies the gradient at each step"
    remedy = (
        f"scale the recurrent weights of {finding.place or 'the recurrent module'} down or initialize them as an"
        " orthogonal matrix (torch.nn.init.orthogonal_)"
    )
    if _kind(finding) not in ("LSTM", "GRU"):
        remedy += ", use an LSTM or GRU in its place"
    return Explanation(message, cause, f"{remedy}, clip the gradient norm, or feed it shorter windows")


def explain_detached(finding: Finding) -> Explanation:
    """Say where a carried state is detached."""
    length, reached = finding.evidence["length"], finding.evidence["reached"]
    who, where = finding.place or "the model", f"the {length:.0f} timesteps of its sequences"
    if reached < length:
        where = f"the last {reached:.0f} of {length:.0f} timesteps"
    return Explanation(
        f"the state that {who} carries on is detached: no gradient goes back beyond {where}",
        "truncated backpropagation through time, by detach() or a state kept from an earlier step",
        f"nothing, if that is meant; else carry the state of {who} on without detach(), or declare with horizon= how"
        " many timesteps matter",
    )


def explain_unjudged(finding: Finding) -> Explanation:
    """Say why nothing can be said about a need."""
    who, need, length = finding.place or "the model", finding.evidence["need"], finding.evidence.get("length")
    if length is not None:
        return Explanation(
            f"the sequences have {length:.0f} timesteps, the need is {need:.0f}",
            "the gradient does not fade within them, and what lies beyond them cannot be told",
            f"feed {who} sequences of {need:.0f} timesteps or more, or lower the need",
        )
    return Explanation(
        f"whether {who} learns from {need:.0f} timesteps is not measured: {finding.names['reason']}",
        "its gain by lag could not be taken",
        "gradwatch.horizon(model, batch) measures one batch with all errors shown; name"
        f" {finding.place or 'the sequence module'} in timesteps= if it is not found",
    )


def _kind(finding: Finding) -> str:
    """Return LSTM, GRU, RNN or "": what the module is known to be, or what only one of them has a fact of."""
    marks = {"LSTM": "forget_gate", "GRU": "update_gate", "RNN": "saturation"}
    return finding.names.get("kind") or next((kind for kind, mark in marks.items() if mark in finding.evidence), "")


def _cut(finding: Finding) -> str:
    """Say that the carried state is detached, where that keeps the gradient from what it needs; else ""."""
    evidence = finding.evidence
    reached = evidence.get("detached")
    if reached is None or evidence["horizon"] < reached >= evidence.get("need", 0.0):
        return ""  # or it fades before, and nothing beyond is needed
    return f"the state that it carries on is detached: no gradient goes back beyond the last {reached:.0f} timesteps"


def _fades_before(finding: Finding) -> bool:
    """Tell whether the gain is gone before the place where the state is detached, if it is."""
    return finding.evidence["horizon"] < finding.evidence.get("detached", math.inf)


def _why_it_fades(finding: Finding) -> str:
    why = _why_it_shrinks(finding.evidence) if _fades_before(finding) else ""
    return "; and ".join(part for part in (why, _cut(finding)) if part)


def _gates_shut(evidence: Mapping[str, float]) -> bool:
    """Tell whether nearly all gates stand at an end, where their derivative is next to nothing."""
    return "saturation" not in evidence and evidence.get("saturated_gates", 0.0) >= MOSTLY_DEAD


def _why_it_shrinks(evidence: Mapping[str, float]) -> str:
    if _gates_shut(evidence):
        return f"{evidence['saturated_gates']:.0%} of its gates are saturated, at 0 or 1"
    if "forget_gate" in evidence or "forget_bias" in evidence:
        said = []
        if "forget_gate" in evidence:
            said.append(f"its forget gates keep {evidence['forget_gate']:.2f} of the cell at each step")
        if "forget_bias" in evidence:
            said.append(f"their bias is {evidence['forget_bias']:.2f}")
        return " and ".join(said)
    if "update_gate" in evidence:
        return f"its update gates keep {evidence['update_gate']:.2f} of the state at each step"
    radius, saturation = evidence.get("spectral_radius"), evidence.get("saturation")
    said = []
    if radius is not None:
        less = "" if radius < 1 else ", but the derivative of the activation takes more than that away"
        said.append(f"the spectral radius of W_hh is {radius:.2f}{less}")
    if saturation is not None and (saturation >= SATURATED_OUTPUTS or radius is None):
        said.append(f"{saturation:.0%} of its outputs are saturated")
    return ", and ".join(said) or _UNKNOWN


def _lengthen(finding: Finding) -> str:
    need = finding.evidence.get("need")
    timesteps = "the timesteps that matter" if need is None else f"{need:.0f} timesteps"
    carry = f"carry the state of {finding.place or 'the recurrent module'} on without detach() for {timesteps}"
    if not _fades_before(finding):
        return f"{carry}, or feed it windows of that length"
    cure = _cure(finding, need)
    return f"{cure}; and {carry}" if _cut(finding) else cure


def _cure(finding: Finding, need: float | None) -> str:
    name = finding.place or "the recurrent module"
    if _gates_shut(finding.evidence):
        return f"standardize the input of {name}, feature by feature; where that is done, smaller weights of {name}"
    bias = (
        "to the log of the number of timesteps that matter"
        if need is None
        else f"to {math.log(need):.1f} (the log of {need:.0f})"
    )
    cures = {
        "LSTM": f"set the forget-gate bias of {name} {bias}",
        "GRU": f"set the update-gate bias of {name} {bias}",
        "RNN": f"initialize weight_hh of {name} as an orthogonal or identity matrix, or use an LSTM or GRU in its place"
        f" with its gate bias set {bias}",
    }
    kind = _kind(finding)
    around = "a skip connection or attention from the timesteps that matter, or shorter windows"
    if kind:
        return f"{cures[kind]}; or {around}"
    if finding.place:
        return f"in {finding.place}: a longer field of view (dilation, layers, a wider window), {around}"
    return f"{around}; for an LSTM, set its forget-gate bias {bias}"
