"""Configuration and runs as commands read them, and text as they print it."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run
    from gradwatch.values.configuration import Configuration


def settings(path: str | None) -> Configuration:
    """Read what a file says, or the nearest pyproject.toml."""
    from gradwatch.values import configuration

    return configuration.nearest() if path is None else configuration.read(path)


def read(paths: Sequence[str]) -> dict[str, Run]:
    """Read all runs in or below some paths, each under a name of its own.

    Raises:
        OSError, ValueError: as `read_runs`.

    """
    from gradwatch.sinks.reading import read_runs

    found = {path: read_runs(path) for path in paths}
    if len(found) == 1:
        return next(iter(found.values()))
    return {
        path if len(runs) == 1 else f"{path}/{name}": run for path, runs in found.items() for name, run in runs.items()
    }


def muted(run: Run, ignore: Sequence[str]) -> Run:
    """Return a run without the alerts that `ignore` mutes; a pattern that fits no rule is told of."""
    from gradwatch.detectors import RULES, alerts

    codes = {*RULES, *(a.finding.code for a in run.alerts)}
    for pattern in ignore:
        if not fnmatch.filter(codes, pattern.partition(":")[0]):
            print(f"gradwatch: {pattern!r} mutes nothing: there is no such rule", file=sys.stderr)  # noqa: T201
    module_of = {layer.name: layer.module for model in run.models for layer in model.layers}
    kept = tuple(a for a in run.alerts if not alerts.muted(a.finding, ignore, module_of.get(a.finding.place)))
    return replace(run, alerts=kept)


def print_(text: str) -> None:
    """Print what another program reads, as it is."""
    from gradwatch.sinks.terminal.show import write

    write(text, sys.stdout)
