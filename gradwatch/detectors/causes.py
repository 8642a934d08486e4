"""Puts to a finding what probes have measured of its cause."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from gradwatch.detectors.flows import aside, cut_of, fades_with, flows_of, takes_zeros
from gradwatch.values.history import History
from gradwatch.values.report import Finding
from gradwatch.values.snapshot import ActivationStats, FactName, Flow, Function
from gradwatch.values.thresholds import (
    ACCOUNTED_FOR,
    BY_BIAS,
    KICK,
    LARGE_GAIN,
    MOSTLY_DEAD,
    MOSTLY_FLAT,
    NEEDED_GAIN,
    OFF_CENTRE,
    SMALL_GAIN,
)

Cause = Literal[
    "dead",
    "saturated",
    "weak",
    "large",
    "cut",
    "inside",
    "own",
    "unused",
    "outside",
    "checkpoint",
    "zero_input",
    "softmax",
    "narrow",
    "state",
    "aside",
    "constant_input",
    "bias",
    "offset",
    "update",
    "rate",
    "format",
]
"""What `Finding.cause` may be; `cause_words.CAUSES` has the words."""


def with_cause(
    finding: Finding, cause: Cause | None, numbers: Mapping[str, float], names: Mapping[str, str] | None = None
) -> Finding:
    """Return a finding with its cause, and the numbers and names that its words need."""
    return dataclasses.replace(
        finding,
        cause=cause or "",
        evidence={**finding.evidence, **numbers},
        names={**finding.names, **(names or {})},
    )


# --- what was measured ---


def newest_activations(history: History) -> tuple[ActivationStats, ...]:
    """Return what the newest probe saw of the outputs of modules."""
    return next((s.activations or () for s in history.looks(1)), ())


def flat(history: History) -> set[int]:
    """Return the layers at or before one whose activation is saturated all over.

    Zeros there are where the gradient faded to, and no cut.
    """
    known = {a.module for a in newest_activations(history) if (a.saturated or 0.0) >= MOSTLY_DEAD}
    if not known:
        return set()
    last = max((at for at, i in enumerate(history.order) if history.model.layers[i].name in known), default=-1)
    return set(history.order[: last + 1])


def steepest(history: History, count: int = 4) -> list[str]:
    """Return the layers with the largest weights for their size."""
    import numpy as np

    gains = history.gains()
    order = np.argsort(-np.nan_to_num(gains))[:count]
    return [history.model.layers[i].name for i in order.tolist() if gains[i] > 0]


def _fact(history: History, place: str, name: FactName) -> float | None:
    """Return a number of a layer as it was measured last; None where it was not."""
    facts = (f for s in reversed(history.window()) for f in s.facts or ())
    return next((f.value for f in facts if (f.place, f.name, f.part) == (place, name, "")), None)


def _spectral_norm(history: History, place: str) -> dict[str, float]:
    norm = _fact(history, place, "spectral_norm")
    return {} if norm is None else {"spectral_norm": norm}


def _functions(history: History) -> dict[str, Function]:
    """Return the activation after each layer of which one was seen."""
    return {a.module: a.function for a in newest_activations(history) if a.function is not None}


def _names(history: History) -> list[str]:
    """Return the names of the layers in the order of the forward pass."""
    return [history.model.layers[i].name for i in history.order]


def _reach(history: History, finding: Finding) -> list[str]:
    """Return the layers of a finding and the one after them, in forward order; of the whole model all."""
    order, last = _names(history), finding.names.get("last")
    if finding.place not in order or not last:
        return order
    return order[order.index(finding.place) : order.index(last) + 2]


# --- what it means ---


def of_vanishing(history: History, finding: Finding) -> Finding:
    """Tell whether float16, dead or saturated units, or weights that are too small account for a vanished gradient."""
    if _in_half(history):
        return with_cause(finding, "format", {}, {"format": "float16"})
    if finding.place in history.numbers and (standing := _standing(history, finding)) is not None:
        return standing
    layers = _reach(history, finding)
    among = set(layers)
    known = [a for a in newest_activations(history) if a.module in among]
    dead = max(((a.dead, a.module) for a in known if a.dead is not None), default=None)
    if dead is not None and dead[0] >= MOSTLY_DEAD:
        return with_cause(finding, "dead", {"dead": dead[0]}, {"at": dead[1]})
    saturated = max(((a.saturated, a.module) for a in known if a.saturated is not None), default=None)
    if saturated is not None and saturated[0] >= MOSTLY_FLAT:
        return _saturated(history, finding, *saturated)
    return _weak(history, finding, layers)


def _standing(history: History, finding: Finding) -> Finding | None:
    """Tell whether a place in the model accounts for it: an initial state, a side branch, a narrow normalization."""
    names = _reach(history, finding)[: int(finding.evidence.get("layers", 1))]
    worst = finding.names.get("worst", finding.place)
    flow = flows_of(history).get(worst, Flow(worst))
    if (fading := fades_with(history, flow.layer)) is not None:
        where, horizon, length = fading
        return with_cause(finding, "state", {"horizon": float(horizon), "length": float(length)}, {"at": where})
    if (barrier := flow.barrier) is not None:
        return with_cause(finding, "narrow", {"values": float(barrier.values)}, {"at": barrier.at})
    numbers = {history.numbers[name] for name in names}
    if numbers and numbers <= aside(history, numbers):
        share = {} if flow.through is None else {"through": flow.through}
        return with_cause(finding, "aside", share, {"at": flow.source or "", "from": flow.layer})
    return None


def _in_half(history: History) -> bool:
    """Tell whether float16 has left nothing of the gradient.

    So it is where it computes, every parameter got exactly 0, and something came in.
    """
    now = history.snapshot
    probes = (s for s in reversed(history.window()) if s.weight_norm is not None or s.computed_in is not None)
    half = any(s.computed_in == "float16" for s in itertools.islice(probes, 1)) or any(
        p.dtype == "float16" for p in now.model.parameters
    )
    return half and not any(now.norm) and any(a.grad_norm for a in newest_activations(history))


def _saturated(history: History, finding: Finding, share: float, at: str) -> Finding:
    numbers = {"saturated": share}
    gain, offset = float(history.gains()[history.numbers[at]]), _fact(history, at, "input_offset")
    if math.isfinite(gain):
        numbers["gain"] = gain
    if offset is not None and math.isfinite(offset):
        numbers["offset"] = offset
    names = {"at": at, "function": _functions(history).get(at, "")}
    return with_cause(finding, "saturated", numbers | _spectral_norm(history, at), names)


def _weak(history: History, finding: Finding, layers: Sequence[str]) -> Finding:
    """Find that weights too small for their activations account for the larger part of what is missing."""
    ratio, all_gains, functions = finding.evidence.get("ratio", 0.0), history.gains().tolist(), _functions(history)
    gains = {name: all_gains[history.numbers[name]] for name in layers[1:]}
    needed = {name: NEEDED_GAIN.get(functions.get(name, ""), 1.0) for name in gains}
    weak = {name: share for name, gain in gains.items() if (share := gain / needed[name]) < SMALL_GAIN}
    if not weak or not 0 < ratio < 1:
        return finding
    if sum(math.log(max(share, 1e-30)) for share in weak.values()) > ACCOUNTED_FOR * math.log(ratio):
        return finding
    worst = min(weak, key=weak.__getitem__)
    numbers = {"gain": gains[worst], "needed": needed[worst], "weak": float(len(weak))}
    ends = {"first": next(iter(weak)), "until": list(weak)[-1]}
    return with_cause(finding, "weak", numbers, {"at": worst, "function": functions.get(worst, ""), **ends})


def of_a_cut(history: History, finding: Finding) -> Finding:
    """Tell between which two modules the gradient ends, or whether float16 or a dead layer has left zero of it."""
    last = finding.names.get("last", finding.place)
    if "norm" in finding.evidence:  # it is there, and exactly zero
        if _in_half(history):
            return with_cause(finding, "format", {}, {"format": "float16"})
        order = _names(history)
        dead = {a.module: a.dead or 0.0 for a in newest_activations(history)}
        after = order[order.index(last) :] if last in order else []
        closed = next((name for name in after if dead.get(name, 0.0) >= 1.0), None)
        if closed is not None:
            return with_cause(finding, "dead", {"dead": 1.0}, {"at": closed})
    cut, flow = cut_of(history, last), flows_of(history).get(last)
    if cut is not None:
        names = {"unreached": cut.unreached, **({} if cut.reached is None else {"reached": cut.reached})}
        kind: Cause = "cut" if cut.kind is None or cut.kind == "between" else cut.kind
        return with_cause(finding, kind, {"graph": float(cut.graph)}, names)
    if "norm" in finding.evidence and takes_zeros(history, last):
        return with_cause(finding, "zero_input", {}, {"at": last})
    if flow is not None and (barrier := flow.barrier) is not None:
        kind = "softmax" if barrier.operation == "softmax" else "narrow"
        return with_cause(finding, kind, {"values": float(barrier.values)}, {"at": barrier.at})
    return finding


def of_silence(history: History, finding: Finding) -> Finding:
    """Tell whether the input, an update or the bias keeps a layer's units at 0."""
    place = finding.place
    norm = _spectral_norm(history, place)
    bias, offset = _fact(history, place, "silent_by_bias"), _fact(history, place, "input_offset")
    if offset is not None and math.isinf(offset):
        return with_cause(finding, "constant_input", norm)
    if (kick := _kick_of(history, [place])) is not None:
        ratio, _, step = kick
        return with_cause(finding, "update", {**norm, "update": ratio, "when": float(step)})
    if bias is not None and bias >= BY_BIAS:
        return with_cause(finding, "bias", {**norm, "share": bias})
    if offset is not None and offset >= OFF_CENTRE:
        return with_cause(finding, "offset", {**norm, "offset": offset})
    return with_cause(finding, None, norm)


def _kick_of(history: History, layers: Collection[str]) -> tuple[float, str, int] | None:
    """Return the largest update of these layers' weights, over the weights, with the layer and the step.

    None where it is none to speak of.
    """
    ratios = (
        (r, p.layer, s.step)
        for s in history.window()
        for p, r in zip(s.model.parameters, s.update_ratio or (), strict=False)
        if r and p.layer in layers and p.role == "weight" and math.isfinite(r)
    )
    largest = max(ratios, default=None)
    return largest if largest is not None and largest[0] >= KICK else None


def of_explosion(history: History, finding: Finding) -> Finding:
    """Tell whether weights were too large at first, an update made them so, or the learning rate is too high."""
    import numpy as np

    gains = history.gains(first=True)  # before they exploded themselves
    needed = np.full(len(gains), NEEDED_GAIN["relu"])
    for name, function in _functions(history).items():
        if name in history.numbers:
            needed[history.numbers[name]] = max(NEEDED_GAIN.get(function, 1.0), NEEDED_GAIN["relu"])
    over = np.where(np.isfinite(gains), gains / needed, 0.0)
    at = int(over.argmax()) if len(over) else 0
    if len(over) and over[at] >= LARGE_GAIN:
        worst = history.model.layers[at].name
        numbers = {"gain": float(gains[at]), "times": float(over[at]), "over": float((over >= LARGE_GAIN).sum())}
        return with_cause(finding, "large", numbers | _spectral_norm(history, worst), {"at": worst})
    if "update" in finding.evidence:  # that is what it is about
        return with_cause(finding, "rate", {})
    if (kick := _kick_of(history, history.numbers)) is not None:
        ratio, layer, step = kick
        return with_cause(finding, "update", {"update": ratio, "when": float(step)}, {"at": layer})
    return finding
