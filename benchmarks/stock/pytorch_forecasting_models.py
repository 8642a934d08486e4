"""Stock networks of pytorch-forecasting, under Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch import Trainer
from pytorch_forecasting import TimeSeriesDataSet, models

from benchmarks.stock.forecasting import AHEAD, LENGTH, PAST, ROWS, SERIES, series, trainer
from benchmarks.stock.run import Heard, Stock

ADDED = ("add_relative_time_idx", "add_target_scales", "add_encoder_length")


def data(*, rich: bool = False, **more: Any) -> TimeSeriesDataSet:
    """Return windows of the series; `rich` as in the library's tutorials, with what is known beside them."""
    table = pd.DataFrame(
        {
            "group": np.repeat([f"series {i}" for i in range(SERIES)], LENGTH),
            "time": np.tile(np.arange(LENGTH), SERIES),
            "value": series().ravel(),
        }
    )
    table["season"] = np.sin(2 * np.pi * table["time"] / 12)
    known = ["season", "time"] if rich else []
    return TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=PAST,
        max_prediction_length=AHEAD,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=known,
        static_categoricals=["group"] if rich else [],
        **(dict.fromkeys(ADDED, True) if rich else {}) | more,
    )


def stock(
    name: str, tag: str = "", *, rich: bool = False, of_data: dict[str, Any] | None = None, **extra: Any
) -> Stock:
    """Return a network of the library; what is a function in `extra` is given the width."""

    def train(width: int, steps: int, heard: Heard) -> None:
        mine = {n: value(width) if callable(value) else value for n, value in extra.items()}
        windows = data(rich=rich, **(of_data or {}))
        built = getattr(models, name).from_dataset(windows, learning_rate=1e-3, **mine)
        fit = Trainer(max_steps=steps, enable_checkpointing=False, gradient_clip_val=1.0, **trainer(heard))
        fit.fit(built, windows.to_dataloader(train=True, batch_size=ROWS))

    return Stock(f"{name}{tag and '/'}{tag}", train)


ABSOLUTE = {"add_relative_time_idx": False}
MODELS = [
    stock("TemporalFusionTransformer", hidden_size=lambda w: w, hidden_continuous_size=lambda w: w // 2),
    stock(
        "TemporalFusionTransformer", "rich", rich=True, hidden_size=lambda w: w, hidden_continuous_size=lambda w: w // 2
    ),
    stock("NBeats", widths=lambda w: [w, w]),
    stock("NBeatsKAN", widths=lambda w: [w, w]),
    stock("NHiTS", hidden_size=lambda w: w),
    stock("NHiTS", "rich", rich=True, of_data=ABSOLUTE, hidden_size=lambda w: w),
    stock("DeepAR", hidden_size=lambda w: w),
    stock("DeepAR", "rich", rich=True, cell_type="GRU", hidden_size=lambda w: w),
    stock("RecurrentNetwork", hidden_size=lambda w: w),
    stock("RecurrentNetwork", "GRU", cell_type="GRU", hidden_size=lambda w: w),
    stock("DecoderMLP", rich=True, hidden_size=lambda w: w),
    stock("TiDEModel", rich=True, of_data=ABSOLUTE, hidden_size=lambda w: w),
    stock("TimeXer", rich=True, hidden_size=lambda w: w, d_ff=lambda w: 4 * w, patch_length=8),
    stock("xLSTMTime", hidden_size=lambda w: w, input_size=1, output_size=1),
]
