"""What the forecasting libraries share: the series, the callback, and a Trainer that prints and keeps nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.stock import tasks
from benchmarks.stock.run import Heard, unsaid

SERIES, LENGTH = 4, 200
PAST, AHEAD = 24, 12
ROWS = 16
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
"""Arguments for a Trainer that prints and keeps nothing."""


def series() -> np.ndarray:
    """Return the values (SERIES, LENGTH) that are to be forecast."""
    return tasks.sines(SERIES, LENGTH).numpy()


def monitor(heard: Heard) -> Any:
    """Return the callback; some libraries copy it with its sinks, and a copied function is the same one."""
    from gradwatch.lightning import GradientMonitor  # the atlas sets numbers here where there is no Lightning

    return GradientMonitor(sinks=[lambda report: heard(report)], on_alert=unsaid)  # noqa: PLW0108


def trainer(heard: Heard, **more: Any) -> dict[str, Any]:
    """Return arguments for the Trainer."""
    return {"callbacks": [monitor(heard)], **QUIET, **more}
