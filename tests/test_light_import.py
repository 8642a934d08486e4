"""`import gradwatch`, the pytest plugin, the readers and the command line load no torch: every pytest run of an environment pays for it."""

from __future__ import annotations

import math
import subprocess
import time
from pathlib import Path

import pytest
from interpreters import warm

import gradwatch
from gradwatch.values.snapshot import LayerInfo, ModelInfo, ParameterInfo, Snapshot

LIGHT = [
    "gradwatch",
    "gradwatch.pytest_plugin",
    "gradwatch.cli",
    *(
        f"gradwatch.values.{name}"
        for name in ("snapshot", "sequences", "plain", "layer_columns", "history", "thresholds", "report")
    ),
    "gradwatch.detectors",
    "gradwatch.detectors.alerts",
    *(
        f"gradwatch.sinks.{name}"
        for name in ("log", "record", "run_directory", "tensorboard", "terminal.page", "terminal.errors")
    ),
    "gradwatch.demo.market",
    "gradwatch.demo.story",
]


JUDGE = """
import gradwatch
run, history = gradwatch.read_run(sys.argv[1]), gradwatch.History()
for snapshot in run.snapshots:
    history.add(snapshot)
print(len(run.snapshots), "snapshots")
print(*(finding.code for detector in gradwatch.DETECTORS for finding in detector(history)))
"""


def loaded(code: str, *arguments: str | Path) -> set[str]:
    """Run code in a fresh process, and return the words that it prints and the modules that it has imported."""
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    command = [*warm(), "-c", script, *arguments]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_loading_it_imports_no_torch(module):
    assert "torch" not in loaded(f"import {module}")


def test_this_test_can_fail():
    assert "torch" in loaded("import torch")
    assert "torch" in loaded("import gradwatch.watcher.watcher")


def test_the_package_itself_loads_neither_numpy_nor_rich_nor_tensorboard():
    assert not loaded("import gradwatch") & {"numpy", "rich", "tensorboard", "PIL", "google_crc32c"}


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


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error():
    for name in gradwatch.__all__:
        assert getattr(gradwatch, name) is not None
    assert set(gradwatch.__all__) <= set(dir(gradwatch))
    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        gradwatch.wach  # noqa: B018
