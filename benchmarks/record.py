"""What a record takes and what reading it costs, and what a watcher of many layers holds.

python -m benchmarks.record              # a million steps, two minutes; --quick: seconds
"""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
from torch import nn

from benchmarks.command import parsed, parser
from benchmarks.detectors import model
from gradwatch import Record, Report, Snapshot, watch
from gradwatch.values.column import rounded
from gradwatch.values.snapshot import ActivationStats
from gradwatch.watcher.cadence import Cadence

LAYERS = 10


def written(folder: str, steps: int, every: int | None) -> tuple[int, float]:
    """Write a record of so many steps; return how many were measured, and the seconds of CPU."""
    info, cadence, draw = model(LAYERS), Cadence(every), random.Random(0)
    norms = [tuple(rounded([draw.uniform(0.5, 2.0) for _ in range(2 * LAYERS)])) for _ in range(500)]
    seen = tuple(ActivationStats(layer.name, 1.0, dead=0.0, saturated=0.1, units=64) for layer in info.layers)
    record, count, began = Record(folder), 0, time.process_time()
    for step in range(steps):
        if not cadence.measured(step):
            continue
        count += 1
        look = {
            "weight_norm": (8.0, 0.1) * LAYERS,
            "update_ratio": (1e-3, 1e-3) * LAYERS,
            "zeros": (0.1, 0.1) * LAYERS,
            "subnormal": (0.0, 0.0) * LAYERS,
            "activations": seen,
            "rate": 0.1,
        }
        more = look if cadence.probed(step) else {}
        loss = 2 + draw.random() * 0.1
        record(Report(Snapshot(step, 1e9 + step, info, optimizer=0, loss=loss, norm=norms[step % 500], **more)))  # type: ignore[arg-type]
    record.close()
    return count, time.process_time() - began


def command(name: str, folder: str, *options: str) -> tuple[float, float]:
    """Return the seconds of CPU and the peak of memory in MiB of a command on a record."""
    code = (
        "import sys, time; from gradwatch.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(time.process_time(), peak, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, folder, *options], capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, done.stderr.splitlines()[-1].split())
    return seconds, peak / 2**10


def held(layers: int) -> float:
    """Return the MiB that a watcher holds of a model of so many layers, after 55 steps."""
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    optimizer.step()
    gc.collect()
    tracemalloc.start()
    watcher = watch(net, optimizer, on_alert=lambda _: None)
    for _ in range(55):
        optimizer.step()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    watcher.close()
    return size / 2**20


def main() -> None:
    """Print the figures."""
    quick = parsed(parser(__doc__)).quick
    torch.set_num_threads(1)
    steps, layers = (2000, 100) if quick else (1_000_000, 10_000)
    for every, rhythm in ((None, "default cadence"), (1, "every step")):
        with tempfile.TemporaryDirectory() as folder:
            count, seconds = written(folder, steps, every)
            size = Path(folder, "record.jsonl").stat().st_size
            read = [
                f"{' '.join(asked)} {s:.2f} s, {peak:.0f} MiB"
                for asked in (("report",), ("check",), ("check", "--rejudge"))
                for s, peak in (command(asked[0], folder, *asked[1:]),)
            ]
            print(
                f"{steps} steps of {LAYERS} layers, {rhythm}: {count} measured, written in {seconds:.1f} s of CPU,"
                f" {size / 2**20:.1f} MiB; {'; '.join(read)}",
                flush=True,
            )
    print(f"a watcher of {layers} layers holds {held(layers):.1f} MiB after 55 steps")


if __name__ == "__main__":
    main()
