"""A run that still goes on, live in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from gradwatch.sinks.log import one_line
from gradwatch.sinks.page.data import headline_of
from gradwatch.sinks.reading import Following, records
from gradwatch.sinks.terminal.alert_text import COLOURS
from gradwatch.sinks.terminal.layer_table import layer_table
from gradwatch.sinks.terminal.page import Harmless
from gradwatch.values.layer_columns import norms
from gradwatch.values.report import Severity

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run

_WIDTH = 24
"""Steps of the line behind each layer: the newest measured ones."""
_RATE_OVER = 60.0
"""Seconds of the run over which its speed is told."""
_SILENT = 10.0
"""Seconds without a step from which on it is said."""
_SENTENCES = 4
"""Sentences on top: the gravest."""
_EDGE = 4
"""Lines of a terminal that the table leaves free beside all else."""


def follow(
    path: str,
    to: TextIO,
    *,
    every: float = 1.0,
    going: Callable[[], bool] = lambda: True,
    now: Callable[[], float] = time.time,
) -> None:
    """Show a run as it grows, until interrupted; in what is no terminal, a line for each look that finds something new.

    Args:
        path: a record, its folder, or a log directory with one run; it need not be there yet.
        to: where it is shown.
        every: seconds between two looks.
        going: whether to look once more.
        now: seconds since the epoch.

    Raises:
        ValueError: there are several runs, or what is there is no record.

    """
    console = Console(file=to, force_jupyter=False, highlight=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, screen=False, vertical_overflow="crop") as live:
            for run in _looks(path, every, going):
                live.update(Harmless(_view(run, path, console.height, now())), refresh=True)
        return
    shown = ""
    for run in _looks(path, every, going):
        line = _line(run, path)
        if line != shown:
            print(line, file=to, flush=True)
            shown = line


def _looks(path: str, every: float, going: Callable[[], bool]) -> Iterator[Run | None]:
    """Yield the run as it is at each look; None while there is none."""
    following: Following | None = None
    run: Run | None = None
    while True:
        if following is None:
            found = records(Path(path))
            if len(found) > 1:
                raise ValueError(f"{path} holds {len(found)} runs, and one is wanted: {', '.join(found)}")
            following = Following(next(iter(found.values()))) if found else None
        try:
            run = following.run() if following is not None else None
        except FileNotFoundError:  # a new run is about to take its place
            following, run = None, None
        except OSError:
            if run is None:
                raise
            # A share that is away for a while: what was read stands, and says how old it is.
        yield run
        if not going():
            return
        time.sleep(every)


def _speed(run: Run) -> float | None:
    """Return steps a second of the last minute of a run."""
    newest = run.snapshots[-1]
    first = next(s for s in run.snapshots if newest.wall_time - s.wall_time <= _RATE_OVER)
    seconds, steps = newest.wall_time - first.wall_time, newest.step - first.step
    return steps / seconds if seconds > 0 and steps > 0 else None  # a run that went on from a checkpoint steps back


def _head(run: Run, path: str) -> str:
    speed, newest = _speed(run), run.snapshots[-1]
    loss = "" if newest.loss is None else f", loss {newest.loss:.4g}"
    pace = "" if speed is None else f", {speed:.3g} steps/s"
    return f"{one_line(path)}: step {newest.step:,}{loss}{pace}"


def _line(run: Run | None, path: str) -> str:
    """Return what is new in one line."""
    if run is None or not run.snapshots:
        return f"{one_line(path)}: waiting for the first step"
    still = [a for a in run.alerts if a.cleared is None and a.severity > Severity.INFO]
    said = ", ".join(f"{a.finding.code} {one_line(a.finding.place)}".strip() for a in still)
    return f"{_head(run, path)}; {'open: ' + said if still else 'no open alert'}"


def _view(run: Run | None, path: str, height: int, now: float) -> RenderableType:
    """Return the whole screen."""
    if run is None or not run.snapshots:
        return Text(_line(run, path))
    newest = run.snapshots[-1]
    silent = now - newest.wall_time
    parts: list[RenderableType] = [Text(_head(run, path) + (f", last {silent:,.0f} s ago" if silent > _SILENT else ""))]
    for one in headline_of(run)[:_SENTENCES]:
        colour = COLOURS.get(Severity(one["severity"]), "") if one["severity"] != "ok" else "green"
        parts.append(Text(one["text"], style=colour))
        if one["remedy"]:
            parts.append(Text(f"  try: {one['remedy']}", style="bold"))
    mine = [s for s in run.snapshots if s.optimizer == newest.optimizer][-_WIDTH:]
    columns = [norms(s.model, s.norm) for s in mine]
    past = {layer.name: [column.get(layer.name) for column in columns] for layer in newest.model.layers}
    rows = max(height - len(parts) * 2 - _EDGE, 3)
    still = [a for a in run.alerts if a.cleared is None]
    parts.append(layer_table(newest, still, most=rows, past=past))
    return Group(*parts)
