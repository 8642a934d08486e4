"""The judge of `benchmarks.situations`: it is no kinder than the labels, and its labels come from plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("benchmarks", reason="the tests run from a checkout")

from benchmarks.situations import SITUATIONS, Right, Situation
from benchmarks.situations.__main__ import QUICK, Said, Verdict
from gradwatch import Severity

BY_NAME = {situation.name: situation for situation in SITUATIONS}


def test_there_are_enough_of_each_and_all_have_a_source():
    assert len(BY_NAME) == len(SITUATIONS)
    assert len([s for s in SITUATIONS if s.right.kinds]) >= 26
    assert len([s for s in SITUATIONS if not s.right.kinds]) >= 14
    assert all(s.source and s.make.__doc__ for s in SITUATIONS)
    assert set(QUICK) <= set(BY_NAME)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_label_holds_without_gradwatch(fixed):
    training = BY_NAME["zeroed_before_the_step"].build(fixed=fixed)
    before = [p.clone() for p in training.model.parameters()]

    training.run(lambda _: None)

    moved = [not torch.equal(old, new) for old, new in zip(before, training.model.parameters(), strict=True)]
    assert all(moved) if fixed else not any(moved)


def alert(kind="dead-units", place="body.2", severity=Severity.WARNING, began=10, cause="a ReLU is dead", remedy=""):
    finding = SimpleNamespace(code=kind, kind=kind, place=place)
    return SimpleNamespace(finding=finding, severity=severity, began=began, cause=cause, remedy=remedy)


def verdict(*said, twin=(), kinds=("dead-units", "stalled")):
    right = Right(kinds, places=("body",), since=5, words="relu", never="kaiming") if kinds else Right()
    heard = [Said(), Said()]
    for alerts, who in zip((said, twin), heard, strict=True):
        for a in alerts:
            who(a)
    situation = Situation("it", "somewhere", lambda: None, right, None, 1)
    return str(Verdict(situation, heard[0], heard[1] if kinds else None))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([alert()], "right"),
        ([alert(kind="stalled")], "right"),
        ([alert(), alert(kind="stalled", place="")], "right"),
        ([], "missed"),
        ([alert(severity=Severity.INFO)], "missed"),
        ([alert(kind="exploding")], "another kind"),
        ([alert(), alert(kind="exploding")], "another kind too"),
        ([alert(place="head")], "place"),
        ([alert(place="bodywork")], "place"),
        ([alert(place="")], "place"),
        ([alert(cause="cause not found")], "words"),
        ([alert(remedy="kaiming_normal_")], "forbidden words"),
        ([alert(began=4)], "too soon"),
    ],
)
def test_a_faulty_situation_is_judged_by_kind_place_words_and_onset(said, expected):
    assert verdict(*said) == expected


def test_an_accused_twin_spoils_the_verdict():
    assert verdict(alert(), twin=[alert()]) == "twin accused"
    assert verdict(alert(), twin=[alert(severity=Severity.INFO)]) == "right"


def test_a_healthy_situation_is_accused_by_any_warning():
    assert verdict(kinds=()) == "right"
    assert verdict(alert(severity=Severity.INFO), kinds=()) == "right"
    assert verdict(alert(), kinds=()) == "accused"
