"""Several processes that train one network under DistributedDataParallel: each watches, and rank 0 speaks for all.

torchrun --nproc_per_node 2 examples/ddp_program.py && gradwatch report runs/ddp
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.demo import market


def main() -> None:
    """Forecast volatility from a year of bars; each process takes batches of its own."""
    parser = argparse.ArgumentParser(description="several processes that train one network")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--logdir", default="runs/ddp")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)

    prices = market.sp500() or market.flow_prices(seed=0, bars=5031)
    x, y = (torch.from_numpy(a) for a in market.windows(prices))
    known = int(market.KNOWN * len(y))
    batches = torch.Generator().manual_seed(dist.get_rank())

    model = DistributedDataParallel(
        nn.Sequential(nn.Flatten(), nn.Linear(1000, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.watch(model, optimizer, logdir=options.logdir) as watcher:  # in every process, with the same names
        for _ in range(options.steps):
            pick = torch.randint(known, (64,), generator=batches)
            loss = nn.functional.mse_loss(model(x[pick]), y[pick])
            watcher.record(loss)  # that of rank 0 is told
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if dist.get_rank() == 0:
        print(f"trained on {prices.name} ({prices.source}), last loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
