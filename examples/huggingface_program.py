"""A program with the Trainer of transformers, on market data: the callback is the whole integration.

python examples/huggingface_program.py && gradwatch report runs/huggingface
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from gradwatch.demo import market
from gradwatch.huggingface import GradientCallback


class Forecast(nn.Module):
    """An LSTM over a year of bars; the readout forecasts the volatility of the next month."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.lstm = nn.LSTM(len(market.FEATURES), 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, bars: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss of one batch beside the forecasts, as models of transformers do."""
        forecast = self.head(self.lstm(bars)[0][:, -1]).flatten()
        return {"loss": nn.functional.mse_loss(forecast, labels), "logits": forecast}


def main() -> None:
    """Train for some steps, with the callback."""
    parser = argparse.ArgumentParser(description="a program with the Trainer of transformers, on market data")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--logdir", default="runs/huggingface")
    options = parser.parse_args()
    set_seed(0)

    prices = market.sp500() or market.flow_prices(seed=0, bars=5031)
    x, y = (torch.from_numpy(a) for a in market.windows(prices))
    known = int(market.KNOWN * len(y))

    arguments = TrainingArguments(
        options.logdir,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        logging_steps=10,
        report_to=["tensorboard"],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    rows = [{"bars": bars, "labels": label} for bars, label in zip(x[:known], y[:known], strict=True)]
    Trainer(Forecast(), arguments, train_dataset=rows, callbacks=[GradientCallback()]).train()
    print(f"trained on {prices.name} ({prices.source}); the record is in {options.logdir}/gradwatch")


if __name__ == "__main__":
    main()
