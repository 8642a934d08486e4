"""How alerts begin, last and clear, and how severities compare."""

from __future__ import annotations

import pytest

from gradwatch import Finding, History, LayerInfo, ModelInfo, ParameterInfo, Severity, Snapshot
from gradwatch.detectors.alerts import advance, judge, muted
from gradwatch.detectors.rule import Rule
from gradwatch.values.report import Alert, Explanation

ONE = ModelInfo((LayerInfo("a", "Linear"),), (ParameterInfo("a.weight", "a", (1, 1), "float32", 0, "weight"),), ())


def find(place="a", severity=Severity.WARNING, onset=3, optimizer=0):
    return Finding("GW101", "vanishing-depth", severity, place, onset=onset, optimizer=optimizer)


def explain(finding):
    return Explanation(f"{finding.place} is {finding.severity.value}", "because", "do")


RULES = {"GW101": Rule("GW101", "vanishing-depth", explain)}


def go(open_alerts, findings, recent, optimizer=0, patience=3):
    return advance(open_alerts, findings, recent, optimizer=optimizer, patience=patience, rules=RULES)


def test_a_finding_begins_an_alert_which_lasts_while_it_is_found():
    began, still, cleared = go((), [find()], [5])
    assert (began, cleared) == (still, ())
    assert (still[0].began, still[0].last, still[0].cleared) == (5, 5, None)
    assert (still[0].message, still[0].cause, still[0].remedy) == ("a is warning", "because", "do")

    began, still, cleared = go(still, [find(onset=9)], [5, 6])
    assert (began, cleared) == ((), ())
    assert (still[0].began, still[0].last, still[0].finding.onset) == (5, 6, 3)


def test_one_that_becomes_graver_than_it_ever_was_is_told_once_more():
    info, warning, error = Severity
    severities = [info, warning, info, warning, error, error]

    def detector(history):
        yield Finding("MY001", "mine", severities[history.snapshot.step], "a")

    history, told, alerts = History(), [], ()
    for step in range(len(severities)):
        report = judge(history, Snapshot(step, 0.0, ONE, 0, norm=(1.0,)), alerts, detectors=[detector])
        alerts = report.open
        told.append([a.severity for a in (*report.began, *report.worsened)])
        assert not (report.began and report.worsened)

    assert told == [[info], [warning], [], [], [error], []]


def test_it_clears_after_so_many_snapshots_without_it_and_not_before():
    _, still, _ = go((), [find()], [5])
    for recent in ([5, 10], [5, 10, 15]):
        _, still, cleared = go(still, [], recent)
        assert (len(still), cleared) == (1, ())
    _, still, cleared = go(still, [], [5, 10, 15, 20])

    assert still == ()
    assert (cleared[0].began, cleared[0].last, cleared[0].cleared) == (5, 5, 20)


def test_windows_count_snapshots_not_steps():
    _, still, _ = go((), [find()], [0])
    _, still, cleared = go(still, [], [0, 1000])

    assert len(still) == 1
    assert cleared == ()


def test_only_snapshots_of_its_own_optimizer_clear_it():
    _, still, _ = go((), [find(optimizer=0)], [0])
    _, still, cleared = go(still, [], [1, 2, 3, 4], optimizer=1)

    assert len(still) == 1
    assert cleared == ()


def test_a_gravity_that_changes_changes_the_words_but_begins_nothing():
    _, still, _ = go((), [find(severity=Severity.INFO)], [0])
    began, still, _ = go(still, [find(severity=Severity.WARNING)], [0, 1])

    assert began == ()
    assert still[0].severity is Severity.WARNING
    assert still[0].message == "a is warning"


def test_two_places_are_two_alerts():
    began, _, _ = go((), [find("a"), find("b")], [0])

    assert [a.finding.place for a in began] == ["a", "b"]


def test_severities_are_ordered():
    assert Severity.INFO < Severity.WARNING < Severity.ERROR
    assert max(Severity) is Severity.ERROR
    assert Severity("error") is Severity.ERROR


@pytest.mark.parametrize(
    ("rules", "is_muted"),
    [
        ([], False),
        (["GW101"], True),
        (["GW1*"], True),
        (["GW102"], False),
        (["GW101:enc*"], True),
        (["GW101:head"], False),
        (["*:encoder.0"], True),
    ],
)
def test_muting(rules, is_muted):
    assert muted(find("encoder.0"), rules) is is_muted


def test_an_alert_reads_like_a_sentence():
    alert = Alert(find(), 0, 0, message="a gets nothing", cause="it is cut off", remedy="look")

    assert str(alert) == "GW101 vanishing-depth: a gets nothing. Likely cause: it is cut off. Try: look."


@pytest.mark.parametrize("cause", ["cause not found", "cause not measured", "cause not found: the gradients show none"])
def test_a_cause_that_is_not_known_is_no_likely_cause(cause):
    alert = Alert(find(), 0, 0, message="a gets nothing", cause=cause, remedy="look")

    assert str(alert) == f"GW101 vanishing-depth: a gets nothing. C{cause[1:]}. Try: look."
