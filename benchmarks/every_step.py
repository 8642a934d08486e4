"""What everything costs, at every step, beside `clip_grad_norm_`: of two builds of gradwatch in one run, and of peers.

python -m benchmarks.every_step                       # 1,000 steps of each, an hour and a half; --quick: seconds
python -m benchmarks.every_step --steps 100 --only lstm conv
python -m benchmarks.every_step --against db0d010     # and an earlier commit, in turn with this one

Each build has a process of its own; they take turns, and so do the loops in each: plain, with clipping, watched, plain
again for control. Everything is reading, detectors, record and TensorBoard, flushing and closing included; what is
counted is the CPU time of the training thread within gradwatch and, of probes, all by which their step is longer than a
plain one, because their hooks run in its passes. *least* is the floor: each norm read once, by torch,
and a line of JSON. Peers do what they do by themselves: gradsnitch and neurolens do not look at every step.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.command import parsed, parser
from benchmarks.workloads import Build, Clock, conv, gpt, lstm, mlp

WORKLOADS: Mapping[str, Build] = {
    "MLP 10x128": lambda: mlp(9, 128, 64),
    "MLP 50x256": lambda: mlp(49, 256, 128),
    "LSTM 2x128, T=256": lstm,
    "GPT 6x256": lambda: gpt(length=64, batch=4),
    "20 conv 16x16": lambda: conv(16),
    "500 small layers": lambda: mlp(499, 16, 8),
    "10 tensors": lambda: mlp(4, 16, 8),
    "100 tensors": lambda: mlp(49, 16, 8),
    "1,000 tensors": lambda: mlp(499, 16, 8, nn.Identity),
    "10,000 tensors": lambda: mlp(4999, 16, 4, nn.Identity),
    "LSTM 2x32, T=64": lambda: lstm(32, 64, 8),
    "LSTM 2x32, T=512": lambda: lstm(32, 512, 8),
    "LSTM 2x32, T=2048": lambda: lstm(32, 2048, 8),
}
WARM = 20
"""Steps before those that count: libraries are loaded, and the first picture is drawn."""
NEVER = 10**9


def probed(step: int) -> bool:
    """Tell whether a step is a probe by default."""
    return step == 1 or (step > 0 and step % (10 if step <= 200 else 50) == 0)


class Loop:
    """A training loop of its own, which adds up what is spent in it, and within what watches it."""

    def __init__(self, build: Build, folder: str) -> None:
        """Build it."""
        torch.manual_seed(0)
        self.folder = folder
        self.net, self.loss = build()
        self.parameters = list(self.net.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-4)
        self.clock = Clock()
        self.around = self.clock.around
        self.taken: list[tuple[float, float, bool]] = []
        """Of each step, the seconds that it took, those within what watches it, and whether it was a probe."""
        self.closing = 0.0

    def step(self, *, counts: bool) -> None:
        """Train one step."""
        _, probe, began = self.clock.take(), self.is_probe(), time.thread_time()
        self.optimizer.zero_grad()
        value = self.loss()
        self.told(value)
        value.backward()
        self.seen()
        self.optimizer.step()
        self.stepped()
        if counts:
            self.taken.append((time.thread_time() - began, self.clock.take(), probe))
        self.after()

    def is_probe(self) -> bool:
        """Tell whether hooks run within the forward pass of the next step."""
        return False

    def told(self, value: torch.Tensor) -> None:
        """Tell the loss."""

    def seen(self) -> None:
        """Look at the gradients."""

    def stepped(self) -> None:
        """Look at what the step has done."""

    def after(self) -> None:
        """Do what is to be done between two steps."""

    def close(self) -> None:
        """Finish."""


class Clipped(Loop):
    """With `clip_grad_norm_`."""

    def seen(self) -> None:
        """Clip."""
        self.around(torch.nn.utils.clip_grad_norm_)(self.parameters, 1e9)


class Least(Loop):
    """With the least that any instrument does: each norm read once, by torch, and written as a line of JSON."""

    def __init__(self, build: Build, folder: str) -> None:
        """Open a file."""
        super().__init__(build, folder)
        self.file = Path(f"{folder}.jsonl").open("w", encoding="utf-8")  # noqa: SIM115  (until it is closed)

    def seen(self) -> None:
        """Write the norms."""

        def write() -> None:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            self.file.write(json.dumps(torch.stack(torch._foreach_norm(gradients)).tolist()) + "\n")

        self.around(write)()

    def close(self) -> None:
        """Close it."""
        self.file.close()


class Watched(Loop):
    """With everything of gradwatch: at every step without probes, as in the first 200 steps, or as after them."""

    def __init__(self, build: Build, folder: str, begin: int = 0, probe_every: int | None = NEVER) -> None:
        """Watch it."""
        super().__init__(build, folder)
        self.begin, self.probe_every = begin, probe_every
        self.watch()

    def watch(self) -> None:
        """Begin a run."""
        from gradwatch import watch

        every = {} if self.probe_every is None else {"every_n_steps": 1, "probe_every_n_steps": self.probe_every}
        self.watcher = watch(self.net, self.optimizer, logdir=self.folder, on_alert=lambda _: None, **every)
        mine: Any = self.watcher._steps[0]
        mine._count.number = self.number = self.begin
        mine.on_look, mine.on_stepped = self.around(mine.on_look), self.around(mine.on_stepped)

    def is_probe(self) -> bool:
        """Tell whether the step is a probe."""
        return self.probe_every is None and probed(self.number)

    def told(self, value: torch.Tensor) -> None:
        """Record the loss."""
        self.around(self.watcher.record)(value)

    def after(self) -> None:
        """Begin anew after the first 200 steps, where it is these that are measured."""
        self.number += 1
        if self.begin == 0 and self.probe_every is None and self.number > 200:
            self.close()
            self.watch()

    def close(self) -> None:
        """Close the run, which counts."""
        began = time.thread_time()
        self.watcher.close()
        self.closing += time.thread_time() - began


class Scalars(Loop):
    """With `add_scalar` of the norm of each gradient."""

    def __init__(self, build: Build, folder: str) -> None:
        """Open a writer."""
        super().__init__(build, folder)
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.number = SummaryWriter(folder), 0

    def seen(self) -> None:
        """Write the norms."""

        def write() -> None:
            for name, parameter in self.net.named_parameters():
                self.writer.add_scalar(f"norm/{name}", parameter.grad.norm(), self.number)  # type: ignore[union-attr]

        self.around(write)()
        self.number += 1

    def close(self) -> None:
        """Close it."""
        self.writer.close()


class LightningNorms(Scalars):
    """With Lightning's `grad_norm`, and a scalar of each."""

    def seen(self) -> None:
        """Write the norms."""
        from lightning.pytorch.utilities import grad_norm

        def write() -> None:
            for name, norm in grad_norm(self.net, 2).items():
                self.writer.add_scalar(name, norm, self.number)

        self.around(write)()
        self.number += 1


class Wandb(Loop):
    """With `wandb.watch` of the gradients at every step, offline."""

    def __init__(self, build: Build, folder: str) -> None:
        """Watch it."""
        super().__init__(build, folder)
        os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
        import wandb

        self.run = wandb.init(dir=folder)
        self.run.watch(self.net, log="gradients", log_freq=1)

    def is_probe(self) -> bool:
        """Tell that hooks run within each backward pass."""
        return True

    def told(self, value: torch.Tensor) -> None:
        """Log the loss, with which the histograms go."""
        self.around(self.run.log)({"loss": float(value.detach())})

    def close(self) -> None:
        """Finish it."""
        self.run.finish()


class ModuleMonitor(Loop):
    """With torch-module-monitor: the norm of each gradient at every step."""

    def __init__(self, build: Build, folder: str) -> None:
        """Monitor it."""
        super().__init__(build, folder)
        import torch_module_monitor

        self.monitor, self.number = torch_module_monitor.ModuleMonitor(monitor_step_fn=lambda _: True), -1
        self.monitor.set_module(self.net)
        self.monitor.add_gradient_metric("norm", torch.Tensor.norm)

    def is_probe(self) -> bool:
        """Begin a step, whose forward pass has hooks."""
        self.number += 1
        self.monitor.begin_step(self.number)
        return True

    def seen(self) -> None:
        """Measure, and fetch the numbers."""
        self.monitor.monitor_gradients()
        self.monitor.end_step()
        self.monitor.get_step_metrics()


class Gradsnitch(Loop):
    """With gradsnitch: the total norm and its checks, as often as it does them by itself."""

    def __init__(self, build: Build, folder: str) -> None:
        """Watch it."""
        super().__init__(build, folder)
        import gradsnitch

        self.monitor, self.number = gradsnitch.watch(self.net, self.optimizer), 0

    def told(self, value: torch.Tensor) -> None:
        """Keep the loss."""
        self.value = value

    def seen(self) -> None:
        """Log the step."""
        self.around(lambda: self.monitor.log(self.number, self.value.item()))()
        self.number += 1


class Neurolens(Gradsnitch):
    """With neurolens, whose window is closed; what its threads do is not counted."""

    def __init__(self, build: Build, folder: str) -> None:
        """Monitor it."""
        Loop.__init__(self, build, folder)
        import neurolens

        self.monitor, self.number = neurolens.monitor(self.net, self.optimizer), 0

    def seen(self) -> None:
        """Wait for the step."""

    def stepped(self) -> None:
        """Log the step."""
        self.around(lambda: self.monitor.step(self.number, loss=self.value))()
        self.number += 1


LOOPS: Mapping[str, Callable[[Build, str], Loop]] = {
    "plain": Loop,
    "clipping": Clipped,
    "least": Least,
    "everything": Watched,
    "first 200": lambda build, folder: Watched(build, folder, probe_every=None),
    "after 200": lambda build, folder: Watched(build, folder, begin=201, probe_every=None),
    "control": Loop,
}
PEERS: Mapping[str, Callable[[Build, str], Loop]] = {
    "add_scalar": Scalars,
    "Lightning grad_norm": LightningNorms,
    "wandb.watch": Wandb,
    "torch-module-monitor": ModuleMonitor,
    "gradsnitch": Gradsnitch,
    "neurolens": Neurolens,
}


def work(workload: str, peers: str) -> None:
    """Train loops in turn, as standard input says how many steps of each; print what they took."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loops: dict[str, Loop] = {}
        for name, make in {**LOOPS, **(PEERS if peers else {})}.items():
            with contextlib.suppress(ImportError):  # a peer that is not installed
                loops[name] = make(WORKLOADS[workload], f"{folder}/{name}")
        for loop in loops.values():
            for _ in range(WARM):
                loop.step(counts=False)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        turn = 0
        for line in sys.stdin:
            for _ in range(int(line)):
                turn += 1
                for loop in (loops.values(), reversed(loops.values()))[turn % 2]:
                    loop.step(counts=True)
            sys.stdout.write("done\n")
            sys.stdout.flush()
        for loop in loops.values():
            loop.close()
        sys.stdout.write(json.dumps({name: (loop.taken, loop.closing) for name, loop in loops.items()}) + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def earlier(commit: str | None) -> Iterator[dict[str, str]]:
    """Return the builds by name, each with its folder."""
    here = str(Path(__file__).resolve().parent.parent)
    if commit is None:
        yield {"now": here}
        return
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, "old.tar")
        subprocess.run(["git", "archive", "-o", str(packed), commit, "gradwatch"], cwd=here, check=True)
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        yield {commit: folder, "now": here}


def compare(workload: str, builds: Mapping[str, str], steps: int, *, peers: bool) -> dict[str, dict[str, Any]]:
    """Let the builds take turns, and return what their loops took."""
    here = str(Path(__file__).resolve().parent.parent)
    workers = {}
    for name, folder in builds.items():
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, here])}
        ask = "--peers" if peers and name == "now" else ""
        command = [sys.executable, "-m", "benchmarks.every_step", "--work", workload, *filter(None, [ask])]
        pipe = subprocess.PIPE
        workers[name] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder)
        _answer(workers[name])
    many = max(steps // 20, 1)
    for turn in range(-(-steps // many)):
        for worker in list(workers.values())[:: 1 if turn % 2 else -1]:
            worker.stdin.write(f"{many}\n")  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            _answer(worker)
    return {name: json.loads(worker.communicate()[0].splitlines()[-1]) for name, worker in workers.items()}


def _answer(worker: subprocess.Popen[str]) -> None:
    while worker.stdout is not None and (line := worker.stdout.readline()) not in ("ready\n", "done\n"):
        if not line:
            raise RuntimeError("a worker has ended")


def adds(taken: list[tuple[float, float, bool]], closing: float, plain: float) -> tuple[float, float]:
    """Return what a loop adds to a step in seconds, and the standard error of that."""
    each = [within if not probe else total - plain for total, within, probe in taken]
    return statistics.fmean(each) + closing / len(each), statistics.stdev(each) / len(each) ** 0.5


def report(workload: str, found: Mapping[str, dict[str, Any]]) -> None:
    """Print the lines of a workload."""
    for build, loops in found.items():
        plain = statistics.fmean(total for total, _, _ in loops["plain"][0])
        middle = statistics.median(total for total, _, _ in loops["plain"][0])
        control = statistics.median(total for total, _, _ in loops["control"][0]) / middle - 1
        clip, _ = adds(*loops["clipping"], plain)
        line = f"{workload:20} {build:9} step {plain * 1e3:8.2f} ms  clipping {clip / plain:6.2%}"
        for name in [name for name in loops if name not in ("plain", "control", "clipping")]:
            more, error = adds(*loops[name], plain)
            line += f"  {name} {more / plain:7.2%} ({more / clip:5.2f}x +- {error / clip:.2f})"
        print(f"{line}  control {control:+.1%}", flush=True)


def main() -> None:
    """Print the table."""
    mine = parser(__doc__)
    mine.add_argument("--steps", type=int, default=1000, help="of each loop")
    mine.add_argument("--against", metavar="COMMIT", help="an earlier build to compare with")
    mine.add_argument("--only", nargs="*", help="workloads whose name contains one of these")
    mine.add_argument("--peers", action="store_true", help="what others cost that do a part of it")
    mine.add_argument("--work", help="for its own processes")
    options = parsed(mine)
    if options.work:
        work(options.work, options.peers)
        return
    quick = {"MLP 10x128": 4, "LSTM 2x32, T=64": 4}
    print(
        f"torch {torch.__version__}, one thread; means of thread CPU over {4 if options.quick else options.steps} steps"
    )
    with earlier(options.against) as builds:
        for workload in quick if options.quick else WORKLOADS:
            if not options.only or any(part.lower() in workload.lower() for part in options.only):
                steps = quick.get(workload, options.steps) if options.quick else options.steps
                report(workload, compare(workload, builds, steps, peers=options.peers))


if __name__ == "__main__":
    main()
