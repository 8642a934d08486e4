"""A loop of one's own on market data: one line watches it, a second tells the loss.

python examples/raw_loop.py && gradwatch report runs/raw_loop && tensorboard --logdir runs/raw_loop
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import gradwatch
from gradwatch.demo import market


def main() -> None:
    """Forecast volatility from a year of bars with a deep network, and clip, and watch."""
    parser = argparse.ArgumentParser(description="a loop of one's own on market data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--logdir", default="runs/raw_loop")
    options = parser.parse_args()
    torch.manual_seed(0)

    prices = market.sp500() or market.flow_prices(seed=0, bars=5031)
    x, y = (torch.from_numpy(a) for a in market.windows(prices))
    known = int(market.KNOWN * len(y))

    model = nn.Sequential(
        nn.Flatten(), nn.Linear(1000, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    with gradwatch.watch(model, optimizer, logdir=options.logdir) as watcher:
        for _ in range(options.steps):
            pick = torch.randint(known, (128,))
            loss = nn.functional.mse_loss(model(x[pick]), y[pick])
            optimizer.zero_grad()
            loss.backward()
            watcher.step(loss=loss)  # before clipping; without this line the hooks see the gradients after it
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(watcher)
    print(f"trained on {prices.name} ({prices.source}), last loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
