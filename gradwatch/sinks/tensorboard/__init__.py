"""Reports -> TensorBoard: scalars, heatmaps, ridge plots, and the text of alerts, one Summary a step."""

from __future__ import annotations

from gradwatch.sinks.tensorboard.scalars import scalars
from gradwatch.sinks.tensorboard.sink import TensorBoardSink

__all__ = ["TensorBoardSink", "scalars"]
