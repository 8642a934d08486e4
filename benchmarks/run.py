"""What `gradwatch run` and the callback for Hugging Face cost: programs in turn, each in a process of its own.

python -m benchmarks.run                 # some minutes; --quick: seconds

Start-up: seconds from the start of a program to its end. Search: what finding the model takes, beside so many objects.
Steps: thread CPU of a training step, after the first 200 of them, at the default cadence. Inside: how much of it passes
within gradwatch's own functions, which other work on the machine hardly moves.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.command import parsed, parser
from gradwatch.run.search import model_of

LIGHT = "import json"
STEP = """
import torch
net = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
net(torch.ones(1, 8)).sum().backward()
optimizer.step()
"""
INSIDE = """
import time

class Inside:
    depth = total = 0.0

def timed(kind, *names):
    for name in names:
        def outermost(*args, _its=getattr(kind, name), **kwargs):
            if Inside.depth:
                return _its(*args, **kwargs)
            Inside.depth, began = 1, time.thread_time()
            try:
                return _its(*args, **kwargs)
            finally:
                Inside.depth, Inside.total = 0, Inside.total + time.thread_time() - began
        setattr(kind, name, outermost)

from gradwatch.run.training import Training
timed(Training, "_before_backward", "_before_step")  # before torch comes, for which it waits
from gradwatch.model.forward_hooks import ForwardTrace
from gradwatch.model.optimizer_hooks import _Calls
from gradwatch.watcher.watcher import Watcher
timed(Watcher, "record", "step")
timed(_Calls, "_before", "_after")
timed(ForwardTrace, "entered", "left")
"""
"""Put before a program, this adds up what passes within what a training calls of gradwatch."""
LOOP = """
import sys, statistics, time, torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(256, 256), nn.ReLU())])
optimizer = torch.optim.AdamW(net.parameters())
if "watch" in sys.argv:
    import gradwatch
    watcher = gradwatch.watch(net, optimizer, logdir="runs")
x, times = torch.randn(128, 256), []
for step in range(int(sys.argv[1])):
    began = time.thread_time()
    optimizer.zero_grad()
    loss = (net(x) - x).square().mean()
    if "watch" in sys.argv:
        watcher.record(loss)
    loss.backward()
    optimizer.step()
    times.append(time.thread_time() - began)
    if step == 199 and "inside" in sys.argv:
        Inside.total = 0.0
print(Inside.total / len(times[200:]) if "inside" in sys.argv else statistics.fmean(times[200:]))
"""
TRAINER = """
import sys, statistics, time, torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
torch.set_num_threads(1)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(256, 256), nn.ReLU())])
    def forward(self, x):
        return {"loss": (self.net(x) - x).square().mean()}
class Data(Dataset):
    rows = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    def __len__(self):
        return 128
    def __getitem__(self, k):
        return {"x": self.rows[k]}
class Clock(TrainerCallback):
    def __init__(self):
        self.times = []
    def on_step_begin(self, *_, **__):
        self.began = time.thread_time()
    def on_step_end(self, *_, **__):
        self.times.append(time.thread_time() - self.began)
        if len(self.times) == 200 and "inside" in sys.argv:
            Inside.total = 0.0
clock = Clock()
callbacks = [clock]
if "callback" in sys.argv:
    from gradwatch.huggingface import GradientCallback
    if "inside" in sys.argv:
        timed(GradientCallback, "on_pre_optimizer_step", "on_step_end", "_hear", "_read")
    callbacks.append(GradientCallback())
torch.manual_seed(0)
Trainer(Net(), TrainingArguments("out", max_steps=int(sys.argv[1]), per_device_train_batch_size=128, report_to=[],
    max_grad_norm=0, use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    dataloader_pin_memory=False), train_dataset=Data(), callbacks=callbacks).train()
print(Inside.total / len(clock.times[200:]) if "inside" in sys.argv else statistics.fmean(clock.times[200:]))
"""
RUN = ("-m", "gradwatch", "run", "--logdir", "runs")


def python(*arguments: str) -> tuple[float, str]:
    """Run Python in an empty folder; return the seconds that it took, and the last line that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return time.perf_counter() - began, (done.stdout.splitlines() or [""])[-1]


def spread(values: list[float], unit: float, name: str) -> str:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle * unit:8.2f} {name} [{low * unit:.2f}, {high * unit:.2f}]"


def start_up(rounds: int, program: Path) -> None:
    """Compare how long two small programs take."""
    for what, source in (("a program without torch", LIGHT), ("one step of torch", STEP)):
        program.write_text(source, encoding="utf-8")
        times: dict[str, list[float]] = {"plain": [], "run": [], "control": []}
        for _ in range(rounds):
            for name, its in times.items():
                its.append(python(*(RUN if name == "run" else ()), str(program))[0])
        base = times.pop("plain")
        print(f"start-up, {what:24} plain {spread(base, 1, 's')}")
        for name, its in times.items():
            added = [one - other for one, other in zip(its, base, strict=True)]
            print(f"{'':34} {name:>8} adds {spread(added, 1, 's')}")


def search(rounds: int, objects: int) -> None:
    """Measure how long the model of an optimizer is looked for, among so many objects more."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    kept = [[k] for k in range(objects)]
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        assert model_of(list(net.parameters()), optimizer) is net
        times.append(time.thread_time() - began)
    print(f"search among {len(gc.get_objects()):8} objects      {spread(times, 1e3, 'ms')}")
    del kept


def steps(rounds: int, count: int, program: Path) -> None:
    """Compare the steps of one training, and those of one in a Trainer of transformers."""
    kinds = {
        "plain": (LOOP, (), ()),
        "watch": (LOOP, (), ("watch",)),
        "gradwatch run": (LOOP, RUN, ()),
        "control": (LOOP, (), ()),
    }
    if importlib.util.find_spec("transformers") is not None:
        kinds |= {"Trainer": (TRAINER, (), ()), "Trainer and callback": (TRAINER, (), ("callback",))}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, (source, before, after) in kinds.items():
            program.write_text(textwrap.dedent(source), encoding="utf-8")
            times[name].append(float(python(*before, str(program), str(count), *after)[1]))
    for name, its in times.items():
        base = times["Trainer" if name.startswith("Trainer") else "plain"]
        added = [one / other - 1 for one, other in zip(its, base, strict=True)]
        print(f"steps, {name:22} {spread(its, 1e3, 'ms')}, {spread(added, 100, '%')} more")


def inside(rounds: int, count: int, program: Path) -> None:
    """Compare what passes within gradwatch, as a share of an unwatched step."""
    kinds = {"watch": (LOOP, (), ("watch",)), "gradwatch run": (LOOP, RUN, ())}
    if importlib.util.find_spec("transformers") is not None:
        kinds["callback"] = (TRAINER, (), ("callback",))
    for name, (source, before, after) in kinds.items():
        program.write_text(source, encoding="utf-8")
        plain = float(python(str(program), str(count))[1])
        program.write_text(INSIDE + source, encoding="utf-8")
        its = [float(python(*before, str(program), str(count), *after, "inside")[1]) for _ in range(rounds)]
        share = statistics.median(its) / plain
        print(f"inside, {name:21} {spread(its, 1e6, 'us')} of a step, {100 * share:.2f} % of a plain one")


def main() -> None:
    """Measure all of it."""
    quick = parsed(parser(__doc__)).quick
    print(f"torch {torch.__version__}, medians [quartiles]; control: plain again")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        start_up(2 if quick else 9, program)
        for objects in (0, 400_000):
            search(3 if quick else 15, objects)
        steps(1 if quick else 3, 205 if quick else 1000, program)
        inside(1 if quick else 3, 205 if quick else 1000, program)


if __name__ == "__main__":
    main()
