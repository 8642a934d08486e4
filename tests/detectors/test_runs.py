"""The labelled runs of `benchmarks.runs`: every fault is found at its place, and nothing else is accused."""

from __future__ import annotations

import pytest

pytest.importorskip("benchmarks", reason="the tests run from a checkout")

from benchmarks.runs import RUNS
from benchmarks.verdicts import judged

pytestmark = pytest.mark.slow


def test_there_are_enough_of_each():
    assert len([run for run in RUNS if run.faults]) >= 20
    assert len([run for run in RUNS if not run.faults]) >= 20
    assert {label.kind for run in RUNS for label in run.faults} == {
        "vanishing-depth",
        "vanishing-time",
        "exploding",
        "dead-units",
        "disconnected",
        "non-finite",
        "underflow",
    }


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_gets_the_verdict_that_it_is_labelled_with(run):
    outcome = judged(run, loss=True)

    assert outcome.wrong == []
    for kind, delay, at_its_place in outcome.found():
        assert delay is not None, kind
        assert at_its_place is not False, kind
