"""The fixture `gradwatch` in real pytest runs of their own, and that loading its plugin imports no torch."""

from __future__ import annotations

import json

import pytest
from interpreters import warm

pytest_plugins = "pytester"

SESSION = """
import json, pathlib, sys

def pytest_sessionfinish(session):
    names = ("torch", "numpy", "rich", "tensorboard", "gradwatch.pytest_plugin", "gradwatch.watcher.watcher")
    found = {name: name in sys.modules for name in names}
    found["plugin"] = session.config.pluginmanager.has_plugin("gradwatch")
    pathlib.Path("found.json").write_text(json.dumps(found))
"""

MODELS = """
import pytest, torch
from torch import nn

torch.set_num_threads(1)

def deep(activation):
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(24) for m in (nn.Linear(16, 16), activation())), nn.Linear(16, 2))

batch = torch.ones(4, 16)
"""


def run(pytester, test, *options):
    """Run pytest on `test` in a process of its own; give the result, and what was imported at its end."""
    pytester.makeconftest(SESSION)
    pytester.makepyfile(test)
    others = "no:hypothesispytest"  # the plugin of somebody else, which takes half a second
    result = pytester.run(*warm(), "-m", "pytest", "--basetemp=kept", "-p", others, *options)
    return result, json.loads((pytester.path / "found.json").read_text())


def test_the_fixture_offers_both_calls_and_a_failure_shows_the_report_and_not_the_library(pytester):
    result, found = run(
        pytester,
        MODELS
        + """
def test_sound(gradwatch):
    torch.manual_seed(0)
    report = gradwatch.assert_healthy(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), batch)
    assert not report.open

def test_sick(gradwatch):
    gradwatch.assert_healthy(deep(nn.Sigmoid), batch)

def test_looked_at(gradwatch):
    report = gradwatch.check(deep(nn.Sigmoid), batch)
    assert [alert.finding.code for alert in report.open] == ["GW101"]
""",
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       gradwatch.assert_healthy(deep(nn.Sigmoid), batch)",
            "E       gradwatch.GradientHealthError: the gradients of this model are not healthy: vanishing-depth",
            "E       GW101 vanishing-depth (warning) 0",
            "E         why: *",
            "E         try: *",
            "E       The 10 layers of 25 with the smallest gradients, in the order of the forward pass:",
            "E       0 *Linear *e-* GW101",
            "*test_the_fixture_offers*.py:*: GradientHealthError",
            "FAILED *::test_sick*",
        ]
    )
    result.stdout.no_fnmatch_line("*checks.py*")
    result.stdout.no_fnmatch_line("*report = check(*")
    assert found["torch"]


def test_the_fixture_offers_the_horizon_and_a_failure_shows_it_and_not_the_library(pytester):
    result, _ = run(
        pytester,
        MODELS
        + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.memory = nn.LSTM(3, 8, batch_first=True)

    def forward(self, x):
        return self.memory(x)[0][:, -1]

batch = torch.randn(8, 60, 3)

def test_near(gradwatch):
    assert gradwatch.assert_horizon(Net(), batch, at_least=5).horizon == gradwatch.horizon(Net(), batch).horizon

def test_far(gradwatch):
    gradwatch.assert_horizon(Net(), batch, at_least=50)
""",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       gradwatch.assert_horizon(Net(), batch, at_least=50)",
            "E       gradwatch.GradientHealthError: the model learns from the last * of 60 timesteps *",
            "E       horizon: the smallest n such that *",
            "E       why: its forget gates keep *",
            "E       try: set the forget-gate bias of memory to 3.9 (the log of 50) and the input-gate bias to -3.9; *",
            "*test_the_fixture_offers*.py:*: GradientHealthError",
        ]
    )
    result.stdout.no_fnmatch_line("*checks.py*")


def test_the_plugin_is_found_through_its_entry_point_and_can_be_left_out(pytester):
    test = "def test_it(gradwatch):\n    assert gradwatch.__name__ == 'gradwatch'\n"
    result, found = run(pytester, test)
    result.assert_outcomes(passed=1)
    assert found["plugin"]
    result, found = run(pytester, test, "-p", "no:gradwatch")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'gradwatch' not found*"])
    assert not found["plugin"]


def test_a_run_that_does_not_use_it_imports_nothing_heavy(pytester):
    result, found = run(pytester, "def test_nothing():\n    pass\n")
    result.assert_outcomes(passed=1)
    loaded = [name for name, there in found.items() if there]
    assert loaded == ["gradwatch.pytest_plugin", "plugin"]


def test_asking_for_the_fixture_alone_imports_no_torch(pytester):
    result, found = run(pytester, "def test_it(gradwatch):\n    assert gradwatch.__version__\n")
    result.assert_outcomes(passed=1)
    assert not found["torch"]


@pytest.mark.parametrize("heavy", ["import torch", "import gradwatch.watcher.watcher"])
def test_the_tests_above_would_see_an_import(pytester, heavy):
    result, found = run(pytester, f"{heavy}\n\ndef test_nothing():\n    pass\n")
    result.assert_outcomes(passed=1)
    assert found["torch"]
