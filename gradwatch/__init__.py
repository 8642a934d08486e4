"""gradwatch sees the gradients that vanish: per layer, in any PyTorch training loop.

The names below are loaded on first use, so that `import gradwatch` is quick and free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradwatch.checks import assert_healthy, assert_horizon, check, horizon
    from gradwatch.detectors import DETECTORS
    from gradwatch.history import Detector, History
    from gradwatch.record import Record, Run, read_run, read_runs
    from gradwatch.report import Alert, Finding, GradientHealthError, GradwatchWarning, Report, Severity, Sink
    from gradwatch.snapshot import LayerInfo, ModelInfo, OptimizerInfo, ParameterInfo, SequenceStats, Snapshot
    from gradwatch.tensorboard import TensorBoardSink
    from gradwatch.thresholds import Thresholds
    from gradwatch.watcher import Watcher, watch

_HOMES = {
    "checks": ("assert_healthy", "assert_horizon", "check", "horizon"),
    "detectors": ("DETECTORS",),
    "history": ("Detector", "History"),
    "record": ("Record", "Run", "read_run", "read_runs"),
    "report": ("Alert", "Finding", "GradientHealthError", "GradwatchWarning", "Report", "Severity", "Sink"),
    "snapshot": ("LayerInfo", "ModelInfo", "OptimizerInfo", "ParameterInfo", "SequenceStats", "Snapshot"),
    "tensorboard": ("TensorBoardSink",),
    "thresholds": ("Thresholds",),
    "watcher": ("Watcher", "watch"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DETECTORS",
    "Alert",
    "Detector",
    "Finding",
    "GradientHealthError",
    "GradwatchWarning",
    "History",
    "LayerInfo",
    "ModelInfo",
    "OptimizerInfo",
    "ParameterInfo",
    "Record",
    "Report",
    "Run",
    "SequenceStats",
    "Severity",
    "Sink",
    "Snapshot",
    "TensorBoardSink",
    "Thresholds",
    "Watcher",
    "assert_healthy",
    "assert_horizon",
    "check",
    "horizon",
    "read_run",
    "read_runs",
    "watch",
]


def __getattr__(name: str) -> object:
    """Load a public name where it lives."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gradwatch.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name what is public."""
    return sorted([*__all__, "__version__"])
