"""History -> findings: the detectors, and the rules that they apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gradwatch.detectors import (
    dead,
    depth,
    disconnected,
    exploded,
    exploding,
    idle,
    nonfinite,
    sizes,
    skipped,
    squashed,
    stalled,
    standstill,
    time,
    underflow,
    unstepped,
)
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import Detector
from gradwatch.values.report import Explanation, Finding

DETECTORS: tuple[Detector, ...] = (
    nonfinite.nonfinite,
    disconnected.disconnected,
    unstepped.unstepped,
    dead.dead_units,
    depth.vanishing_depth,
    squashed.squashed,
    sizes.sizes,
    standstill.standstill,
    exploding.exploding,
    exploded.exploded,
    underflow.underflow,
    idle.idle,
    skipped.skipped,
    time.through_time,
    stalled.stalled,
)
"""The default detectors. Your own is a function from a `History` to findings; give it in `detectors=`."""

RULES: Mapping[str, Rule] = {
    rule.code: rule
    for family in (
        depth,
        squashed,
        sizes,
        standstill,
        exploding,
        exploded,
        time,
        disconnected,
        nonfinite,
        skipped,
        dead,
        underflow,
        stalled,
        unstepped,
        idle,
    )
    for rule in family.RULES
}
"""The rules of the default detectors, by code; docs/rules.md describes them."""


def rules_of(detectors: Iterable[Detector]) -> Mapping[str, Rule]:
    """Return the rules by which these detectors judge, by code: gradwatch's own, and those that one carries.

    Raises:
        TypeError: what one carries are no rules.

    """
    own = [(detector, rules) for detector in detectors if (rules := getattr(detector, "rules", ()))]
    if not own:
        return RULES
    found = dict(RULES)
    for detector, rules in own:
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(
                    f"the rules of a detector must be gradwatch.Rule, got {rule!r:.80} from {detector!r:.80}"
                )
            found[rule.code] = rule
    return found


def explain(finding: Finding, rules: Mapping[str, Rule] = RULES) -> Explanation:
    """Put a finding into words; one of a code without a rule (a user's own detector) by its numbers."""
    rule = rules.get(finding.code)
    if rule is not None:
        return rule.explain(finding)
    numbers = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in (*finding.evidence.items(), *finding.names.items())
    )
    return Explanation(f"{finding.place or 'the whole model'}: {numbers or finding.kind}")
