"""`import gradwatch`, the pytest plugin, the readers and the command line load no torch: every pytest run pays."""

from __future__ import annotations

import ast
import importlib.metadata
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from interpreters import warm

import gradwatch
from gradwatch.values.snapshot import LayerInfo, ModelInfo, ParameterInfo, Snapshot

LIGHT = [
    "gradwatch",
    "gradwatch.pytest_plugin",
    "gradwatch.cli",
    "gradwatch.tensorboard_plugin",
    *(
        f"gradwatch.values.{name}"
        for name in ("snapshot", "sequences", "plain", "layer_columns", "history", "thresholds", "report")
    ),
    "gradwatch.detectors",
    "gradwatch.detectors.alerts",
    *(
        f"gradwatch.sinks.{name}"
        for name in (
            *("log", "record", "reading", "run_directory", "tensorboard", "terminal.page", "terminal.errors"),
            *("terminal.follow", "page.data", "page.render", "page.notebook"),
        )
    ),
    *(f"gradwatch.demo.{name}" for name in ("market", "tasks", "networks", "story")),
]


JUDGE = """
import gradwatch
run, history = gradwatch.read_run(sys.argv[1]), gradwatch.History()
for snapshot in run.snapshots:
    history.add(snapshot)
print(len(run.snapshots), "snapshots")
print(*(finding.code for detector in gradwatch.DETECTORS for finding in detector(history)))
"""


TRAINING = """
import torch, gradwatch
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with gradwatch.watch(model, optimizer, logdir=sys.argv[1]) as watcher:
    for step in range(12):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        if step == 9:
            model.weight.grad.fill_(float("nan"))
        optimizer.step()
assert [alert.finding.code for alert in watcher.report.open] == ["GW501"]
"""


def loaded(code: str, *arguments: str | Path, python: Sequence[str] = (sys.executable,)) -> set[str]:
    """Run code in a process of its own, and return the words that it prints and the modules that it has imported."""
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    command = [*python, "-c", script, *arguments]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_loading_it_imports_no_torch(module):
    assert "torch" not in loaded(f"import {module}", python=warm())


def test_this_test_can_fail():
    assert "torch" in loaded("import torch", python=warm())
    assert "torch" in loaded("import gradwatch.watcher.watcher", python=warm())


def test_the_package_itself_loads_neither_numpy_nor_rich_nor_tensorboard():
    assert not loaded("import gradwatch") & {"numpy", "rich", "tensorboard", "PIL", "google_crc32c"}


def test_the_logger_and_a_whole_training_with_its_files_and_alerts_load_no_rich(tmp_path):
    assert "rich" not in loaded("import gradwatch.sinks.log")
    assert "rich" not in loaded(TRAINING, tmp_path, python=warm())
    assert (tmp_path / "gradwatch" / "record.jsonl").exists()


def test_the_table_of_a_watcher_is_what_loads_rich(tmp_path):
    assert "rich" in loaded(f"{TRAINING}\nrepr(watcher)", tmp_path, python=warm())


RANDOM = """
import random
random.seed(7)
before = random.getstate()
import {}
print("the same" if random.getstate() == before else "another", "state")
"""


def test_what_is_shown_in_the_middle_of_a_training_leaves_its_random_state():
    for module in ("page", "errors", "alert_text", "layer_table", "lag_profile"):
        assert {"the", "same", "rich"} <= loaded(RANDOM.format(f"gradwatch.sinks.terminal.{module}"))


RICH = tuple(map(int, importlib.metadata.version("rich").split(".")[:2]))


@pytest.mark.skipif(RICH < (14, 0), reason="the oldest versions of rich draw none")
def test_rich_itself_draws_a_random_number_as_it_is_imported():
    assert "another" in loaded(RANDOM.format("rich.console, rich.table"))  # else the guard has nothing to guard against


def test_reading_and_judging_a_run_imports_no_torch(tmp_path):
    model = ModelInfo(
        (LayerInfo("body", "Linear"),), (ParameterInfo("body.weight", "body", (4, 3), "float32", 0, "weight"),)
    )
    record = gradwatch.Record(tmp_path)
    for step in range(3):
        record(gradwatch.Report(Snapshot(step, time.time(), model, norm=(math.nan,), nonfinite=(1.0,))))
    record.close()

    found = loaded(JUDGE, tmp_path)

    assert found >= {"3", "snapshots", "GW501"}
    assert "torch" not in found
    for command in (
        ["check", "--rejudge"],
        ["check", "--format", "junit"],
        ["check", "--format", "json"],
        ["diff", str(tmp_path)],
    ):
        said = loaded(f"from gradwatch.cli import main\nmain({[*command, str(tmp_path)]!r})")
        assert "torch" not in said
        assert said & {"GW501", "<testsuites", '"runs":', "change"}


def test_what_the_type_checker_imports_is_what_is_loaded_on_use_and_what_is_public():
    tree = ast.parse(Path(gradwatch.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {alias.name: node.module for node in block.body for alias in node.names}

    assert imported == {name: f"gradwatch.{home}" for name, home in gradwatch._HOME_OF.items()}
    assert sorted(imported) == sorted(gradwatch.__all__)


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error():
    for name in gradwatch.__all__:
        assert getattr(gradwatch, name) is not None
    assert set(gradwatch.__all__) <= set(dir(gradwatch))
    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        gradwatch.wach  # noqa: B018
