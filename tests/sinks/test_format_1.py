"""A record that was written before facts had types is read, judged and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradwatch import History, Record, Report, Severity, Thresholds, read_run
from gradwatch.detectors.alerts import judge
from gradwatch.values.autograd import Cut
from gradwatch.values.format_1 import alert_from_1, snapshot_from_1
from gradwatch.values.snapshot import Fact

RECORD = Path(__file__).parent / "data" / "format_1.jsonl"
"""Five steps of an LSTM with closed forget gates and of layers under autocast to float16, one of them detached."""
JUDGED = Thresholds(window=4, disconnected_steps=4, horizon_probes=2)


@pytest.fixture
def lines():
    return [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run():
    return read_run(RECORD)


def test_the_stored_record_is_one_of_format_1(lines):
    assert lines[0] == {"format": 1}
    assert {"scale"} < {p["role"] for line in lines if "model" in line for p in line["model"]["parameters"]}


def test_names_that_are_types_now_are_read_as_such(run):
    probe = run.snapshots[2]

    assert (run.broken, len(run.snapshots), len(run.models)) == (0, 5, 2)
    assert [p.role for p in probe.model.parameters if p.name == "body.gain"] == ["gain"]
    assert probe.computed_in == "float16"
    assert run.snapshots[1].computed_in is None
    assert probe.cuts == (Cut("cut", "cut", "body", graph=True),)
    assert Fact("rnn", "forget_gate", 0.00272, "l0") in probe.facts
    assert Fact("rnn", "forget_bias", -6.0, "l0_reverse") in probe.facts
    assert Fact("cut", "silent_by_bias", 0.333) in probe.facts
    assert len(probe.facts) == 9
    assert [(s.part, s.kind, s.reverse) for s in probe.sequences] == [
        ("", "LSTM", False),
        ("l0", None, False),
        ("l0_reverse", None, True),
    ]


def test_its_alerts_keep_their_words_and_their_numbers_are_numbers(run, lines):
    told = [line["alert"] for line in lines if "alert" in line]
    assert {(a.message, a.cause, a.remedy) for a in run.alerts} == {
        (a["message"], a["cause"], a["remedy"]) for a in told
    }
    cut, short = run.alerts

    assert (cut.finding.code, cut.finding.cause, cut.finding.names["reached"]) == ("GW401", "cut", "body")
    assert cut.finding.evidence == {"layers": 1.0, "graph": 1.0}
    assert (short.finding.code, short.finding.names["who"], short.finding.evidence["need"]) == ("GW301", "rnn", 9.0)
    assert all(isinstance(n, float) for a in run.alerts for n in a.finding.evidence.values())


def test_it_is_judged_as_it_was(run):
    history, still = History(JUDGED), ()
    for snapshot in run.snapshots:
        still = judge(history, snapshot, still).open

    assert [(a.finding.code, a.finding.place, a.began, a.severity) for a in still] == [
        ("GW401", "cut", 3, Severity.ERROR),
        ("GW301", "rnn", 4, Severity.WARNING),
    ]
    assert still[0].cause.startswith("the gradient comes back to body and ends there")
    assert still[1].cause == run.alerts[1].cause
    assert still[1].remedy.startswith("set the forget-gate bias of rnn to 2.2 (the log of 9)")  # and what is new since


def test_a_history_that_was_saved_before_goes_on(run, lines):
    history = History(JUDGED)
    for snapshot in run.snapshots:
        history.add(snapshot)
    state = history.state_dict()
    plain = [line["snapshot"] for line in lines if "snapshot" in line]
    state["models"] = [line["model"] for line in lines if "model" in line]
    state["tracks"][0].update(snapshots=plain, probes=[])
    del state["format"]
    again = History(JUDGED)
    again.load_state_dict(json.loads(json.dumps(state)))

    assert again.window() == history.window()
    assert again.sequences() == history.sequences()
    assert again.improved is history.improved
    np.testing.assert_array_equal(again.sensitivities(5), history.sensitivities(5))


def test_a_record_that_goes_on_holds_lines_of_both_formats(run, tmp_path):
    shutil.copy(RECORD, tmp_path / "record.jsonl")
    record = Record(tmp_path)
    record.resume()
    for snapshot in run.snapshots:
        record(Report(snapshot))
    record.close()
    again = read_run(tmp_path)

    assert again.snapshots == (*run.snapshots, *run.snapshots)
    assert again.broken == 0


def test_a_record_that_is_thinned_on_the_way_stays_readable(run, tmp_path):
    shutil.copy(RECORD, tmp_path / "record.jsonl")
    record = Record(tmp_path, bound=20_000)
    record.resume()
    for _ in range(3):
        for snapshot in run.snapshots:
            record(Report(snapshot))
    record.close()
    again = read_run(tmp_path)

    assert again.thinned
    assert again.broken == 0
    assert {s.computed_in for s in again.snapshots if s.cuts} == {"float16"}
    assert "scale" not in {p.role for model in again.models for p in model.parameters}


def test_activations_stood_among_the_facts():
    facts = [{"place": "body", "name": "activation relu", "value": 1.0}]
    old = {"model": 0, "step": 1, "activations": [{"module": "head", "dead": 0.5}], "facts": facts}

    assert snapshot_from_1(old, ())["activations"] == [
        {"module": "head", "dead": 0.5},
        {"module": "body", "function": "relu"},
    ]


@pytest.mark.parametrize(
    ("kind", "evidence", "numbers", "names", "cause"),
    [
        ("disconnected", {"gradient": "zero", "last": "a"}, {"norm": 0.0}, {"last": "a"}, ""),
        ("disconnected", {"gradient": "none", "last": "a"}, {}, {"last": "a"}, ""),
        ("dead-units", {"because": "constant input", "dead": 1.0}, {"dead": 1.0}, {}, "constant_input"),
        ("exploding", {"because": "large", "at": "a", "layers over": 2.0}, {"over": 2.0}, {"at": "a"}, "large"),
        ("vanishing-time", {"because": "compiled", "need": 9.0}, {"need": 9.0}, {"reason": "compiled"}, ""),
    ],
)
def test_texts_stood_among_the_numbers(kind, evidence, numbers, names, cause):
    finding = alert_from_1({"finding": {"kind": kind, "evidence": evidence}})["finding"]

    assert (finding["evidence"], finding["names"], finding.get("cause", "")) == (numbers, names, cause)
