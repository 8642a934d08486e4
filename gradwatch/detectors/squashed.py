"""Scores that are squashed once more by the loss function."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.thresholds import LOOKS_AT_LOSS


def squashed(history: History) -> Iterator[Finding]:
    """GW104: the loss function takes for scores what a softmax or a sigmoid has made, and squashes it once more."""
    yield from history.lasting(_squashed)


def _squashed(history: History) -> tuple[Finding, ...]:
    found = [(s.step, s.squashed) for s in history.looks(LOOKS_AT_LOSS) if s.squashed is not None]
    if not found:
        return ()
    step, twice = found[0]
    return (
        Finding(
            "GW104",
            "vanishing-depth",
            Severity.WARNING,
            twice.module,
            onset=step,
            evidence={"classes": float(twice.classes)},
            names={"by": twice.by, "into": twice.into},
        ),
    )


def _explain(finding: Finding) -> Explanation:
    by, into, classes = finding.names["by"], finding.names["into"], finding.evidence["classes"]
    where = f", after {finding.place}," if finding.place else ""
    if into == "nll":
        return Explanation(
            f"the loss takes log-probabilities, and gets the probabilities that a {by}{where} has made",
            "without the logarithm, the gradient of a sample is its probability times what is missing to 1: next to"
            " nothing where the model is wrong and sure",
            "log_softmax in place of the softmax, or cross_entropy of the scores themselves",
        )
    floor = math.log1p(math.exp(-1)) if into == "sigmoid" else math.log(math.e + classes - 1) - 1
    return Explanation(
        f"the loss takes a {into} of what a {by}{where} has made already, numbers between 0 and 1: of a sample it"
        f" cannot fall below {floor:.2g}",
        f"the gradient goes through the {by} too, which lets next to nothing through where the model is sure, right or"
        " wrong",
        f"give the loss the scores themselves, without the {by}, and take it where the model is used",
    )


RULES = (Rule("GW104", "vanishing-depth", _explain),)
