"""What gradwatch costs: thread CPU inside of real training steps, in turn with what it is compared to, and a control.

python -m benchmarks.overhead            # everything, a few minutes on one core; --quick: seconds
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from benchmarks.command import parsed, parser
from benchmarks.workloads import Build, Clock, conv, gpt, lstm, mlp
from gradwatch import watch
from gradwatch.measurement.measurement import Measurement
from gradwatch.measurement.parameters import undisturbed
from gradwatch.measurement.processes import Processes
from gradwatch.measurement.transfer import Transfer
from gradwatch.measurement.updates import Updates
from gradwatch.model.nested import floats

ALONE = Processes((), alone=True)


def shown(values: list[float], scale: float = 1.0, unit: str = "") -> str:
    """Return the median and the quartiles."""
    q = statistics.quantiles(values, n=4)
    return f"{q[1] * scale:8.2f}{unit} [{q[0] * scale:.2f}, {q[2] * scale:.2f}]"


def measuring(name: str, build: Build, rounds: int) -> None:
    """Compare reading the gradients, and a probe of the parameters, with `clip_grad_norm_` on the same gradients."""
    torch.manual_seed(0)
    net, loss = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    watcher = watch(net, optimizer, every_n_steps=10**9)
    steps, clock, updates = watcher._steps[0], Clock(), Updates()
    parameters = list(net.parameters())

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)

    def measure(*, probe: bool = False) -> Measurement:
        with undisturbed():
            members, columns = steps._stepped.now(optimizer), steps._stepped.columns
            reading = Measurement(0, watcher._model_map.info, "applied", probe=probe)
            reading.gradients(columns, [p.grad for p in members if p.grad is not None], None, half=False)
            if probe:
                reading.parameters.weights(columns, members)
                updates.copy(columns, members, complete=True)
            else:
                reading.snapshot(0, "", ALONE)
            return reading

    def probe_end(reading: Measurement) -> None:
        with undisturbed():
            updates.measure(reading.parameters, reading.parameters.read, probe=True)
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
    print(f"{name:15} {tensors:5} tensors {size:6.1f} MB  clip {base * 1e6:8.0f} us"
          f"   measure / clip {shown(ratios['measure'])}"
          f"   probe / clip {shown(ratios['probe'])}   control {shown(ratios['control'])}", flush=True)  # fmt: skip


def whole(name: str, build: Build, steps: int, beginning: int = 20) -> None:
    """Compare measuring, detectors, record and TensorBoard with the bare step: every step, and the default cadence."""
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
            mine, clock = watcher._steps[0], Clock()
            mine._count.number = begin
            mine.on_look = clock.around(mine.on_look)  # type: ignore[method-assign]
            mine.on_stepped = clock.around(mine.on_stepped)  # type: ignore[method-assign]
            inside, bare = [], []
            for number in range(beginning + steps):
                began = time.thread_time()
                optimizer.zero_grad()
                value = loss()
                watcher.record(value)
                value.backward()
                optimizer.step()
                total, ours = time.thread_time() - began, clock.take()
                if number >= beginning:  # the first picture loads the libraries that draw it, once in a process
                    inside.append(ours)
                    bare.append(total - ours)
            watcher.close()
            # The mean of the inside, because probes and pictures are rare and dear; the median of the step.
            figures[label] = [statistics.mean(inside), statistics.median(bare), statistics.median(inside), max(inside)]
    for label, (mean, step, median, worst) in figures.items():
        print(
            f"{name:15} {label:24} step {step * 1e3:8.2f} ms   gradwatch {mean / step:7.2%} "
            f"(mean {mean * 1e6:7.0f} us, median {median * 1e6:7.0f}, max {worst * 1e6:7.0f})",
            flush=True,
        )


@contextlib.contextmanager
def output_norms() -> Iterator[None]:
    """Take the norm of the gradient at all that modules give, and nothing else."""
    arrived: list[torch.Tensor] = []

    def give(_module: nn.Module, _inputs: object, output: object) -> None:
        for tensor in floats(output):
            node: Any = tensor.grad_fn
            if node is not None:
                node.register_prehook(lambda gradients: arrived.append(torch.linalg.vector_norm(gradients[0])))

    handle = register_module_forward_hook(give)
    try:
        yield
    finally:
        handle.remove()


def forward_trace(name: str, build: Build, rounds: int) -> None:
    """Measure what a probe's look at activations costs, in turn with the same step without it.

    Once while no layer is in question, and once while half of them are. That is all of it: arming, the hooks of the
    forward and the backward pass, what is worked out at the step, and the values in the end. Beside it, what nobody
    can go below who wants the norm of the gradient at what each module gives: empty hooks, and that norm.
    """
    torch.manual_seed(0)
    net, loss = build()
    watcher = watch(net, torch.optim.SGD(net.parameters(), lr=1e-4), every_n_steps=10**9, on_alert=lambda _: None)
    steps = watcher._steps[0]
    layers = [layer.name for layer in watcher._model_map.info.layers]
    questions: dict[str, frozenset[str] | None] = {
        "without": None,
        "no layer in question": frozenset(),
        "half of them in question": frozenset(layers[::2]),
        "norms alone": None,
        "control": None,
    }

    def step(suspects: frozenset[str] | None, *, norms_alone: bool) -> float:
        began = time.thread_time()
        if suspects is not None:
            steps.look_ahead()
            watcher._forward_pass._probes.suspect(suspects)
        net.zero_grad()
        with output_norms() if norms_alone else contextlib.nullcontext():
            loss().backward()
        if suspects is not None:
            with undisturbed():
                transfer = Transfer()
                parts, _ = steps._seen(transfer)
                transfer.run()
                for part in parts:
                    part()
        return time.thread_time() - began

    times: dict[str, list[float]] = {what: [] for what in questions}
    for number in range(rounds + 1):
        for what in (*questions, *reversed(questions)):
            spent = step(questions[what], norms_alone=what == "norms alone")
            if number:  # the first round warms up
                times[what].append(spent)
    watcher.close()
    base = statistics.median(times.pop("without"))
    parts = "   ".join(f"{what} {shown([t / base for t in spent])}" for what, spent in times.items())
    print(f"{name:15} step with the forward trace of a probe / without: {parts}", flush=True)


class Still(torch.optim.Optimizer):
    """An optimizer that does nothing, so that what is left of a step is the hooks."""

    def __init__(self, parameters: Any) -> None:
        """Take the parameters."""
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


def idle(rounds: int) -> None:
    """Return what a step costs that is not measured, by the number of parameters."""
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
            f"a step that is not measured, {tensors:6} tensors: "
            f"{extra:6.1f} us more than the bare {statistics.median(times['bare']):.1f} us",
            flush=True,
        )


def importing(processes: int) -> None:
    """Return the seconds of `import gradwatch` in a fresh process, and whether torch came along."""
    code = (
        "import time; a = time.perf_counter(); import gradwatch; print(time.perf_counter() - a); "
        "import sys; print('torch' in sys.modules)"
    )
    seconds = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(processes)
    ]
    print(f"import gradwatch: {shown([float(s) for s, _ in seconds], 1e3, ' ms')}, torch imported: {seconds[0][1]}")


def main() -> None:
    """Print all tables."""
    quick = parsed(parser(__doc__)).quick
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, one thread; medians [quartiles] of thread CPU; "
        "control: clip_grad_norm_ against itself"
    )
    if quick:
        small: dict[str, Build] = {
            "mlp 3x8": lambda: mlp(3, 8, 4),
            "gpt, small": lambda: gpt(1, 32, 8),
            "conv 2, 8x8": lambda: conv(8, 2),
            "lstm 2x8": lambda: lstm(8, 8, 4),
        }
        for name, build in small.items():
            measuring(name, build, 2)
            whole(name, build, 4, beginning=2)
            forward_trace(name, build, 2)
        idle(1)
        importing(2)
        return
    middling: Build = lambda: mlp(50, 256, 128)  # noqa: E731
    measuring("mlp 20x32", lambda: mlp(20, 32, 64), 120)
    measuring("mlp 50x256", middling, 30)
    measuring("mlp 249x64", lambda: mlp(249, 64, 16), 30)
    measuring("linear 1999x16", lambda: mlp(1999, 16, 4, nn.Identity), 10)
    measuring("50x256 vanished", lambda: mlp(50, 256, 128, vanished=True), 30)
    measuring("gpt", gpt, 10)
    whole("lstm 2x128", lstm, 100)  # whole periods of the cadence
    whole("gpt", gpt, 100)
    whole("conv 20, 32x32", conv, 100)
    whole("conv 20, 16x16", lambda: conv(16), 100)
    whole("mlp 50x256", middling, 240)
    forward_trace("mlp 50x256", middling, 30)
    forward_trace("gpt", gpt, 15)
    forward_trace("conv 20", conv, 15)
    idle(30)
    importing(9)


if __name__ == "__main__":
    main()
