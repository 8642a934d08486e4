"""`import gradwatch`, the pytest plugin, the readers and the command line load no torch: every pytest run of an environment pays for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gradwatch

LIGHT = [
    "gradwatch",
    "gradwatch.pytest_plugin",
    "gradwatch.cli",
    "gradwatch.snapshot",
    "gradwatch.thresholds",
    "gradwatch.report",
    "gradwatch.reach",
    "gradwatch.history",
    "gradwatch.detectors",
    "gradwatch.record",
    "gradwatch.tensorboard",
    "gradwatch.console",
    "gradwatch.market",
    "gradwatch.demo",
]


def loaded(code: str) -> set[str]:
    """Run code in a fresh process, and give what it has imported."""
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_loading_it_imports_no_torch(module):
    assert "torch" not in loaded(f"import {module}")


def test_this_test_can_fail():
    assert "torch" in loaded("import torch")
    assert "torch" in loaded("import gradwatch.watcher")


def test_the_package_itself_loads_neither_numpy_nor_rich_nor_tensorboard():
    assert not loaded("import gradwatch") & {"numpy", "rich", "tensorboard", "PIL", "google_crc32c"}


def test_reading_and_judging_a_run_imports_no_torch(tmp_path):
    assert "torch" not in loaded("import gradwatch\ntry: gradwatch.read_run('.')\nexcept FileNotFoundError: pass\ngradwatch.DETECTORS, gradwatch.History()")


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error():
    for name in gradwatch.__all__:
        assert getattr(gradwatch, name) is not None
    assert set(gradwatch.__all__) <= set(dir(gradwatch))
    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        gradwatch.wach  # noqa: B018
