"""`gradwatch demo` in a real process: the sick network alerts in the right place and in time, its twin does not."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

import gradwatch
from gradwatch.demo import demo


def run(folder, *arguments, **environment):
    command = [sys.executable, "-m", "gradwatch", "demo", "--logdir", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", **environment}, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["sp500", "synthetic"])
@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_sigmoid_network_alerts_within_100_steps_and_its_twin_never(tmp_path, data, seed):
    done = run(tmp_path, "--seed", seed, "--data", data)
    sick, well = gradwatch.read_run(tmp_path / "sigmoid"), gradwatch.read_run(tmp_path / "relu")

    assert done.returncode == 0, done.stderr
    assert [(a.finding.code, a.finding.place) for a in sick.alerts] == [("GW101", "hidden1")]
    assert sick.alerts[0].began < 100
    assert well.alerts == ()
    assert "hidden1" in done.stdout
    assert "tensorboard --logdir" in done.stdout


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        demo(tmp_path / name, seed=seed, steps=12, data="synthetic", out=Console(file=io.StringIO()))
        runs.append([s.norm for s in gradwatch.read_run(tmp_path / name / "relu").snapshots])

    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_the_fallback_is_said(tmp_path):
    code = (
        "import sys; from gradwatch import market; market.sp500 = lambda: None; from gradwatch.cli import main;"
        f"sys.exit(main(['demo', '--steps', '3', '--logdir', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "The S&P 500 is not installed" in done.stdout
    assert "synthetic" in done.stdout


def test_the_sp500_that_is_wanted_and_not_there_is_an_error(tmp_path):
    code = (
        "import sys; from gradwatch import market; market.sp500 = lambda: None; from gradwatch.cli import main;"
        f"sys.exit(main(['demo', '--data', 'sp500', '--logdir', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "pip install" in done.stderr


def test_it_prints_no_escape_codes_into_a_pipe_and_fits_a_narrow_terminal(tmp_path):
    done = run(tmp_path, "--steps", "3", "--data", "synthetic", NO_COLOR="1", COLUMNS="50")

    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    commands = [line for line in done.stdout.splitlines() if line.startswith(("See it", "Read it", "Judge it"))]
    assert len(commands) == 3  # whole, to be copied
    assert all(len(line) <= 50 for line in done.stdout.splitlines() if line not in commands)
