"""A training that knows nothing of gradwatch: a recurrent network that is to remember the first of 80 numbers.

gradwatch run --horizon 80 examples/plain_program.py && tensorboard --logdir runs/plain_program
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn


class Remembers(nn.Module):
    """A GRU; the readout is to tell the sign of the first entry."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.gru = nn.GRU(1, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one logit for each row."""
        logits: Tensor = self.head(self.gru(x)[0][:, -1]).flatten()
        return logits


def main() -> None:
    """Train for some steps."""
    parser = argparse.ArgumentParser(description="a training that knows nothing of gradwatch")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Remembers()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(options.steps):
        x = torch.randn(64, 80, 1)
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), (x[:, 0, 0] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"last loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
