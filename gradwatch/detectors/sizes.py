"""Inputs and scores of a size with which little can be learned: next to nothing comes in, or far too much comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradwatch.detectors.flows import flows_of
from gradwatch.detectors.measured import facts
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.thresholds import FAINT_INPUT, SAME_NORM, WORSE_THAN_CHANCE


def sizes(history: History) -> Iterator[Finding]:
    """GW106: so little comes in that only biases speak. GW209: the model is far worse than one that guesses."""
    if history.improved is not True and history.count >= history.thresholds.window:
        yield from _faint(history)
        yield from _worse(history)


def faint_input(history: History) -> tuple[str, float] | None:
    """Return the first layer, if it takes next to nothing, and how much; None where it takes more.

    Exactly nothing is another matter, and so is what a normalization takes, or a layer without a bias, which may give
    the same whatever the size is. Nor is it told where another layer may take what the model is given.
    """
    return history.lasting(_faint_input)


def _faint_input(history: History) -> tuple[str, float] | None:
    known, flows, layers = facts(history), flows_of(history), history.model.layers
    names = [layers[i].module for i in history.order]
    taken = {name: size for name in names if (size := known.get((name, "input_size"), 0.0)) > 0}
    if not names or not 0 < taken.get(names[0], 0.0) <= FAINT_INPUT:
        return None
    others = [size for name, size in taken.items() if name not in flows or flows[name].source is None]
    roles = [{p.role for p in history.model.parameters if p.layer == layers[i].name} for i in history.order[:2]]
    if (
        not others
        or max(others) > FAINT_INPUT
        or "bias" not in roles[0]
        or any("normalization" in its for its in roles)
    ):
        return None
    return names[0], taken[names[0]]


def _faint(history: History) -> Iterator[Finding]:
    found = faint_input(history)
    if found is not None:
        severity = Severity.INFO if history.improved is None else Severity.WARNING
        onset = history.window(history.thresholds.window)[0].step
        yield Finding("GW106", "vanishing-depth", severity, found[0], onset=onset, evidence={"size": found[1]})


def _worse(history: History) -> Iterator[Finding]:
    """Find that all losses, from the first on, were far above what equal scores for all classes would have had."""
    losses = history.losses(history.thresholds.window)
    known = history.lasting(_chances)
    if not known or len(losses) < history.thresholds.window or not all(map(math.isfinite, losses)):
        return
    if min(*losses, history.first_loss or 0.0) > WORSE_THAN_CHANCE * known[1]:
        numbers = {"loss": losses[-1], "chance": known[1]}
        onset = history.window(history.thresholds.window)[0].step
        yield Finding("GW209", "exploding", Severity.WARNING, known[0], onset=onset, evidence=numbers)


def _chances(history: History) -> tuple[str, float] | None:
    """Return what gives the scores, and the loss of a guess; None where what was told is no cross-entropy alone."""
    for snapshot in reversed(history.probed):
        told = {f.name: (f.place, f.value) for f in snapshot.facts or () if f.name in ("chance", "cross_entropy")}
        if len(told) == 2 and snapshot.loss is not None:  # of sums and averages with other losses it is another number
            same = math.isclose(told["cross_entropy"][1], snapshot.loss, rel_tol=SAME_NORM)
            return told["chance"] if same else None
    return None


# --- in words ---


def _explain_faint(finding: Finding) -> Explanation:
    place = finding.place or "the model"
    return Explanation(
        f"next to nothing comes in: what {place} takes has a root mean square of {finding.evidence['size']:.1g}, and"
        " the loss has hardly come down",
        f"what the weights of {place} make of so small an input is nothing beside its bias, so that all samples are"
        " alike; and their gradient is as small as the input is",
        f"standardize the input of {place}, feature by feature; look for a division that was made twice",
    )


def _explain_worse(finding: Finding) -> Explanation:
    loss, chance = finding.evidence["loss"], finding.evidence["chance"]
    head = finding.place or "the model"
    return Explanation(
        f"the model is far worse than one that guesses: the loss is {loss:.3g}, and equal scores for all classes have"
        f" {chance:.3g}; so it has been since step {finding.onset}",
        f"the scores that {head} gives are far too large, and mostly wrong: it begins with too large weights (an"
        " embedding whose weights it shares is drawn from N(0, 1)), or takes too large an input",
        f"begin with smaller weights in {head} (a standard deviation of 0.02, or 1 / sqrt(inputs)), or normalize what"
        " it takes",
    )


RULES = (
    Rule("GW106", "vanishing-depth", _explain_faint),
    Rule("GW209", "exploding", _explain_worse),
)
