"""What gradwatch costs: thread CPU inside of real training steps, in turn with what it is compared to, and a control.

python -m benchmarks.overhead            # everything, a few minutes on one core; --quick for a look
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from gradwatch.watcher.processes import Processes
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from gradwatch import watch
from gradwatch.measurement.measurement import Measurement
from gradwatch.measurement.parameters import undisturbed
from gradwatch.watcher.warn_once import Once

Step = Callable[[], torch.Tensor]

ALONE = Processes((), Once(), alone=True)


def mlp(
    layers: int, width: int, batch: int, kind: type[nn.Module] = nn.ReLU, *, vanished: bool = False
) -> tuple[nn.Module, Step]:
    """Build a plain network with He initialization, so that its gradients have the size of a sound network's: two tensors per layer."""
    net = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), kind())), nn.Linear(width, 1))
    for module in net:
        if isinstance(module, nn.Linear) and not vanished:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if kind is nn.ReLU else "linear")
    x, y = torch.randn(batch, width), torch.randn(batch, 1)
    return net, lambda: mse_loss(net(x), y)


class Gpt(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, blocks: int = 6, width: int = 256, vocabulary: int = 512, length: int = 128) -> None:
        """Build it."""
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the logits of the next token."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(
            self.norm(self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1])), mask=mask, is_causal=True))
        )


def gpt() -> tuple[nn.Module, Step]:
    """T=128, B=8."""
    net = Gpt()
    x = torch.randint(512, (8, 129))
    return net, lambda: cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


class Lstm(nn.Module):
    """Two layers of 128, and a readout of the last step."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 128, 2, batch_first=True), nn.Linear(128, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give one number per sequence."""
        return self.head(self.lstm(x)[0][:, -1])


def lstm() -> tuple[nn.Module, Step]:
    """T=256, B=32."""
    net, x, y = Lstm(), torch.randn(32, 256, 32), torch.randn(32, 1)
    return net, lambda: mse_loss(net(x), y)


def conv(size: int = 32) -> tuple[nn.Module, Step]:
    """Twenty convolutions of 32 channels with BatchNorm, on 32 square images."""
    blocks = [
        m
        for i in range(20)
        for m in (nn.Conv2d(32 if i else 3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    ]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    x, y = torch.randn(32, 3, size, size), torch.randint(10, (32,))
    return net, lambda: cross_entropy(net(x), y)


class Clock:
    """Adds up the thread CPU seconds that are spent inside of what it wraps."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began

        return timed

    def take(self) -> float:
        """Give what has added up, and begin anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def shown(values: list[float], scale: float = 1.0, unit: str = "") -> str:
    """Give the median and the quartiles."""
    q = statistics.quantiles(values, n=4)
    return f"{q[1] * scale:8.2f}{unit} [{q[0] * scale:.2f}, {q[2] * scale:.2f}]"


def measuring(name: str, build: Callable[[], tuple[nn.Module, Step]], rounds: int) -> None:
    """Compare reading the gradients, and a probe of the parameters, with `clip_grad_norm_` on the same gradients in the same steps."""
    torch.manual_seed(0)
    net, loss = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    watcher = watch(net, optimizer, every_n_steps=10**9)
    slot, clock = watcher._slots[0], Clock()
    parameters = list(net.parameters())

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)

    def measure(*, probe: bool = False) -> Measurement:
        with undisturbed():
            inventory = watcher._inventory
            members = inventory.parameters(slot)
            reading = Measurement(0, inventory.info, "applied", probe=probe)
            reading.gradients(slot.columns, [p.grad for p in members if p.grad is not None], None, half=False)
            if probe:
                reading.parameters.weights(slot.columns, members)
                reading.parameters.copy(slot.columns, members, 0, slot.spare)
            else:
                reading.snapshot(0, "", ALONE)
            return reading

    def probe_end(reading: Measurement) -> None:
        with undisturbed():
            reading.parameters.updates(slot.spare)
        reading.snapshot(0, "", ALONE)

    times: dict[str, list[float]] = {"clip": [], "measure": [], "control": [], "probe": []}
    order = ["clip", "measure", "probe", "control", "control", "probe", "measure", "clip"]
    for _ in range(rounds):
        for what in order:
            optimizer.zero_grad()
            loss().backward()
            reading = (
                clock.around(measure)()
                if what == "measure"
                else clock.around(measure)(probe=True)
                if what == "probe"
                else clock.around(clip)()
            )
            optimizer.step()
            if what == "probe":
                clock.around(probe_end)(reading)
            times[what].append(clock.take())
    watcher.close()
    base = statistics.median(times["clip"])
    ratios = {what: [t / base for t in ts] for what, ts in times.items()}
    tensors, size = len(parameters), sum(p.numel() * p.element_size() for p in parameters) / 2**20
    print(f"{name:15} {tensors:5} tensors {size:6.1f} MB  clip {base * 1e6:8.0f} us   measure / clip {shown(ratios['measure'])}"
          f"   probe / clip {shown(ratios['probe'])}   control {shown(ratios['control'])}", flush=True)  # fmt: skip


def whole(name: str, build: Callable[[], tuple[nn.Module, Step]], rounds: int) -> None:
    """Compare all of it with the bare step: measuring, detectors, record and TensorBoard, at every step and at the default cadence."""
    torch.manual_seed(0)
    net, loss = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, every, begin in (("every step", 1, 0), ("default, after step 200", None, 200)):
            watcher = watch(
                net,
                optimizer,
                logdir=f"{folder}/{label}",
                every_n_steps=every,
                timesteps=False,
                on_alert=lambda _: None,
            )
            for slot in watcher._slots:
                slot.count = begin
            clock = Clock()
            watcher.on_look, watcher.on_stepped = clock.around(watcher.on_look), clock.around(watcher.on_stepped)  # type: ignore[method-assign]
            inside, bare = [], []
            for number in range(20 + max(rounds, 50) * 2):  # whole periods of the cadence
                began = time.thread_time()
                optimizer.zero_grad()
                value = loss()
                watcher.record(value)
                value.backward()
                optimizer.step()
                total, mine = time.thread_time() - began, clock.take()
                if number >= 20:  # the first picture loads the libraries that draw it, once in a process
                    inside.append(mine)
                    bare.append(total - mine)
            watcher.close()
            # The mean of the inside, because probes and pictures are rare and dear; the median of the step.
            figures[label] = [statistics.mean(inside), statistics.median(bare), statistics.median(inside), max(inside)]
    for label, (mean, step, median, worst) in figures.items():
        print(
            f"{name:15} {label:24} step {step * 1e3:8.2f} ms   gradwatch {mean / step:7.2%} (mean {mean * 1e6:7.0f} us, median {median * 1e6:7.0f}, max {worst * 1e6:7.0f})",
            flush=True,
        )


def forward_hook(rounds: int) -> None:
    """Give what the forward trace of a probe costs, in turn with the same step without it."""
    for name, build in (("mlp 50x256", lambda: mlp(50, 256, 128)), ("gpt", gpt), ("conv 20", conv)):
        torch.manual_seed(0)
        net, loss = build()
        watcher = watch(net, torch.optim.SGD(net.parameters(), lr=1e-4), every_n_steps=10**9)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            for armed in (True, False, False, True):
                began = time.thread_time()
                if armed:
                    watcher.look_ahead()
                value = loss()
                if armed:
                    watcher._inventory.take_trace(watcher._slots[0])
                value.backward()
                times[armed].append(time.thread_time() - began)
        watcher.close()
        base = statistics.median(times[False])
        print(
            f"{name:15} step with the forward trace of a probe / without {shown([t / base for t in times[True]])}   control {shown([t / base for t in times[False]])}",
            flush=True,
        )


class Still(torch.optim.Optimizer):
    """An optimizer that does nothing, so that what is left of a step is the hooks."""

    def __init__(self, parameters: Any) -> None:
        """Take the parameters."""
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


def idle(rounds: int) -> None:
    """Give what a step costs that is not measured, by the number of parameters."""
    for tensors in (10, 1000, 10_000):
        parameters = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(tensors))
        bare, watched = Still(parameters.parameters()), Still(parameters.parameters())
        with watch(parameters, watched, every_n_steps=10**9) as watcher:
            watched.step()
            times: dict[str, list[float]] = {"bare": [], "watched": []}
            for _ in range(rounds * 20):
                for what, optimizer in (("bare", bare), ("watched", watched), ("watched", watched), ("bare", bare)):
                    began = time.thread_time_ns()
                    optimizer.step()
                    times[what].append((time.thread_time_ns() - began) / 1e3)
                watcher.record(0.5)
        extra = statistics.median(times["watched"]) - statistics.median(times["bare"])
        print(
            f"a step that is not measured, {tensors:6} tensors: {extra:6.1f} us more than the bare {statistics.median(times['bare']):.1f} us",
            flush=True,
        )


def importing() -> None:
    """Give the seconds of `import gradwatch` in a fresh process, and whether torch came along."""
    code = "import time; a = time.perf_counter(); import gradwatch; print(time.perf_counter() - a); import sys; print('torch' in sys.modules)"
    seconds = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(9)
    ]
    print(f"import gradwatch: {shown([float(s) for s, _ in seconds], 1e3, ' ms')}, torch imported: {seconds[0][1]}")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 5 if parser.parse_args().quick else 30
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, one thread; medians [quartiles] of thread CPU; control: clip_grad_norm_ against itself"
    )
    measuring("mlp 20x32", lambda: mlp(20, 32, 64), rounds * 4)
    measuring("mlp 50x256", lambda: mlp(50, 256, 128), rounds)
    measuring("mlp 249x64", lambda: mlp(249, 64, 16), rounds)
    measuring("linear 1999x16", lambda: mlp(1999, 16, 4, nn.Identity), max(rounds // 3, 3))
    measuring("50x256 vanished", lambda: mlp(50, 256, 128, vanished=True), rounds)
    measuring("gpt", gpt, max(rounds // 3, 3))
    whole("lstm 2x128", lstm, rounds)
    whole("gpt", gpt, rounds)
    whole("conv 20, 32x32", conv, rounds)
    whole("conv 20, 16x16", lambda: conv(16), rounds)
    whole("mlp 50x256", lambda: mlp(50, 256, 128), rounds * 4)
    forward_hook(rounds)
    idle(rounds)
    importing()


if __name__ == "__main__":
    main()
