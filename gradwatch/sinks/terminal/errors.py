"""What is wrong with a model -> the text of an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from gradwatch.sinks.terminal.alert_text import alert_lines
from gradwatch.sinks.terminal.depth_profile import DepthProfile
from gradwatch.sinks.terminal.lag_profile import LagProfile
from gradwatch.sinks.terminal.layer_table import layer_table
from gradwatch.sinks.terminal.page import WIDTH, plain_text, run_summary
from gradwatch.values.causality import Causality
from gradwatch.values.report import Alert, Explanation, Report
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.thresholds import HORIZON_GAIN

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run


def health_error(report: Report, wrong: Sequence[Alert], most: int) -> str:
    """Return the text of an error: what is wrong, why, what to do, and the layers with the least gradient."""
    count = len(report.snapshot.model.layers)
    title = f"the gradients of this model are not healthy: {', '.join(sorted({a.finding.kind for a in wrong}))}"
    shown = f"The {most} layers of {count} with the smallest gradients" if count > most else "The layers"
    return plain_text(
        Group(
            Text(title),
            *alert_lines(wrong, began=False),
            Text(f"\n{shown}, in the order of the forward pass:"),
            layer_table(report.snapshot, wrong, most=most),
        ),
        WIDTH,
    )


def training_error(run: Run, wrong: Sequence[Alert]) -> str:
    """Return the text of an error: what is wrong with a short training, and all that `gradwatch report` says of it."""
    losses = [s.loss for s in run.snapshots if s.loss is not None]
    came = f"; its loss went from {losses[0]:.3g} to {losses[-1]:.3g}" if losses else ""
    kinds = ", ".join(sorted({a.finding.kind for a in wrong}))
    return plain_text(
        Group(Text(f"this does not train well: {kinds} in {len(run.snapshots)} steps{came}\n"), run_summary(run)), WIDTH
    )


def causality_error(found: Causality) -> str:
    """Return the text of an error: which output depends on which later input, where that comes from, and what to do."""
    leak = found.leak
    if leak is None:
        raise ValueError("there is no leak to tell of")
    return plain_text(
        Group(
            Text(f"{'the model' if leak.feature is None else 'the function'} {found}\n"),
            Text(f"why: {leak.cause}"),
            Text(f"try: {leak.remedy}"),
            Text(
                "a backtest of such a model uses what was not known yet. Where it may know this much (a known"
                " calendar, an output that is late by so many timesteps), offset= or input= says so"
            ),
        ),
        WIDTH,
    )


def horizon_error(stats: SequenceStats, words: Explanation) -> str:
    """Return the text of an error: the horizon, what a horizon is, why it is so short, what to do, and the gain by lag.

    Args:
        stats: what was measured; with a `need`.
        words: what that means.

    """
    definition = (
        "horizon: the smallest n such that the gain, the norm of d(newest output)/d(input n steps back), stays below"
        f" {HORIZON_GAIN:g} of its maximum from there on"
    )
    return plain_text(
        Group(
            Text(f"{words.message}\n"),
            Text(definition),
            Text(f"why: {words.cause}"),
            Text(f"try: {words.remedy}"),
            LagProfile(stats),
            DepthProfile(stats),
        ),
        WIDTH,
    )
