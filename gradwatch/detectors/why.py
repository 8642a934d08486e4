"""Why: what probes have measured of the layers of a finding, and in words what that means and what to do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from gradwatch.history import History
from gradwatch.report import UNKNOWN, Finding
from gradwatch.snapshot import ActivationStats, Fact, ModelInfo

Evidence = Mapping[str, float | str]

_NEEDED = {"relu": math.sqrt(2), "tanh": 5 / 3, "sigmoid": 4.0, "hardtanh": 5 / 3}
"""Gain of the weights that keeps a signal and its gradient through the activation as large as it was (He, 2015; Glorot, 2010); the sigmoid passes a quarter."""
_MOSTLY_DEAD, _MOSTLY_FLAT = 0.95, 0.4
"""Shares of dead units and saturated entries from which on they account for a gradient that is gone; of the latter the first accounts for zeros."""
_FAR = 5.0
"""Mean of an input over its spread from which on it counts as off-centre."""
_LARGE, _SMALL = 3.0, 0.7
"""A gain over what is needed that counts as large, and as small where layer upon layer has it."""
_KICK = 0.3
"""An update over the weights that can move a layer's units out of reach."""
_MOST, _MOST_AT_FIRST = 32, 256
"""Layers of which a probe measures more."""


def suspects(history: History, model: ModelInfo) -> frozenset[str]:
    """Give the layers of which a probe is to measure more: those of open alerts, those that look ill now, and those behind them.

    At the first look all are: what explodes at once is gone before a second one.
    """
    if not history.begun or history.count < 2:
        return frozenset(layer.name for layer in model.layers[:_MOST_AT_FIRST])
    t = history.thresholds
    order = [model.layers[i].name for i in model.forward_order]
    ratios = history.ratios(1)[-1]
    chosen = {layer.name for layer, ratio in zip(model.layers, ratios, strict=True) if ratio < t.vanishing_ratio}
    silent = {p.layer for p, norm in zip(model.parameters, history.snapshot.norm, strict=True) if norm == 0 and p.role != "bias"}
    cut = {p.layer for p, reason in zip(model.parameters, history.snapshot.absent or (), strict=False) if reason == "disconnected"}
    dead = {a.module for a in _activations(history) if (a.dead or 0.0) >= t.dead_units}
    named = {str(place) for code, place, *_ in history.open for place in ([place] if place else _steepest(history))}
    chosen |= silent | cut | dead | named
    behind = {order[i + 1] for i in range(len(order) - 1) if order[i] in chosen}
    return frozenset([name for name in order if name in chosen | behind][:_MOST])


def flat(history: History) -> set[int]:
    """Give the layers at or before one behind which an activation is saturated all over: zeros there are where the gradient faded to, and no cut."""
    known = {a.module for a in _activations(history) if (a.saturated or 0.0) >= _MOSTLY_DEAD}
    last = max((at for at, i in enumerate(history.order) if history.model.layers[i].name in known), default=-1) if known else -1
    return set(history.order[: last + 1])


def with_cause(history: History, finding: Finding) -> Finding:
    """Put to a finding what was measured of its cause, if anything was."""
    look = _LOOKS.get(finding.code)
    found = look(history, finding) if look is not None else {}
    return dataclasses.replace(finding, evidence={**finding.evidence, **found}) if found else finding


# --- what was measured ---


def _activations(history: History) -> tuple[ActivationStats, ...]:
    return next((s.activations or () for s in history.looks(1)), ())


def _facts(history: History) -> Sequence[Fact]:
    """Give the facts of the newest probe that measured any."""
    return next((s.facts or () for s in reversed(history.window()) if s.facts), ())


def _fact(history: History, place: str, name: str) -> float | None:
    return next((f.value for s in reversed(history.window()) for f in s.facts or () if f.place == place and f.name == name), None)


def _functions(history: History) -> dict[str, str]:
    """Give the activation behind each layer of which one was seen."""
    return {f.place: f.name.removeprefix("activation ") for f in _facts(history) if f.name.startswith("activation ")}


def _steepest(history: History, count: int = 4) -> list[str]:
    """Give the layers with the largest weights for their size."""
    import numpy as np

    gains = history.gains()
    order = np.argsort(-np.nan_to_num(gains))[:count]
    return [history.model.layers[i].name for i in order.tolist() if gains[i] > 0]


def _between(history: History, finding: Finding) -> list[str]:
    """Give the layers of a finding in the order of the forward pass, and the one behind them; of the whole model all."""
    order = [history.model.layers[i].name for i in history.order]
    if finding.place not in order or not finding.evidence.get("last"):
        return order
    first, last = order.index(finding.place), order.index(str(finding.evidence["last"]))
    return order[first : last + 2]


# --- what it means ---


def _of_vanishing(history: History, finding: Finding) -> dict[str, float | str]:
    if _in_half(history):
        return {"because": "format", "format": "float16"}
    layers = _between(history, finding)
    known = {a.module: a for a in _activations(history)}
    dead = [(a.dead, name) for name in layers if (a := known.get(name)) is not None and a.dead is not None]
    if dead and max(dead)[0] >= _MOSTLY_DEAD:
        return {"because": "dead", "dead": max(dead)[0], "at": max(dead)[1]}
    flat = [(a.saturated, name) for name in layers if (a := known.get(name)) is not None and a.saturated is not None]
    if flat and max(flat)[0] >= _MOSTLY_FLAT:
        return _saturation(history, *max(flat))
    return _weak(history, layers, float(finding.evidence.get("ratio", 0.0)))


def _in_half(history: History) -> bool:
    """Tell whether float16 has left nothing of the gradient: it computes, every parameter got exactly 0, and something came in."""
    now = history.snapshot
    half = any(f.name == "float16" for f in _facts(history)) or any(p.dtype == "float16" for p in now.model.parameters)
    return half and not any(now.norm) and any(a.grad_norm for a in _activations(history))


def _saturation(history: History, share: float, at: str) -> dict[str, float | str]:
    found: dict[str, float | str] = {"because": "saturated", "saturated": share, "at": at, "function": _functions(history).get(at, "")}
    gain, offset = float(history.gains()[history.numbers[at]]), _fact(history, at, "input_offset")
    if math.isfinite(gain):
        found["gain"] = gain
    if offset is not None and math.isfinite(offset):
        found["offset"] = offset
    if (norm := _fact(history, at, "spectral_norm")) is not None:
        found["spectral_norm"] = norm
    return found


def _weak(history: History, layers: Sequence[str], ratio: float) -> dict[str, float | str]:
    """Find that weights too small for their activations, layer upon layer, account for at least half of the orders of magnitude that are missing."""
    all_gains, functions = history.gains().tolist(), _functions(history)
    gains = {name: all_gains[history.numbers[name]] for name in layers[1:]}
    shares = {name: gain / _NEEDED.get(functions.get(name, ""), 1.0) for name, gain in gains.items()}
    weak = {name: share for name, share in shares.items() if share < _SMALL}
    if not weak or not 0 < ratio < 1 or sum(math.log(max(share, 1e-30)) for share in weak.values()) > 0.5 * math.log(ratio):
        return {}
    worst = min(weak, key=weak.__getitem__)
    function = functions.get(worst, "")
    found: dict[str, float | str] = {"because": "weak", "at": worst, "gain": gains[worst], "needed": _NEEDED.get(function, 1.0), "function": function}
    return {**found, "weak": float(len(weak)), "first": next(iter(weak)), "until": list(weak)[-1]}


def _of_a_cut(history: History, finding: Finding) -> dict[str, float | str]:
    order = [history.model.layers[i].name for i in history.order]
    last = str(finding.evidence.get("last", finding.place))
    behind = order[order.index(last) :] if last in order else []
    if finding.evidence.get("gradient") == "zero":
        if _in_half(history):
            return {"because": "format", "format": "float16"}
        known = {a.module: a.dead for a in _activations(history)}
        closed = next((name for name in behind if (known.get(name) or 0.0) >= 1.0), None)
        if closed is not None:
            return {"because": "dead", "dead": 1.0, "at": closed}
    facts = _facts(history)
    done = next((at for at, f in enumerate(facts) if f.place == last and f.name == "done"), None)
    if done is None:
        return {}
    unreached, *behind_it = facts[done + 1 : done + 3]  # as they are measured: where it ended, and where it had come to
    found: dict[str, float | str] = {"because": "cut", "unreached": unreached.place, "graph": unreached.value}
    if behind_it and behind_it[0].name == "reached":
        found["reached"] = behind_it[0].place
    return found


def _kick_of(history: History, layers: Collection[str]) -> tuple[float, str, int] | None:
    """Give the largest update of these layers' weights, over the weights, with the layer and the step; None where it is none to speak of."""
    ratios = (
        (r, p.layer, s.step)
        for s in history.window()
        for p, r in zip(s.model.parameters, s.update_ratio or (), strict=False)
        if r and p.layer in layers and p.role == "weight" and math.isfinite(r)
    )
    largest = max(ratios, default=None)
    return largest if largest is not None and largest[0] >= _KICK else None


def _of_silence(history: History, finding: Finding) -> dict[str, float | str]:
    place = finding.place
    found: dict[str, float | str] = {}
    bias, offset, norm = (_fact(history, place, name) for name in ("silent_by_bias", "input_offset", "spectral_norm"))
    if norm is not None:
        found["spectral_norm"] = norm
    if offset is not None and math.isinf(offset):
        return {**found, "because": "constant input"}
    if kick := _kick_of(history, [place]):
        ratio, _, step = kick
        return {**found, "because": "update", "update": ratio, "when": float(step)}
    if bias is not None and bias >= 0.5:
        return {**found, "because": "bias", "share": bias}
    if offset is not None and offset >= _FAR:
        return {**found, "because": "offset", "offset": offset}
    return found


def _of_explosion(history: History, finding: Finding) -> dict[str, float | str]:
    import numpy as np

    gains = history.gains(first=True)  # before they exploded themselves
    needed = np.full(len(gains), math.sqrt(2))
    for name, function in _functions(history).items():
        if name in history.numbers:
            needed[history.numbers[name]] = max(_NEEDED.get(function, 1.0), math.sqrt(2))
    over = np.where(np.isfinite(gains), gains / needed, 0.0)
    at = int(over.argmax()) if len(over) else 0
    if len(over) and over[at] >= _LARGE:
        worst = history.model.layers[at].name
        found: dict[str, float | str] = {"because": "large", "at": worst, "gain": float(gains[at]), "times": float(over[at])}
        if (norm := _fact(history, worst, "spectral_norm")) is not None:
            found["spectral_norm"] = norm
        return {**found, "layers over": float((over >= _LARGE).sum())}
    if finding.code == "GW202":
        return {"because": "rate"}
    if kick := _kick_of(history, history.numbers):
        ratio, layer, step = kick
        return {"because": "update", "update": ratio, "at": layer, "when": float(step)}
    return {}


_LOOKS: Mapping[str, Callable[[History, Finding], dict[str, float | str]]] = {
    **dict.fromkeys(("GW101", "GW102"), _of_vanishing),
    **dict.fromkeys(("GW201", "GW202", "GW203", "GW205", "GW206"), _of_explosion),
    "GW401": _of_a_cut,
    "GW601": _of_silence,
}


# --- in words ---


def said(evidence: Evidence, place: str, otherwise: str) -> tuple[str, str]:
    """Give cause and remedy in words; `otherwise` is what to try where no cause was found."""
    words = _WORDS.get(str(evidence.get("because", "")))
    return words(evidence, place) if words is not None else (UNKNOWN, otherwise)


def _at(evidence: Evidence) -> str:
    return str(evidence["at"]) or "the model"


def _spectral(evidence: Evidence) -> str:
    return f" (spectral norm {float(evidence['spectral_norm']):.3g})" if "spectral_norm" in evidence else ""


def _dead(evidence: Evidence, _place: str) -> tuple[str, str]:
    at = _at(evidence)
    cause = f"{float(evidence['dead']):.0%} of the units of {at} are dead: 0 for every input"
    return cause, f"revive {at}: zero its bias, lower the learning rate, or use LeakyReLU behind it"


def _weak_weights(evidence: Evidence, _place: str) -> tuple[str, str]:
    at, function, gain, needed = _at(evidence), str(evidence["function"]), float(evidence["gain"]), float(evidence["needed"])
    count, behind = float(evidence["weak"]), f"the {function} behind it" if function else "its activation"
    where = at if count == 1 else f"{evidence['first']} to {evidence['until']}"
    more = f" ({count:.0f} layers; worst: {at})" if count > 1 else ""
    cause = f"the weights of {where}{more} are too small: gain {gain:.2g}, and {behind} needs {needed:.3g} to hand on the gradient as large as it came"
    if function == "sigmoid":
        return cause, f"ReLU in place of the sigmoids, with torch.nn.init.kaiming_normal_ on the weights of {where}; or normalization or skip connections"
    init = "torch.nn.init.xavier_normal_(weight, gain=5/3)" if function == "tanh" else "torch.nn.init.kaiming_normal_(weight, nonlinearity='relu')"
    return cause, f"{init} on the weights of {where}; or normalization or skip connections"


def _large_weights(evidence: Evidence, _place: str) -> tuple[str, str]:
    at, others = _at(evidence), float(evidence["layers over"])
    times, gain = float(evidence["times"]), float(evidence["gain"])
    cause = f"the weights of {at} are {times:.3g} times as large as its activation needs: gain {gain:.3g}{_spectral(evidence)}"
    more = f" and {others - 1:.0f} other layers" if others > 1 else ""
    return cause, f"torch.nn.init.kaiming_normal_ (ReLU) or xavier_normal_ (tanh) on the weights of {at}{more}; or normalization; or clip the gradient norm"


def _rate(evidence: Evidence, place: str) -> tuple[str, str]:
    cause = "the learning rate is too large for these gradients: the weights themselves are of the size that their activations need"
    return cause, f"lower the learning rate of {place} by a factor of {float(evidence['update']):.2g} or more, warm it up, or clip the gradient norm"


def _rounded(evidence: Evidence, _place: str) -> tuple[str, str]:
    return f"the gradient is computed in {evidence['format']}, where it is rounded to 0", "scale the loss (torch.amp.GradScaler), or compute in bfloat16"


def _constant(_evidence: Evidence, place: str) -> tuple[str, str]:
    return f"the input of {place} is the same for every sample", f"look at what feeds {place}: a dead layer, or a constant"


def _bias(evidence: Evidence, place: str) -> tuple[str, str]:
    return f"its bias alone keeps {float(evidence['share']):.0%} of them below zero", f"set the bias of {place} to zero (torch.nn.init.zeros_)"


def _offset(evidence: Evidence, place: str) -> tuple[str, str]:
    return f"the input of {place} is off-centre: its mean is {float(evidence['offset']):.3g} times its spread", f"standardize the input of {place}"


def _kick(evidence: Evidence, place: str) -> tuple[str, str]:
    at = str(evidence.get("at") or place)
    cause = f"at step {float(evidence['when']):.0f} an update changed the weights of {at} by {float(evidence['update']):.2g} times their own size"
    return cause, "lower the learning rate or warm it up, or clip the gradient norm"


def _saturated(evidence: Evidence, _place: str) -> tuple[str, str]:
    at, spectral = _at(evidence), _spectral(evidence)
    function, share = str(evidence["function"]) or "activation", float(evidence["saturated"])
    cause = f"{share:.0%} of the {function} outputs behind {at} are saturated"
    offset, gain = float(evidence.get("offset", 0.0)), float(evidence.get("gain", 0.0))
    needed = 5 / 3 if function == "tanh" else 1.0
    if offset >= _FAR:
        return (
            f"{cause}: its input is off-centre, its mean {offset:.3g} times its spread",
            f"standardize the input of {at}, or normalize it (LayerNorm, BatchNorm)",
        )
    if gain >= _LARGE * needed:
        cause += f": its weights have gain {gain:.3g}{spectral}, and {needed:.3g} is enough"
    return cause, f"torch.nn.init.xavier_normal_(weight) on {at}, normalization in front of its {function}, or a ReLU-like activation with He initialization"


def _cut(evidence: Evidence, place: str) -> tuple[str, str]:
    unreached, reached, what = str(evidence["unreached"]) or place, evidence.get("reached"), place or "the model's own parameters"
    if reached is None:
        return (
            f"the gradient reaches nothing behind {unreached}: the loss does not use what it gives",
            f"use the output of {unreached} in the loss, or call requires_grad_(False) on {what}",
        )
    if evidence.get("graph"):
        cause = f"the gradient comes back to {reached} and ends there: {unreached} gives a graph, and {reached} takes none of it"
        return cause, f"look between {unreached} and {reached} for detach(), .item(), .numpy(), argmax or round"
    cause = f"the gradient comes back to {reached} and ends there: what {unreached} gives has no graph"
    return cause, f"look inside of {unreached} for torch.no_grad() or detach()"


_WORDS: Mapping[str, Callable[[Evidence, str], tuple[str, str]]] = {
    "dead": _dead,
    "saturated": _saturated,
    "weak": _weak_weights,
    "large": _large_weights,
    "cut": _cut,
    "constant input": _constant,
    "bias": _bias,
    "offset": _offset,
    "update": _kick,
    "rate": _rate,
    "format": _rounded,
}
