"""What gradients through time cost: probe steps in turn with plain ones, and a control; memory; and a long run.

python -m benchmarks.timesteps           # everything, about ten minutes on one core; --quick: seconds
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.command import parsed, parser
from benchmarks.overhead import shown
from benchmarks.workloads import lstm
from gradwatch import Watcher, watch

INPUTS = 32


class Readout(nn.Module):
    """A recurrent layer and a readout of its last step."""

    def __init__(self, kind: type[nn.RNNBase], hidden: int) -> None:
        """Build it."""
        super().__init__()
        self.rnn, self.head = kind(INPUTS, hidden, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one number per sequence."""
        return self.head(self.rnn(x)[0][:, -1])


def trainer(net: nn.Module, x: torch.Tensor) -> tuple[torch.optim.Optimizer, Callable[[], float]]:
    """Return an optimizer, and a function that makes a training step and gives its thread CPU seconds."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def step() -> float:
        began = time.thread_time()
        optimizer.zero_grad()
        net(x).pow(2).mean().backward()
        optimizer.step()
        return time.thread_time() - began

    return optimizer, step


def input_alone(watcher: Watcher) -> None:
    """Take the recurrent modules for ones that cannot be walked back through: the gradient of their inputs is left."""
    recorder = watcher._forward_pass._probes._asked[-1]._recorder
    arm = recorder.arm

    def armed(*args: Any, **kwargs: Any) -> Any:
        chosen = arm(*args, **kwargs)
        for target in recorder.targets.values():
            target.kind, target.time = None, 1
        return chosen

    recorder.arm = armed  # type: ignore[method-assign]


def ratios(kind: type[nn.RNNBase], steps: int, hidden: int, batch: int, rounds: int) -> None:
    """Compare steps: plain, with the input's gradient per timestep, and with all of it on 8 rows.

    What a probe of the parameters takes is measured beside and taken off: it is no part of either, and has its own
    benchmark.
    """
    torch.manual_seed(0)
    x = torch.randn(batch, steps, INPUTS)
    runs: dict[str, Callable[[], float]] = {}
    for what in ("plain", "parameters", "input", "all", "control"):
        net = Readout(kind, hidden)
        optimizer, runs[what] = trainer(net, x)
        if what not in ("plain", "control"):
            timesteps = False if what == "parameters" else "auto"
            watcher = watch(
                net,
                optimizer,
                every_n_steps=1,
                probe_every_n_steps=1,
                timesteps=timesteps,
                detectors=(),
                on_alert=lambda _: None,
            )
            if what == "input":
                input_alone(watcher)
    times: dict[str, list[float]] = {what: [] for what in runs}
    order = [*runs, *reversed(runs)]
    for what in order:
        runs[what]()  # arms, and warms up
    for _ in range(rounds):
        for what in order:
            times[what].append(runs[what]())
    base = statistics.median(times["plain"])
    extra = statistics.median(times["parameters"]) - base
    parts = "   ".join(
        f"{what} {shown([(t - extra * (what != 'control')) / base for t in times[what]])}"
        for what in ("input", "all", "control")
    )
    print(f"{kind.__name__:4} T={steps:4} H={hidden:3} B={batch:2}  plain {base * 1e3:8.1f} ms   {parts}", flush=True)


def average(build: Callable[[], tuple[nn.Module, Callable[[], torch.Tensor]]], name: str, rounds: int) -> None:
    """Measure the default cadence after step 200, with time on and no `horizon=`.

    That is one probe in 50 steps, five measured besides.
    """
    torch.manual_seed(0)
    net, loss = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        watcher = watch(net, optimizer, logdir=folder, on_alert=lambda _: None)
        times: dict[str, list[float]] = {"plain": [], "measured": [], "probe": []}
        for _ in range(rounds):
            for what in ("plain", "probe", "measured", "plain"):
                watcher._steps[0]._count.number = {"plain": 203, "measured": 210, "probe": 250}[what]
                if what == "probe":
                    watcher._steps[0].look_ahead()
                began = time.thread_time()
                optimizer.zero_grad()
                value = loss()
                watcher.record(value)
                value.backward()
                optimizer.step()
                times[what].append(time.thread_time() - began)
        watcher.close()
    plain, measured, probe = (statistics.median(times[what]) for what in ("plain", "measured", "probe"))
    share = ((probe - plain) + 4 * (measured - plain)) / 50 / plain
    print(
        f"{name}   unmeasured {plain * 1e3:.1f} ms, measured {measured / plain:.3f}x, "
        f"probe {probe / plain:.3f}x: on average {share:.2%} of a step"
    )


MEMORY = """
import sys
import torch
from torch import nn
from benchmarks.timesteps import Readout, trainer
from gradwatch import watch
torch.set_num_threads(1)
torch.manual_seed(0)
hidden, batch, length = map(int, sys.argv[2:])
x = torch.randn(batch, length, 32)
net = Readout(nn.LSTM, hidden)
optimizer, step = trainer(net, x)
if sys.argv[1] == "probe":
    watch(net, optimizer, every_n_steps=1, probe_every_n_steps=1, detectors=(), on_alert=lambda _: None)
if sys.argv[1] != "base":
    for _ in range(4):
        step()
else:
    net(x[:1, :8]).sum().backward()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def memory(steps: int, hidden: int, batch: int, processes: int) -> None:
    """Compare the peak resident memory of processes with plain and with probe steps, less a base without a step."""
    command, sizes = [sys.executable, "-c", MEMORY], [str(hidden), str(batch), str(steps)]
    peak = {
        what: statistics.median(
            int(subprocess.run([*command, what, *sizes], capture_output=True, text=True, check=True).stdout) / 1024
            for _ in range(processes)
        )
        for what in ("base", "plain", "probe")
    }
    plain, probe = peak["plain"] - peak["base"], peak["probe"] - peak["base"]
    print(
        f"LSTM T={steps} H={hidden} B={batch}, 8 rows: peak of plain steps {plain:.0f} MiB, "
        f"of probe steps {probe:.0f} MiB: {(probe - plain) / plain:.2f} of it more"
    )


def growth(steps: int) -> None:
    """Watch resident memory over many probe steps."""
    torch.manual_seed(0)
    net, x = Readout(nn.LSTM, 8), torch.randn(4, 12, INPUTS)
    optimizer, step = trainer(net, x)
    with watch(net, optimizer, every_n_steps=1, probe_every_n_steps=1, horizon=10, on_alert=lambda _: None):
        sizes = []
        for number in range(steps):
            step()
            if number % (steps // 5) == steps // 10:
                sizes.append(_resident())
    print(f"{steps} steps, each a probe with horizon=: resident memory {', '.join(f'{s:.1f}' for s in sizes)} MiB")


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


SHAPES = (
    (nn.LSTM, 64, 32, 8),
    (nn.LSTM, 64, 128, 64),
    (nn.LSTM, 512, 32, 64),
    (nn.LSTM, 512, 128, 64),
    (nn.LSTM, 512, 256, 64),
    (nn.GRU, 512, 128, 64),
    (nn.RNN, 512, 128, 64),
)
"""Kind, timesteps, hidden width and rows of the recurrent layer."""


def main() -> None:
    """Print all tables."""
    quick = parsed(parser(__doc__)).quick
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, one thread; thread CPU of a training step over that of a plain one, "
        "medians [quartiles]; control: plain again"
    )
    for kind, steps, hidden, batch in [(k, 16, 8, 4) for k in (nn.LSTM, nn.GRU, nn.RNN)] if quick else SHAPES:
        ratios(kind, steps, hidden, batch, 2 if quick else 6 if steps * hidden * batch > 2**20 else 40)
    if quick:
        average(lambda: lstm(8, 16, 4), "lstm 2x8 T=16 B=4", 2)
        memory(64, 32, 8, 1)
    else:
        average(lstm, "lstm 2x128 T=256 B=32", 20)
        memory(512, 128, 64, 3)
    growth(50 if quick else 10_000)


if __name__ == "__main__":
    main()
