"""Stock networks of gluonts (torch), through its own estimators."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import pandas as pd
from gluonts.dataset.common import ListDataset

from benchmarks.stock.forecasting import AHEAD, PAST, ROWS, series, trainer
from benchmarks.stock.run import Heard, Stock


def stock(path: str, *, frequency: bool = True, tag: str = "", **extra: Any) -> Stock:
    """Return a network of the library; what is a function in `extra` is given the width."""
    module, name = path.rsplit(".", 1)

    def train(width: int, steps: int, heard: Heard) -> None:
        mine = {n: value(width) if callable(value) else value for n, value in extra.items()}
        mine |= {"freq": "M"} if frequency else {}
        target = [{"start": pd.Period("1990-01", "M"), "target": values} for values in series()]
        with tempfile.TemporaryDirectory() as directory:
            estimator = getattr(importlib.import_module(f"gluonts.torch.model.{module}"), name)(
                prediction_length=AHEAD,
                batch_size=ROWS,
                num_batches_per_epoch=50,
                trainer_kwargs=trainer(heard, max_steps=steps, max_epochs=1000, default_root_dir=directory),
                **mine,
            )
            estimator.train(ListDataset(target, freq="M"))

    return Stock(f"{name}{tag and '/'}{tag}", train)


_PAST = {"context_length": PAST}
MODELS = [
    stock("deepar.DeepAREstimator", hidden_size=lambda w: w, **_PAST),
    stock(
        "simple_feedforward.SimpleFeedForwardEstimator", frequency=False, hidden_dimensions=lambda w: [w, w], **_PAST
    ),
    stock("tft.TemporalFusionTransformerEstimator", hidden_dim=lambda w: w, variable_dim=lambda w: w, **_PAST),
    stock(
        "patch_tst.PatchTSTEstimator",
        frequency=False,
        patch_len=8,
        d_model=lambda w: w,
        dim_feedforward=lambda w: 4 * w,
        **_PAST,
    ),
    stock("lag_tst.LagTSTEstimator", d_model=lambda w: w, dim_feedforward=lambda w: 4 * w, **_PAST),
    stock("d_linear.DLinearEstimator", frequency=False, hidden_dimension=lambda w: w, **_PAST),
    stock("tide.TiDEEstimator", encoder_hidden_dim=lambda w: w, decoder_hidden_dim=lambda w: w, **_PAST),
    stock(
        "tide.TiDEEstimator",
        tag="layernorm",
        encoder_hidden_dim=lambda w: w,
        decoder_hidden_dim=lambda w: w,
        layer_norm=True,
        **_PAST,
    ),
    stock(
        "wavenet.WaveNetEstimator",
        num_residual_channels=lambda w: w,
        num_skip_channels=lambda w: w,
        num_bins=64,
        dilation_depth=3,
    ),
]
