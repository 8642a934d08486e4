"""Gradients that vanish, explode or are cut on their way back through the timesteps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gradwatch.detectors import memory
from gradwatch.detectors.measured import flat, misread
from gradwatch.detectors.rule import Rule
from gradwatch.detectors.time_words import (
    GROWS,
    explain_growth,
    explain_short,
    explain_unjudged,
    too_short,
    worst,
)
from gradwatch.values.chain import limiting, narrowed_before
from gradwatch.values.history import History
from gradwatch.values.layer_columns import trunk
from gradwatch.values.report import Finding, Severity
from gradwatch.values.sequences import (
    Horizon,
    RecurrenceName,
    SequenceStats,
    reach_of,
    shortest,
    slope,
    subject,
    whose,
)
from gradwatch.values.snapshot import Fact, Snapshot
from gradwatch.values.thresholds import GROWTH_LAGS, GROWTH_TO_INFINITY, LARGEST_EXPONENT


def through_time(history: History) -> Iterator[Finding]:
    """GW301: a horizon shorter than the need. GW302: a gradient that grows by lag. GW303: a detached state.

    GW304: a need that cannot be judged. GW305: a cell that is full. GW306: padding that is read.
    GW307: a batch that is taken for time. GW308: a recurrence of which one timestep is read.

    Between two probes the findings of the last one hold.
    """
    probes = history.sequences()
    if not probes:
        return
    # Where gates are saturated all over, that is the one fault, and GW101 tells of it.
    shut = [history.model.layers[i] for i in flat(history)]
    told = {layer.module for layer in shut if history.is_open("GW101", layer.name)} | misread(history).keys()
    claims = [c for c in _claims(history, probes) if c.place not in told]
    unmet = {
        c.place
        for c in claims
        if c.need is not None and (verdicts := _verdicts(history, probes, c)) and verdicts[-1].met is False
    }
    detached = [f for f in memory.detached_states(history, probes) if f.place not in unmet]
    short = {f.place for f in detached if f.severity > Severity.INFO}
    for claim in claims:
        yield from (f for f in _judged(history, probes, claim) if f.code != "GW304" or f.place not in short)
    yield from _exploding(history, probes)
    yield from detached
    yield from memory.misreading(history, probes)
    yield from memory.unused_recurrences(history, probes)
    yield from (f for f in memory.full_cells(history, probes) if f.place not in unmet)


# --- a horizon against its need ---


class _Claim(NamedTuple):
    """A horizon to judge."""

    module: str
    part: str
    place: str
    need: int | None
    severity: Severity
    reason: str = ""
    """Why it is judged in the place of another, in words."""


def _claims(history: History, probes: Sequence[Snapshot]) -> Iterator[_Claim]:
    """Return what is to be judged: the model where its need is declared, and the modules.

    Those without a need are for information only. Where the model's own horizon could not be measured, that of its
    shortest module stands in, and is no more than information.
    """
    newest = probes[-1].sequences or ()
    whole = next((s for s in newest if s.part == "model" and s.need is not None), None)
    if whole is not None:
        place = _place(history, probes, "GW301")
        module = shortest(newest, history.thresholds.horizon_gain)
        if whole.lag_gain is None and module is not None and module.lag_gain is not None:
            yield _Claim(
                module.module,
                "",
                module.module,
                whole.need,
                Severity.INFO,
                whole.why_unknown or "the horizon of the model itself was not measured",
            )
        else:
            # Of a part of the model, which the loop calls in pieces, nothing can be said that holds for all of it.
            reason = f"the loop calls the parts of the model one after the other, {whole.module} among them"
            of_part = whole.module != ""
            severity = Severity.INFO if of_part else Severity.WARNING
            yield _Claim(whole.module, "model", place, whole.need, severity, reason if of_part else "")
    for s in newest:
        if s.part == "" and (s.need is not None or whole is None):
            yield _Claim(s.module, "", s.module, s.need, Severity.INFO if s.need is None else Severity.WARNING)


class _Verdict(NamedTuple):
    step: int
    stats: SequenceStats
    horizon: Horizon
    met: bool | None
    """None where it cannot be told: the sequences end before the need does."""


def _verdicts(history: History, probes: Sequence[Snapshot], claim: _Claim) -> list[_Verdict]:
    """Judge each probe at which the horizon could be measured."""
    t = history.thresholds.of(claim.place)
    return [
        _Verdict(p.step, s, found, _met(found, s.length, claim.need, t.horizon_share))
        for p in probes
        for s in p.sequences or ()
        if (s.module, s.part) == (claim.module, claim.part) and (found := reach_of(s, t.horizon_gain)) is not None
    ]


def _judged(history: History, probes: Sequence[Snapshot], claim: _Claim) -> Iterator[Finding]:
    t = history.thresholds.of(claim.place)
    seen = _verdicts(history, probes, claim)
    judged = [v for v in seen if v.met is not None]
    if claim.need is not None and not judged:
        yield from _unjudged(claim, seen, probes[-1])
    if history.is_open("GW301", claim.place):
        short = [v for v in judged[-t.horizon_met :] if not v.met]
    else:
        last = judged[-t.horizon_probes :]
        opening = bool(last) and last[-1].horizon.timesteps > t.horizon_rising * last[0].horizon.timesteps
        short = [] if len(last) < t.horizon_probes or opening or any(v.met for v in last) else last
    if not short:
        return
    now = short[-1]
    unbroken = list(itertools.takewhile(lambda v: not v.met, reversed(judged[: judged.index(now) + 1])))
    finding = too_short(
        now.stats,
        now.horizon,
        _facts(probes, now.step),
        place=claim.place,
        kind=_kind(probes, claim.place),
        need=claim.need,
        severity=claim.severity,
    )
    cut = memory.reached_by(probes[-1]).get(claim.place)
    yield dataclasses.replace(
        finding,
        onset=unbroken[-1].step,
        evidence={**finding.evidence, **({} if cut is None else {"detached": float(cut)})},
        names={**finding.names, **({"reason": claim.reason} if claim.reason else {})},
    )


def _met(found: Horizon, length: int, need: int | None, share: float) -> bool | None:
    if need is None:
        return found.censored or found.timesteps > share * length
    if not found.sure:
        return None
    return True if max(found.timesteps, found.high) >= need else None if found.censored else False


def _unjudged(claim: _Claim, seen: Sequence[_Verdict], newest: Snapshot) -> Iterator[Finding]:
    """Say that nothing can be said."""
    evidence, names = {"need": float(claim.need or 0)}, {"who": "the model" if claim.part else claim.module}
    if seen:
        evidence["length"] = float(max(v.stats.length for v in seen))
        evidence["assumed"] = float(seen[-1].stats.time_assumed)
        names |= {"of": of} if (of := whose(seen[-1].stats)) else {}
        if not seen[-1].horizon.sure:
            evidence |= {"low": float(seen[-1].horizon.low), "high": float(seen[-1].horizon.high)}
    else:
        stats = next((s for s in newest.sequences or () if (s.module, s.part) == (claim.module, claim.part)), None)
        if stats is None or stats.lag_gain is not None:  # a gain that is not finite is another kind
            return
        names["reason"] = stats.why_unknown or "nothing ran on which it could be measured"
    yield Finding(
        "GW304",
        "vanishing-time",
        Severity.INFO,
        claim.place,
        onset=(seen[0].step if seen else newest.step),
        evidence=evidence,
        names=names,
    )


def _place(history: History, probes: Sequence[Snapshot], code: str) -> str:
    """Return the place of what is found of the model as a whole.

    It is the recurrent module with the shortest horizon; where there is none, the module that most of the horizon comes
    from; where far more reaches some module than the model's input, what is before that. Where none of these is known,
    it is what holds most of the layers.
    One that an alert is open at stays the place, so that two modules of the same horizon do not take turns.
    """
    newest = probes[-1].sequences or ()
    whole = next((s for s in newest if s.part == "model"), None)
    share = history.thresholds.horizon_gain
    if whole is not None and (narrowed := narrowed_before(whole, share)) is not None:
        return narrowed.around or narrowed.before or trunk(history.model)
    modules = [s.module for s in newest if s.part == "" and s.module]
    known = next((name for name in modules if history.is_open(code, name)), None)
    if known is not None:
        return known
    module = shortest(newest, share)
    if module is None or module.lag_gain is None:
        known = limiting(whole, share) if whole is not None else None
        return known or (module.module if module is not None else trunk(history.model))
    return module.module


def _kind(probes: Sequence[Snapshot], place: str) -> RecurrenceName | None:
    """Return what the module at a place is, as the newest probe that knew it saw it."""
    stats = (s for p in reversed(probes) for s in p.sequences or () if s.module == place and s.kind is not None)
    return next((s.kind for s in stats), None)


def _facts(probes: Sequence[Snapshot], step: int) -> tuple[Fact, ...]:
    return next((p.facts or () for p in probes if p.step == step), ())


# --- a gradient that grows ---


class _Growth(NamedTuple):
    """How a series grows by lag."""

    factor: float
    """Along the fitted line, from lag 0 to the maximum; infinite where it runs into what is not finite."""
    rate: float
    """Factor per timestep."""
    lags: int
    """Timesteps back to the maximum, or to the first entry that is not finite."""
    what: str = ""


_NONE = _Growth(1.0, 1.0, 0)


def _exploding(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Find growth at the last two probes, or at once where the gradient runs into infinity; at each place the worst."""
    newest = probes[-1]
    found: dict[str, Finding] = {}
    for stats in newest.sequences or ():
        place = stats.module if stats.part != "model" else _place(history, probes, "GW302")
        t = history.thresholds.of(place)
        limit = t.explosion_time / (history.thresholds.clear_factor if history.is_open("GW302", place) else 1.0)
        growth, key = _growth_of(stats, newest), (stats.module, stats.part)
        if growth.factor < limit:
            continue
        series = [(p.step, _growth_of(s, p)) for p in probes for s in p.sequences or () if (s.module, s.part) == key]
        grown = list(itertools.takewhile(lambda at: at[1].factor >= limit, reversed(series)))  # noqa: B023 (used here)
        if len(grown) < min(2, history.thresholds.window) and not math.isinf(growth.factor):
            continue
        kind = _kind(probes, place)
        hopeless = growth.factor >= history.thresholds.explosion_hopeless
        severity = (
            Severity.INFO if history.improved and not hopeless else Severity.WARNING
        )  # clipped, it may train well
        known = found.get(place)
        if known is not None and known.evidence["growth"] >= growth.factor:
            continue
        found[place] = Finding(
            "GW302",
            "exploding",
            severity,
            place,
            lag=growth.lags,
            onset=grown[-1][0],
            evidence={
                "growth": growth.factor,
                "rate": growth.rate,
                "lags": float(growth.lags),
                "limit": t.explosion_time,
                **worst(newest.facts or (), place, GROWS),
            },
            names={"who": subject(stats), "what": growth.what, **({} if kind is None else {"kind": kind})},
        )
    yield from found.values()


def _growth_of(stats: SequenceStats, probe: Snapshot) -> _Growth:
    """Return the growth of the gain by lag, or where the module has none, that of the hidden state's gradient.

    The gain is free of the loss. The gradient is not: it also grows where the loss falls with time. So it counts no
    further than it is above what the loss feeds in directly, and not for a reverse direction, which ends at the oldest
    timestep.
    """
    if stats.lag_gain is not None:
        return _growth(stats.lag_gain)._replace(what="the gain by lag")
    total, direct = stats.grad_hidden, stats.grad_hidden_direct
    if (
        not total
        or not direct
        or stats.reverse
        or any(s.module == stats.module and s.lag_gain is not None for s in probe.sequences or ())
    ):
        return _NONE
    growth = _growth(total[::-1])
    fed = max(direct)
    above = max(total) / fed if fed > 0 else 1.0
    return growth._replace(
        factor=growth.factor if math.isinf(growth.factor) else min(growth.factor, above),
        what="the gradient of the hidden state",
    )


@functools.lru_cache(maxsize=64)
def _growth(by_lag: tuple[float, ...]) -> _Growth:
    """Fit a line through the logarithm from lag 0 to the maximum.

    What grows by a law and not by a step has its growth in the slope.
    """
    finite = tuple(itertools.takewhile(math.isfinite, by_lag))
    start = next((lag for lag, gain in enumerate(finite) if gain > 0), None)
    if start is None:
        return _NONE
    if len(finite) < len(
        by_lag
    ):  # on to infinity, if it had grown before: a derivative that does not exist is another kind
        return _Growth(math.inf, math.inf, len(finite)) if finite[-1] >= GROWTH_TO_INFINITY * finite[start] else _NONE
    peak = finite.index(max(finite))
    if peak - start < GROWTH_LAGS:
        return _NONE
    law = slope([(lag, math.log(gain)) for lag, gain in enumerate(finite[: peak + 1]) if gain > 0]) or 0.0
    return _Growth(math.exp(min(law * (peak - start), LARGEST_EXPONENT)), math.exp(law), peak)


RULES = (
    Rule("GW301", "vanishing-time", explain_short),
    Rule("GW302", "exploding", explain_growth, event=True),
    Rule("GW304", "vanishing-time", explain_unjudged, explains_a_stall=False),
    *memory.RULES,
)
