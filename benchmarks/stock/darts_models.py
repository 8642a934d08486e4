"""Stock networks of darts, through its own fit."""

from __future__ import annotations

from typing import Any

import darts.models
from darts import TimeSeries

from benchmarks.stock.forecasting import AHEAD, PAST, ROWS, series, trainer
from benchmarks.stock.run import Heard, Stock


def stock(name: str, tag: str = "", *, covariates: str = "", shift: bool = True, **extra: Any) -> Stock:
    """Return a network of the library; what is a function in `extra` is given the width."""

    def train(width: int, steps: int, heard: Heard) -> None:
        mine = {n: value(width) if callable(value) else value for n, value in extra.items()}
        if shift:
            mine["output_chunk_length"] = AHEAD
        built = getattr(darts.models, name)(
            input_chunk_length=PAST,
            batch_size=ROWS,
            random_state=0,
            n_epochs=1000,
            pl_trainer_kwargs=trainer(heard, max_steps=steps),
            **mine,
        )
        target = [TimeSeries.from_values(values.astype("float32")) for values in series()]
        known = {} if not covariates else {covariates: [one.map(lambda x: x**2) for one in target]}
        built.fit(target, **known)

    return Stock(f"{name}{tag and '/'}{tag}", train)


MODELS = [
    *(
        stock("BlockRNNModel", kind, model=kind, hidden_dim=lambda w: w, n_rnn_layers=2)
        for kind in ("RNN", "LSTM", "GRU")
    ),
    *(
        stock("RNNModel", kind, model=kind, hidden_dim=lambda w: w, training_length=PAST + AHEAD, shift=False)
        for kind in ("RNN", "LSTM", "GRU")
    ),
    stock("NBEATSModel", layer_widths=lambda w: w, num_stacks=4),
    stock("NBEATSModel", "interpretable", generic_architecture=False, layer_widths=lambda w: w),
    stock("NHiTSModel", layer_widths=lambda w: w),
    stock("TCNModel", num_filters=lambda w: w),
    stock(
        "TransformerModel",
        d_model=lambda w: w,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dim_feedforward=lambda w: 4 * w,
    ),
    stock("TFTModel", hidden_size=lambda w: w, add_relative_index=True),
    stock("TFTModel", "covariates", hidden_size=lambda w: w, add_relative_index=True, covariates="past_covariates"),
    stock("DLinearModel"),
    stock("NLinearModel"),
    stock("TiDEModel", hidden_size=lambda w: w),
    stock("TiDEModel", "covariates", hidden_size=lambda w: w, covariates="past_covariates", use_layer_norm=True),
    stock("TSMixerModel", hidden_size=lambda w: w, ff_size=lambda w: w),
    stock("TSMixerModel", "covariates", hidden_size=lambda w: w, ff_size=lambda w: w, covariates="past_covariates"),
]
