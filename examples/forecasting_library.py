"""A forecasting library's own network, watched: its trainer arguments take the callback, and nothing else is different.

pip install -c constraints.txt ".[demo]" neuralforecast
python examples/forecasting_library.py && gradwatch report runs/forecasting_library
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from gradwatch import Report
from gradwatch.demo import market

try:
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import GRU, LSTM, RNN
    from pytorch_lightning.loggers import TensorBoardLogger

    from gradwatch.lightning import GradientMonitor
except ModuleNotFoundError as error:
    print(f"this example watches neuralforecast ({error}): pip install neuralforecast", file=sys.stderr)
    raise SystemExit(2) from None

NETWORKS = {"LSTM": LSTM, "GRU": GRU, "RNN": RNN}


def series(prices: market.Prices) -> pd.DataFrame:
    """Return the bars in the library's long form; y, which is forecast, is the log of each bar's range."""
    return pd.DataFrame(
        {
            "unique_id": prices.name,
            "ds": np.arange(1, len(prices.close)),
            "y": np.log(np.maximum(np.log(prices.high / prices.low), 1e-6))[1:],
            "return": np.diff(np.log(prices.close)),
            "volume_change": np.diff(np.log(prices.volume)),
        }
    )


def show(report: Report) -> None:
    """Say how far back each sequence module learns."""
    for module in report.snapshot.sequences or ():
        if module.horizon is not None:
            reach = f"{'at least' if module.censored else 'the last'} {module.horizon} of {module.length} bars"
            print(f"step {report.snapshot.step}: {module.module or 'the model'} learns from {reach}")


def main() -> None:
    """Train one of the library's networks, forecast, and say how far back it learned at its first and last probe."""
    parser = argparse.ArgumentParser(description="a forecasting library's own network, watched")
    parser.add_argument("--network", choices=NETWORKS, default="LSTM")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--horizon",
        type=int,
        help="how many of the newest bars matter, if you know it: a shorter horizon is then an alert",
    )
    parser.add_argument("--logdir", default="runs/forecasting_library")
    options = parser.parse_args()

    reports: list[Report] = []
    network = NETWORKS[options.network](
        h=20,
        input_size=250,
        encoder_n_layers=1,
        encoder_hidden_size=64,
        hist_exog_list=["return", "volume_change"],
        scaler_type="standard",
        windows_batch_size=64,
        max_steps=options.steps,
        random_seed=0,
        # What the network does not know goes to the Trainer. The library copies it all;
        # a sink is how the reports come back.
        callbacks=[GradientMonitor(horizon=options.horizon, sinks=[reports.append])],
        logger=TensorBoardLogger(options.logdir, name=None),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    library = NeuralForecast(models=[network], freq=1)
    library.fit(series(market.sp500() or market.flow_prices(seed=0, bars=5031)))
    print(library.predict().head(3))

    probes = [report for report in reports if report.snapshot.sequences]
    for report in probes[:1] + probes[1:][-1:]:
        show(report)


if __name__ == "__main__":
    main()
