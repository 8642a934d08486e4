"""gradwatch sees the gradients that vanish: per layer, in any PyTorch training loop.

The names below are loaded on first use, so that `import gradwatch` is quick and free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradwatch.checks.causal import assert_causal, causal
    from gradwatch.checks.causal_features import assert_causal_features
    from gradwatch.checks.check import assert_healthy, check
    from gradwatch.checks.cures.cure import cure
    from gradwatch.checks.cures.outcome import Cure, Cures
    from gradwatch.checks.cures.trial import Outcome
    from gradwatch.checks.horizon import assert_horizon, horizon
    from gradwatch.checks.profile import assert_profile, profile
    from gradwatch.checks.trains import assert_trains
    from gradwatch.detectors import DETECTORS
    from gradwatch.detectors.rule import Rule
    from gradwatch.sinks.reading import Run, read_run, read_runs
    from gradwatch.sinks.record import Record
    from gradwatch.sinks.tensorboard import TensorBoardSink, scalars
    from gradwatch.values.causality import Causality, Leak
    from gradwatch.values.comparison import Change, Comparison, compare
    from gradwatch.values.history import Detector, History
    from gradwatch.values.profile import HorizonProfile, LayerProfile, Profile, profile_of
    from gradwatch.values.report import (
        Alert,
        Explanation,
        Finding,
        GradientHealthError,
        GradwatchWarning,
        Report,
        Severity,
        Sink,
    )
    from gradwatch.values.sequences import SequenceStats
    from gradwatch.values.snapshot import LayerInfo, ModelInfo, OptimizerInfo, ParameterInfo, Snapshot
    from gradwatch.values.thresholds import Thresholds
    from gradwatch.watcher.watch import watch
    from gradwatch.watcher.watcher import Watcher

_HOMES = {
    "checks.causal": ("assert_causal", "causal"),
    "checks.causal_features": ("assert_causal_features",),
    "checks.check": ("assert_healthy", "check"),
    "checks.cures.cure": ("cure",),
    "checks.cures.outcome": ("Cure", "Cures"),
    "checks.cures.trial": ("Outcome",),
    "checks.horizon": ("assert_horizon", "horizon"),
    "checks.profile": ("assert_profile", "profile"),
    "checks.trains": ("assert_trains",),
    "detectors": ("DETECTORS",),
    "detectors.rule": ("Rule",),
    "sinks.reading": ("Run", "read_run", "read_runs"),
    "sinks.record": ("Record",),
    "sinks.tensorboard": ("TensorBoardSink", "scalars"),
    "values.causality": ("Causality", "Leak"),
    "values.comparison": ("Change", "Comparison", "compare"),
    "values.history": ("Detector", "History"),
    "values.profile": ("HorizonProfile", "LayerProfile", "Profile", "profile_of"),
    "values.report": (
        "Alert",
        "Explanation",
        "Finding",
        "GradientHealthError",
        "GradwatchWarning",
        "Report",
        "Severity",
        "Sink",
    ),
    "values.sequences": ("SequenceStats",),
    "values.snapshot": ("LayerInfo", "ModelInfo", "OptimizerInfo", "ParameterInfo", "Snapshot"),
    "values.thresholds": ("Thresholds",),
    "watcher.watch": ("watch",),
    "watcher.watcher": ("Watcher",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DETECTORS",
    "Alert",
    "Causality",
    "Change",
    "Comparison",
    "Cure",
    "Cures",
    "Detector",
    "Explanation",
    "Finding",
    "GradientHealthError",
    "GradwatchWarning",
    "History",
    "HorizonProfile",
    "LayerInfo",
    "LayerProfile",
    "Leak",
    "ModelInfo",
    "OptimizerInfo",
    "Outcome",
    "ParameterInfo",
    "Profile",
    "Record",
    "Report",
    "Rule",
    "Run",
    "SequenceStats",
    "Severity",
    "Sink",
    "Snapshot",
    "TensorBoardSink",
    "Thresholds",
    "Watcher",
    "assert_causal",
    "assert_causal_features",
    "assert_healthy",
    "assert_horizon",
    "assert_profile",
    "assert_trains",
    "causal",
    "check",
    "compare",
    "cure",
    "horizon",
    "profile",
    "profile_of",
    "read_run",
    "read_runs",
    "scalars",
    "watch",
]


if not TYPE_CHECKING:  # a type checker that sees it takes every misspelt name for one of these

    def __getattr__(name: str) -> object:
        """Load a public name from where it lives."""
        if name not in _HOME_OF:
            raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"gradwatch.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted([*__all__, "__version__"])
