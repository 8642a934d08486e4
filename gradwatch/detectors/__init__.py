"""History -> findings: the detectors, and the table of the rules that they apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradwatch.detectors.dead import dead_units, explain_dead_units
from gradwatch.detectors.depth import explain_vanishing_depth, vanishing_depth
from gradwatch.detectors.disconnected import disconnected, explain_disconnected
from gradwatch.detectors.exploding import explain_exploding, exploding
from gradwatch.detectors.nonfinite import explain_nonfinite, nonfinite
from gradwatch.detectors.stalled import explain_stalled, stalled
from gradwatch.detectors.time import explain_through_time, through_time
from gradwatch.detectors.underflow import explain_underflow, underflow
from gradwatch.values.history import Detector
from gradwatch.values.report import Explanation, Finding

DETECTORS: tuple[Detector, ...] = (
    nonfinite,
    disconnected,
    dead_units,
    vanishing_depth,
    exploding,
    underflow,
    through_time,
    stalled,
)
"""The default detectors. Your own is a function from a `History` to findings; give it in `detectors=`."""

RULES: Mapping[str, Callable[[Finding], Explanation]] = {
    "GW101": explain_vanishing_depth,
    "GW102": explain_vanishing_depth,
    "GW103": explain_vanishing_depth,
    "GW201": explain_exploding,
    "GW202": explain_exploding,
    "GW203": explain_exploding,
    "GW204": explain_exploding,
    "GW205": explain_exploding,
    "GW206": explain_exploding,
    "GW301": explain_through_time,
    "GW302": explain_through_time,
    "GW303": explain_through_time,
    "GW304": explain_through_time,
    "GW401": explain_disconnected,
    "GW501": explain_nonfinite,
    "GW502": explain_nonfinite,
    "GW601": explain_dead_units,
    "GW701": explain_underflow,
    "GW702": explain_underflow,
    "GW703": explain_underflow,
    "GW801": explain_stalled,
}
"""What each code means, in words. docs/rules.md has the rules themselves."""


def explain(finding: Finding) -> Explanation:
    """Put a finding into words; one of an unknown code (a user's own detector) by its numbers."""
    rule = RULES.get(finding.code)
    if rule is not None:
        return rule(finding)
    numbers = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in finding.evidence.items()
    )
    return Explanation(f"{finding.place or 'the whole model'}: {numbers or finding.kind}")
