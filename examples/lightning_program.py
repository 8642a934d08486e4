"""A Lightning program on market data: the callback is the whole integration.

python examples/lightning_program.py && tensorboard --logdir runs/lightning
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.demo import market
from gradwatch.lightning import GradientMonitor


class Forecast(LightningModule):
    """An LSTM over a year of bars; the readout forecasts the volatility of the next month."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.lstm = nn.LSTM(len(market.FEATURES), 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Return the loss of one batch."""
        x, y = batch
        loss = nn.functional.mse_loss(self.head(self.lstm(x)[0][:, -1]).flatten(), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main() -> None:
    """Fit for some steps, with the callback."""
    parser = argparse.ArgumentParser(description="a Lightning program on market data")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--logdir", default="runs/lightning")
    options = parser.parse_args()
    seed_everything(0)

    prices = market.sp500() or market.flow_prices(seed=0, bars=5031)
    x, y = (torch.from_numpy(a) for a in market.windows(prices))
    known = int(market.KNOWN * len(y))
    batches = DataLoader(TensorDataset(x[:known], y[:known]), batch_size=64, shuffle=True)

    monitor = GradientMonitor()
    trainer = Trainer(
        max_steps=options.steps,
        callbacks=[monitor],
        logger=TensorBoardLogger(options.logdir, name=None),
        accelerator="cpu",
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Forecast(), batches)
    print(f"trained on {prices.name} ({prices.source}); the record is in {trainer.log_dir}/gradwatch")


if __name__ == "__main__":
    main()
