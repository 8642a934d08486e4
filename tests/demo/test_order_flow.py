"""The order-flow example: its report names the short horizon, and with the remedy it names the loss follows."""

from __future__ import annotations

import re
import runpy
import sys
import time
from pathlib import Path

import pytest

import gradwatch

EXAMPLE = Path(__file__).parents[2] / "examples" / "order_flow.py"


@pytest.mark.slow
def test_the_report_shows_the_horizon_before_and_after_the_remedy_and_the_loss_that_follows(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["order_flow.py", "--logdir", str(tmp_path)])
    begun = time.process_time()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    seconds = time.process_time() - begun
    before, after = (gradwatch.read_run(tmp_path / name) for name in ("before", "after"))
    out = capsys.readouterr().out
    ending = re.findall(r"^(before|after): +learns from (.+); loss ([\d.]+) and (\d+)% right", out, re.MULTILINE)

    assert [(a.finding.code, a.finding.place, a.cleared) for a in before.alerts] == [("GW301", "lstm", None)]
    assert "set the forget-gate bias of lstm to 5.3 (the log of 200)" in before.alerts[0].remedy
    assert after.alerts == ()
    assert "GW301 vanishing-time (warning) lstm" in out
    assert re.findall(r"^the model learns from (at least|the last)", out, re.MULTILINE) == ["the last", "at least"]
    assert [row[0] for row in ending] == ["before", "after"]
    assert re.fullmatch(r"the last \d\d of 250 bars", ending[0][1])
    assert ending[1][1] == "at least 250 of 250 bars"
    assert float(ending[0][2]) > 0.65
    assert float(ending[1][2]) < 0.2
    assert int(ending[0][3]) < 60
    assert int(ending[1][3]) > 90
    assert seconds < 60
