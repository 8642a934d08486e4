"""How the cost of gradwatch grows: with parameters, with tensors and with processes.

python -m benchmarks.scale               # eight minutes on two cores, 3 GB; --quick: seconds, two processes
python -m benchmarks.scale --part parameters|columns|speaker|processes
"""

from __future__ import annotations

import ctypes
import logging
import random
import re
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import scale_processes
from benchmarks.command import parsed, parser
from benchmarks.detectors import once
from benchmarks.overhead import shown
from benchmarks.scale_processes import schedule
from benchmarks.workloads import Clock, Step, mlp
from gradwatch import History, Report, watch
from gradwatch.sinks.reading import NAME, read_run
from gradwatch.sinks.record import Record
from gradwatch.sinks.tensorboard.sink import TensorBoardSink
from gradwatch.values.column import rounded
from gradwatch.values.plain import compact, from_json
from gradwatch.values.snapshot import (
    ActivationStats,
    LayerInfo,
    ModelInfo,
    OptimizerInfo,
    ParameterInfo,
    Snapshot,
)

ROUND = (
    "plain",
    "measured",
    "before",
    "probe",
    "clip",
    "control",
    "control",
    "clip",
    "before",
    "probe",
    "measured",
    "plain",
)
"""The steps of a round. What arms a probe runs at the end of the step `before`, and is counted with the probe."""
START = ("plain", "measured", "before", "probe") * 2
"""Steps that are not counted: libraries are loaded, and what a run does once is done."""


# --- parameters: real training steps ---


def small_tensors(many: int) -> tuple[nn.Module, Step]:
    """Build layers of 100 numbers each."""
    net = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(many)))
    for layer in net:
        nn.init.orthogonal_(layer.weight)
    x = torch.randn(8, 10)
    return net, lambda: net(x).square().mean()


def peak() -> float:
    """Return the largest resident memory since the last call, in MiB; what is free is given back. Linux alone tells."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(found[1]) / 1024 if found else 0.0


def parameters(name: str, net: nn.Module, loss: Step, rounds: int) -> None:
    """Compare measured and probe steps with plain ones, everything on: detectors, record and TensorBoard."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    plan = (*START, *ROUND * rounds, "plain", "measured", "before", "probe")
    tensors = list(net.parameters())
    spent: dict[str, list[float]] = {kind: [] for kind in ROUND}
    inside: dict[str, list[float]] = {kind: [] for kind in ROUND}
    peaks, clips, clock = [], [], Clock()
    with tempfile.TemporaryDirectory() as folder:
        watcher = watch(net, optimizer, logdir=folder, every_n_steps=1, timesteps=False, on_alert=lambda _: None)
        steps = schedule(watcher, plan)
        for hook in ("on_look", "on_stepped"):
            setattr(steps, hook, clock.around(getattr(steps, hook)))
        for number, kind in enumerate(plan):
            remembering = number >= len(plan) - 4
            if remembering and kind == "plain":
                steps._copies.updates.clear()
                peak()
            began = time.thread_time()
            optimizer.zero_grad()
            value = loss()
            watcher.record(value)
            value.backward()
            if kind == "clip":
                before = time.thread_time()
                nn.utils.clip_grad_norm_(tensors, 1e9)
                clips.append(time.thread_time() - before)
            optimizer.step()
            total, ours = time.thread_time() - began, clock.take()
            if remembering and kind in ("measured", "probe"):
                peaks.append(peak())
            elif len(START) <= number:
                spent[kind].append(total)
                inside[kind].append(ours)
        watcher.close()
        snapshots, events = sizes(Path(folder), plan)

    def added(*kinds: str) -> str:
        each = [[statistics.fmean(spent[k][2 * i : 2 * i + 2]) for i in range(rounds)] for k in (*kinds, "plain")]
        over = [sum(values[:-1]) - len(kinds) * values[-1] for values in zip(*each, strict=True)]
        return shown(over, 1e3).strip()

    within = {kind: statistics.median(inside[kind]) * 1e3 for kind in ("measured", "probe")}
    print(
        f"{name:14} {len(tensors):5} tensors  step {statistics.median(spent['plain']) * 1e3:8.2f} ms"
        f"  clip {statistics.median(clips) * 1e3:7.2f}"
        f"  measured {within['measured']:7.2f}, step longer by {added('measured'):22}"
        f"  probe {within['probe']:7.2f}, {added('before', 'probe'):22}  control {added('control')}\n"
        f"{'':14} a probe's peak of memory {peaks[1] - peaks[0]:+.0f} MiB over a measured step's;"
        f" a snapshot in the record {snapshots['measured']:.0f} B, of a probe {snapshots['probe']:.0f};"
        f" in the events {events['measured']:.0f}, {events['probe']:.0f}",
        flush=True,
    )


def sizes(folder: Path, plan: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes of a snapshot by the kind of its step: in the record, and in the events without pictures."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    record: dict[str, list[int]] = {kind: [] for kind in plan}
    events: dict[str, list[int]] = {kind: [] for kind in plan}
    for line in next(folder.rglob(NAME)).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith('{"snapshot"'):
            record[plan[from_json(line)["snapshot"]["step"]]].append(len(line))
    for path in folder.rglob("*tfevents*"):
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            pictures = any(value.tag.startswith("gradwatch_heatmap") for value in event.summary.value)
            if event.summary.value and not pictures:
                events[plan[event.step]].append(len(raw) + 16)  # the frame: length, two checksums
    kinds = ("measured", "probe")
    taken, drawn = ({kind: statistics.median(found[kind] or [0]) for kind in kinds} for found in (record, events))
    return taken, drawn


# --- columns: what follows a measurement, without any tensor ---


def described(columns: int) -> ModelInfo:
    """Describe a model with so many tensors, two in each layer, 64 layers in a block, as a mixture of experts has."""
    names = [f"model.layers.{i // 64}.mlp.experts.{i % 64}.proj" for i in range(columns // 2)]
    both: tuple[tuple[Any, tuple[int, ...]], ...] = (("weight", (1000, 1000)), ("bias", (1000,)))
    return ModelInfo(
        tuple(LayerInfo(n, "Linear", i) for i, n in enumerate(names)),
        tuple(ParameterInfo(f"{n}.{role}", n, shape, "float32", 0, role, True) for n in names for role, shape in both),
        (OptimizerInfo("AdamW", adaptive=True),),
    )


def snapshots(info: ModelInfo, many: int, draw: random.Random) -> list[Snapshot]:
    """Make snapshots of a sound run, each tenth of a probe that has also seen every layer."""
    columns = len(info.parameters)

    def column(size: float) -> tuple[float, ...]:
        return tuple(rounded([size * draw.uniform(0.5, 2.0) for _ in range(columns)]))  # as measured numbers are

    found = []
    for step in range(many):
        more: dict[str, Any] = {}
        if step % 10 == 1:
            more = {name: column(size) for name, size in (("weight_norm", 8.0), ("zeros", 0.1), ("update_ratio", 1e-3))}
            more["subnormal"] = column(0.0)
            more["activations"] = tuple(ActivationStats(layer.name, draw.random(), units=1000) for layer in info.layers)
        found.append(Snapshot(step, 0.0, info, optimizer=0, loss=draw.uniform(2.0, 2.1), norm=column(1.0), **more))
    return found


def columns(many: int, rounds: int) -> None:
    """Tell what so many columns cost after they are measured: in the history, the detectors and the sinks."""
    info, draw = described(many), random.Random(0)
    history = History()
    window = snapshots(info, 50, draw)
    held = memory_of(lambda: [compact(one) for one in snapshots(info, 10, draw)]) * 5
    adding = statistics.median(timed(lambda one=one: history.add(one)) for one in window)
    held += memory_of(lambda: [history.sensitivities(50).copy(), history.ratios(50).copy()])
    judging = statistics.median(timed(lambda: once(history, probe=False)) for _ in range(rounds))
    with tempfile.TemporaryDirectory() as folder:
        record, events = Record(folder), TensorBoardSink(folder)
        took: dict[str, list[float]] = {"record": [], "events": []}
        grown: list[tuple[int, int]] = []
        sizes = [0, 0]
        for one in window[2 : 2 + 10]:  # the last of them a probe; the first takes the model along
            took["record"].append(timed(lambda one=one: record(Report(one))))
            took["events"].append(timed(lambda one=one: events(Report(one))))
            now = [record._size, sum(p.stat().st_size for p in Path(folder).glob("*tfevents*"))]
            grown.append((now[0] - sizes[0], now[1] - sizes[1]))
            sizes = now
        record.close()
        events.close()
        line = max(map(len, (Path(folder) / NAME).read_text(encoding="utf-8").splitlines()))
        run = read_run(folder)
    first, usual, probe = grown[0], tuple(statistics.median(g[i] for g in grown[1:-1]) for i in (0, 1)), grown[-1]
    print(
        f"{many:7} columns  history: {adding * 1e3:8.2f} ms to add, {held / 2**20:7.1f} MiB in 50 snapshots"
        f"  detectors {judging * 1e3:7.2f} ms\n"
        f"{'':15}  record: {statistics.median(took['record']) * 1e3:8.2f} ms, a snapshot {usual[0] / many:5.1f} B"
        f" a column, of a probe {probe[0] / many:.1f}, the model {(first[0] - usual[0]) / many:.1f};"
        f" longest line {line / 2**20:.2f} MiB;"
        f" reads back: {len(run.snapshots)} of {len(grown)}\n"
        f"{'':15}  events: {statistics.median(took['events']) * 1e3:8.2f} ms, a snapshot {usual[1]:.0f} B,"
        f" of a probe {probe[1]:.0f}",
        flush=True,
    )


def timed(work: Callable[[], object]) -> float:
    """Return the thread CPU seconds of a call."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def memory_of(work: Callable[[], object]) -> int:
    """Return the bytes of what a call returns."""
    tracemalloc.start()
    kept = work()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return size


# --- all of it ---


def all_parameters(*, quick: bool) -> None:
    """Print the table of networks."""
    print("thread CPU in ms: inside of the hooks, and how much longer the step is; medians [quartiles] of rounds")
    sizes = ((5, 70, 3),) if quick else ((5, 70, 30), (6, 223, 15), (7, 707, 8), (8, 2236, 5))
    for exponent, width, rounds in sizes:
        torch.manual_seed(0)
        parameters(f"10^{exponent} numbers", *mlp(19, width, 8), rounds)
    torch.manual_seed(0)
    many = 30 if quick else 1000
    parameters(f"{many} x 100", *small_tensors(many), 3 if quick else 8)


def main() -> None:
    """Print all tables, or one."""
    mine = parser(__doc__)
    mine.add_argument("--part", choices=("parameters", "columns", "speaker", "processes"))
    options = parsed(mine)
    torch.set_num_threads(1)
    logging.disable()
    print(f"torch {torch.__version__}, one thread")

    def wanted(part: str) -> bool:
        return options.part in (None, part)

    if wanted("parameters"):
        all_parameters(quick=options.quick)
    if wanted("columns"):
        for many in (200,) if options.quick else (1000, 10_000, 100_000):
            columns(many, 3 if options.quick else 5)
    if wanted("speaker"):
        scale_processes.all_speakers(quick=options.quick)
    if wanted("processes"):
        for size in (2,) if options.quick else (1, 2, 4, 8):
            scale_processes.together(size, 1 if options.quick else 10)


if __name__ == "__main__":
    main()
