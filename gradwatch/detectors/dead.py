"""Units that give 0 for every input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradwatch.detectors.cause_words import WARM_UP, has_both, said
from gradwatch.detectors.causes import of_silence
from gradwatch.detectors.measured import zero_weights
from gradwatch.detectors.rule import Rule
from gradwatch.detectors.sizes import faint_input
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import ActivationStats, Snapshot
from gradwatch.values.thresholds import BETWEEN_PROBES, FEW_DEAD


def dead_units(history: History) -> Iterator[Finding]:
    """GW601: most units of a layer were silent at probe after probe, for longer than chance explains.

    Between two probes the findings of the last one hold.
    """
    t, limits = history.thresholds, history.lasting(_limits)
    if not limits or (faint_input(history) is not None and history.improved is not True):  # of which GW106 tells
        return
    probes, measured, numbers, layers = history.looks(), history.lasting(_units), history.numbers, history.model.layers
    if opened := history.open_at("GW601"):
        limits = {i: one / (t.clear_share_factor if layers[i].name in opened else 1.0) for i, one in limits.items()}
    unmoved = {numbers[name] for name in zero_weights(history)}  # of which GW401 tells
    ill = {i for i, limit in limits.items() if i not in unmoved and float(measured[i].dead or 0.0) >= limit}
    if not ill:
        return
    since = history.lasting(_onsets, *((measured[i].module, limits[i]) for i in ill))
    onsets = {
        numbers[name]: onset
        for name, onset in since.items()
        if measured[numbers[name]].dead != 1 or not _gradient_between(history, name, probes)
    }
    for run in history.runs(onsets, measured):
        place = history.model.layers[run[0]].name
        worst = max(run, key=lambda i: measured[i].dead or 0.0)
        yield Finding(
            "GW601",
            "dead-units",
            Severity.INFO if all(_few(measured[i]) for i in run) else Severity.WARNING,
            place,
            onset=min(onsets[i] for i in run),
            evidence={
                "dead": float(measured[worst].dead or 0.0),
                "units": float(measured[worst].units or 0),
                "limit": history.thresholds_of(run[0]).dead_units,
                "layers": float(len(run)),
            },
            names={"worst": history.model.layers[worst].name, "last": history.model.layers[run[-1]].name},
        )


def _few(stats: ActivationStats) -> bool:
    """Tell whether the dead units are a handful, and not all that there are."""
    return stats.dead != 1 and (stats.dead or 0.0) * (stats.units or 0) < FEW_DEAD


def _units(history: History) -> dict[int, ActivationStats]:
    """Return what the newest of enough probes saw, by number of the layers whose units it counted."""
    probes, numbers = history.looks(), history.numbers
    if len(probes) < history.thresholds.dead_probes:
        return {}
    return {numbers[a.module]: a for a in probes[-1].activations or () if a.dead is not None and a.module in numbers}


def _limits(history: History) -> Mapping[int, float]:
    """Return the limits of those layers that have dead units at all."""
    return {i: history.thresholds_of(i).dead_units for i, a in history.lasting(_units).items() if a.dead}


def _onsets(history: History, *ill: tuple[str, float]) -> dict[str, int]:
    """Return, by module, since when most of its units are dead; those for which they were not long enough are left out.

    Args:
        history: with looks at the units.
        ill: modules, with the share of units that is too large for each.

    """
    found: dict[str, int] = {}
    left = list(ill)
    for count, (step, dead) in enumerate(history.lasting(_dead_by_module), 1):
        left = [(module, limit) for module, limit in left if dead.get(module, -1.0) >= limit]
        if count >= history.thresholds.dead_probes:
            found.update((module, step) for module, _ in left)
    return found


def _dead_by_module(history: History) -> list[tuple[int, dict[str, float]]]:
    """Return the step of each look, the newest first, and the share of dead units of each module."""
    return [(s.step, {a.module: a.dead or 0.0 for a in s.activations or ()}) for s in reversed(history.looks())]


def _gradient_between(history: History, module: str, probes: Sequence[Snapshot]) -> bool:
    """Tell whether a layer that got nothing at probes often got something between them.

    It does not do the same at every step then.
    """
    own = history.columns.layer_of(module)
    columns = [c for c, p in enumerate(history.model.parameters) if p.layer == own and p.role != "bias"]
    since = probes[-history.thresholds.dead_probes].step
    window = [s for s in history.window() if s.step >= since]
    between = [any(s.norm[c] for c in columns) for s in window if s.activations is None]
    return not any(s.norm[c] for s in window if s.activations is not None for c in columns) and sum(
        between
    ) > BETWEEN_PROBES * len(between)


def _explain(finding: Finding) -> Explanation:
    evidence, names, place = finding.evidence, finding.names, finding.place or "the model"
    units, count = evidence["units"], evidence["layers"]
    whose = place if count == 1 else names["worst"]
    more = f" (and most of {place} to {names['last']}, {count:.0f} layers)" if count > 1 else ""
    otherwise = f"a bias of zero, LeakyReLU after {place}, normalization before its ReLU, or a lower learning rate"
    if has_both(finding):
        otherwise = WARM_UP
    cause, remedy = said(finding, otherwise)
    return Explanation(
        f"{evidence['dead'] * units:.0f} of the {units:.0f} units of {whose} are dead{more}: after their ReLU they"
        f" have been 0 for every input since step {finding.onset}",
        cause,
        remedy,
    )


RULES = (Rule("GW601", "dead-units", _explain, of_silence, event=True),)
