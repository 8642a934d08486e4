"""Run one program within its environment, measured without gradwatch, and compare what a watcher told."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.trainers.truth import Norms, Truth, When

_WRAPPERS = re.compile(r"\b(module|_forward_module|_module|_orig_mod)\.")
"""Modules that libraries put around a model, whose names one side may show and the other not."""


class Heard:
    """What one watcher told."""

    def __init__(self, model: Any, truth: Truth) -> None:
        """Note the names of the parameters."""
        self._truth = truth
        self.names = {p: _WRAPPERS.sub("", name) for name, p in model.named_parameters()}
        self.norms: list[dict[str, float]] = []
        self.losses = 0
        self.accused: set[str] = set()

    def __call__(self, report: Any) -> None:
        """Note a snapshot."""
        snapshot = report.snapshot
        self.accused |= {alert.finding.code for alert in report.began if alert.severity.value != "info"}
        if snapshot.silence is not None:  # a word on steps that nobody heard, not a step
            return
        self._truth.read()
        names = (_WRAPPERS.sub("", parameter.name) for parameter in snapshot.model.parameters)
        self.norms.append({n: norm for n, norm in zip(names, snapshot.norm, strict=True) if norm is not None})
        self.losses += snapshot.loss is not None

    def true(self, steps: list[Norms]) -> list[dict[str, float]]:
        """Return the true steps of the watched parameters."""
        named = ({self.names[p]: norm for p, norm in step.items() if p in self.names} for step in steps)
        return [step for step in named if step]


def listen(truth: Truth) -> list[Heard]:
    """Return what every watcher of this process will tell, whoever makes it."""
    from gradwatch.watcher.watcher import Watcher

    heard: list[Heard] = []
    original = Watcher.__init__

    @functools.wraps(original)
    def init(self: Any, model: Any, optimizers: Any, options: Any, **more: Any) -> None:
        heard.append(Heard(model, truth))
        original(self, model, optimizers, dataclasses.replace(options, sinks=[*options.sinks, heard[-1]]), **more)

    Watcher.__init__ = init
    return heard


def difference(told: dict[str, float], true: dict[str, float]) -> float:
    """Return the largest relative difference; infinite if other parameters have a gradient, or it is no number."""
    if told.keys() != true.keys():
        return math.inf
    every = [abs(told[n] - true[n]) / (abs(true[n]) or 1.0) for n in true]
    return max(every, default=0.0) if all(map(math.isfinite, every)) else math.inf


def measured(act: Callable[[], object], when: When, out: Path) -> None:
    """Run something and write down what happened."""
    truth = Truth(when)
    heard = listen(truth)
    kept = act()  # a program's names, without which its model would be gone
    pairs = [(told, true) for its in heard for told, true in zip(its.norms, its.true(truth.steps), strict=False)]
    out.write_text(
        json.dumps(
            {
                "weights": truth.weights(),
                "steps": sum(len(its.true(truth.steps)) for its in heard) if heard else len(truth.steps),
                "snapshots": sum(len(its.norms) for its in heard),
                "losses": sum(its.losses for its in heard),
                "difference": max((difference(told, true) for told, true in pairs), default=0.0),
                "accused": sorted(set[str]().union(*(its.accused for its in heard))),
            }
        )
    )
    del kept


def follow(when: When, out: Path) -> None:
    """Measure in the worker of Ray, where the training is, and not here."""
    from ray.train.torch import TorchTrainer

    original = TorchTrainer.__init__

    @functools.wraps(original)
    def init(self: Any, loop: Callable[[], object], **more: Any) -> None:
        original(self, lambda: measured(loop, when, out), **more)

    TorchTrainer.__init__ = init


def main() -> None:
    """Run a program; the command line has its file, what is true, the file of the results, and "worker" perhaps."""
    program, when, out, *in_worker = sys.argv[1:]
    sys.argv = [program]
    run = functools.partial(runpy.run_path, program, run_name="__main__")
    if in_worker:
        follow(when, Path(out))
        run()
    else:
        measured(run, when, Path(out))


if __name__ == "__main__":
    main()
