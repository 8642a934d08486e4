"""Reads what was written in format 1, where facts that now have types stood as names that are taken apart here.

A record that was begun in format 1 and resumed later has lines of both formats: those of format 2 pass as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradwatch.values.snapshot import ModelInfo

Plain = dict[str, Any]

_PART = re.compile(
    r"(forget_gate|forget_bias|update_gate|spectral_radius|spectral_norm|saturation)_(l\d+(?:_reverse)?)"
)
_FUNCTION = "activation "
_OF_A_CUT = ("done", "unreached", "reached")
_CAUSES = {"constant input": "constant_input"}
"""Causes that are called otherwise now."""
_NUMBERS = {"layers over": "over"}


def model_from_1(plain: Mapping[str, Any]) -> Plain:
    """Return a model as `to_plain` gives it now: a lone gain was called a scale."""
    parameters = [{**p, "role": "gain"} if p["role"] == "scale" else p for p in plain["parameters"]]
    return {**plain, "parameters": parameters}


def snapshot_from_1(plain: Mapping[str, Any], models: Sequence[ModelInfo]) -> Plain:
    """Return a snapshot as `snapshot_to_plain` gives it now.

    Raises:
        KeyError, IndexError, TypeError, AttributeError: it is none, or its model is not among `models`.

    """
    found = dict(plain)
    if plain.get("facts") is not None:
        facts = list(plain["facts"])
        if cuts := list(_cuts(facts)):
            found["cuts"] = cuts
        if any(f["name"] == "float16" for f in facts):
            found["computed_in"] = "float16"
        functions = {f["place"]: f["name"].removeprefix(_FUNCTION) for f in facts if f["name"].startswith(_FUNCTION)}
        found["activations"] = _with_functions(plain.get("activations"), functions)
        found["facts"] = [_fact(f) for f in facts if _is_number(f["name"])] or None
    if plain.get("sequences") is not None:
        kinds = {layer.name: _recurrence(layer.kind) for layer in models[plain.get("model", -1)].layers}
        found["sequences"] = [_sequence(s, kinds) for s in plain["sequences"]]
    return found


def alert_from_1(plain: Mapping[str, Any]) -> Plain:
    """Return an alert as `to_plain` gives it now: texts stood among the numbers, and the cause with them."""
    finding = dict(plain["finding"])
    numbers, names = {}, {}
    for name, value in finding.get("evidence", {}).items():
        if not isinstance(value, str):
            numbers[_NUMBERS.get(name, name)] = value
        elif name != "because":
            names[name] = value
        elif finding["kind"] == "vanishing-time":  # where it was a sentence
            names["reason"] = value
        else:
            finding["cause"] = _CAUSES.get(value, value)
    if names.pop("gradient", None) == "zero":
        numbers["norm"] = 0.0
    return {**plain, "finding": {**finding, "evidence": numbers, "names": {**finding.get("names", {}), **names}}}


def _is_number(name: str) -> bool:
    return name not in (*_OF_A_CUT, "float16") and not name.startswith(_FUNCTION)


def _fact(plain: Plain) -> Plain:
    match = _PART.fullmatch(plain["name"])
    return plain if match is None else {**plain, "name": match[1], "part": match[2]}


def _cuts(facts: Sequence[Plain]) -> Iterator[Plain]:
    """Return the cuts: facts that follow one another, on the layer in question, what was not reached, and what was."""
    for at, fact in enumerate(facts):
        if fact["name"] == "done":
            unreached, *after = facts[at + 1 : at + 3]
            reached = after[0]["place"] if after and after[0]["name"] == "reached" else None
            yield {
                "layer": fact["place"],
                "unreached": unreached["place"],
                "reached": reached,
                "graph": bool(unreached["value"]),
            }


def _with_functions(activations: Sequence[Plain] | None, functions: Mapping[str, str]) -> list[Plain] | None:
    known = {a["module"]: a for a in activations or ()}
    for module, function in functions.items():
        known[module] = {**known.get(module, {"module": module}), "function": function}
    return list(known.values()) or None


def _sequence(plain: Plain, kinds: Mapping[str, str | None]) -> Plain:
    part = plain.get("part", "")
    kind = kinds.get(plain["module"]) if not part else None
    return {"kind": kind, "reverse": part.endswith("_reverse"), **plain}


def _recurrence(kind: str) -> str | None:
    return next((name for name in ("LSTM", "GRU", "RNN") if name in kind.upper()), None)
