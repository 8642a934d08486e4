"""What keeps a recurrent module from its data, and no horizon shows: a detached state, a full cell, padding."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterator, Sequence

from gradwatch.detectors.measured import misread
from gradwatch.detectors.misread_words import explain_over_batch, explain_padding, explain_unused
from gradwatch.detectors.rule import Rule
from gradwatch.detectors.time_words import (
    FADES,
    explain_detached,
    explain_full,
    keeps,
    worst,
)
from gradwatch.values.history import History
from gradwatch.values.report import Finding, Severity
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Snapshot
from gradwatch.values.thresholds import MOSTLY_FLAT


def detached_states(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Find where a carried state is detached: a fault where that keeps the gradient from what a declared need asks."""
    newest = probes[-1].sequences or ()
    for place, reached in reached_by(probes[-1]).items():
        since = list(itertools.takewhile(lambda p: place in reached_by(p), reversed(probes)))  # noqa: B023 (used here)
        mine = [s for s in newest if s.module == place]
        need = _need(newest, place)
        short = need is not None and reached < need and len(since) >= history.thresholds.of(place).horizon_probes
        yield Finding(
            "GW303",
            "vanishing-time",
            Severity.WARNING if short else Severity.INFO,
            place,
            lag=reached,
            onset=since[-1].step,
            evidence={
                "length": float(max(s.length for s in mine)),
                "reached": float(reached),
                **({} if need is None else {"need": float(need)}),
            },
        )


def _need(newest: Sequence[SequenceStats], place: str) -> int | None:
    """Return the need that was declared of a module, or else of the model."""
    declared = [s for s in newest if s.need is not None]
    of_module = (s.need for s in declared if s.module == place)
    return next(of_module, next((s.need for s in declared if s.part == "model"), None))


def reached_by(probe: Snapshot) -> dict[str, int]:
    """Return how many of its newest timesteps a gradient reaches, by module whose carried state is detached."""
    return {s.module: s.reached for s in probe.sequences or () if s.reached is not None}


def full_cells(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Find LSTMs that keep everything and let everything in, until their cells are saturated, and learn nothing.

    The gain by lag does not show it: it shrinks at every lag alike.
    """
    if history.improved is not False:
        return
    newest = probes[-1].sequences or ()
    for stats in (s for s in newest if s.part == "" and s.kind == "LSTM"):
        place, need = stats.module, _need(newest, stats.module)
        patience = history.thresholds.of(place).horizon_probes
        last = probes[-patience:]
        seen = [worst(p.facts or (), place, FADES) for p in last]
        full = [
            f.get("cell_saturation", 0.0) >= MOSTLY_FLAT and keeps(f.get("forget_gate", 0.0), stats.length)
            for f in seen
        ]
        if len(last) >= patience and all(full):
            yield Finding(
                "GW305",
                "vanishing-time",
                Severity.INFO if need is None else Severity.WARNING,
                place,
                onset=last[0].step,
                evidence={**seen[-1], **({} if need is None else {"need": float(need)})},
            )


def misreading(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Find recurrent modules that take padding for data, or the batch for time, so that they cannot learn from it."""
    for place, stats in misread(history).items():
        of = batch_read if stats.over_batch else padding_read if stats.reads_padding else rows_mixed
        who = (stats.module, stats.part)
        mine = [next((s for s in p.sequences or () if (s.module, s.part) == who), None) for p in probes]
        since = itertools.takewhile(lambda s: s is not None and s.misread, reversed(mine))
        onset = probes[-len(list(since))].step
        # Rows may be meant to know of each other, as those of a graph or of assets beside each other.
        meant = history.improved is not False if of is rows_mixed else bool(history.improved)
        severity = Severity.INFO if meant else Severity.WARNING
        yield dataclasses.replace(of(stats, place), severity=severity, onset=onset)


def batch_read(stats: SequenceStats, place: str) -> Finding:
    """Return the finding that the batch is taken for time, at the module of this name."""
    return Finding("GW307", "vanishing-time", Severity.WARNING, place, evidence={"length": float(stats.length)})


def rows_mixed(stats: SequenceStats, place: str) -> Finding:
    """Return the finding that the model mixes the rows of a batch up."""
    evidence = {"length": float(stats.length), "mixed": stats.mixes_rows or 0.0}
    return Finding("GW307", "vanishing-time", Severity.WARNING, place, evidence=evidence)


def padding_read(stats: SequenceStats, place: str) -> Finding:
    """Return the finding that padding is read in place of data, at the module of this name."""
    evidence = {"padding": stats.padding or 0.0, "length": float(stats.length), "data": stats.grad_data or 0.0}
    return Finding("GW306", "vanishing-time", Severity.WARNING, place, evidence=evidence)


def unused_recurrences(history: History, probes: Sequence[Snapshot]) -> Iterator[Finding]:
    """Find recurrent modules, or directions of them, of whose timesteps a single one is read.

    The state before that is 0, and so, exactly, is the gradient of the weights that take it.
    """
    window = history.window(history.thresholds.window)
    if len(window) < history.thresholds.window or 0.0 not in history.snapshot.norm:  # nearly always
        return
    if any(s.model is not history.model and s.model.parameters != history.model.parameters for s in window):
        return
    columns = {p.name: column for column, p in enumerate(history.model.parameters)}
    told = misread(history)
    for stats in probes[-1].sequences or ():
        if stats.part or stats.length < 2 or stats.module in told:
            continue
        prefix = f"{stats.module}." if stats.module else ""
        for weights, inputs, direction in _recurrent(prefix, columns):
            if all(s.norm[columns[weights]] == 0 and s.norm[columns[inputs]] for s in window):
                yield Finding(
                    "GW308",
                    "vanishing-time",
                    Severity.WARNING,
                    stats.module,
                    onset=window[0].step,
                    evidence={"length": float(stats.length)},
                    names={"weights": weights, "direction": direction},
                )
                break


def _recurrent(prefix: str, among: Container[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the recurrent weights of a module of torch's, and those of its inputs, and which way they run.

    But for those without a bias: their state is 0 as long as their inputs are, as those of padding are.
    """
    for layer in itertools.takewhile(lambda k: f"{prefix}weight_hh_l{k}" in among, itertools.count()):
        both = f"{prefix}weight_hh_l{layer}_reverse" in among
        for end in ("", "_reverse"):
            weights, inputs, bias = (f"{prefix}{kind}_l{layer}{end}" for kind in ("weight_hh", "weight_ih", "bias_hh"))
            if weights in among and inputs in among and bias in among:
                yield weights, inputs, "reverse" if end else "forward" if both else ""


RULES = (
    Rule("GW303", "vanishing-time", explain_detached, explains_a_stall=False),
    Rule("GW305", "vanishing-time", explain_full),
    Rule("GW306", "vanishing-time", explain_padding),
    Rule("GW307", "vanishing-time", explain_over_batch),
    Rule("GW308", "vanishing-time", explain_unused, explains_a_stall=False),
)
