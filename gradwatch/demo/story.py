"""`gradwatch demo`: sick networks beside healthy ones, in depth on real market data, in time on order flow."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from gradwatch.demo import market
from gradwatch.demo.networks import DEEP, FLOW, STOCK, Subject
from gradwatch.demo.tasks import AHEAD, LENGTH, NEED, SEQUENCES, UNSEEN, Task, flow_task, volatility_task
from gradwatch.sinks.reading import Run, read_run
from gradwatch.sinks.terminal.alert_text import alert_lines
from gradwatch.sinks.terminal.lag_profile import LagProfile, reach_lines
from gradwatch.sinks.terminal.page import run_summary
from gradwatch.values.report import Severity
from gradwatch.values.sequences import SequenceStats


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
    # These networks are small: a second thread waits more than it works, and many times as long on a busy machine.
    torch.set_num_threads(1)
    try:
        _tell(Path(logdir), seed=seed, steps=steps, data=data, out=out)
    finally:
        torch.set_num_threads(threads)


def _tell(logdir: Path, *, seed: int, steps: int, data: str, out: Console) -> None:
    prices = market.prices_of(data, seed)
    go = partial(_train_all, logdir=logdir, seed=seed, steps=steps, out=out)
    period = f", {prices.first} to {prices.last}" if prices.first else ""
    _say(f"[bold]{prices.name}[/bold]{period} ({prices.source}): {len(prices.close)} bars.", out)
    if data == "auto" and not prices.first:
        _say(
            'The S&P 500 is not installed (pip install "torch-gradwatch\\[demo]"), so these prices are synthetic.', out
        )
    _say(
        f"Forecast the volatility of the next {AHEAD} bars from windows of {LENGTH} bars x"
        f" {len(market.FEATURES)} features.\n",
        out,
    )
    volatility = volatility_task(prices)
    deep = go(DEEP, volatility)
    for trained in deep:
        _show_depth(trained, out)

    _say(
        f"[bold]Order flow[/bold] (random numbers): {SEQUENCES} sequences of {LENGTH} bars x"
        f" {len(market.FLOW_FEATURES)} features. In half of them the imbalance was one standard deviation higher 210 to"
        f" 240 bars ago. Tell in which: more than {NEED} bars matter, hence horizon={NEED}.\n",
        out,
    )
    flow = go(FLOW, flow_task(seed))
    for trained in flow:
        _show_time(trained, out)

    _say(
        f"Back to [bold]{prices.name}[/bold]. Nobody has declared how many bars matter here, so how far back a network"
        " learns is shown and not judged.\n",
        out,
    )
    stock = go(STOCK, volatility)
    for trained in stock:
        _show_horizon(trained, out)

    out.rule()
    out.print(_overview([*deep, *flow, *stock]))
    out.print()
    ill = flow[1].run
    status = int((ill.worst() or Severity.INFO) > Severity.INFO)
    executable = Path(sys.executable)  # its folder need not be on PATH
    python = os.path.relpath(executable) if executable.is_relative_to(Path.cwd()) else executable
    for command in (
        f"See it in TensorBoard:  {python} -m tensorboard.main --logdir {logdir}",
        f"Read it again:          {python} -m gradwatch report {logdir}/flow-lstm",
        f"Judge it in CI:         {python} -m gradwatch check {logdir}/flow-lstm   (exit status {status})",
    ):
        out.print(command, highlight=False, soft_wrap=True)


# --- the training ---


@dataclass(frozen=True, eq=False)
class Trained:
    """A network after its training, and the record of it."""

    subject: Subject
    run: Run
    right: float | None
    """Share of the samples it was not trained on that it classifies correctly; None if the targets are not classes."""

    @property
    def losses(self) -> tuple[float, float]:
        """The first one, and the mean of the last ten."""
        known = [s.loss for s in self.run.snapshots if s.loss is not None]
        return known[0], sum(known[-10:]) / len(known[-10:])

    @property
    def horizons(self) -> list[SequenceStats]:
        """The model's own horizon at each probe or, where no need is declared, that of its recurrent module."""
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
    newest = trained.horizons[-1:]
    for line in reach_lines(newest):
        out.print(line)
    _say(
        "Loss {:.3f} at the first step, {:.3f} at the end".format(*trained.losses)
        + f" (a coin's: {math.log(2):.3f});"
        + f" {trained.right:.0%} of {UNSEEN} sequences it had not seen are classified correctly.",
        out,
    )
    for part in (*map(LagProfile, newest), *alert_lines(trained.run.alerts)):
        out.print(part)
    out.print()


def _show_horizon(trained: Trained, out: Console) -> None:
    for line in reach_lines(trained.horizons[-1:]):
        out.print(line)
    before = "".join(f"; it began with the last {m.horizon}" for m in trained.horizons[:1])
    _say("Loss {:.3f} at the first step, {:.3f} at the end".format(*trained.losses) + f"{before}.\n", out)


def _overview(networks: Sequence[Trained]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("network", "learns from", "loss", "alerts"):
        table.add_column(name, justify="right" if name == "loss" else "left")
    for trained in networks:
        bad = [alert for alert in trained.run.alerts if alert.severity > Severity.INFO]
        reach = "".join(
            f"{'at least' if m.censored else 'the last'} {m.horizon} of {m.length}" for m in trained.horizons[-1:]
        )
        alerts = Text(
            " ".join(sorted({alert.finding.code for alert in bad})) or "none", style="yellow" if bad else "green"
        )
        table.add_row(trained.subject.name, reach, f"{trained.losses[1]:.3f}", alerts)
    return table
