"""A page in a notebook: its first screen as a still, which needs no script, and the page itself in a frame."""

from __future__ import annotations

import html
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.sinks.log import printable
from gradwatch.sinks.page.columns import unpacked
from gradwatch.sinks.page.data import page_data, run_data
from gradwatch.sinks.page.render import page_html

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run

_COLUMNS, _ROWS = 48, 24
"""Cells of the picture in a still; of more layers, those with alerts and then those with the smallest gradients."""
_ALERTS = 12
"""Open alerts that a still tells in words."""
_HEIGHT = 900
"""Pixels of the frame."""
_LOW, _HIGH = (0, 32, 76), (255, 233, 69)
"""Colours of the smallest and of the largest gradient: the ends of cividis."""
_SEVERITIES = {"ok": "#1b6e3c", "info": "#0b5cad", "warning": "#9a5b00", "error": "#b3261e"}


class Page:
    """A run as a page: shows itself in a notebook, and can be saved."""

    def __init__(self, name: str, run: Run, version: str) -> None:
        """Make it of what is there now."""
        self._html = page_html(page_data({name: run}, version), name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page into a file, which needs nothing beside itself."""
        Path(path).write_text(self._html, encoding="utf-8")

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, in which its script runs and from which it reaches nothing."""
        return (
            f'<iframe srcdoc="{html.escape(self._html)}" sandbox="allow-scripts" width="100%" height="{_HEIGHT}"'
            ' style="border: 0"></iframe><p>Where nothing is shown above, page.save("page.html") writes a file.</p>'
        )


def still(name: str, run: Run) -> str:
    """Return what is wrong, the gradient of each layer by step, and the alerts, as HTML without script or style sheet.

    Notebooks strike scripts, frames and style sheets out of what they do not trust; tables and colours stay.
    """
    data = run_data(name, run, columns=_COLUMNS)
    parts = [_sentence(one["severity"], one["text"], one["remedy"]) for one in data["headline"]]
    if data["steps"] and data["layers"]:
        parts.append(_heatmap(data))
    parts += [
        f"<p><b>{alert['code']} {_text(alert['kind'])}</b> ({alert['severity']}), since step {alert['since']}:"
        f" {_text(alert['message'])}"
        + (f"<br>Why: {_text(alert['cause'])}" if alert["cause"] else "")
        + (f"<br>Try: {_text(alert['remedy'])}" if alert["remedy"] else "")
        + "</p>"
        for alert in [one for one in data["alerts"] if one["cleared"] is None][:_ALERTS]
    ]
    return f"<div>{''.join(parts)}</div>"


def _sentence(severity: str, text: str, remedy: str) -> str:
    style = f"border-left: 5px solid {_SEVERITIES[severity]}; padding-left: 8px"
    more = f"<br>Try: {_text(remedy)}" if remedy else ""
    return f'<p style="{style}"><b>{_text(text)}</b>{more}</p>'


def _heatmap(data: dict[str, Any]) -> str:
    """Return a table of coloured cells, layers by steps."""
    rows = [unpacked(row) for row in data["columns"]["norm"]]
    ill = {row for alert in data["alerts"] for row in alert["rows"] if alert["severity"] != "info"}

    def newest(row: int) -> float:
        return next((value for value in reversed(rows[row]) if value is not None), math.inf)

    shown = sorted(sorted(range(len(rows)), key=lambda row: (row not in ill, newest(row)))[:_ROWS])
    levels = [math.log10(v) for row in rows for v in row if v is not None and 0 < v < math.inf]
    low, high = (min(*levels, max(levels) - 3), max(levels)) if levels else (-1.0, 0.0)
    lines = []
    for row in shown:
        last = rows[row][-1]
        colours = [_colour(value, low, high) for value in rows[row]]
        cells = "".join(f'<td style="background-color: {one}; padding: 4px 3px"></td>' for one in colours)
        mark = "&#9650; " if row in ill else ""
        number = "none" if last is None else "not finite" if math.isinf(last) else f"{last:.2e}"
        lines.append(f"<tr><td>{mark}{_text(data['layers'][row]['name'])}</td>{cells}<td>{number}</td></tr>")
    which = "each layer" if len(shown) == len(rows) else f"{len(shown)} of {len(rows)} layers"
    return (
        f"<table><caption>Gradient of {which}, step {data['first']} to {data['last']}: dark is little"
        f" ({10**low:.0e}), bright is much ({10**high:.0e})</caption>{''.join(lines)}</table>"
    )


def _colour(value: float | None, low: float, high: float) -> str:
    if value is None:
        return "transparent"
    if math.isinf(value):
        return "#d62776"
    if value == 0:
        return "#000000"
    share = min(max((math.log10(value) - low) / (high - low), 0.0), 1.0)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_LOW, _HIGH, strict=True))


def _text(text: str) -> str:
    return html.escape(printable(text))
