"""The fixture `gradwatch` in real pytest runs of their own, and that loading its plugin imports no torch."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree as ET

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


SETTINGS = (
    MODELS
    + """
def test_sick(gradwatch):
    gradwatch.assert_healthy(deep(nn.Sigmoid), batch)
"""
)


@pytest.mark.parametrize(
    ("pyproject", "ini", "passes"),
    [
        ("", "", 0),
        ('[tool.gradwatch]\nignore = ["GW101"]\n', "", 1),
        ("", "gradwatch_ignore =\n    GW101:0", 1),
        ("", "gradwatch_ignore =\n    GW101:2", 0),
        ("", "gradwatch_thresholds = set.toml", 1),
    ],
)
def test_the_project_mutes_and_sets_thresholds(pytester, pyproject, ini, passes):
    (pytester.path / "pyproject.toml").write_text(pyproject)
    (pytester.path / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    (pytester.path / "set.toml").write_text('ignore = ["GW101"]\n')
    result, _ = run(pytester, SETTINGS)
    result.assert_outcomes(passed=passes, failed=1 - passes)


def test_a_marker_mutes_and_sets_thresholds_and_the_nearest_wins(pytester):
    result, _ = run(
        pytester,
        MODELS
        + """
pytestmark = pytest.mark.gradwatch(thresholds={"dead_units": 0.9, "window": 3})

@pytest.mark.gradwatch(ignore=["GW101"])
def test_muted(gradwatch):
    gradwatch.assert_healthy(deep(nn.Sigmoid), batch)

@pytest.mark.gradwatch(ignore=["GW101:2"])
def test_elsewhere(gradwatch):
    gradwatch.assert_healthy(deep(nn.Sigmoid), batch, ignore=["GW3*"])

@pytest.mark.gradwatch(thresholds={"dead_units": 0.01})
def test_strict(gradwatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        net[0].bias[:8] = -100
    report = gradwatch.check(net, torch.randn(200, 16), thresholds=gradwatch.Thresholds(dead_units=0.9, dead_probes=1))
    assert not report.open
""",
        "--strict-markers",
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["FAILED *::test_elsewhere*"])


MEASURED = (
    MODELS
    + """
def test_far(gradwatch):
    torch.manual_seed(0)
    gradwatch.horizon(nn.RNN(3, 8, batch_first=True), torch.randn(8, 60, 3), output=lambda given: given[0])

@pytest.mark.parametrize("name", ["a/b", "c"])
def test_ahead(gradwatch, name):
    gradwatch.assert_causal(nn.GRU(3, 8, batch_first=True, bidirectional=True), torch.randn(8, 60, 3))

def test_sound(gradwatch):
    gradwatch.assert_healthy(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), batch)

def test_other():
    pass
"""
)


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_what_was_measured_is_in_the_summary_in_junit_and_in_files(pytester, workers):
    if workers:
        pytest.importorskip("xdist")
    result, _ = run(pytester, MEASURED, "--junitxml=out.xml", "--gradwatch-report=kept-reports", *workers)
    result.assert_outcomes(passed=3, failed=2)
    lines = result.stdout.str().partition("= gradwatch =")[2].splitlines()
    said = sorted(line for line in lines if "::test_" in line and "FAILED" not in line and "seconds" not in line)
    assert len([line for line in said if ": horizon: the model learns from the last" in line]) == 1
    assert len([line for line in said if ": assert_causal: the model looks ahead: the output at" in line]) == 2
    assert len([line for line in said if ": assert_healthy: no finding" in line]) == 1
    cases = {case.get("name"): case for case in ET.parse(pytester.path / "out.xml").iter("testcase")}
    properties = {name: [p.attrib for p in case.iter("property")] for name, case in cases.items()}
    assert properties["test_sound"] == [{"name": "gradwatch.assert_healthy", "value": "no finding"}]
    assert properties["test_other"] == []
    files = sorted(path.name for path in (pytester.path / "kept-reports").iterdir())
    assert len(files) == 4
    (first,) = [name for name in files if "a_b" in name]
    assert "try: bidirectional=False" in (pytester.path / "kept-reports" / first).read_text(encoding="utf-8")


def test_without_the_fixture_there_is_no_section(pytester):
    result, _ = run(pytester, "def test_nothing():\n    pass\n")
    result.stdout.no_fnmatch_line("*= gradwatch =*")


def test_a_file_of_settings_that_is_wrong_is_an_error_that_says_so(pytester):
    (pytester.path / "pyproject.toml").write_text("[tool.gradwatch]\nignored = 1\n")
    result, _ = run(pytester, SETTINGS)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E  *pyproject.toml: must have thresholds, ignore, fail-on, *got 'ignored'"])


PROFILED = (
    MODELS
    + """
def net(spread):
    torch.manual_seed(0)
    made = deep(nn.Tanh)
    with torch.no_grad():
        made[4].weight *= spread
    return made

@pytest.mark.parametrize("name", ["a/b", "c"])
def test_golden(gradwatch, name):
    gradwatch.assert_profile(net(1.0), batch)

def test_two(gradwatch):
    gradwatch.assert_profile(net(1.0), batch)
    gradwatch.assert_profile(net(0.5), batch, tolerance=1.0)
"""
)


def test_golden_profiles_lie_beside_the_test(pytester):
    first, _ = run(pytester, PROFILED)
    first.assert_outcomes(failed=3)
    first.stdout.fnmatch_lines(["E  *there was no profile *test_golden_a_b-*.toml: it was written now*"])
    (folder,) = [path.with_suffix("") for path in pytester.path.glob("test_*.py")]
    written = sorted(re.sub("-[0-9a-f]{8}", "", path.name) for path in folder.iterdir())
    assert written == ["test_golden_a_b.toml", "test_golden_c.toml", "test_two.toml"]
    run(pytester, PROFILED)
    third, _ = run(pytester, PROFILED)
    third.assert_outcomes(passed=3)
    assert (folder / "test_two-2.toml").exists()
    changed = PROFILED.replace("net(1.0)", "net(0.01)")
    broken, _ = run(pytester, changed)
    broken.assert_outcomes(failed=3)
    broken.stdout.fnmatch_lines(["E *gradient x0.0* beside the last layers"])
    run(pytester, changed, "--gradwatch-update")[0].assert_outcomes(passed=3)
    run(pytester, changed)[0].assert_outcomes(passed=3)


def test_a_profile_of_a_test_that_is_gone_is_told(pytester):
    run(pytester, PROFILED, "--gradwatch-update")
    (folder,) = [path.with_suffix("") for path in pytester.path.glob("test_*.py")]
    (folder / "other.toml").write_text("x = 1\n")
    result, _ = run(pytester, PROFILED.replace("test_two", "test_deux"), "-k", "golden")
    result.stdout.fnmatch_lines(["*test_two.toml: no test of this name is there any more"])
    result.stdout.fnmatch_lines(["*test_two-2.toml: no test of this name is there any more"])
    result.stdout.no_fnmatch_line("*test_golden*.toml: no test*")
    result.stdout.no_fnmatch_line("*other.toml*")


def test_tests_of_one_name_have_profiles_of_their_own(pytester):
    tests = (
        MODELS
        + """
class TestOne:
    def test_same(self, gradwatch):
        gradwatch.assert_profile(deep(nn.Tanh), batch)

class TestTwo:
    def test_same(self, gradwatch):
        gradwatch.assert_profile(deep(nn.ReLU), batch)

@pytest.mark.parametrize(("name", "kind"), [("x/y", nn.Tanh), ("x y", nn.ReLU), ("x_y", nn.ELU)])
def test_drawn(gradwatch, name, kind):
    gradwatch.assert_profile(deep(kind), batch)
"""
    )
    run(pytester, tests, "--gradwatch-update")
    run(pytester, tests)[0].assert_outcomes(passed=5)
    (folder,) = [path.with_suffix("") for path in pytester.path.glob("test_*.py")]
    assert len(list(folder.iterdir())) == 5
    assert (folder / "TestOne.test_same.toml").exists()


@pytest.mark.parametrize(
    "marker",
    ["ignore='GW101'", "ignor=['GW101']", "['GW101']", "thresholds={'nonsense': 1}", "thresholds={'window': 0}"],
)
def test_a_marker_that_says_what_is_not_known_is_an_error(pytester, marker):
    result, _ = run(pytester, SETTINGS.replace("def test_sick", f"@pytest.mark.gradwatch({marker})\ndef test_sick"))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E  *Error: *"])
    result.stdout.no_fnmatch_line("*GradientHealthError*")
