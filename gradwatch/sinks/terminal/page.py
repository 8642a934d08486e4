"""Reports and runs -> what people read in a terminal and a notebook."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from gradwatch.sinks.log import one_line, printable
from gradwatch.sinks.terminal.alert_text import alert_lines
from gradwatch.sinks.terminal.depth_profile import DepthProfile
from gradwatch.sinks.terminal.lag_profile import LagProfile, reach_lines
from gradwatch.sinks.terminal.layer_table import layer_table
from gradwatch.values.history import History
from gradwatch.values.report import Report, Severity
from gradwatch.values.sequences import SequenceStats, sentences

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run

WIDTH = 100
_PROFILES = 3
"""Lag profiles that a summary draws."""


class Harmless:
    """Content in which what a terminal would obey, for instance in the names of a foreign record, is made visible."""

    def __init__(self, content: RenderableType) -> None:
        """Wrap anything that can be printed."""
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print it."""
        for segment in console.render(self._content, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def text(report: Report, *, sequences: Sequence[SequenceStats] = (), width: int = WIDTH) -> str:
    """Return how far back the model learns, the table of layers and the open alerts as plain text.

    Args:
        report: what to show.
        sequences: those of the last probe, for a report of a step between two.
        width: longest line.

    """
    return plain_text(_report(report, sequences), width)


def plain_text(content: RenderableType, width: int) -> str:
    """Return what would be printed, without colours."""
    out = io.StringIO()
    console = Console(
        file=out, width=width, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False
    )  # in a notebook rich shows what it prints, and the file stays empty
    console.print(Harmless(content))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _report(report: Report, sequences: Sequence[SequenceStats]) -> RenderableType:
    snapshot = report.snapshot
    count = sum(n is not None for n in snapshot.norm)
    title = f"{count} of {len(snapshot.norm)} parameters with a gradient at step {snapshot.step}"
    return Group(
        *reach_lines(snapshot.sequences or sequences),
        Text(title),
        layer_table(snapshot, report.open),
        *alert_lines(report.open),
    )


def run_summary(run: Run, name: str = "") -> RenderableType:
    """Return what happened in a run.

    That is how far back it learns, the verdict, the lag profiles, the layers with the least gradient, and the alerts.
    """
    history, newest = History(), {snapshot.optimizer: snapshot for snapshot in run.snapshots}
    ratios: dict[int | None, list[float]] = {}
    for snapshot in run.snapshots:
        if snapshot.weight_norm is not None or snapshot is newest[snapshot.optimizer]:  # all that the table needs
            history.add(snapshot)
            ratios[snapshot.optimizer] = history.ratios(1)[-1].tolist()
    sequences = next((s.sequences for s in reversed(run.snapshots) if s.sequences), ())
    lines = reach_lines(sequences, name)
    parts: list[RenderableType] = [*lines, Text(verdict(run, name if not lines else ""), style="bold")]
    parts += [LagProfile(stats) for stats, _ in sentences(sequences) if stats.lag_gain is not None][:_PROFILES]
    parts += [DepthProfile(stats) for stats in sequences if stats.chain]
    for optimizer, last in newest.items():
        both = zip(last.model.layers, ratios[optimizer], strict=True)
        known = {layer.name: r for layer, r in both if not math.isnan(r)}
        whose = (
            f" that {last.model.optimizers[last.optimizer].kind} {last.optimizer} steps,"
            if last.optimizer is not None and len(newest) > 1
            else ""
        )
        columns = "gradient: its L2 norm; of later layers: sensitivity over the largest of the layers after it"
        title = f"\nThe layers{whose} at step {last.step}, in the order of the forward pass ({columns})"
        parts += [Text(title), layer_table(last, run.alerts, sensitivity=known, most=40)]
    parts += alert_lines(run.alerts)
    parts += note_lines(run)
    return Group(*parts)


def note_lines(run: Run) -> list[RenderableType]:
    """Say what the record lacks, in lines of a terminal."""
    return [Text(f"\nNote: {note}.") for note in notes(run)]


def notes(run: Run) -> list[str]:
    """Say what the record lacks."""
    said = []
    if not run.snapshots:
        said.append("no step was recorded")
    if run.thinned:
        were = "was" if run.thinned == 1 else "were"
        said.append(f"{run.thinned} of the older snapshots {were} dropped to keep the record's bound")
    if run.broken:
        said.append(f"{run.broken} line{'s' * (run.broken != 1)} of the record could not be read")
    return said


def verdict(run: Run, name: str = "") -> str:
    """Say in one line how the run went."""
    measured = [s.step for s in run.snapshots]
    if len(measured) == 1:
        steps = f"1 measured step, step {measured[0]}"
    else:
        steps = f"{len(measured)} measured steps" + (f", {min(measured)} to {max(measured)}" if measured else "")
    bad = [a for a in run.alerts if a.severity > Severity.INFO]
    still = sum(a.cleared is None for a in bad)
    said = "no alert" if not bad else f"{len(bad)} alert{'s' * (len(bad) > 1)}, {still} still open at the end"
    if infos := len(run.alerts) - len(bad):
        said += f" ({infos} for information)"
    return f"{one_line(name) + ': ' if name else ''}{steps}: {said}"
