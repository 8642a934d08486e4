"""A snapshot -> the table of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gradwatch.sinks.log import one_line
from gradwatch.sinks.terminal.alert_text import COLOURS
from gradwatch.values.layer_columns import norms
from gradwatch.values.report import Alert
from gradwatch.values.snapshot import Snapshot

_BLOCKS = "▁▂▃▄▅▆▇█"


def layer_table(
    snapshot: Snapshot,
    alerts: Iterable[Alert] = (),
    *,
    sensitivity: dict[str, float] | None = None,
    most: int | None = None,
    past: Mapping[str, Sequence[float | None]] | None = None,
) -> RenderableType:
    """Return the layers in the order of the forward pass, with their gradient norms and the codes of their alerts.

    Where the terminal is narrow, the bars are left out, then the kinds, then the sensitivities; never the names, norms
    and codes.

    Args:
        snapshot: the step to show; layers that only another optimizer steps are left out.
        alerts: those whose codes are shown at their layers.
        sensitivity: share of the largest sensitivity of later layers, by layer.
        most: show no more rows than this, those with alerts and then those with the smallest norms.
        past: norms of each layer at earlier steps, drawn as a line in place of the bar.

    """
    codes: dict[str, list[Alert]] = {}
    for alert in alerts:
        codes.setdefault(alert.finding.place, []).append(alert)
    norm_of = norms(snapshot.model, snapshot.norm)
    known = [math.log10(n) for n in norm_of.values() if n is not None and 0 < n < math.inf]
    low, high = (min(*known, max(known) - 3), max(known)) if known else (-1.0, 0.0)
    unstepped = {p.layer for p in snapshot.model.unstepped}
    mine = {p.layer for p in snapshot.model.parameters if p.optimizer in (None, snapshot.optimizer)}
    rows = [layer for i in snapshot.model.forward_order if (layer := snapshot.model.layers[i]).name in mine]
    shown = rows
    if most is not None and len(rows) > most:
        chosen = {
            layer.name
            for layer in sorted(
                rows,
                key=lambda layer: (codes.keys().isdisjoint((layer.name, layer.module)), _rank(norm_of[layer.name])),
            )[:most]
        }
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
            made.add_column("log10" if past is None else "log10, by step", no_wrap=True)
        made.add_column("", overflow="fold")
        for layer in shown:
            norm, wrong = norm_of[layer.name], [a for name in {layer.name, layer.module} for a in codes.get(name, ())]
            gravest = max((a.severity for a in wrong), default=None)
            style = COLOURS[gravest] if gravest else ""
            cells = [
                Text(one_line(layer.name) or "(the model)", style=style),
                Text(one_line(layer.kind)) if kinds else None,
                Text("in no optimizer" if norm is None and layer.name in unstepped else _number(norm)),
                Text(_number((sensitivity or {}).get(layer.name))) if shares else None,
                (_bar(norm, low, high) if past is None else _line(past.get(layer.name, ()))) if bars else None,
                Text(" ".join(sorted({a.finding.code for a in wrong})), style=style),
            ]
            made.add_row(*(cell for cell in cells if cell is not None))
        more = len(rows) - len(shown)
        if more > 0:
            made.caption = f"{more} more layer{'s' * (more > 1)}"
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


def _rank(norm: float | None) -> float:
    return math.inf if norm is None else -1.0 if math.isnan(norm) else norm


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2e}"


def _line(norms: Sequence[float | None]) -> Text:
    """Draw sizes as a line of blocks, from the smallest of them to the largest; ! is not finite, 0 is exactly 0."""
    known = [math.log10(n) for n in norms if n is not None and 0 < n < math.inf]
    low, span = (min(known), max(max(known) - min(known), 1.0)) if known else (0.0, 1.0)

    def mark(norm: float | None) -> str:
        if norm is None:
            return " "
        if not 0 < norm < math.inf:
            return "0" if norm == 0 else "!"
        return _BLOCKS[min(int((math.log10(norm) - low) / span * len(_BLOCKS)), len(_BLOCKS) - 1)]

    return Text("".join(map(mark, norms)))


def _bar(norm: float | None, low: float, high: float, width: int = 12) -> Text:
    if norm is None or not 0 < norm < math.inf:
        return Text("")
    share = (math.log10(norm) - low) / (high - low) if high > low else 1.0
    return Text(
        "█" * max(round(share * width), 0) or "▏", style="green" if share > 0.5 else "yellow" if share > 0.25 else "red"
    )
