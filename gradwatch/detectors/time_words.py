"""What is wrong through time, in words: what was measured, why, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from gradwatch.values.chain import narrowed_before
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.sequences import (
    Horizon,
    RecurrenceName,
    SequenceStats,
    sentence,
    subject,
    whose,
)
from gradwatch.values.snapshot import Fact, FactName
from gradwatch.values.thresholds import (
    ACCOUNTED_FOR,
    GATE_BIAS_NEAR,
    HORIZON_GAIN,
    MOSTLY_DEAD,
    MOSTLY_FLAT,
    SATURATED_OUTPUTS,
)

_UNKNOWN = "cause not measured"
_TRUNCATED = "truncated backpropagation through time, by detach() or a state kept from an earlier step"

FADES: Mapping[FactName, Callable[[Iterable[float]], float]] = {
    "forget_gate": min,
    "forget_bias": min,
    "input_gate": max,
    "input_bias": max,
    "cell_saturation": max,
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
    if found.low < found.high:
        known |= {"low": float(found.low), "high": float(found.high)}
    if need is not None:
        known["need"] = float(need)
    if found.decay_rate is not None:
        known["decay_rate"] = found.decay_rate
    if found.half_life is not None:
        known["half_life"] = found.half_life
    names = {"who": subject(stats), **({"of": whose(stats)} if stats.input else {})}
    if (before := narrowed_before(stats)) is not None:
        names |= {"entered": before.entered, "before": before.before, "around": before.around}
        known["reaches"] = float(before.reaches)
    else:
        known |= worst(facts, place, FADES)
        names |= {} if kind is None else {"kind": kind}
    return Finding("GW301", "vanishing-time", severity, place, lag=found.timesteps, evidence=known, names=names)


def explain_short(finding: Finding) -> Explanation:
    """Say what a short horizon is, where it comes from, and the cures."""
    evidence, names = finding.evidence, finding.names
    need = evidence.get("need")
    horizon = evidence["horizon"]
    low, high = int(evidence.get("low", horizon)), int(evidence.get("high", horizon))
    rate, half_life = evidence.get("decay_rate"), evidence.get("half_life")
    found = Horizon(int(horizon), "censored" in evidence, rate, half_life, low, high)
    message = sentence(names["who"], found, int(evidence["length"]), names.get("of", ""))
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
    if kind_of(finding) not in ("LSTM", "GRU"):
        remedy += ", use an LSTM or GRU in its place"
    return Explanation(message, cause, f"{remedy}, clip the gradient norm, or feed it shorter windows")


def explain_detached(finding: Finding) -> Explanation:
    """Say where a carried state is detached."""
    length, reached, need = finding.evidence["length"], finding.evidence["reached"], finding.evidence.get("need")
    who, where = finding.place or "the model", f"the {length:.0f} timesteps of its sequences"
    if reached < length:
        where = f"the last {reached:.0f} of {length:.0f} timesteps"
    message = f"the state that {who} carries on is detached: no gradient goes back beyond {where}"
    if need is None:
        otherwise = ", or declare with horizon= how many timesteps matter"
    elif need <= reached:
        otherwise = ""
    else:
        return Explanation(
            f"{message}, and the need is {need:.0f}",
            _TRUNCATED,
            f"carry the state of {who} on without detach() for {need:.0f} timesteps, or feed it windows of that length",
        )
    meant = f"nothing, if that is meant; else carry the state of {who} on without detach(){otherwise}"
    return Explanation(message, _TRUNCATED, meant)


def explain_full(finding: Finding) -> Explanation:
    """Say that the cell of an LSTM is saturated, by what, and how it stays free."""
    evidence, name, need = finding.evidence, finding.place, finding.evidence.get("need")
    return Explanation(
        f"the cell of {name} has been saturated since step {finding.onset}: what it holds can hardly change, and next"
        " to no gradient goes back through it",
        f"its forget gates keep {evidence['forget_gate']:.2f} of the cell at each step and {_adds_up(evidence)}",
        f"set the input-gate bias of {name} to {_minus_log(need)}, so that only what matters is let in",
    )


def too_short_to_judge(length: float, of: str, need: float) -> str:
    """Say that the sequences end before the need does; `of` is what `whose` says of them."""
    return f"the sequences have {length:.0f} timesteps{of}, the need is {need:.0f}"


def explain_unjudged(finding: Finding) -> Explanation:
    """Say why nothing can be said about a need."""
    who = finding.names.get("who") or finding.place or "the model"
    need, length = finding.evidence["need"], finding.evidence.get("length")
    if "low" in finding.evidence and length is not None:
        low, high = finding.evidence["low"], finding.evidence["high"]
        return Explanation(
            f"whether the need of {need:.0f} timesteps is met cannot be told: the horizon lies somewhere between"
            f" {low:.0f} and {high:.0f} of {length:.0f}",
            "the gain falls so slowly there, or differs so much from row to row, that its end is not sure",
            "feed it more rows at once, or longer sequences",
        )
    if length is not None:
        of = finding.names.get("of", "")
        other = (
            "say by timesteps= which dimension is time, if it is another; or "
            if finding.evidence.get("assumed")
            else ""
        )
        return Explanation(
            too_short_to_judge(length, of, need),
            "the gradient does not fade within them, and what lies beyond them cannot be told",
            f"{other}feed {who} sequences of {need:.0f} timesteps or more, or lower the need",
        )
    return Explanation(
        f"whether {who} learns from {need:.0f} timesteps is not measured: {finding.names['reason']}",
        "its gain by lag could not be taken",
        "gradwatch.horizon(model, batch) measures one batch with all errors shown; timesteps= says where time is, if"
        " that is not found",
    )


def kind_of(finding: Finding) -> str:
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
    if "entered" in finding.names:
        entered, reaches = finding.names["entered"], finding.evidence["reaches"]
        before, around = finding.names.get("before"), finding.names.get("around")
        if around:
            return (
                f"what enters {entered} reaches {reaches:.0f} timesteps back, but what it gives is next to nothing"
                f" beside what {around}, which holds it, passes by"
            )
        what = f"what enters {before}, before it," if before else "what is made of the input before or beside that"
        return f"what enters {entered} reaches {reaches:.0f} timesteps back, and {what} does not"
    why = _why_it_shrinks(finding.evidence) if _fades_before(finding) else ""
    return "; and ".join(part for part in (why, _cut(finding)) if part)


def keeps(kept: float, timesteps: float) -> bool:
    """Tell whether a gate keeps so much of the state that it is not why a gain is gone after so many timesteps."""
    return kept > 0.0 and timesteps * math.log(kept) > ACCOUNTED_FOR * math.log(HORIZON_GAIN)


def _open(evidence: Mapping[str, float], gate: Literal["forget_gate", "update_gate"]) -> bool:
    return keeps(evidence.get(gate, 0.0), evidence["horizon"])


def gates_shut(evidence: Mapping[str, float]) -> bool:
    """Tell whether nearly all gates stand at an end, where their derivative is next to nothing."""
    return "saturation" not in evidence and evidence.get("saturated_gates", 0.0) >= MOSTLY_DEAD


def _adds_up(evidence: Mapping[str, float]) -> str:
    let_in, full = evidence["input_gate"], evidence["cell_saturation"]
    return f"its input gates let in {let_in:.2f} of what is new, which adds up and saturates {full:.0%} of it"


def _why_it_shrinks(evidence: Mapping[str, float]) -> str:
    if gates_shut(evidence):
        return f"{evidence['saturated_gates']:.0%} of its gates are saturated, at 0 or 1"
    if _open(evidence, "forget_gate"):
        kept, full = f"its forget gates keep {evidence['forget_gate']:.2f} of the cell", evidence.get("cell_saturation")
        if full is None or full < MOSTLY_FLAT:
            return f"{_UNKNOWN}: {kept} at each step"
        return f"{kept} and {_adds_up(evidence)}"
    if "forget_gate" in evidence or "forget_bias" in evidence:
        said = []
        if "forget_gate" in evidence:
            said.append(f"its forget gates keep {evidence['forget_gate']:.2f} of the cell at each step")
        if "forget_bias" in evidence:
            said.append(f"their bias is {evidence['forget_bias']:.2f}")
        return " and ".join(said)
    if "update_gate" in evidence:
        kept = f"its update gates keep {evidence['update_gate']:.2f} of the state at each step"
        return f"{_UNKNOWN}: {kept}" if _open(evidence, "update_gate") else kept
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
    if "entered" in finding.names:
        before, around = finding.names.get("before"), finding.names.get("around")
        if around:
            return (
                f"if the older timesteps matter, let {around} pass by less or {finding.names['entered']} give more: a"
                " larger scale of that branch, at its initialization"
            )
        where = f"from {before} on and before" if before else "before"
        return (
            f"look at what is made of the input {where} {finding.names['entered']}: does each timestep get values of"
            " its own there, and not those of the newest"
        )
    carry = f"carry the state of {finding.place or 'the recurrent module'} on without detach() for {timesteps}"
    if not _fades_before(finding):
        return f"{carry}, or feed it windows of that length"
    cure = _cure(finding, need)
    return f"{cure}; and {carry}" if _cut(finding) else cure


def _cure(finding: Finding, need: float | None) -> str:
    name, kind = finding.place or "the recurrent module", kind_of(finding)
    if gates_shut(finding.evidence):
        return f"standardize the input of {name}, feature by feature; where that is done, smaller weights of {name}"
    around = "a skip connection or attention from the timesteps that matter, or shorter windows"
    bias = (
        "the log of the number of timesteps that matter"
        if need is None
        else f"{math.log(need):.1f} (the log of {need:.0f})"
    )
    if kind == "LSTM":
        cure = _gate_biases(finding.evidence, name, need, bias)
    elif kind == "GRU":
        cure = "" if _open(finding.evidence, "update_gate") else f"set the update-gate bias of {name} to {bias}"
    elif kind == "RNN":
        cure = (
            f"initialize weight_hh of {name} as {_matrix(finding.evidence)}, or use a GRU in its place with its"
            f" update-gate bias set to {bias}"
        )
    elif finding.place:
        return f"in {finding.place}: a longer field of view (dilation, layers, a wider window), {around}"
    else:
        view = "a longer field of view (dilation, layers, a wider window)"
        return f"{view}, {around}; or an LSTM: {_gate_biases({}, '', need, bias)}"
    return f"{cure}; or {around}" if cure else around


def _matrix(evidence: Mapping[str, float]) -> str:
    """Name the recurrent matrix that remembers: one that keeps lengths under tanh, the identity under ReLU.

    The identity is of Le, Jaitly and Hinton, "A simple way to initialize recurrent networks of rectified linear units",
    2015. Only of tanh the saturation is measured.
    """
    if "saturation" in evidence:
        return "an orthogonal matrix"
    if "spectral_radius" in evidence:
        return "the identity matrix, with biases of 0"
    return "an orthogonal matrix (tanh) or the identity with biases of 0 (ReLU)"


def _gate_biases(evidence: Mapping[str, float], name: str, need: float | None, bias: str) -> str:
    """Say which biases of an LSTM to set, but for those that are set: forget gates open, input gates nearly shut.

    Both, because an open cell that takes in all of its input adds it up until it is saturated (Tallec and Ollivier,
    "Can recurrent neural networks warp time?", 2018).
    """
    enough = math.inf if need is None else math.log(need) - GATE_BIAS_NEAR
    forget = evidence.get("forget_bias", -math.inf) < enough
    enter = evidence.get("input_bias", math.inf) > -enough
    of, minus = f" of {name}" if name else "", _minus_log(need)
    if forget:
        return f"set the forget-gate bias{of} to {bias}" + f" and the input-gate bias to {minus}" * enter
    return f"set the input-gate bias{of} to {minus}" if enter else ""


def _minus_log(need: float | None) -> str:
    return "minus the log of the number of timesteps that matter" if need is None else f"-{math.log(need):.1f}"
