"""Inputs and scores of a size with which little can be learned: next to nothing comes in, or far too much comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradwatch.detectors.measured import facts
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.thresholds import FAINT_INPUT, WORSE_THAN_CHANCE


def sizes(history: History) -> Iterator[Finding]:
    """GW106: so little comes in that only biases speak. GW209: the model is far worse than one that guesses."""
    if history.improved is not True and history.count >= history.thresholds.window:
        yield from _faint(history)
    yield from _worse(history)


def faint_input(history: History) -> tuple[str, float] | None:
    """Return the first layer, if it takes next to nothing, and how much; None where it takes more.

    Exactly nothing is another matter, and so is a normalization, which gives the same whatever the size is.
    """
    return history.lasting(_faint_input)


def _faint_input(history: History) -> tuple[str, float] | None:
    first = history.model.layers[history.order[0]] if history.order else None
    size = facts(history).get((first.module, "input_size"), 0.0) if first is not None else 0.0
    if first is None or not 0 < size <= FAINT_INPUT:
        return None
    roles = {p.role for p in history.model.parameters if p.layer == first.name}
    return None if "normalization" in roles else (first.module, size)


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
    """Return what gives the scores, and the loss of a guess; None where the loss is no cross-entropy alone."""
    return next(((place, value) for (place, name), value in facts(history).items() if name == "chance"), None)


# --- in words ---


def _explain_faint(finding: Finding) -> Explanation:
    place = finding.place or "the model"
    return Explanation(
        f"next to nothing comes in: what {place} takes has a root mean square of {finding.evidence['size']:.1g}, and"
        " the loss does not come down",
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
        f"begin with smaller weights in {head} (a standard deviation of 0.02, or 1 / sqrt(inputs)), normalize what it"
        " takes, or lower the learning rate",
    )


RULES = (
    Rule("GW106", "vanishing-depth", _explain_faint),
    Rule("GW209", "exploding", _explain_worse),
)
