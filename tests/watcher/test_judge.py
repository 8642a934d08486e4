"""What becomes of an alert: who is told, what is raised, and what happens when a sink or a detector fails."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from loops import Watched, train
from torch import nn

import gradwatch


@pytest.mark.parametrize("what", ["sinks", "detectors"])
def test_a_sink_or_detector_that_fails_is_switched_off_and_takes_nothing_from_the_others(what):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls, reports = [], []

    def broken(given):
        calls.append(given)
        raise OSError("disk full")

    others = (
        {"sinks": [broken, reports.append]} if what == "sinks" else {"sinks": [reports.append], "detectors": [broken]}
    )
    gradwatch.watch(model, optimizer, **others)
    with pytest.warns(
        gradwatch.GradwatchWarning, match="broken failed and is switched off: OSError: disk full"
    ) as caught:
        train(model, optimizer, 3)
    assert (len(caught), len(calls), len(reports)) == (1, 1, 3)


def test_an_alert_of_severity_error_is_raised_out_of_the_step_when_asked_for():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, on_alert="raise")
    train(model, optimizer, 2)
    optimizer.zero_grad()
    (model(torch.ones(1, 1)).sum() * math.inf).backward()
    with pytest.raises(gradwatch.GradientHealthError, match="GW501") as raised:
        optimizer.step()
    assert [a.finding.code for a in raised.value.alerts] == ["GW501"]
    train(model, optimizer, 1)  # it has begun, and is told once
    assert [s.step for s in watched.snapshots] == [0, 1, 2, 3]


def test_an_alert_is_handed_to_the_function_that_wants_it_and_by_default_to_the_logger(caplog):
    for on_alert in ("function", "warn"):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        told = []
        gradwatch.watch(model, optimizer, on_alert=told.append if on_alert == "function" else "warn")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gradwatch"):
            (model(torch.ones(1, 1)).sum() * math.inf).backward()
            optimizer.step()
        assert [a.finding.code for a in told] == (["GW501"] if on_alert == "function" else [])
        assert ("GW501" in caplog.text) is (on_alert == "warn")


def worsening(history):
    """Find the same at every step, and more gravely each time."""
    yield gradwatch.Finding("MY001", "mine", list(gradwatch.Severity)[history.snapshot.step // 2], "")


def test_an_alert_that_becomes_graver_is_told_once_more_and_raised_as_an_error(caplog, tmp_path):
    def watched(**options):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradwatch.watch(model, optimizer, detectors=[worsening], **options)
        return model, optimizer

    told = []
    train(*watched(on_alert=told.append), 6)
    assert [(a.severity.value, a.began, a.last) for a in told] == [("info", 0, 0), ("warning", 0, 2), ("error", 0, 4)]

    with caplog.at_level(logging.INFO, "gradwatch"):
        train(*watched(logdir=tmp_path), 6)
    levels = [r.levelno for r in caplog.records if "MY001" in r.message and "at the end" not in r.message]
    assert levels == [logging.INFO, logging.WARNING, logging.ERROR]

    model, optimizer = watched(on_alert="raise")
    train(model, optimizer, 4)
    with pytest.raises(gradwatch.GradientHealthError, match="MY001"):
        train(model, optimizer, 1)
    train(model, optimizer, 1)


def test_a_function_for_alerts_that_fails_is_replaced_by_the_logger(caplog):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradwatch.watch(model, optimizer, on_alert=lambda _: 1 / 0)
    (model(torch.ones(1, 1)).sum() * math.inf).backward()
    with (
        pytest.warns(gradwatch.GradwatchWarning, match="on_alert failed"),
        caplog.at_level(logging.WARNING, "gradwatch"),
    ):
        optimizer.step()
    assert "GW501" in caplog.text
