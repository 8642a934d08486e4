"""`gradwatch demo`: sick networks beside healthy ones, in depth on real market data, in time on order flow."""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from gradwatch.demo import market
from gradwatch.sinks.record import Run, read_run
from gradwatch.sinks.terminal.alert_text import alert_lines
from gradwatch.sinks.terminal.lag_profile import LagProfile, reach_lines
from gradwatch.sinks.terminal.page import run_summary
from gradwatch.values.report import Severity
from gradwatch.values.sequences import SequenceStats

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.optim import Optimizer

LENGTH = 250
"""Bars in a window: a year of trading days."""
AHEAD = 20
"""Bars over which the volatility to forecast is taken."""
DEPTH, WIDTH, BATCH = 20, 64, 128
STATE, CLIP = 32, 1.0
"""Units of a recurrent network, and the gradient norm that it is clipped to."""
NEED = 200
"""Bars that a network must look back to see anything of the event in the order flow."""
SEQUENCES, UNSEEN = 2000, 500
"""Sequences of order flow to train on, and to try the network on."""


@dataclass(frozen=True)
class Subject:
    """A network that the demo trains."""

    name: str
    says: str
    build: Callable[[], tuple[nn.Module, Optimizer]]


@dataclass(frozen=True, eq=False)
class Task:
    """What a network is to learn."""

    x: np.ndarray[Any, Any]
    """Inputs of shape (samples, bars, features)."""
    y: np.ndarray[Any, Any]
    """Targets of shape (samples,)."""
    known: int
    """The first so many samples are for training."""
    loss: str
    """Name of a function of `torch.nn.functional`."""
    batch: int
    clip: float | None = None
    horizon: int | None = None


def demo(
    logdir: str | os.PathLike[str], *, seed: int = 0, steps: int = 250, data: str = "auto", out: Console | None = None
) -> None:
    """Train all networks, show what gradwatch saw of them, and say how to see more.

    Args:
        logdir: each network gets a folder in it.
        seed: the same seed gives the same numbers.
        steps: training steps of each network.
        data: "sp500", "synthetic", or "auto": the first if it is installed.
        out: where to print.

    Raises:
        ValueError: `data` is "sp500", and it is not installed.

    """
    import torch

    out = out or Console()
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # these networks are small: a second thread waits more than it works, and many times as long on a busy machine
    try:
        _tell(Path(logdir), seed=seed, steps=steps, data=data, out=out)
    finally:
        torch.set_num_threads(threads)


def _tell(logdir: Path, *, seed: int, steps: int, data: str, out: Console) -> None:
    prices = _prices(data, seed)
    go = partial(_train_all, logdir=logdir, seed=seed, steps=steps, out=out)
    period = f", {prices.first} to {prices.last}" if prices.first else ""
    _say(f"[bold]{prices.name}[/bold]{period} ({prices.source}): {len(prices.close)} bars.", out)
    if data == "auto" and not prices.first:
        _say(
            'The S&P 500 is not installed (pip install "torch-gradwatch\\[demo]"), so these prices are synthetic.', out
        )
    _say(
        f"Forecast the volatility of the next {AHEAD} bars from windows of {LENGTH} bars x {len(market.FEATURES)} features.\n",
        out,
    )
    volatility = volatility_task(prices)
    deep = go(DEEP, volatility)
    for trained in deep:
        _show_depth(trained, out)

    _say(
        f"[bold]Order flow[/bold] (random numbers): {SEQUENCES} sequences of {LENGTH} bars x {len(market.FLOW_FEATURES)} features. In half of them the"
        f" imbalance was one standard deviation higher 210 to 240 bars ago. Tell in which: more than {NEED} bars matter, hence horizon={NEED}.\n",
        out,
    )
    flow = go(FLOW, flow_task(seed))
    for trained in flow:
        _show_time(trained, out)

    _say(
        f"Back to [bold]{prices.name}[/bold]. How many bars matter here nobody has declared, so how far back a network learns is shown and not judged.\n",
        out,
    )
    stock = go(STOCK, volatility)
    for trained in stock:
        _show_memory(trained, out)

    out.rule()
    out.print(_overview([*deep, *flow, *stock]))
    out.print()
    ill = flow[1].run
    status = int((ill.worst() or Severity.INFO) > Severity.INFO)
    python = (
        os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    )  # its folder need not be on PATH
    for command in (
        f"See it in TensorBoard:  {python} -m tensorboard.main --logdir {logdir}",
        f"Read it again:          {python} -m gradwatch report {logdir}/flow-lstm",
        f"Judge it in CI:         {python} -m gradwatch check {logdir}/flow-lstm   (exit status {status})",
    ):
        out.print(command, highlight=False, soft_wrap=True)


# --- the data ---


def _prices(data: str, seed: int) -> market.Prices:
    prices = market.sp500() if data != "synthetic" else None
    if prices is None and data == "sp500":
        raise ValueError(
            'the S&P 500 comes with the package arch, which is not installed: pip install "torch-gradwatch[demo]"'
        )
    return prices or market.flow_prices(seed, 5031)


def volatility_task(prices: market.Prices) -> Task:
    """Forecast the volatility of the next bars from a window of bars."""
    x, y = market.windows(prices, LENGTH, AHEAD)
    return Task(x, y, int(market.KNOWN * len(y)), "mse_loss", BATCH)


def flow_task(seed: int) -> Task:
    """Tell whether an event took place 210 to 240 bars ago."""
    x, y = market.order_flow(seed, LENGTH, SEQUENCES + UNSEEN)
    return Task(x, y, SEQUENCES, "cross_entropy", 64, clip=CLIP, horizon=NEED)


# --- the networks ---


def network(inputs: int, *, healthy: bool) -> nn.Sequential:
    """Build a deep network on `inputs` numbers: ReLU with He initialization, or sigmoids with what PyTorch gives."""
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


def recurrent(kind: str, outputs: int, *, remembers: int | None = None) -> nn.Module:
    """Build an RNN, LSTM or GRU with a readout of its newest output.

    Args:
        kind: "RNN", "LSTM" or "GRU"; in small letters it is the name of the module.
        outputs: numbers that it gives for each sequence; a single one has no dimension of its own.
        remembers: bars after which the cell of an LSTM still holds e^-1 of its content, by the bias of its forget gate; None leaves what PyTorch gives.

    """
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(kind.lower(), getattr(nn, kind)(len(market.FEATURES), STATE, batch_first=True))
            self.head = nn.Linear(STATE, outputs)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.get_submodule(kind.lower())(x)
            forecast: Tensor = self.head(states[:, -1])
            return forecast.squeeze(-1)

    made = Network()
    if remembers is not None:
        lstm = made.get_submodule("lstm")
        forget = slice(STATE, 2 * STATE)  # torch's order of the gates: input, forget, cell, output
        with torch.no_grad():
            lstm.get_parameter("bias_ih_l0")[forget] = math.log(remembers)
            lstm.get_parameter("bias_hh_l0")[forget] = 0.0  # the two are added up
    return made


def _deep(*, healthy: bool) -> tuple[nn.Module, Optimizer]:
    import torch

    net = network(LENGTH * len(market.FEATURES), healthy=healthy)
    return net, torch.optim.Adam(net.parameters(), lr=1e-3) if healthy else torch.optim.SGD(net.parameters(), lr=0.02)


def _recurrent(kind: str, outputs: int, *, remembers: int | None = None) -> tuple[nn.Module, Optimizer]:
    import torch

    net = recurrent(kind, outputs, remembers=remembers)
    return net, torch.optim.Adam(net.parameters(), lr=3e-3)


DEEP = (
    Subject(
        "sigmoid",
        f"{DEPTH} layers with sigmoid activations and PyTorch's default initialization.",
        partial(_deep, healthy=False),
    ),
    Subject("relu", f"The same {DEPTH} layers with ReLU and He initialization.", partial(_deep, healthy=True)),
)
FLOW = (
    Subject("flow-rnn", "A vanilla RNN as PyTorch makes it.", partial(_recurrent, "RNN", 2)),
    Subject("flow-lstm", "An LSTM as PyTorch makes it.", partial(_recurrent, "LSTM", 2)),
    Subject(
        "flow-lstm-bias",
        f"The same LSTM, its forget-gate bias set to {math.log(NEED):.1f}, the log of {NEED}.",
        partial(_recurrent, "LSTM", 2, remembers=NEED),
    ),
)
STOCK = tuple(
    Subject(f"prices-{kind.lower()}", f"{kind} as PyTorch makes it.", partial(_recurrent, kind, 1))
    for kind in ("RNN", "LSTM", "GRU")
)


# --- the training ---


@dataclass(frozen=True, eq=False)
class Trained:
    """A network after its training, and the record of it."""

    subject: Subject
    run: Run
    right: float | None
    """Share of the samples it was not trained on whose class it tells right; None where the targets are no classes."""

    @property
    def losses(self) -> tuple[float, float]:
        """The first one, and the mean of the last ten."""
        known = [s.loss for s in self.run.snapshots if s.loss is not None]
        return known[0], sum(known[-10:]) / len(known[-10:])

    @property
    def memories(self) -> list[SequenceStats]:
        """What each probe saw of the model's own memory or, where no need is declared, of its recurrent module's."""
        return [next(q for q in s.sequences if q.part in ("model", "")) for s in self.run.snapshots if s.sequences]


def _train_all(
    subjects: Sequence[Subject], task: Task, *, logdir: Path, seed: int, steps: int, out: Console
) -> list[Trained]:
    with Progress(console=out, transient=True, disable=not out.is_terminal) as progress:
        bar = progress.add_task("", total=steps * len(subjects))
        done = []
        for subject in subjects:
            progress.update(bar, description=f"training {subject.name}")
            done.append(train(subject, task, logdir=logdir, seed=seed, steps=steps, tick=lambda: progress.advance(bar)))
    return done


def train(subject: Subject, task: Task, *, logdir: Path, seed: int, steps: int, tick: Callable[[], object]) -> Trained:
    """Train a network, watched; its record goes to a folder of its name in `logdir`."""
    import torch
    from torch.nn import functional

    from gradwatch.watcher.watch import watch

    inputs, targets, loss_of = torch.from_numpy(task.x), torch.from_numpy(task.y), getattr(functional, task.loss)
    torch.manual_seed(seed)
    net, optimizer = subject.build()
    batches = torch.Generator(device="cpu").manual_seed(seed)
    # The alerts are shown from the record when all is done: not in the middle of a progress bar.
    with watch(net, optimizer, horizon=task.horizon, logdir=logdir / subject.name, on_alert=lambda _: None) as watcher:
        for _ in range(steps):
            pick = torch.randint(task.known, (task.batch,), generator=batches, device="cpu")
            loss = loss_of(net(inputs[pick]), targets[pick])
            optimizer.zero_grad()
            loss.backward()
            watcher.step(loss=loss)  # before clipping
            if task.clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), task.clip)
            optimizer.step()
            tick()
    right = None
    if not targets.is_floating_point():
        with torch.no_grad():
            right = (net(inputs[task.known :]).argmax(1) == targets[task.known :]).double().mean().item()
    return Trained(subject, read_run(logdir / subject.name), right)


# --- what is shown ---


def _say(text: str, out: Console) -> None:
    out.print(text, highlight=False)


def _show_depth(trained: Trained, out: Console) -> None:
    out.rule(trained.subject.name)
    _say(trained.subject.says, out)
    _say(
        "Loss {:.3f} at the first step, {:.3f} at the end (1 is no better than the mean).\n".format(*trained.losses),
        out,
    )
    out.print(run_summary(trained.run))
    out.print()


def _show_time(trained: Trained, out: Console) -> None:
    out.rule(trained.subject.name)
    _say(trained.subject.says, out)
    memory = trained.memories[-1:]
    for line in reach_lines(memory):
        out.print(line)
    _say(
        "Loss {:.3f} at the first step, {:.3f} at the end".format(*trained.losses)
        + f" (a coin's: {math.log(2):.3f}); {trained.right:.0%} of {UNSEEN} sequences that it has not seen told right.",
        out,
    )
    for part in (*map(LagProfile, memory), *alert_lines(trained.run.alerts)):
        out.print(part)
    out.print()


def _show_memory(trained: Trained, out: Console) -> None:
    for line in reach_lines(trained.memories[-1:]):
        out.print(line)
    before = "".join(f"; it began with the last {m.horizon}" for m in trained.memories[:1])
    _say("Loss {:.3f} at the first step, {:.3f} at the end".format(*trained.losses) + f"{before}.\n", out)


def _overview(networks: Sequence[Trained]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("network", "learns from", "loss", "alerts"):
        table.add_column(name, justify="right" if name == "loss" else "left")
    for trained in networks:
        bad = [alert for alert in trained.run.alerts if alert.severity > Severity.INFO]
        reach = "".join(
            f"{'at least' if m.censored else 'the last'} {m.horizon} of {m.length}" for m in trained.memories[-1:]
        )
        alerts = Text(
            " ".join(sorted({alert.finding.code for alert in bad})) or "none", style="yellow" if bad else "green"
        )
        table.add_row(trained.subject.name, reach, f"{trained.losses[1]:.3f}", alerts)
    return table
