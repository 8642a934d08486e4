"""Rules give findings words and alerts their ways: those of gradwatch, and those that a user's detector carries."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import (
    DETECTORS,
    Explanation,
    Finding,
    History,
    LayerInfo,
    ModelInfo,
    OptimizerInfo,
    ParameterInfo,
    Rule,
    Severity,
    Snapshot,
)
from gradwatch.detectors import RULES, explain, rules_of
from gradwatch.detectors.alerts import judge
from gradwatch.detectors.cause_words import CAUSES

MODEL = ModelInfo(
    (LayerInfo("head", "Linear", 0),),
    (ParameterInfo("head.weight", "head", (4, 4), "float32", 0, "weight"),),
    (OptimizerInfo("SGD", adaptive=False),),
)


def snapshot(step, norm=1.0, loss=None):
    return Snapshot(step, 0.0, MODEL, 0, norm=(norm,), loss=loss)


def quiet(history):
    if history.snapshot.norm[0] < 1:
        yield Finding("MY1", "quiet", Severity.WARNING, "head", evidence={"norm": history.snapshot.norm[0]})


class Quiet:
    """A detector with words, and with a cause that it measures."""

    def __init__(self, **ways):
        self.rules = [Rule("MY1", "quiet", self.explain, self.cause, **ways)]

    def __call__(self, history):
        return quiet(history)

    @staticmethod
    def cause(history, finding):
        return dataclasses.replace(
            finding, cause="whispers", evidence={**finding.evidence, "step": history.snapshot.step}
        )

    @staticmethod
    def explain(finding):
        numbers = finding.evidence
        return Explanation(f"head is at {numbers['norm']}", f"{finding.cause} at {numbers['step']}", "speak up")


def alerts(detector, norms, losses=None):
    history, still = History(), ()
    for step, norm in enumerate(norms):
        one = snapshot(step, norm, None if losses is None else losses[step])
        still = judge(history, one, still, detectors=[*DETECTORS, detector]).open
    return {a.finding.code: a for a in still}


def test_every_default_rule_is_named_by_its_code_and_no_two_have_the_same():
    families = [rule for d in DETECTORS for rule in __import__(d.__module__, fromlist=["RULES"]).RULES]

    assert sorted(RULES) == sorted(rule.code for rule in families)
    assert all(RULES[rule.code] is rule for rule in families)


def test_a_detector_without_rules_is_told_by_its_numbers():
    assert alerts(quiet, [0.5])["MY1"].message == "head: norm 0.5"


def test_a_detector_that_carries_rules_has_words_and_a_cause():
    alert = alerts(Quiet(), [0.5, 0.25])["MY1"]

    assert (alert.message, alert.cause, alert.remedy) == ("head is at 0.25", "whispers at 1", "speak up")


def test_of_an_event_the_first_cause_stays():
    assert alerts(Quiet(event=True), [0.5, 0.25])["MY1"].cause == "whispers at 0"


@pytest.mark.parametrize(("explains", "stalls"), [(True, False), (False, True)])
def test_a_loss_that_stands_still_is_told_of_unless_an_open_alert_explains_it(explains, stalls):
    found = alerts(Quiet(explains_a_stall=explains), [0.5] * 210, losses=[1.0] * 210)

    assert "MY1" in found
    assert ("GW801" in found) is stalls


def test_a_detector_without_rules_explains_a_stall():
    assert "GW801" not in alerts(quiet, [0.5] * 210, losses=[1.0] * 210)
    assert "GW801" in alerts(quiet, [1.0] * 210, losses=[1.0] * 210)


def test_rules_that_a_detector_carries_do_not_reach_another_run():
    assert "MY1" in rules_of([Quiet()])
    assert "MY1" not in rules_of(DETECTORS)
    assert explain(next(iter(quiet(_with(0.5))))).message == "head: norm 0.5"


def _with(norm):
    history = History()
    history.add(snapshot(0, norm))
    return history


def test_what_is_no_rule_is_refused_before_the_training():
    def detector(_history):
        return ()

    detector.rules = ["MY1"]
    model = nn.Linear(2, 1)

    with pytest.raises(TypeError, match=r"the rules of a detector must be gradwatch.Rule, got 'MY1' from <function"):
        gradwatch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), detectors=[detector])


@pytest.mark.parametrize("fails", ["__call__", "explain", "cause"])
def test_a_detector_whose_words_or_cause_fail_is_switched_off_and_the_others_go_on(fails):
    def broken(*_):
        raise ZeroDivisionError("a mistake")

    detector = type("Broken", (Quiet,), {fails: staticmethod(broken)})()
    failed, history = [], _with(1.0)
    report = judge(
        history,
        snapshot(1, float("nan")),
        detectors=[detector, *DETECTORS],
        failed=lambda *what: failed.append(what),
    )
    quiet_report = judge(
        history, snapshot(2, 0.5), report.open, detectors=[detector], failed=lambda *w: failed.append(w)
    )

    assert [a.finding.code for a in report.open] == ["GW501"]
    assert [a.finding.code for a in quiet_report.open] == ["GW501"]
    assert failed[-1][0] is detector
    assert str(failed[-1][1]) == "a mistake"
    with pytest.raises(ZeroDivisionError):
        judge(history, snapshot(3, 0.5), detectors=[detector])


def test_every_cause_that_is_measured_has_its_words():
    from typing import get_args

    from gradwatch.detectors.causes import Cause

    assert set(CAUSES) == set(get_args(Cause))


def test_a_training_tells_its_alert_in_the_words_of_the_users_rule():
    model, told = nn.Sequential(nn.Linear(2, 1)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    detector = Quiet()
    with gradwatch.watch(model, optimizer, detectors=[detector], on_alert=told.append):
        (0.01 * model(torch.ones(1, 2))).sum().backward()
        optimizer.step()

    assert [a.remedy for a in told] == ["speak up"]
