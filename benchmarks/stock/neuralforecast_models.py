"""Stock networks of neuralforecast, through its own fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast, models

from benchmarks.stock.forecasting import AHEAD, LENGTH, PAST, ROWS, SERIES, series, trainer
from benchmarks.stock.run import Heard, Stock

WIDE = (
    *("hidden_size", "encoder_hidden_size", "decoder_hidden_size", "lstm_hidden_size", "conv_hidden_size"),
    *("linear_hidden_size", "d_model", "d_ff", "d_core", "ff_dim", "temporal_decoder_dim", "temporal_ff"),
)
"""Arguments that are set to the width; the number of layers is the library's."""
SMALL: Mapping[str, Callable[[int], Any]] = {
    **{name: lambda width: width for name in WIDE},
    "mlp_units": lambda width: [[width, width]] * 3,
    "n_series": lambda _: SERIES,
    "n_head": lambda _: 4,
    "n_heads": lambda _: 4,
    "patch_len": lambda _: 8,
    "stride": lambda _: 4,
}


def frame(*, exogenous: bool = False) -> pd.DataFrame:
    """Return the series in the library's long form."""
    values = series()
    table = pd.DataFrame(
        {
            "unique_id": np.repeat([f"series {i}" for i in range(SERIES)], LENGTH),
            "ds": np.tile(np.arange(LENGTH), SERIES),
            "y": values.ravel(),
        }
    )
    if exogenous:
        table["month"] = np.sin(2 * np.pi * table["ds"] / 12)
        table["other"] = np.roll(values, 1, 1).ravel()
    return table


def stock(name: str, tag: str = "", *, exogenous: bool = False, only: int = SERIES, **extra: Any) -> Stock:
    """Return a network of the library; what is a function in `extra` is given the width."""
    network = getattr(models, name)

    def train(width: int, steps: int, heard: Heard) -> None:
        mine = {n: value(width) for n, value in SMALL.items() if n in inspect.signature(network).parameters}
        mine |= {n: value(width) if callable(value) else value for n, value in extra.items()}
        if exogenous:
            mine |= {"futr_exog_list": ["month"], "hist_exog_list": ["other"]}
        built = network(
            h=AHEAD,
            input_size=PAST,
            max_steps=steps,
            windows_batch_size=ROWS,
            random_seed=0,
            **mine,
            **trainer(heard, enable_checkpointing=False),
        )
        NeuralForecast(models=[built], freq=1).fit(frame(exogenous=exogenous).head(only * LENGTH))

    return Stock(f"{name}{tag and '/'}{tag}", train)


MODELS = [
    stock("RNN"),
    stock("GRU"),
    stock("LSTM"),
    stock("LSTM", "recurrent", recurrent=True),
    stock("TCN"),
    stock("DilatedRNN"),
    stock("DeepAR", decoder_hidden_size=0),
    stock("DeepNPTS"),
    stock("MLP"),
    stock("NBEATS"),
    stock("NBEATS", "generic", stack_types=["identity", "identity"], n_blocks=[1, 1]),
    stock("NBEATSx"),
    stock("NBEATSx", "exogenous", exogenous=True),
    stock("NHITS"),
    stock("NHITS", "exogenous", exogenous=True),
    stock("NLinear"),
    stock("DLinear"),
    stock("TiDE"),
    stock("TiDE", "no layernorm", layernorm=False),
    stock("TiDE", "exogenous", exogenous=True),
    stock("TFT"),
    stock("TFT", "exogenous", exogenous=True),
    stock("VanillaTransformer"),
    stock("Informer"),
    stock("Autoformer"),
    stock("FEDformer", n_head=8),
    stock("PatchTST"),
    stock("TimesNet", num_kernels=2),
    stock("BiTCN"),
    stock("BiTCN", "exogenous", exogenous=True),
    stock("KAN"),
    stock("iTransformer"),
    stock("iTransformer", "one series", only=1, n_series=1),
    stock("StemGNN"),
    stock("TSMixer"),
    stock("TSMixerx"),
    stock("MLPMultivariate"),
    stock("SOFTS"),
    stock("SOFTSSharp"),
    stock("TimeMixer"),
    stock("TimeXer"),
    stock("RMoK"),
    stock("XLinear"),
]
