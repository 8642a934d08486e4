"""The composite action for GitHub: its steps, by hand, as the runner does them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
import yaml
from models import deep
from torch import nn

import gradwatch
from gradwatch.values.profile import profile_of, to_toml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / ".github" / "actions" / "gradwatch" / "action.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    for name, depth, act in (("sick", 14, nn.Sigmoid), ("well", 2, nn.Tanh)):
        torch.manual_seed(0)
        model = deep(depth, 6, act)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with gradwatch.watch(model, optimizer, logdir=top / name, on_alert=lambda _: None):
            for _ in range(25):
                optimizer.zero_grad()
                model(torch.randn(16, 6)).square().mean().backward()
                optimizer.step()
    (top / "well.toml").write_text(to_toml(profile_of(gradwatch.read_run(top / "well").snapshots)), encoding="utf-8")
    return top


def act(folder, **given):
    """Run the action's steps in a shell, with its inputs in the environment; return status, output and summary."""
    inputs = {name: its.get("default", "") for name, its in ACTION["inputs"].items()} | given
    (step,) = ACTION["runs"]["steps"]
    fill = lambda text: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: inputs[m[1]], text)
    places = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    (folder / "bin").mkdir(exist_ok=True)
    link = folder / "bin" / "python"
    link.unlink(missing_ok=True)
    link.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    link.chmod(0o755)
    environment = {**os.environ, **{k: fill(v) for k, v in step["env"].items()}, "PATH": places}
    environment |= {"GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "PYTHONPATH": str(ROOT)}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, (folder / "summary.md").read_text(encoding="utf-8")


def test_it_is_a_composite_action_whose_inputs_are_said():
    assert ACTION["runs"]["using"] == "composite"
    assert all(its["description"] for its in ACTION["inputs"].values())
    assert [step["shell"] for step in ACTION["runs"]["steps"]] == ["bash"]


def test_a_sick_run_fails_with_annotations_a_summary_and_junit(runs, tmp_path):
    status, out, summary = act(tmp_path, run=str(runs / "sick"), junit="health.xml")
    assert status == 1
    assert out.startswith("::warning title=GW101 vanishing-depth")
    assert "### gradwatch: failed" in summary
    assert ET.parse(tmp_path / "health.xml").getroot().get("failures") == "1"


def test_a_sound_run_passes_and_what_fails_can_be_said(runs, tmp_path):
    assert act(tmp_path, run=str(runs / "well"))[0] == 0
    assert act(tmp_path, run=str(runs / "sick"), **{"fail-on": "error"})[0] == 0


def test_a_comparison_fails_too(runs, tmp_path):
    before = str(runs / "well.toml")
    assert act(tmp_path, run=str(runs / "well"), before=before)[0] == 0
    status, _, summary = act(tmp_path, run=str(runs / "sick"), before=before, **{"fail-on": "info"})
    assert status == 1
    assert "### gradwatch diff: changed" in summary


def test_a_path_is_no_command(runs, tmp_path):
    status, out, _ = act(tmp_path, run=f"{runs / 'well'}", before='"; touch owned; echo "')
    assert status == 2
    assert not (tmp_path / "owned").exists()
    assert "owned" not in out


def test_the_workflow_in_the_docs_is_one():
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    workflow = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert "./.github/actions/gradwatch" in uses
    given = next(step["with"] for step in job["steps"] if step.get("uses") == "./.github/actions/gradwatch")
    assert given.keys() <= ACTION["inputs"].keys()
