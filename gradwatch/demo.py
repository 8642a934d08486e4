"""`gradwatch demo`: a sick network beside a healthy one, on real market data."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from gradwatch import console as shown
from gradwatch import market
from gradwatch.record import read_run

if TYPE_CHECKING:
    import torch
    from torch import nn

LENGTH = 250
"""Bars in a window: a year of trading days."""
AHEAD = 20
"""Bars over which the volatility to forecast is taken."""
DEPTH, WIDTH, BATCH = 20, 64, 128


@dataclass(frozen=True)
class Subject:
    """A network that the demo trains."""

    name: str
    says: str
    healthy: bool


SUBJECTS = (
    Subject("sigmoid", f"{DEPTH} layers with sigmoid activations and PyTorch's default initialization", healthy=False),
    Subject("relu", f"the same {DEPTH} layers with ReLU and He initialization", healthy=True),
)


def demo(logdir: str | os.PathLike[str], *, seed: int = 0, steps: int = 250, data: str = "auto", out: Console | None = None) -> None:
    """Train both networks, show what gradwatch saw of them, and say how to see more.

    Args:
        logdir: each network gets a folder in it.
        seed: the same seed gives the same numbers.
        steps: training steps of each network.
        data: "sp500", "synthetic", or "auto": the first if it is installed.
        out: where to print.

    Raises:
        ValueError: `data` is "sp500", and it is not installed.

    """
    out = out or Console()
    prices = _prices(data, seed)
    x, y = market.windows(prices, LENGTH, AHEAD)
    known = int(market.KNOWN * len(y))
    period = f", {prices.first} to {prices.last}" if prices.first else ""
    out.print(f"[bold]{prices.name}[/bold]{period} ({prices.source}): {len(prices.close)} bars.", highlight=False)
    if data == "auto" and not prices.first:
        out.print('The S&P 500 is not installed (pip install "torch-gradwatch\\[demo]"), so these prices are synthetic.', highlight=False)
    out.print(f"Forecast the volatility of the next {AHEAD} bars from windows of {LENGTH} bars x {len(market.FEATURES)} features.\n", highlight=False)
    with Progress(console=out, transient=True) as progress:
        for subject in SUBJECTS:
            bar = progress.add_task(f"training {subject.name}", total=steps)
            _train(subject, x[:known], y[:known], logdir=Path(logdir) / subject.name, seed=seed, steps=steps, tick=lambda bar=bar: progress.advance(bar))
    for subject in SUBJECTS:
        out.rule(subject.name)
        out.print(f"{subject.says[0].upper()}{subject.says[1:]}.", highlight=False)
        run = read_run(Path(logdir) / subject.name)
        losses = [s.loss for s in run.snapshots if s.loss is not None]
        out.print(
            f"Loss {losses[0]:.3f} at the first step, {sum(losses[-5:]) / len(losses[-5:]):.3f} at the end (1 is no better than the mean).\n", highlight=False
        )
        out.print(shown.run_summary(run))
        out.print()
    out.rule()
    out.print(f"See it in TensorBoard:  tensorboard --logdir {logdir}", highlight=False, soft_wrap=True)
    out.print(f"Read it again:          gradwatch report {logdir}", highlight=False, soft_wrap=True)
    out.print(f"Judge it in CI:         gradwatch check {logdir}/sigmoid   (exit status 1)", highlight=False, soft_wrap=True)


def _prices(data: str, seed: int) -> market.Prices:
    prices = market.sp500() if data != "synthetic" else None
    if prices is None and data == "sp500":
        raise ValueError('the S&P 500 comes with the package arch, which is not installed: pip install "torch-gradwatch[demo]"')
    return prices or market.flow_prices(seed, 5031)


def network(inputs: int, *, healthy: bool) -> nn.Sequential:
    """Build the network on `inputs` numbers: ReLU with He initialization, or sigmoids with what PyTorch gives."""
    from torch import nn

    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for depth in range(DEPTH):
        linear = nn.Linear(WIDTH if depth else inputs, WIDTH)
        if healthy:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        layers[f"hidden{depth + 1}"] = linear
        layers[f"act{depth + 1}"] = nn.ReLU() if healthy else nn.Sigmoid()
    return nn.Sequential(OrderedDict([*layers.items(), ("head", nn.Linear(WIDTH, 1)), ("forecast", nn.Flatten(0))]))


def _train(subject: Subject, x: Any, y: Any, *, logdir: Path, seed: int, steps: int, tick: Any) -> None:  # noqa: ANN401  (arrays of numpy, and a callable)
    import torch
    from torch.nn.functional import mse_loss

    from gradwatch.watcher import watch

    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    torch.manual_seed(seed)
    net = network(inputs[0].numel(), healthy=subject.healthy)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), lr=1e-3) if subject.healthy else torch.optim.SGD(net.parameters(), lr=0.02)
    batches = torch.Generator().manual_seed(seed)
    # The alerts are shown from the record when both are done: not in the middle of a progress bar.
    with watch(net, optimizer, logdir=logdir, on_alert=lambda _: None) as watcher:
        for _ in range(steps):
            pick = torch.randint(len(inputs), (BATCH,), generator=batches)
            loss = mse_loss(net(inputs[pick]), targets[pick])
            watcher.record(loss)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
            tick()
