"""Puts to a finding what probes have measured of its cause."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from gradwatch.detectors.flows import aside, cut_of, fades_with, flow_of, left_out, takes_zeros
from gradwatch.detectors.measured import (
    activations_by_layer,
    fact,
    facts,
    forward_names,
    functions,
    kinds,
    newest_activations,
    nothing_to_learn,
    reach,
    saturation,
    spectral_norm,
    spectral_radius,
    zero_weights,
)
from gradwatch.values.autograd import Flow
from gradwatch.values.history import History
from gradwatch.values.report import Finding
from gradwatch.values.thresholds import (
    ACCOUNTED_FOR,
    BY_BIAS,
    EXPANDING,
    KEPT,
    KICK,
    KICK_LASTS,
    LARGE_GAIN,
    LARGEST_EXPONENT,
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
    "left_out",
    "softmax",
    "narrow",
    "state",
    "aside",
    "constant_input",
    "bias",
    "offset",
    "update",
    "rate",
    "radius",
    "format",
    "in_data",
    "in_weights",
    "by_step",
    "born_forward",
    "born_backward",
    "origin_gone",
    "zero_weights",
    "flat_loss",
    "stacked",
    "no_signal",
    "no_rate",
    "small_rate",
]
"""What `Finding.cause` may be; `cause_words.CAUSES` has the words."""

_HARD = ("hardtanh", "clamp")
"""Activations of which the derivative is 1 up to their ends, and 0 beyond."""


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


def of_vanishing(history: History, finding: Finding) -> Finding:
    """Tell whether float16, dead or saturated units, or weights that are too small account for a vanished gradient."""
    if _in_half(history):
        return with_cause(finding, "format", {}, {"format": "float16"})
    if finding.place in history.numbers and (standing := _standing(history, finding)) is not None:
        return standing
    layers = reach(history, finding)
    among = set(layers)
    known = activations_by_layer(history).items()
    dead = max(((a.dead, layer) for layer, a in known if layer in among and a.dead is not None), default=None)
    if dead is not None and dead[0] >= MOSTLY_DEAD:
        return _dead(history, finding, *dead)
    # What is hard passes the gradient whole until it is at its end.
    ends = ((share, at, f) for at, (share, f) in saturation(history).items() if at in among)
    enough = [(share, at, f) for share, at, f in ends if share >= (MOSTLY_DEAD if f in _HARD else MOSTLY_FLAT)]
    if enough:
        return _saturated(history, finding, *max(enough))
    return _stacked(history, finding, layers) or _weak(history, _with_remedies(history, finding, layers), layers)


def _with_remedies(history: History, finding: Finding, layers: Collection[str]) -> Finding:
    """Return a finding that tells what of the usual remedies the layers have already: of those none is named again."""
    known = functions(history)
    seen = [known[name] for name in layers if name in known]
    has = {
        "relus": sum(f == "relu" for f in seen) > len(seen) / 2,
        "normalized": not history.columns.normalized.isdisjoint(layers),
        "skips": any(name == "skip_connection" for _, name in facts(history)),
    }
    return dataclasses.replace(finding, evidence={**finding.evidence, **{name: 1.0 for name, it in has.items() if it}})


def _standing(history: History, finding: Finding) -> Finding | None:
    """Tell whether a place in the model accounts for it: an initial state, a side branch, a narrow normalization."""
    names, count = reach(history, finding), finding.evidence.get("layers", 1.0)
    names = names[: int(count)] if count < len(names) else names
    worst = finding.names.get("worst", finding.place)
    flow = flow_of(history, worst) or Flow(worst)
    if (fading := fades_with(history, flow.layer)) is not None:
        where, horizon, length = fading
        return with_cause(finding, "state", {"horizon": float(horizon), "length": float(length)}, {"at": where})
    if (barrier := flow.barrier) is not None:
        return with_cause(finding, "narrow", {"values": float(barrier.values)}, {"at": barrier.at})
    numbers = set(map(history.numbers.__getitem__, names))
    if numbers and numbers <= aside(history, numbers):
        share = {} if flow.through is None else {"through": flow.through}
        return with_cause(finding, "aside", share, {"at": flow.source or "", "from": flow.layer})
    return None


def _in_half(history: History) -> bool:
    """Tell whether float16 has left nothing of the gradient.

    So it is where it computes, every parameter got exactly 0, and something came in.
    """
    now = history.snapshot
    if any(now.norm):
        return False
    probes = (s for s in reversed(history.probed) if s.weight_norm is not None or s.computed_in is not None)
    half = any(s.computed_in == "float16" for s in itertools.islice(probes, 1)) or any(
        p.dtype == "float16" for p in now.model.parameters
    )
    return half and any(a.grad_norm for a in newest_activations(history))


def _saturated(history: History, finding: Finding, share: float, at: str, function: str) -> Finding:
    numbers, names = {"saturated": share}, {"at": at, "function": function}
    if (kick := _kick_of(history, [at], until=finding.onset)) is not None:
        return with_cause(finding, "update", {**numbers, "update": kick[0], "when": float(kick[2])}, names)
    gain = float(history.gains()[history.numbers[at]])
    if math.isfinite(gain):
        numbers["gain"] = gain
    module = history.columns.module_of(at)
    if at == next(layer.name for layer in history.model.layers if layer.module == module):  # what enters is its input
        of_input = {"offset": fact(history, module, "input_offset"), "size": fact(history, module, "input_size")}
        numbers |= {name: value for name, value in of_input.items() if value is not None and math.isfinite(value)}
    return with_cause(finding, "saturated", numbers | spectral_norm(history, at), names)


def _stacked(history: History, finding: Finding, layers: Sequence[str]) -> Finding | None:
    """Find that the gradient fades from layer to layer inside of one recurrent module."""
    module = history.columns.module_of(layers[-1] if layers else "")
    if (kind := kinds(history).get(module)) is None:
        return None
    count = sum(layer.module == module for layer in history.model.layers)
    inside = [name for name in layers if history.columns.module_of(name) == module]
    if count < 2 or len(inside) < 2:
        return None
    return with_cause(finding, "stacked", {"stacked": float(count)}, {"at": module, "kind": kind})


def _weak(history: History, finding: Finding, layers: Sequence[str]) -> Finding:
    """Find that weights too small for their activations account for the larger part of what is missing."""
    ratio, all_gains, known = finding.evidence.get("ratio", 0.0), history.gains().tolist(), functions(history)
    numbers = history.numbers
    gains = {name: all_gains[numbers[name]] for name in layers[1:]}
    needed = {name: NEEDED_GAIN.get(known.get(name, ""), 1.0) for name in gains}
    weak = {name: share for name, gain in gains.items() if (share := gain / needed[name]) < SMALL_GAIN}
    if not weak or not 0 < ratio < 1 or "normalized" in finding.evidence:  # which takes their size away
        return finding
    if sum(math.log(max(share, 1e-30)) for share in weak.values()) > ACCOUNTED_FOR * math.log(ratio):
        return finding
    worst = min(weak, key=weak.__getitem__)
    evidence = {"gain": gains[worst], "needed": needed[worst], "weak": float(len(weak))}
    ends = {"first": next(iter(weak)), "until": list(weak)[-1]}
    return with_cause(finding, "weak", evidence, {"at": worst, "function": known.get(worst, ""), **ends})


def of_a_cut(history: History, finding: Finding) -> Finding:
    """Tell between which two modules the gradient ends, or what has left zero of it.

    That is float16, weights that are all 0, a dead layer, or a loss that is flat.
    """
    last, zero = finding.names.get("last", finding.place), "norm" in finding.evidence
    flow = flow_of(history, last) or Flow(last)
    if flow.barrier is not None and flow.barrier.operation == "softmax":
        return with_cause(finding, "softmax", {"values": float(flow.barrier.values)}, {"at": flow.barrier.at})
    if zero and (known := _of_zeros(history, finding, last)) is not None:
        return known
    if (cut := cut_of(history, last)) is not None:
        names = {"unreached": cut.unreached, **({} if cut.reached is None else {"reached": cut.reached})}
        kind: Cause = "cut" if cut.kind is None or cut.kind == "between" else cut.kind
        return with_cause(finding, kind, {"graph": float(cut.graph)}, names)
    if flow.barrier is not None:
        return with_cause(finding, "narrow", {"values": float(flow.barrier.values)}, {"at": flow.barrier.at})
    return _of_other_zeros(history, finding, last) if zero else finding


def _of_zeros(history: History, finding: Finding, last: str) -> Finding | None:
    """Tell what has left exactly zero of a gradient that is there."""
    if _in_half(history):
        return with_cause(finding, "format", {}, {"format": "float16"})
    if nothing_to_learn(history):
        return with_cause(finding, "no_signal", {})
    order = forward_names(history)
    after = order[order.index(last) :] if last in order else []
    moving = {p.layer for p, norm in zip(history.model.parameters, history.snapshot.norm, strict=True) if norm}
    zeros = [name for name in zero_weights(history) if name not in moving]
    if among := [name for name in zeros if name in reach(history, finding)] or [n for n in zeros if n in after]:
        return _of_zero_weights(history, finding, among)
    known = activations_by_layer(history)
    closed = next((name for name in after if name in known and (known[name].dead or 0.0) >= 1.0), None)
    if closed is not None:
        return _dead(history, finding, 1.0, closed)
    return None


def _of_other_zeros(history: History, finding: Finding, last: str) -> Finding:
    """Tell whether a layer takes zeros, gives what is not used, or the gradient is zero at what the model gives."""
    if takes_zeros(history, last):
        return with_cause(finding, "zero_input", {}, {"at": last})
    if (part := left_out(history, last)) is not None:
        return with_cause(finding, "left_out", {}, {"at": part})
    if not any(a.module == "" and a.grad_norm == 0 for a in newest_activations(history)):
        return finding
    losses = history.losses(KEPT)
    same = sum(1 for _ in itertools.takewhile(lambda loss: loss == losses[-1], reversed(losses)))
    told = {"same": float(same), "loss": losses[-1]} if same > 1 and math.isfinite(losses[-1]) else {}
    return with_cause(finding, "flat_loss", told)


def _of_zero_weights(history: History, finding: Finding, zeros: Sequence[str]) -> Finding:
    """Say whose weights are 0, and of a single layer what comes after it."""
    function = functions(history).get(zeros[0]) if len(zeros) == 1 else None
    names = {"at": " and ".join(zeros), **({} if function is None else {"activation": function})}
    names |= {f"zero_{i}": name for i, name in enumerate(zeros)}
    return with_cause(finding, "zero_weights", {"zeros": float(len(zeros))}, names)


def _dead(history: History, finding: Finding, share: float, at: str) -> Finding:
    """Say which units are dead, and whether an update made them so."""
    if (kick := _kick_of(history, [at], until=finding.onset)) is not None:
        return with_cause(finding, "update", {"dead": share, "update": kick[0], "when": float(kick[2])}, {"at": at})
    return with_cause(finding, "dead", {"dead": share}, {"at": at})


def of_silence(history: History, finding: Finding) -> Finding:
    """Tell whether the input, an update or the bias keeps a layer's units at 0."""
    place, finding = finding.place, _with_remedies(history, finding, forward_names(history))
    norm = spectral_norm(history, place)
    bias, offset = fact(history, place, "silent_by_bias"), fact(history, place, "input_offset")
    if offset is not None and math.isinf(offset):
        return with_cause(finding, "constant_input", norm)
    if (kick := _kick_of(history, [place], until=finding.onset)) is not None:
        ratio, _, step = kick
        return with_cause(finding, "update", {**norm, "update": ratio, "when": float(step)})
    if bias is not None and bias >= BY_BIAS:
        return with_cause(finding, "bias", {**norm, "share": bias})
    if offset is not None and offset >= OFF_CENTRE:
        return with_cause(finding, "offset", {**norm, "offset": offset})
    return with_cause(finding, None, norm)


def _kick_of(history: History, layers: Collection[str], until: int | None = None) -> tuple[float, str, int] | None:
    """Return the largest update of these layers' weights, over the weights, with the layer and the step.

    None where it is none to speak of, or not within so many steps before the step `until` as it lasts; those that no
    snapshot has any more are among them.
    """
    lasting = range(until - KICK_LASTS, until + 1) if until is not None else None
    kicks = [kick for kick in history.lasting(_kicks) if kick[1] in layers and (lasting is None or kick[2] in lasting)]
    if lasting is not None:
        remembered = ((ratio, layer, step) for layer, (ratio, step) in history.track.kicks.items() if layer in layers)
        kicks += (kick for kick in remembered if kick[2] in lasting)
    return max(kicks, default=None)


def _kicks(history: History) -> list[tuple[float, str, int]]:
    return [
        (r, p.layer, s.step)
        for s in history.probed
        for p, r in zip(s.model.parameters, s.update_ratio or (), strict=False)
        if r and KICK <= r < math.inf and p.role == "weight"
    ]


def of_explosion(history: History, finding: Finding) -> Finding:
    """Tell whether weights were too large at first, an update made them so, or the learning rate is too high."""
    import numpy as np

    gains = history.gains(first=True)  # before they exploded themselves
    needed = np.full(len(gains), NEEDED_GAIN["relu"])
    for name, function in functions(history).items():
        if name in history.numbers:
            needed[history.numbers[name]] = max(NEEDED_GAIN.get(function, 1.0), NEEDED_GAIN["relu"])
    over = np.where(np.isfinite(gains), gains / needed, 0.0)
    at = int(over.argmax()) if len(over) else 0
    together = 1.0  # after a normalization the size of a weight counts for nothing
    if not history.columns.normalized:
        together = math.exp(min(float(np.log(np.maximum(over, 1.0)).sum()), LARGEST_EXPONENT))
    if len(over) and (over[at] >= LARGE_GAIN or together >= history.thresholds.explosion_depth):
        worst = history.model.layers[at].name
        large = LARGE_GAIN if over[at] >= LARGE_GAIN else 1.0 + (float(over[at]) - 1.0) / 2
        numbers = {"gain": float(gains[at]), "times": float(over[at]), "over": float((over >= large).sum())}
        if together >= history.thresholds.explosion_depth:
            numbers["together"] = together
        return with_cause(finding, "large", numbers | spectral_norm(history, worst), {"at": worst})
    radius = spectral_radius(history, finding.place)
    if radius is not None and radius >= EXPANDING:
        return with_cause(finding, "radius", {"spectral_radius": radius})
    if "update" in finding.evidence:  # that is what it is about
        return with_cause(finding, "rate", {})
    if (kick := _kick_of(history, history.numbers)) is not None:
        ratio, layer, step = kick
        return with_cause(finding, "update", {"update": ratio, "when": float(step)}, {"at": layer})
    return finding
