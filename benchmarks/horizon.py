"""What `gradwatch.horizon` costs, in turn with a plain pass and a control, and how well its interval holds the truth.

python -m benchmarks.horizon             # a few minutes on one core; --quick: seconds
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.command import parsed, parser
from benchmarks.overhead import shown
from gradwatch.values.sequences import horizon_of

FEATURES, TIMESTEPS, WIDTH = 4, 250, 64


class Recurrent(nn.Module):
    """A recurrent network, and all of its outputs."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1) -> None:
        """Build it."""
        super().__init__()
        self.rnn = kind(FEATURES, WIDTH, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs at every timestep."""
        return self.rnn(x)[0]


class Loop(nn.Module):
    """A tanh cell in a loop of Python."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.into, self.on = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state."""
        h = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = torch.tanh(self.into(x[:, t]) + self.on(h))
        return h


class Convolutions(nn.Module):
    """A causal temporal convolution network with channels first."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(FEATURES if not i else WIDTH, WIDTH, 4, dilation=2**i) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs at every timestep, (B, T, C)."""
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = torch.relu(layer(nn.functional.pad(x, (3 * layer.dilation[0], 0))))
        return x.transpose(1, 2)


class Attention(nn.Module):
    """Two layers of a transformer's encoder."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.0)
        self.into = nn.Linear(FEATURES, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the newest output."""
        return self.encoder(self.into(x))[:, -1]


class Slow(nn.Module):
    """Whose memory falls as a power of the lag, so that a thousandth of it is crossed at a flat angle."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        lag = torch.arange(TIMESTEPS, 0, -1.0)
        self.into, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("weights", lag[:, None] ** -(1.3 + 1.2 * torch.rand(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        """Return one output a row."""
        return self.out((torch.tanh(self.into(x)) * self.weights).sum(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: Recurrent(nn.RNN),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM, 4 layers": lambda: Recurrent(nn.LSTM, 4),
    "convolutions": Convolutions,
    "transformer": Attention,
    "loop of Python": Loop,
    "power law": Slow,
}


def cost(name: str, model: nn.Module, rows: int, rounds: int) -> None:
    """Time a horizon and a plain forward and backward pass, in turn."""
    x = torch.randn(rows, TIMESTEPS, FEATURES)

    def plain() -> float:
        began = time.thread_time()
        model(x).pow(2).mean().backward()
        return time.thread_time() - began

    def horizon() -> float:
        began = time.thread_time()
        gradwatch.horizon(model, x)
        return time.thread_time() - began

    times: dict[str, list[float]] = {"plain": [], "horizon": [], "control": []}
    for number in range(rounds + 1):
        for what, act in (("plain", plain), ("horizon", horizon), ("control", plain)):
            spent = act()
            if number:  # the first round warms up
                times[what].append(spent)
        model.zero_grad()
    base = statistics.median(times["plain"])
    ratios = "   ".join(f"{what} {shown([t / base for t in times[what]])}" for what in ("horizon", "control"))
    print(f"{name:15} {rows:3} rows   plain {base * 1e3:7.1f} ms   {ratios}", flush=True)


def exact(model: nn.Module, x: Tensor) -> int:
    """Return the horizon by the whole Jacobian of the newest output."""
    x = x.clone().requires_grad_()
    y = model(x)
    y = y[:, -1] if y.dim() > 2 else y
    squares = torch.zeros(TIMESTEPS, dtype=torch.float64)
    for column in y.unbind(1):
        (gradient,) = torch.autograd.grad(column.sum(), x, retain_graph=True)
        squares += gradient.double().square().sum((0, 2))
    found = horizon_of(squares.sqrt().flip(0).tolist())
    return 0 if found is None else found.timesteps


def precision(name: str, build: Callable[[], nn.Module], rows: int, batches: int) -> None:
    """Count how often the exact horizon lies within the interval, over fresh networks and batches."""
    held, widths, shares, truths = 0, [], [], []
    for seed in range(batches):
        torch.manual_seed(seed)
        model, x = build().eval(), torch.randn(rows, TIMESTEPS, FEATURES)
        true, interval = exact(model, x), gradwatch.horizon(model, x).interval or (0, -1)
        held += interval[0] <= true <= interval[1]
        widths.append(interval[1] - interval[0])
        shares.append(widths[-1] / max(true, 1))
        truths.append(true)
    print(
        f"{name:15} {rows:3} rows   exact {min(truths):3} to {max(truths):3}   within the interval {held:2} of"
        f" {batches}   width: median {statistics.median(widths):.0f} steps, {statistics.median(shares):.0%}",
        flush=True,
    )


def main() -> None:
    """Print both tables."""
    quick = parsed(parser(__doc__)).quick
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; thread CPU over that of a plain pass, medians [quartiles]")
    for name in ("LSTM",) if quick else MODELS:
        for rows in (8,) if quick else (8, 12, 32):
            torch.manual_seed(0)
            cost(name, MODELS[name](), rows, 2 if quick else 15)
    print("the exact horizon against the interval, fresh networks and batches")
    for name in ("LSTM",) if quick else MODELS:
        for rows in (8,) if quick else (1, 8, 32):
            precision(name, MODELS[name], rows, 2 if quick else 20)


if __name__ == "__main__":
    main()
