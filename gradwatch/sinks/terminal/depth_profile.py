"""Where a horizon is won and lost on the way through a model, as a strip for each place."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from gradwatch.sinks.log import one_line
from gradwatch.values.chain import places, resampled
from gradwatch.values.sequences import SequenceStats, reach_of
from gradwatch.values.thresholds import HORIZON_GAIN

_MOST = 16
"""Places that are drawn."""
_NAME = 28
"""Letters of a name that are shown: its last ones."""


class DepthProfile:
    """The gain by lag of the model's input, and of what enters each module that mixes timesteps, over its maximum.

    The newest timestep is on the left, on the clock of the input; what is below the limit of a horizon is blank. Where
    nothing mixes timesteps, or the terminal is too narrow, there is nothing.
    """

    def __init__(self, stats: SequenceStats) -> None:
        """Draw the way of the model's input through its modules."""
        self._stats = stats

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw as many columns as there is room for, at most 48: each is the largest gain of its lags."""
        stats, own = self._stats, reach_of(self._stats)
        width = min(options.max_width - _NAME - 22, 48)
        shown = places(stats)
        if own is None or not shown or width < 12:
            return
        blocks = " .:#" if options.ascii_only else " ▁▂▃▄▅▆▇█"
        yield Text("\nThrough depth: how far back the newest output sees what enters each module (left: newest)")
        for name, one in shown[:_MOST]:
            found = reach_of(one)
            if found is not None:
                strip = "".join(_block(level, blocks) for level in resampled(one, stats.length, width))
                name = one_line(name)  # noqa: PLW2901
                label = name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"
                reaches = f"{'at least ' * found.censored}{found.timesteps * one.clock} of {stats.length}"
                yield Text.assemble(f"  {label:{_NAME}} ", (f"{strip:{width}}", "green"), f" {reaches}")
        if len(shown) > _MOST:
            yield Text(f"  ({len(shown) - _MOST} more)")


def _block(level: float, blocks: Sequence[str]) -> str:
    """Return the block of a share of the maximum: three decades from nothing to full."""
    if level < HORIZON_GAIN:
        return blocks[0]
    height = 1 - math.log10(level) / math.log10(HORIZON_GAIN)
    return blocks[max(math.ceil(height * (len(blocks) - 1)), 1)]
