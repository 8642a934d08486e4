"""What `benchmarks.scale` measures of several processes: real ones on gloo, and the speaker of many that are not there.

python -m benchmarks.scale --part processes, --part speaker
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.workloads import Clock, mlp
from gradwatch import watch
from gradwatch.measurement import norms, processes
from gradwatch.measurement.columns import NONZERO, NORM, TINY, UPDATE, WEIGHT, Raw
from gradwatch.measurement.processes import Processes
from gradwatch.values.plain import to_json
from gradwatch.watcher.optimizer_steps import OptimizerSteps
from gradwatch.watcher.watcher import Watcher

MEASURED, PROBE = (NORM,), (NORM, WEIGHT, UPDATE, NONZERO, TINY)
"""What a message tells of a column, in float32 and unclipped."""
START, ROUND = ("measured", "probe"), ("plain", "measured", "probe", "probe", "measured", "plain")


class Schedule:
    """A cadence by a list of kinds: steps that are "measured", those that are a "probe" too, and others."""

    every = probe_every = 1

    def __init__(self, plan: Sequence[str]) -> None:
        """Take the kind of each step."""
        self._plan = plan

    def measured(self, step: int) -> bool:
        """Tell whether the gradients are read."""
        return step < len(self._plan) and self._plan[step] in ("measured", "probe")

    def probed(self, step: int) -> bool:
        """Tell whether more is looked at."""
        return step < len(self._plan) and self._plan[step] == "probe"


def schedule(watcher: Watcher, plan: Sequence[str]) -> OptimizerSteps:
    """Let the first optimizer's steps be of these kinds, and no alert make another one a probe."""
    steps = watcher._steps[0]
    steps._count._cadence = Schedule(plan)  # type: ignore[assignment]
    steps._count.probe_next = lambda: None  # type: ignore[method-assign]
    return steps


# --- real processes ---


class CountedStore:
    """Counts what one process asks of the store, and the bytes of the messages that it leaves there."""

    def __init__(self, store: Any) -> None:
        """Count from zero."""
        self._store, self.calls, self.messages, self.bytes = store, 0, 0, 0

    def set(self, key: str, text: str) -> None:
        """Pass a message on."""
        self.messages += 1
        self.bytes += len(text)
        self._store.set(key, text)
        self.calls += 1

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Pass another call on."""
        self.calls += 1
        return getattr(self._store, name)  # type: ignore[no-any-return]

    def take(self) -> dict[str, float]:
        """Return the counts, and begin anew."""
        found = {"calls": self.calls, "messages": self.messages, "bytes": self.bytes}
        self.calls = self.messages = self.bytes = 0
        return found


class WallClock(Clock):
    """Adds up wall time."""

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def trained(how: str, rounds: int) -> dict[str, dict[str, float]]:
    """Train in this process among others, and return the medians of what a step took, by its kind."""
    torch.manual_seed(0)
    net, loss = mlp(19, 64, 8)
    forward: Callable[[], torch.Tensor] = loss
    if how == "DDP":
        copies, x = DistributedDataParallel(net), torch.randn(8, 64)
        forward = lambda: copies(x).square().mean()  # noqa: E731
    else:
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    plan = (*START, *ROUND * rounds)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in plan}
    with watch(net, optimizer, every_n_steps=1, timesteps=False, on_alert=lambda _: None) as watcher:
        steps, mine = schedule(watcher, plan), watcher._processes
        ours, joining, waiting = Clock(), Clock(), WallClock()
        for hook in ("on_look", "on_stepped"):
            setattr(steps, hook, ours.around(getattr(steps, hook)))
        mine.join = joining.around(mine.join)  # type: ignore[method-assign]
        mine._wait = waiting.around(mine._wait)  # type: ignore[method-assign]
        mine._store = store = CountedStore(mine._store)
        for number, kind in enumerate(plan):
            optimizer.zero_grad()
            forward().backward()
            store.take()
            optimizer.step()
            took = {"cpu": ours.take(), "join": joining.take(), "wait": waiting.take(), **store.take()}
            if number >= len(START):
                found[kind].append(took)
        mine._store = store._store
    return {
        kind: {name: statistics.median(one[name] for one in each) for name in each[0]} for kind, each in found.items()
    }


def child(rank: int, size: int, port: int, folder: str, rounds: int) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    ways = {how: trained(how, rounds) for how in ("DDP", "FSDP")}
    (Path(folder) / str(rank)).write_text(json.dumps(ways), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()


def together(size: int, rounds: int) -> None:
    """Train in so many processes, and print what each takes for a measured step and for a probe, of 40 tensors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(child, (size, port, folder, rounds), nprocs=size)
        ranks = [json.loads((Path(folder) / str(rank)).read_text(encoding="ascii")) for rank in range(size)]
    for how in ("DDP", "FSDP"):
        for kind in ("measured", "probe"):
            first, others = ranks[0][how][kind], [one[how][kind] for one in ranks[1:]]
            idle = ranks[0][how]["plain"]["cpu"]

            def of(name: str, others: list[dict[str, float]] = others) -> float:
                return statistics.median(one[name] for one in others) if others else 0.0

            print(
                f"{size} processes  {how:4} {kind:8}  CPU in ms: rank 0 {(first['cpu'] - idle) * 1e3:6.2f}"
                f" (of that, pieces put together {first['join'] * 1e3:6.2f}), others {of('cpu') * 1e3:6.2f}"
                f"  messages {sum(one['messages'] for one in others):2.0f} of {of('bytes'):5.0f} B"
                f"  calls of the store: rank 0 {first['calls']:3.0f}, others {of('calls'):2.0f}"
                f"  rank 0 waits {first['wait'] * 1e3:6.2f} ms by the clock",
                flush=True,
            )


# --- the speaker alone: the others have sent, and are not there ---


def spoken(ranks: int, columns: int, kinds: Sequence[Raw]) -> tuple[Processes, dict[Raw, dict[int, float]], int]:
    """Return a speaker whose others have sent, its own numbers, and the bytes of all messages."""
    speaker, draw = Processes((), alone=True), random.Random(0)
    speaker._store = store = dist.HashStore()
    numbers = {raw: {c: draw.random() for c in range(columns)} for raw in kinds}
    text = to_json({raw.name: column for raw, column in numbers.items()})
    for rank in range(1, ranks):
        store.set(f"{speaker._key}/{rank}", "there")
        store.set(speaker._message(rank, "step"), text)
    return speaker, numbers, len(text) * (ranks - 1)


def speak(ranks: int, columns: int, kinds: Sequence[Raw]) -> None:
    """Tell what it takes to put the pieces of so many ranks together."""
    holders = dict.fromkeys(range(columns), tuple(range(ranks)))
    speaker, numbers, size = spoken(ranks, columns, kinds)
    reading, from_json = Clock(), processes.from_json
    processes.from_json = reading.around(from_json)  # type: ignore[attr-defined]
    began = time.thread_time()
    missing = speaker.join("step", numbers, holders)
    spent = time.thread_time() - began
    processes.from_json = from_json  # type: ignore[attr-defined]
    assert missing is None, missing
    speaker, numbers, _ = spoken(ranks, columns, kinds)
    tracemalloc.start()
    speaker.join("step", numbers, holders)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pieces = columns * ranks
    print(
        f"{ranks:5} ranks x {columns:6} columns, {'probe' if len(kinds) > 1 else 'measured':8}"
        f"  messages {size / 2**20:7.2f} MiB, {size / pieces:5.1f} B a piece"
        f"  rank 0: {spent:7.3f} s of CPU, {spent / pieces * 1e6:5.2f} us a piece ({reading.take() / spent:.0%} JSON),"
        f" {most / 2**20:7.1f} MiB, {most / pieces:4.0f} B a piece",
        flush=True,
    )


def listed(ranks: int, columns: int) -> None:
    """Tell what every rank takes to list who holds pieces of a column."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    tensor = DTensor.from_local(torch.zeros(1, 4), init_device_mesh("cpu", (ranks,)), [Shard(0)], run_check=False)
    began = time.thread_time()
    found = {column: norms.holders(tensor) for column in range(columns)}
    spent = time.thread_time() - began
    dist.destroy_process_group()
    one = found[0] or ()
    size = sys.getsizeof(one) + sum(sys.getsizeof(rank) for rank in one if rank > 256)
    print(
        f"{ranks:5} ranks: each takes {spent / columns * 1e6:6.1f} us and {size} B a column to list who holds it",
        flush=True,
    )


def stored(messages: int, size: int) -> None:
    """Tell how fast a store of this machine takes and gives messages of so many bytes, by the clock."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    text, spent = "0" * size, []
    calls: tuple[Callable[[str], object], ...] = (
        lambda key: store.set(key, text),
        lambda key: store.check([key]),
        store.get,
        store.delete_key,
    )
    for call in calls:
        began = time.perf_counter()
        for number in range(messages):
            call(str(number))
        if call is calls[0]:  # which waits for no answer
            store.check(["0"])
        spent.append(time.perf_counter() - began)
    taking, asking, giving, deleting = spent
    total = messages * size / 2**20
    print(
        f"a store, {messages} messages of {size / 2**20:.3f} MiB: takes {total / taking:6.0f} MiB/s,"
        f" gives {total / giving:6.0f}; a question {asking / messages * 1e6:.0f} us,"
        f" deleting {deleting / messages * 1e6:.0f}",
        flush=True,
    )


def all_speakers(*, quick: bool) -> None:
    """Print the table of the speaker."""
    cases = ((8, 100),) if quick else ((8, 1000), (100, 1000), (1000, 100), (1000, 1000), (100, 10_000))
    for ranks, columns in cases:
        for kinds in (MEASURED, PROBE):
            speak(ranks, columns, kinds)
    for ranks in (8,) if quick else (8, 100, 1000):
        listed(ranks, 100)
    for messages, size in ((20, 25_000),) if quick else ((1000, 25_000), (1000, 126_000), (100, 2_500_000)):
        stored(messages, size)
