"""Two runs or profiles -> what changed."""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gradwatch.values.profile import HorizonProfile, LayerProfile, Profile
from gradwatch.values.report import Alert, Severity

TOLERANCE = 0.5
"""Orders of magnitude by which a layer may change beside the last ones: half a decade, a factor of 3. Runs of other
seeds differ by less, and what vanishes does so by several."""
_SHARE = 0.2
"""By how much a share of dead units may change."""
_SLACK = 0.1
"""Share of itself by which an end of a horizon's interval may lie elsewhere."""
_COST = 1.5
"""Factor by which a step may take longer, or less long."""

What = Literal[
    "horizon", "gradient", "sensitivity", "dead", "gone", "new", "kind", "renamed", "alert", "cleared", "cost"
]


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as it was."""

    what: What
    place: str
    """A layer or module; "" is the model."""
    severity: Severity
    text: str
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        """Return it in a line."""
        return f"{self.place or 'the model'}: {self.text}"


@dataclass(frozen=True)
class Comparison:
    """What changed, gravest first."""

    changes: tuple[Change, ...]
    scale: float = 0.0
    """Orders of magnitude by which all gradients became larger, which is no change."""
    layers: int = 0
    """How many were compared."""

    def worst(self) -> Severity | None:
        """Return the gravest severity; None where nothing changed."""
        return max((change.severity for change in self.changes), default=None)

    def __str__(self) -> str:
        """Return a line for each change."""
        return "\n".join(map(str, self.changes)) or f"no change in {self.layers} layers"


def compare(
    before: Profile, after: Profile, *, tolerance: float = TOLERANCE, layers: Mapping[str, float] | None = None
) -> Comparison:
    """Compare two profiles; a factor on all gradients, as of another scale of the loss, is no change.

    Args:
        before: what was.
        after: what is.
        tolerance: orders of magnitude by which a layer may change beside the last ones.
        layers: the same of layers whose names match a pattern; the last that matches counts.

    """
    names = _names(before.layers, after.layers)
    changes = [*_horizons(before.horizons, after.horizons, names)]
    changes += [
        Change("renamed", new, Severity.INFO, f"was called {old or 'the model'}")
        for old, new in names.items()
        if old != new
    ]
    kept = set(names.values())
    changes += _come_and_gone("gone", [old for old in before.layers if old not in names])
    changes += _come_and_gone("new", [new for new in after.layers if new not in kept])
    pairs = {new: (before.layers[old], after.layers[new]) for old, new in names.items()}
    scale = _scale([(a.norm, b.norm) for a, b in pairs.values()])
    of_sensitivity = _scale([(a.sensitivity, b.sensitivity) for a, b in pairs.values()])
    for name, (old, new) in pairs.items():
        own = next((t for p, t in reversed([*(layers or {}).items()]) if fnmatch.fnmatchcase(name, p)), tolerance)
        changes += _ratio("gradient", name, old.norm, new.norm, scale, own)
        changes += _ratio("sensitivity", name, old.sensitivity, new.sensitivity, of_sensitivity, own)
        changes += _dead(name, old, new)
        if old.kind != new.kind:
            changes.append(Change("kind", name, Severity.INFO, f"is a {new.kind}, and was a {old.kind}"))
    return Comparison(_sorted(changes), scale, len(pairs))


def with_alerts(found: Comparison, before: Iterable[Alert], after: Iterable[Alert]) -> Comparison:
    """Add the alerts that only one of two runs had."""
    old, new = {_key(a): a for a in before}, {_key(a): a for a in after}
    changes = [*found.changes]
    for key in new.keys() - old.keys():
        alert = new[key]
        text = f"new alert {alert.finding.code} {alert.finding.kind}: {alert.message}"
        changes.append(Change("alert", alert.finding.place, max(alert.severity, alert.worst), text))
    for key in old.keys() - new.keys():
        finding = old[key].finding
        changes.append(
            Change("cleared", finding.place, Severity.INFO, f"no alert {finding.code} {finding.kind} any more")
        )
    return Comparison(_sorted(changes), found.scale, found.layers)


def with_cost(found: Comparison, before: float | None, after: float | None) -> Comparison:
    """Add what a step costs, in seconds, where that changed by much."""
    if before and after and not 1 / _COST < after / before < _COST:
        text = f"a step takes {after * 1e3:.3g} ms, and took {before * 1e3:.3g}"
        found = Comparison(
            _sorted([*found.changes, Change("cost", "", Severity.INFO, text, before, after)]), found.scale, found.layers
        )
    return found


def _key(alert: Alert) -> tuple[str, str, str | None]:
    return alert.finding.code, alert.finding.place, alert.finding.parameter


def _sorted(changes: Sequence[Change]) -> tuple[Change, ...]:
    return tuple(sorted(changes, key=lambda change: change.severity, reverse=True))


def _come_and_gone(what: Literal["gone", "new"], names: Sequence[str]) -> Iterable[Change]:
    if names:
        several = f"{len(names)} layers are {what}: {names[0]} to {names[-1]}"
        yield Change(what, names[0], Severity.INFO, several if len(names) > 1 else f"this layer is {what}")


def _names(before: Mapping[str, LayerProfile], after: Mapping[str, LayerProfile]) -> dict[str, str]:
    """Return the new names by the old ones.

    Where as many layers of the same kinds in the same order are gone as are new, they were renamed.
    """
    names = {name: name for name in before if name in after}
    gone = [name for name in before if name not in after]
    new = [name for name in after if name not in before]
    if [before[name].kind for name in gone] == [after[name].kind for name in new]:
        names |= dict(zip(gone, new, strict=True))
    order = {name: at for at, name in enumerate(after)}
    return dict(sorted(names.items(), key=lambda pair: order[pair[1]]))


def _scale(pairs: Sequence[tuple[float | None, float | None]]) -> float:
    """Return by how many orders of magnitude the last layers changed, to which a loss of another scale comes first."""
    known = [b - a for a, b in pairs if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
    return statistics.median(known[-max(len(known) // 4, 1) :]) if known else 0.0


def _ratio(
    what: Literal["gradient", "sensitivity"],
    name: str,
    before: float | None,
    after: float | None,
    scale: float,
    tolerance: float,
) -> Iterable[Change]:
    if before is None or after is None:
        if before is not after:
            text = f"{what} {'is there now' if before is None else 'is not there any more'}"
            grave = Severity.INFO if before is None else Severity.WARNING
            yield Change(what, name, grave, text, before, after)
        return
    same = before == after or (math.isnan(before) and math.isnan(after))
    change = 0.0 if same else after - before - scale
    if not abs(change) <= tolerance:
        grave = Severity.INFO if change > 0 else Severity.WARNING
        yield Change(what, name, grave, f"{what} {_factor(change)} beside the last layers", before, after)


def _factor(change: float) -> str:
    if not math.isfinite(change):
        return "is 0 now" if change < 0 else "is not 0 any more" if change > 0 else "is not a number"
    return f"x{10**change:.2g}"


def _dead(name: str, before: LayerProfile, after: LayerProfile) -> Iterable[Change]:
    old, new = before.dead or 0.0, after.dead or 0.0
    if abs(new - old) > _SHARE:
        grave = Severity.WARNING if new > old else Severity.INFO
        yield Change("dead", name, grave, f"{old:.0%} -> {new:.0%} of the units are dead", old, new)


def _horizons(
    before: Mapping[str, HorizonProfile], after: Mapping[str, HorizonProfile], names: Mapping[str, str]
) -> Iterable[Change]:
    for name, old in before.items():
        new = after.get(names.get(name, name))
        if new is None:
            continue
        low, high = new.low * (1 - _SLACK) - 1, new.high * (1 + _SLACK) + 1
        both_whole = old.censored and new.censored and old.of != new.of
        if (old.high >= low and old.low <= high) or both_whole:
            continue
        grave = Severity.WARNING if new.horizon < old.horizon else Severity.INFO
        shown = f"{_shown(old)} -> {_shown(new)} timesteps"
        text = shown if old.of == new.of else f"{shown} (of {old.of} and {new.of})"
        yield Change("horizon", names.get(name, name), grave, text, old.horizon, new.horizon)


def _shown(horizon: HorizonProfile) -> str:
    return f"{'at least ' * horizon.censored}{horizon.horizon}"
