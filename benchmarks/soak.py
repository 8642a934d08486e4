"""A long training with everything on, to see whether anything grows that should not.

python -m benchmarks.soak                # 20,000 steps, a few minutes on one core; --steps N; --quick: seconds
"""

from __future__ import annotations

import gc
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.command import parsed, parser
from gradwatch.sinks.record import BOUND

_SICK = (400, 100)
"""Of every so many steps, so many train with a loss that does not reach the lower layers: alerts begin and clear."""


class Net(nn.Module):
    """Reads a sequence, and can be cut off from it."""

    def __init__(self) -> None:
        """Make it small, so that gradwatch has a large share of the step."""
        super().__init__()
        self.lower, self.rnn, self.head = nn.Linear(4, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 2)
        self.sick = False

    def forward(self, x: Tensor) -> Tensor:
        """Give two numbers for each row."""
        low = self.lower(x)
        states: Tensor = self.rnn(low.detach() + 0 * low if self.sick else low)[0]
        out: Tensor = self.head(states[:, -1])
        return out


class Training:
    """A training that can go on for a few steps at a time."""

    def __init__(self, logdir: Path | None) -> None:
        """Watch it if there is a place to write to."""
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.began = self.cleared = self.number = 0
        self.watcher = None
        if logdir is not None:
            self.watcher = gradwatch.watch(
                self.net,
                self.optimizer,
                logdir=logdir,
                every_n_steps=1,
                probe_every_n_steps=10,
                horizon=20,
                sinks=[self.count],
                on_alert=lambda _: None,
            )

    def count(self, report: gradwatch.Report) -> None:
        """Count alerts."""
        self.began += len(report.began)
        self.cleared += len(report.cleared)

    def steps(self, many: int) -> Iterator[float]:
        """Train, and give the seconds of each step."""
        for _ in range(many):
            self.net.sick = self.number % _SICK[0] >= _SICK[0] - _SICK[1]
            x = torch.randn(16, 24, 4)
            began = time.perf_counter()
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.net(x), (x[:, -1, 0] > 0).long())
            loss.backward()
            if self.watcher is not None:
                self.watcher.record(loss)
            self.optimizer.step()
            self.number += 1
            yield time.perf_counter() - began


def resident() -> float:
    """Give the resident memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def ours() -> int:
    """Count the living objects of gradwatch's own classes."""
    gc.collect()
    return sum(str(type(o).__module__).startswith("gradwatch") for o in gc.get_objects())


def by_kind(folder: str) -> dict[str, int]:
    """Give the bytes of events by what they hold; a scalar has no metadata of its own."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict[str, int] = {}
    for path in Path(folder).rglob("*tfevents*"):
        for raw in RawEventFileLoader(str(path)).Load():
            for value in Event.FromString(raw).summary.value:
                kind = value.WhichOneof("value") or "nothing"
                found[kind] = found.get(kind, 0) + value.ByteSize()
    return found


def main() -> None:
    """Print one line for each tenth of the run."""
    mine = parser(__doc__)
    mine.add_argument("--steps", type=int, default=20_000)
    options = parsed(mine)
    steps = 40 if options.quick else options.steps
    torch.set_num_threads(1)
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        files, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
        watched, bare, other = Training(Path(folder)), Training(None), Training(None)
        print(
            f"torch {torch.__version__}, one thread; every step measured, every 10th a probe with horizon=; "
            "medians of step time; control: bare / bare"
        )
        for _ in range(10):
            part = steps // 10
            times: dict[str, list[float]] = {"watched": [], "bare": [], "control": []}
            for turn in ("watched", "bare", "control", "control", "bare", "watched"):
                run = {"watched": watched, "bare": bare, "control": other}[turn]
                # The unwatched ones need not train as long: their time is all that they are for.
                times[turn] += run.steps(part // 2 if turn == "watched" else min(part // 2, 200))
            sizes = {
                kind: sum(p.stat().st_size for p in Path(folder).rglob(pattern))
                for kind, pattern in (("record", "record.jsonl"), ("events", "*tfevents*"))
            }
            w, b, c = (statistics.median(times[k]) * 1e6 for k in ("watched", "bare", "control"))
            print(
                f"step {watched.number:6}  resident {resident():6.1f} MiB  objects {ours():6}"
                f"  record {sizes['record'] / 2**20:5.1f} MiB  events {sizes['events'] / 2**20:5.1f} MiB"
                f"  step {w:6.0f} us watched, {b:6.0f} bare, control {c / b:.2f}"
                f"  alerts {watched.began:4} began, {watched.cleared:4} cleared",
                flush=True,
            )
        assert watched.watcher is not None
        watched.watcher.close()
        grown = len(list(Path("/proc/self/fd").iterdir())) - files, threading.active_count() - threads
        run = gradwatch.read_run(folder)
        print(
            f"after close: {grown[0]:+} open files, {grown[1]:+} threads; "
            f"the record (at most {BOUND / 2**20:.0f} MiB) reads back: {len(run.snapshots)} snapshots,"
        )
        print(f"{run.thinned} thinned out, {run.broken} broken lines, {len(run.alerts)} alerts")
        print(
            "events, bytes a step:",
            ", ".join(f"{kind} {size / watched.number:.0f}" for kind, size in sorted(by_kind(folder).items())),
        )


if __name__ == "__main__":
    main()
