"""What the optimizers of one training have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradwatch.measurement.model_map import ModelMap
from gradwatch.measurement.processes import Processes
from gradwatch.watcher.cadence import Cadence
from gradwatch.watcher.forward_pass import ForwardPass
from gradwatch.watcher.losses import Losses
from gradwatch.watcher.unheard import Unheard


@dataclass(frozen=True)
class Training:
    """The training that a watcher watches: what its optimizers have in common."""

    model_map: ModelMap
    forward_pass: ForwardPass
    losses: Losses
    unheard: Unheard
    processes: Processes
    cadence: Cadence
    patience: int
    """Measured steps in a row without any gradient that are worth a snapshot."""
    scaler: Any = None
    clock: Callable[[], int] | None = None
    """Numbers the steps where the loop has an axis of its own."""
