"""How far back something learns, as lines and a small plot."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from gradwatch.sinks.log import one_line
from gradwatch.values.sequences import SequenceStats, reach_of, sentences, subject

_HORIZONS = 12
"""Horizons that a summary tells of."""


def reach_lines(sequences: Sequence[SequenceStats], name: str = "") -> list[RenderableType]:
    """Return a line for each horizon that was asked for, the model's own first, after the `name` of the run."""
    said = [line for _, line in sentences(sequences)]
    shown = [f"{name}: {line}" if name and i == 0 else line for i, line in enumerate(said[:_HORIZONS])]
    more = len(said) - _HORIZONS
    shown += [f"({more} more sequence module{'s' * (more > 1)})"] * (more > 0)
    return [Text(one_line(line), style="bold") for line in shown]


class LagProfile:
    """The gain by lag over its maximum as a small plot, one decade a row, with the horizon marked below.

    Where the terminal is too narrow there is nothing.
    """

    def __init__(self, stats: SequenceStats) -> None:
        """Draw what has a `lag_gain`."""
        self._stats = stats

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw as many columns as there is room for, at most 60: each is the largest gain of its lags."""
        gain, found = self._stats.lag_gain or (), reach_of(self._stats)
        width = min(options.max_width - 6, 60)
        top = max(gain, default=0.0)
        if found is None or top <= 0 or width < 12:
            return
        blocks, line, corner = (" #", "-", "+") if options.ascii_only else (" ▁▂▃▄▅▆▇█", "─", "└")
        lags = len(gain)
        edges = [i * lags // width for i in range(width)]
        levels = [
            max(gain[first : max(last, first + 1)]) / top for first, last in zip(edges, [*edges[1:], lags], strict=True)
        ]
        heights = [0.0 if level <= 0 else max(_DECADES + math.log10(level), 0.0) for level in levels]
        yield Text(f"\n{one_line(subject(self._stats))}: gain by lag, over its maximum")
        within = sum(first < found.timesteps for first in edges)
        for row in range(_DECADES - 1, -1, -1):
            bars = "".join(
                blocks[round(min(max(height - row, 0.0), 1.0) * (len(blocks) - 1))] for height in heights
            ).rstrip()
            label = {_DECADES - 1: "   1 ", _DECADES - 4: "1e-3 "}.get(row, "     ")  # of the row's upper edge
            yield Text.assemble(label, (bars[:within], "green"), (bars[within:], "red"))
        yield Text(f"1e-{_DECADES} {corner}{line * (width - 1)}")
        marks = [(f"horizon: {'at least ' * found.censored}{found.timesteps}", found.timesteps)]
        if self._stats.need is not None:
            marks.append((f"need: {self._stats.need}", self._stats.need))
        for label, lag in marks:
            yield Text("     " + _below(label, min(lag * width // lags, width - 1), width))
        yield Text(f"     0{f'{lags - 1} timesteps back':>{width - 1}}")


_DECADES = 6
"""Rows of a lag profile."""


def _below(label: str, column: int, width: int) -> str:
    """Point at a column from below, with the label on the side that has room."""
    return f"{'^':>{column + 1}} {label}" if column + 2 + len(label) <= width else f"{f'{label} ^':>{column + 1}}"
