"""What is wrong through time, in words: what was measured, why, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from gradwatch.values.report import Explanation
from gradwatch.values.sequences import Horizon, SequenceStats, reach_of, sentence, subject
from gradwatch.values.snapshot import Fact

Evidence = Mapping[str, float | str]


def measured(
    stats: SequenceStats,
    found: Horizon,
    facts: Iterable[Fact] = (),
    *,
    place: str = "",
    kind: str = "",
    need: int | None = None,
) -> dict[str, float | str]:
    """Return the evidence from which `why_short` tells what it means.

    Args:
        stats: what was measured.
        found: its horizon.
        facts: measured causes; those at `place` are taken, or all where there is no place.
        place: name of the sequence module.
        kind: its class.
        need: how many of the newest timesteps matter.

    """
    known: dict[str, float | str] = {
        "who": subject(stats),
        "horizon": float(found.timesteps),
        "length": float(stats.length),
    }
    if found.censored:
        known["censored"] = 1.0
    if need is not None:
        known["need"] = float(need)
    if found.decay_rate is not None:
        known["decay_rate"] = found.decay_rate
    if found.half_life is not None:
        known["half_life"] = found.half_life
    return {**known, **causes(facts, place=place, kind=kind)}


def causes(facts: Iterable[Fact], *, place: str, kind: str) -> dict[str, float | str]:
    """Return the facts at a place as evidence, and the kind of the module there."""
    mine = [f for f in facts if not place or f.place == place]
    known: dict[str, float | str] = {f.name: f.value for f in mine}
    if kind:
        known["kind"] = kind
    return known


def why_short(evidence: Evidence, place: str) -> Explanation:
    """Say what a short memory is, where it comes from, and the cures; `place` is the module whose memory it is, or "" if no one knows."""
    need = evidence.get("need")
    rate, half_life = evidence.get("decay_rate"), evidence.get("half_life")
    found = Horizon(
        int(float(evidence["horizon"])),
        "censored" in evidence,
        None if rate is None else float(rate),
        None if half_life is None else float(half_life),
    )
    message = sentence(str(evidence["who"]), found, int(float(evidence["length"])))
    if need is not None:
        message += f", and the need is {float(need):.0f}"
    if "because" in evidence:
        message += f" (judged by this module alone: {evidence['because']})"
    return Explanation(message, _why_it_fades(evidence), _lengthen(evidence, place))


def words_of_horizon(
    stats: SequenceStats, need: int, facts: Iterable[Fact] = (), *, place: str = "", kind: str = ""
) -> Explanation:
    """Return what a horizon that was measured on one batch means, where the need is longer.

    Args:
        stats: what was measured; with a finite `lag_gain`.
        need: how many of the newest timesteps matter.
        facts: measured causes.
        place: name of the sequence module, if it is known: only its facts count, and the remedy names it.
        kind: its class.

    Raises:
        ValueError: there is no horizon to tell of.

    """
    facts = list(facts)
    found = reach_of(stats)
    if found is None:
        raise ValueError(f"stats must have a finite lag_gain, got {stats.lag_gain!r:.80}")
    place = place or stats.module or next(iter(dict.fromkeys(f.place for f in facts)), "")
    return why_short(measured(stats, found, facts, place=place, kind=kind, need=need), place)


def why_explodes(evidence: Evidence, place: str) -> Explanation:
    """Say how a gradient grows through time, where that comes from, and what holds it."""
    who, lags = evidence["who"], float(evidence["lags"])
    since = f", since step {float(evidence['onset']):.0f}" if "onset" in evidence else ""
    if math.isinf(float(evidence["growth"])):
        message = f"{evidence['what']} of {who} is not finite from {lags:.0f} timesteps back on{since}"
    else:
        message = (
            f"{evidence['what']} of {who} grows to {float(evidence['growth']):.2g} times itself within {lags:.0f} timesteps on its way back"
            f" ({float(evidence['rate']):.2f} times a step){since}"
        )
    name = place or "the recurrent module"
    radius = _extreme(evidence, "spectral_radius", max)
    cause = (
        f"the spectral radius of W_hh is {radius:.2f}, and above 1 it multiplies the gradient at each step"
        if radius is not None and radius > 1
        else _UNKNOWN
    )
    remedy = f"scale the recurrent weights of {name} down or initialize them as an orthogonal matrix (torch.nn.init.orthogonal_)"
    if _kind(evidence) not in ("LSTM", "GRU"):
        remedy += ", use an LSTM or GRU in its place"
    return Explanation(message, cause, f"{remedy}, clip the gradient norm, or feed it shorter windows")


_UNKNOWN = "cause not measured"
_SATURATED = 0.1
"""Share of saturated outputs that is worth a word."""


def _kind(evidence: Evidence) -> str:
    """Return LSTM, GRU, RNN or "": by the class, or by what only one of them has."""
    kind = str(evidence.get("kind", "")).upper()
    marks = {"LSTM": "forget_gate", "GRU": "update_gate", "RNN": "saturation"}
    return next(
        (name for name in marks if name in kind),
        next((name for name, mark in marks.items() if any(key.startswith(mark) for key in evidence)), ""),
    )


def _extreme(evidence: Evidence, name: str, choose: Callable[[list[float]], float]) -> float | None:
    """Return the worst of a fact over the layers and directions of a module."""
    values = [float(value) for key, value in evidence.items() if key.startswith(f"{name}_l")]
    return choose(values) if values else None


def _cut(evidence: Evidence) -> str:
    """Say that the carried state is detached, where that keeps the memory from what it needs; else ""."""
    if "detached" not in evidence:
        return ""
    reached = float(evidence["detached"])
    if (
        float(evidence["horizon"]) < reached >= float(evidence.get("need", 0.0))
    ):  # it fades before, and nothing beyond is needed
        return ""
    return f"the state that it carries on is detached: no gradient goes back beyond the last {reached:.0f} timesteps"


def _fades_before(evidence: Evidence) -> bool:
    """Tell whether the gain is gone before the place where the state is detached, if it is."""
    return float(evidence["horizon"]) < float(evidence.get("detached", math.inf))


def _why_it_fades(evidence: Evidence) -> str:
    said = _why_it_shrinks(evidence) if _fades_before(evidence) else ""
    return "; and ".join(part for part in (said, _cut(evidence)) if part)


def _why_it_shrinks(evidence: Evidence) -> str:
    gate, bias = _extreme(evidence, "forget_gate", min), _extreme(evidence, "forget_bias", min)
    if gate is not None or bias is not None:
        said = [f"its forget gates keep {gate:.2f} of the cell at each step"] if gate is not None else []
        said += [f"their bias is {bias:.2f}"] if bias is not None else []
        return " and ".join(said)
    gate = _extreme(evidence, "update_gate", min)
    if gate is not None:
        return f"its update gates keep {gate:.2f} of the state at each step"
    radius, saturation = _extreme(evidence, "spectral_radius", min), _extreme(evidence, "saturation", max)
    if radius is None and saturation is None:
        return _UNKNOWN
    said = []
    if radius is not None:
        said.append(
            f"the spectral radius of W_hh is {radius:.2f}"
            + ("" if radius < 1 else ", but the derivative of the activation takes more than that away")
        )
    if saturation is not None and (saturation >= _SATURATED or radius is None):
        said.append(f"{saturation:.0%} of its outputs are saturated")
    return ", and ".join(said)


def _lengthen(evidence: Evidence, place: str) -> str:
    need = evidence.get("need")
    timesteps = "the timesteps that matter" if need is None else f"{float(need):.0f} timesteps"
    carry = f"carry the state of {place or 'the recurrent module'} on without detach() for {timesteps}"
    if not _fades_before(evidence):
        return f"{carry}, or feed it windows of that length"
    cure = _cure(evidence, place, None if need is None else float(need))
    return f"{cure}; and {carry}" if _cut(evidence) else cure


def _cure(evidence: Evidence, place: str, need: float | None) -> str:
    name = place or "the recurrent module"
    bias = (
        "to the log of the number of timesteps that matter"
        if need is None
        else f"to {math.log(need):.1f} (the log of {need:.0f})"
    )
    cures = {
        "LSTM": f"set the forget-gate bias of {name} {bias}",
        "GRU": f"set the update-gate bias of {name} {bias}",
        "RNN": f"initialize weight_hh of {name} as an orthogonal or identity matrix, or use an LSTM or GRU in its place with its gate bias set {bias}",
    }
    kind = _kind(evidence)
    around = "a skip connection or attention from the timesteps that matter, or shorter windows"
    if kind:
        return f"{cures[kind]}; or {around}"
    if place:
        return f"in {place}: a longer field of view (dilation, layers, a wider window), {around}"
    return f"{around}; for an LSTM, set its forget-gate bias {bias}"
