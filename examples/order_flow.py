"""An LSTM whose signal lies 200 bars back: what gradwatch says of it, and the remedy that it names.

python examples/order_flow.py && gradwatch report runs/order_flow && tensorboard --logdir runs/order_flow
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.demo import market

UNITS = 32
NEED = 200  # the regime that decides the label ended 210 bars ago: more than so many of the newest bars matter


class Regime(nn.Module):
    """An LSTM over 250 bars of order flow; the readout of its newest output tells the regime."""

    def __init__(self) -> None:
        """Build it as PyTorch makes it."""
        super().__init__()
        self.lstm = nn.LSTM(len(market.FLOW_FEATURES), UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return two logits for each sequence of shape (bars, features)."""
        return self.head(self.lstm(x)[0][:, -1])


def remember(lstm: nn.LSTM, timesteps: int) -> None:
    """Let the cell keep 1 - 1/timesteps of itself at each, and take in 1/timesteps of what is new.

    So an LSTM remembers as long, and what it remembers is a mean; with an open input gate it would be a sum.
    """
    enter, forget = slice(lstm.hidden_size), slice(lstm.hidden_size, 2 * lstm.hidden_size)  # torch's first two gates
    with torch.no_grad():
        lstm.bias_ih_l0[forget], lstm.bias_ih_l0[enter] = math.log(timesteps), -math.log(timesteps)
        lstm.bias_hh_l0[: 2 * lstm.hidden_size] = 0  # torch adds the two


def train(model: Regime, steps: int, logdir: str) -> str:
    """Train it, watched; show what gradwatch saw, and say how far back it learns and how much it has learned."""
    x, y = (torch.from_numpy(a) for a in market.order_flow(seed=0, count=2500))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.watch(model, optimizer, horizon=NEED, logdir=logdir) as watcher:
        for _ in range(steps):
            pick = torch.randint(2000, (64,))
            loss = nn.functional.cross_entropy(model(x[pick]), y[pick])
            optimizer.zero_grad()
            loss.backward()
            watcher.step(loss=loss)  # before clipping; without this line the hooks see the gradients after it
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(watcher)

    memory = gradwatch.horizon(model, x[2000:2008])  # what the probes measure, of a batch of one's own
    with torch.no_grad():
        logits = model(x[2000:])
    loss, right = nn.functional.cross_entropy(logits, y[2000:]), (logits.argmax(1) == y[2000:]).double().mean()
    reach = f"{'at least' if memory.censored else 'the last'} {memory.horizon} of {memory.length} bars"
    return f"learns from {reach}; loss {loss:.3f} and {right:.0%} right, of 500 sequences that it has not seen"


def main() -> None:
    """Train twice: as PyTorch makes it, and with the remedy."""
    parser = argparse.ArgumentParser(description="an LSTM whose signal lies 200 bars back")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--logdir", default="runs/order_flow")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Regime()
    print("As PyTorch makes it:")
    before = train(model, options.steps, f"{options.logdir}/before")

    torch.manual_seed(0)
    model = Regime()
    remember(model.lstm, NEED)
    gradwatch.assert_horizon(
        model, torch.randn(8, 250, len(market.FLOW_FEATURES)), at_least=NEED
    )  # before anything is trained
    print(f"\nWith a forget-gate bias of {math.log(NEED):.1f} and an input-gate bias of -{math.log(NEED):.1f}:")
    after = train(model, options.steps, f"{options.logdir}/after")

    print(f"\nbefore: {before}\nafter:  {after}\n(a coin: loss {math.log(2):.3f}, 50% right)")


if __name__ == "__main__":
    main()
