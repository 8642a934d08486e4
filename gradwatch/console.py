"""Reports -> what people read in a terminal, a notebook and a log."""

from __future__ import annotations

import io
import logging
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.history import History
from gradwatch.reach import measured, memory_of, reaches, subject, why_short
from gradwatch.report import Alert, Report, Severity
from gradwatch.snapshot import HORIZON_GAIN, Fact, SequenceStats, Snapshot

# rich draws a random number while it is imported, and this file is imported in the middle of other people's trainings.
_random_state = random.getstate()

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult  # noqa: E402
from rich.measure import Measurement  # noqa: E402
from rich.padding import Padding  # noqa: E402
from rich.segment import Segment  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

random.setstate(_random_state)

if TYPE_CHECKING:
    from gradwatch.record import Run

_log = logging.getLogger("gradwatch")
_LEVELS = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.ERROR: logging.ERROR}
_COLOURS = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}
_WIDTH = 100
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_VISIBLE = "\N{REPLACEMENT CHARACTER}"
_MEMORIES, _PROFILES = 12, 3
"""Memories that a summary tells of, and lag profiles that it draws."""


def log(report: Report) -> None:
    """Send the alerts that began or cleared to the logger `gradwatch`."""
    for alert in report.began:
        log_alert(alert)
    for alert in report.cleared:
        _log.info("%s %s at %s cleared at step %d", alert.finding.code, alert.finding.kind, alert.finding.place or "the whole model", alert.cleared)


def log_alert(alert: Alert) -> None:
    """Send one alert to the logger `gradwatch`, at the level of its severity."""
    _log.log(_LEVELS[alert.severity], "%s", _CONTROL.sub(_VISIBLE, str(alert)))


def log_end(report: Report) -> None:
    """Send what is still open at the end to the logger `gradwatch`, worst first, in one line; nothing where nothing is."""
    still = sorted(report.open, key=lambda alert: alert.severity, reverse=True)
    if still:
        said = "; ".join(f"{a.finding.code} {a.finding.kind} at {a.finding.place or 'the whole model'} since step {a.finding.onset}" for a in still)
        line = f"at the end {len(still)} alert{'s are' if len(still) > 1 else ' is'} open: {said}"
        _log.log(_LEVELS[still[0].severity], "%s", _CONTROL.sub(_VISIBLE, line))


class Harmless:
    """What a terminal would obey in it, for instance in the names of a foreign record, is made visible."""

    def __init__(self, content: RenderableType) -> None:
        """Wrap anything that can be printed."""
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print it."""
        for segment in console.render(self._content, options):
            yield segment if segment.control else Segment(_CONTROL.sub(_VISIBLE, segment.text), segment.style)


def text(report: Report, *, sequences: Sequence[SequenceStats] = (), width: int = _WIDTH) -> str:
    """Give how far back the model learns, the table of layers and the open alerts as plain text.

    Args:
        report: what to show.
        sequences: those of the last probe, for a report of a step between two.
        width: longest line.

    """
    return _plain(_report(report, sequences), width)


def _plain(content: RenderableType, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(Harmless(content))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def html(report: Report, *, sequences: Sequence[SequenceStats] = (), width: int = _WIDTH) -> str:
    """Give the same as HTML, for notebooks."""
    console = Console(file=io.StringIO(), width=width, record=True, force_terminal=True, color_system="truecolor")
    console.print(Harmless(_report(report, sequences)))
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:normal">{code}</pre>')


def _report(report: Report, sequences: Sequence[SequenceStats]) -> RenderableType:
    snapshot = report.snapshot
    title = f"{sum(n is not None for n in snapshot.norm)} of {len(snapshot.norm)} parameters with a gradient at step {snapshot.step}"
    return Group(*reach_lines(snapshot.sequences or sequences), Text(title), layer_table(snapshot, report.open), *alert_lines(report.open))


def reach_lines(sequences: Sequence[SequenceStats], name: str = "") -> list[RenderableType]:
    """Say how far back it learns, in a line for each memory that was asked for, the model's own first; with the `name` of the run before the first."""
    said = [line for _, line in reaches(sequences)]
    shown = [f"{name}: {line}" if name and i == 0 else line for i, line in enumerate(said[:_MEMORIES])]
    shown += [f"({len(said) - _MEMORIES} more sequence modules)"] * (len(said) > _MEMORIES)
    return [Text(line, style="bold") for line in shown]


class LagProfile:
    """The gain by lag over its maximum as a small plot, one decade a row, with the horizon marked below; nothing where the terminal is too narrow."""

    def __init__(self, stats: SequenceStats) -> None:
        """Draw what has a `lag_gain`."""
        self._stats = stats

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw as many columns as there is room for, at most 60: each is the largest gain of its lags."""
        gain, found = self._stats.lag_gain or (), memory_of(self._stats)
        width = min(options.max_width - 6, 60)
        top = max(gain, default=0.0)
        if found is None or top <= 0 or width < 12:
            return
        blocks, line, corner = (" #", "-", "+") if options.ascii_only else (" ▁▂▃▄▅▆▇█", "─", "└")
        lags = len(gain)
        edges = [i * lags // width for i in range(width)]
        levels = [max(gain[first : max(last, first + 1)]) / top for first, last in zip(edges, [*edges[1:], lags], strict=True)]
        heights = [0.0 if level <= 0 else max(_DECADES + math.log10(level), 0.0) for level in levels]
        yield Text(f"\n{subject(self._stats)}: gain by lag, over its maximum")
        within = sum(first < found.horizon for first in edges)
        for row in range(_DECADES - 1, -1, -1):
            bars = "".join(blocks[round(min(max(height - row, 0.0), 1.0) * (len(blocks) - 1))] for height in heights).rstrip()
            label = {_DECADES - 1: "   1 ", _DECADES - 4: "1e-3 "}.get(row, "     ")  # of the row's upper edge
            yield Text.assemble(label, (bars[:within], "green"), (bars[within:], "red"))
        yield Text(f"1e-{_DECADES} {corner}{line * (width - 1)}")
        marks = [(f"horizon: {'at least ' * found.censored}{found.horizon}", found.horizon)]
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


def layer_table(snapshot: Snapshot, alerts: Iterable[Alert] = (), *, sensitivity: dict[str, float] | None = None, most: int | None = None) -> RenderableType:
    """Give the layers in the order of the forward pass, with their gradient norms and the codes of their alerts.

    Where the terminal is narrow, the bars are left out, then the kinds, then the sensitivities: never names, norms and codes.

    Args:
        snapshot: the step to show; layers that only another optimizer steps are left out.
        alerts: those whose codes are shown at their layers.
        sensitivity: share of the largest sensitivity of later layers, by layer.
        most: show no more rows than this, those with alerts and then those with the smallest norms.

    """
    codes: dict[str, list[Alert]] = {}
    for alert in alerts:
        codes.setdefault(alert.finding.place, []).append(alert)
    norms = layer_norms(snapshot)
    known = [math.log10(n) for n in norms.values() if n is not None and 0 < n < math.inf]
    low, high = (min(*known, max(known) - 3), max(known)) if known else (-1.0, 0.0)
    mine = {p.layer for p in snapshot.model.parameters if p.optimizer in (None, snapshot.optimizer)}
    rows = [layer for i in snapshot.model.forward_order if (layer := snapshot.model.layers[i]).name in mine]
    shown = rows
    if most is not None and len(rows) > most:
        chosen = {layer.name for layer in sorted(rows, key=lambda layer: (layer.name not in codes, _rank(norms[layer.name])))[:most]}
        shown = [layer for layer in rows if layer.name in chosen]

    def table(*, bars: bool, kinds: bool, shares: bool) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold")
        made.add_column("layer", overflow="fold", min_width=8)
        if kinds:
            made.add_column("kind", no_wrap=True)
        made.add_column("gradient", justify="right", no_wrap=True)
        if shares:
            made.add_column("of later layers", justify="right", no_wrap=True)
        if bars:
            made.add_column("log10", no_wrap=True)
        made.add_column("", overflow="fold")
        for layer in shown:
            norm, wrong = norms[layer.name], codes.get(layer.name, ())
            gravest = max((a.severity for a in wrong), default=None)
            style = _COLOURS[gravest] if gravest else ""
            cells = [
                Text(layer.name or "(the model)", style=style),
                Text(layer.kind) if kinds else None,
                Text(_number(norm)),
                Text(_number((sensitivity or {}).get(layer.name))) if shares else None,
                _bar(norm, low, high) if bars else None,
                Text(" ".join(sorted({a.finding.code for a in wrong})), style=style),
            ]
            made.add_row(*(cell for cell in cells if cell is not None))
        if len(shown) < len(rows):
            made.caption = f"{len(rows) - len(shown)} more layers"
        return made

    shares = sensitivity is not None
    return _Fitting(
        table(bars=True, kinds=True, shares=shares),
        table(bars=False, kinds=True, shares=shares),
        table(bars=False, kinds=False, shares=shares),
        table(bars=False, kinds=False, shares=False),
    )


class _Fitting:
    """The first of several renderings for which the terminal is wide enough, or else the last."""

    def __init__(self, *renderings: RenderableType) -> None:
        """Take them, the widest first."""
        self._renderings = renderings

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Choose."""
        unbounded = options.update_width(10_000)
        fitting = (r for r in self._renderings if Measurement.get(console, unbounded, r).maximum <= options.max_width)
        yield next(fitting, self._renderings[-1])


def alert_lines(alerts: Iterable[Alert], *, began: bool = True) -> list[RenderableType]:
    """Give each alert with its cause and remedy, and when it `began`, gravest first."""
    lines: list[RenderableType] = []
    for alert in sorted(alerts, key=lambda a: a.severity, reverse=True):
        finding = alert.finding
        lines.append(Text(""))
        lines.append(
            Text.assemble(
                (f"{finding.code} {finding.kind}", _COLOURS[alert.severity]), f" ({finding.severity.value}) ", (finding.place or "the whole model", "bold")
            )
        )
        until = f"cleared at step {alert.cleared}" if alert.cleared is not None else f"last seen at step {alert.last}"
        when = f"alert began at step {alert.began}, {until}" if began else ""
        for label, said in (("", alert.message), ("why: ", alert.cause), ("try: ", alert.remedy), ("", when)):
            if said:
                lines.append(Padding(Text.assemble((label, "bold"), said), (0, 0, 0, 2)))
    return lines


def run_summary(run: Run, name: str = "") -> RenderableType:
    """Give what happened in a run: how far back it learns, the verdict, the lag profile, the layers with the least gradient, the alerts."""
    history = History()
    newest: dict[int | None, tuple[Snapshot, list[float]]] = {}
    for snapshot in run.snapshots:
        history.add(snapshot)
        newest[snapshot.optimizer] = snapshot, history.ratios(1)[-1].tolist()
    sequences = next((s.sequences for s in reversed(run.snapshots) if s.sequences), ())
    lines = reach_lines(sequences, name)
    parts: list[RenderableType] = [*lines, Text(verdict(run, name if not lines else ""), style="bold")]
    parts += [LagProfile(stats) for stats, _ in reaches(sequences) if stats.lag_gain is not None][:_PROFILES]
    for last, ratios in newest.values():
        known = {layer.name: r for layer, r in zip(last.model.layers, ratios, strict=True) if not math.isnan(r)}
        whose = f" that {last.model.optimizers[last.optimizer].kind} {last.optimizer} steps," if last.optimizer is not None and len(newest) > 1 else ""
        title = f"\nThe layers{whose} at step {last.step}, in the order of the forward pass (gradient: its L2 norm; of later layers: sensitivity over the largest behind)"
        parts += [Text(title), layer_table(last, run.alerts, sensitivity=known, most=40)]
    parts += alert_lines(run.alerts)
    parts += note_lines(run)
    return Group(*parts)


def note_lines(run: Run) -> list[RenderableType]:
    """Say what the record lacks."""
    notes = []
    if not run.snapshots:
        notes.append("no step was recorded")
    if run.thinned:
        notes.append(f"{run.thinned} of the older snapshots were dropped to keep the record's bound")
    if run.broken:
        notes.append(f"{run.broken} lines of the record could not be read")
    return [Text(f"\nNote: {note}.") for note in notes]


def verdict(run: Run, name: str = "") -> str:
    """Say in one line how the run went."""
    steps = f"{len(run.snapshots)} measured steps" + (f", {run.snapshots[0].step} to {run.snapshots[-1].step}" if run.snapshots else "")
    bad = [a for a in run.alerts if a.severity > Severity.INFO]
    still = sum(a.cleared is None for a in bad)
    said = "no alert" if not bad else f"{len(bad)} alert{'s' * (len(bad) > 1)}, {still} still open at the end"
    return f"{name + ': ' if name else ''}{steps}: {said}"


def layer_norms(snapshot: Snapshot) -> dict[str, float | None]:
    """Give the L2 norm of each layer's gradient over all of its parameters; None where there is none."""
    found: dict[str, list[float]] = {layer.name: [] for layer in snapshot.model.layers}
    for parameter, norm in zip(snapshot.model.parameters, snapshot.norm, strict=True):
        if norm is not None:
            found[parameter.layer].append(norm)
    return {name: math.hypot(*norms) if norms else None for name, norms in found.items()}


def _rank(norm: float | None) -> float:
    return math.inf if norm is None else -1.0 if math.isnan(norm) else norm


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2e}"


def _bar(norm: float | None, low: float, high: float, width: int = 12) -> Text:
    if norm is None or not 0 < norm < math.inf:
        return Text("")
    share = (math.log10(norm) - low) / (high - low) if high > low else 1.0
    return Text("█" * max(round(share * width), 0) or "▏", style="green" if share > 0.5 else "yellow" if share > 0.25 else "red")


def health_error(report: Report, wrong: Sequence[Alert], most: int) -> str:
    """Give the text of an error: what is wrong, why, what to do, and the layers with the least gradient."""
    count = len(report.snapshot.model.layers)
    title = f"the gradients of this model are not healthy: {', '.join(sorted({a.finding.kind for a in wrong}))}"
    shown = f"The {most} layers of {count} with the smallest gradients" if count > most else "The layers"
    return _plain(
        Group(
            Text(title), *alert_lines(wrong, began=False), Text(f"\n{shown}, in the order of the forward pass:"), layer_table(report.snapshot, wrong, most=most)
        ),
        _WIDTH,
    )


def horizon_error(stats: SequenceStats, need: int, facts: Sequence[Fact] = (), *, place: str = "", kind: str = "") -> str:
    """Give the text of an error: the memory that was measured, what a horizon is, why it is so short, what to do, and the gain by lag.

    Args:
        stats: what was measured; with a finite `lag_gain`.
        need: how many of the newest timesteps matter.
        facts: measured causes.
        place: name of the sequence module, if it is known: only its facts count, and the remedy names it.
        kind: its class.

    Raises:
        ValueError: there is no memory to tell of.

    """
    found = memory_of(stats)
    if found is None:
        raise ValueError(f"stats must have a finite lag_gain, got {stats.lag_gain!r:.80}")
    place = place or stats.module or next(iter(dict.fromkeys(f.place for f in facts)), "")
    said = why_short(measured(stats, found, facts, place=place, kind=kind, need=need), place)
    definition = f"horizon: the smallest n such that the gain, the norm of d(newest output)/d(input n steps back), stays below {HORIZON_GAIN:g} of its maximum from there on"
    return _plain(
        Group(Text(f"{said.message}\n"), Text(definition), Text(f"why: {said.cause}"), Text(f"try: {said.remedy}"), LagProfile(replace(stats, need=need))),
        _WIDTH,
    )
