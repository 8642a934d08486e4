"""Puts to a finding what probes have measured of its cause."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from gradwatch.values.history import History
from gradwatch.values.report import Finding
from gradwatch.values.snapshot import ActivationStats, Fact

Evidence = Mapping[str, float | str]

_NEEDED = {"relu": math.sqrt(2), "tanh": 5 / 3, "sigmoid": 4.0, "hardtanh": 5 / 3}
"""Gain of the weights that keeps a signal and its gradient through the activation as large as it was (He, 2015; Glorot, 2010); the sigmoid passes a quarter."""
_MOSTLY_DEAD, _MOSTLY_FLAT = 0.95, 0.4
"""Shares of dead units and saturated entries from which on they account for a gradient that is gone; of the latter the first accounts for zeros."""
FAR = 5.0
"""Mean of an input over its spread from which on it counts as off-centre."""
LARGE, _SMALL = 3.0, 0.7
"""A gain over what is needed that counts as large, and as small where layer upon layer has it."""
_KICK = 0.3
"""An update over the weights that can move a layer's units out of reach."""


def flat(history: History) -> set[int]:
    """Return the layers at or before one behind which an activation is saturated all over: zeros there are where the gradient faded to, and no cut."""
    known = {a.module for a in newest_activations(history) if (a.saturated or 0.0) >= _MOSTLY_DEAD}
    last = (
        max((at for at, i in enumerate(history.order) if history.model.layers[i].name in known), default=-1)
        if known
        else -1
    )
    return set(history.order[: last + 1])


def with_cause(history: History, finding: Finding) -> Finding:
    """Put to a finding what was measured of its cause, if anything was."""
    look = _LOOKS.get(finding.code)
    found = look(history, finding) if look is not None else {}
    return dataclasses.replace(finding, evidence={**finding.evidence, **found}) if found else finding


# --- what was measured ---


def newest_activations(history: History) -> tuple[ActivationStats, ...]:
    """Return what the newest probe saw of the outputs of modules."""
    return next((s.activations or () for s in history.looks(1)), ())


def _facts(history: History) -> Sequence[Fact]:
    """Return the facts of the newest probe that measured any."""
    return next((s.facts or () for s in reversed(history.window()) if s.facts), ())


def _fact(history: History, place: str, name: str) -> float | None:
    return next(
        (f.value for s in reversed(history.window()) for f in s.facts or () if f.place == place and f.name == name),
        None,
    )


def _functions(history: History) -> dict[str, str]:
    """Return the activation behind each layer of which one was seen."""
    return {f.place: f.name.removeprefix("activation ") for f in _facts(history) if f.name.startswith("activation ")}


def steepest(history: History, count: int = 4) -> list[str]:
    """Return the layers with the largest weights for their size."""
    import numpy as np

    gains = history.gains()
    order = np.argsort(-np.nan_to_num(gains))[:count]
    return [history.model.layers[i].name for i in order.tolist() if gains[i] > 0]


def _between(history: History, finding: Finding) -> list[str]:
    """Return the layers of a finding in the order of the forward pass, and the one behind them; of the whole model all."""
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
    known = {a.module: a for a in newest_activations(history)}
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
    return half and not any(now.norm) and any(a.grad_norm for a in newest_activations(history))


def _saturation(history: History, share: float, at: str) -> dict[str, float | str]:
    found: dict[str, float | str] = {
        "because": "saturated",
        "saturated": share,
        "at": at,
        "function": _functions(history).get(at, ""),
    }
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
    if (
        not weak
        or not 0 < ratio < 1
        or sum(math.log(max(share, 1e-30)) for share in weak.values()) > 0.5 * math.log(ratio)
    ):
        return {}
    worst = min(weak, key=weak.__getitem__)
    function = functions.get(worst, "")
    found: dict[str, float | str] = {
        "because": "weak",
        "at": worst,
        "gain": gains[worst],
        "needed": _NEEDED.get(function, 1.0),
        "function": function,
    }
    return {**found, "weak": float(len(weak)), "first": next(iter(weak)), "until": list(weak)[-1]}


def _of_a_cut(history: History, finding: Finding) -> dict[str, float | str]:
    order = [history.model.layers[i].name for i in history.order]
    last = str(finding.evidence.get("last", finding.place))
    behind = order[order.index(last) :] if last in order else []
    if finding.evidence.get("gradient") == "zero":
        if _in_half(history):
            return {"because": "format", "format": "float16"}
        known = {a.module: a.dead for a in newest_activations(history)}
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
    """Return the largest update of these layers' weights, over the weights, with the layer and the step; None where it is none to speak of."""
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
    if offset is not None and offset >= FAR:
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
    if len(over) and over[at] >= LARGE:
        worst = history.model.layers[at].name
        found: dict[str, float | str] = {
            "because": "large",
            "at": worst,
            "gain": float(gains[at]),
            "times": float(over[at]),
        }
        if (norm := _fact(history, worst, "spectral_norm")) is not None:
            found["spectral_norm"] = norm
        return {**found, "layers over": float((over >= LARGE).sum())}
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
