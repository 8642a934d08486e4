"""Levels by step -> heatmaps."""

from __future__ import annotations

import math
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from gradwatch.sinks.tensorboard.scalars import FLOOR, log10
from gradwatch.values.chain import places, resampled
from gradwatch.values.sequences import SequenceStats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image, ImageDraw

    Floats = NDArray[np.float64]
    Pixels = NDArray[np.uint8]
    Label = tuple[float, float, str, str]
    """Where a text stands, the text, and which of its points stands there, as PIL's anchors say."""

_COLUMNS = 240
"""Steps that a heatmap shows; when there are more, every second is dropped."""
_ROWS = 256
"""Rows of a heatmap of lags; when there are more lags, each row is of several."""
_DEEPEST = -12.0
"""log10 of the share of the maximum below which all lags have one colour: what matters has most of the colours."""
_PLACES = 20
"""Modules on the way through a model that are drawn: each has its name written over it."""
_SHALLOW = -6.0
"""The same where horizons are compared: as far below their limit as that is below the maximum."""
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 8, 74, 56, 32
"""Pixels of a heatmap and of its margins: above is the title, to the right the bar of colours, below are the steps."""
_INSIDE = _WIDTH - _LEFT - _RIGHT
_ROOM = 22
"""Pixels that the name of a row takes; lower rows have none."""

Content = TypeVar("Content")


class _Columns(Generic[Content]):
    """The columns of a picture: bounded, and due to be drawn ever more rarely as the run goes on."""

    def __init__(self, first: int, then: int) -> None:
        """Draw after `first` columns, and then after `then` more or a quarter more, whichever is later."""
        self.kept: list[tuple[int, Content]] = []
        """Steps, and what they show."""
        self.fresh = True
        """Whether what was drawn last shows all."""
        self._stride = 1
        self._count = 0
        self._next, self._then = first, then

    def add(self, step: int, content: Content) -> None:
        if self._count % self._stride == 0:
            self.kept.append((step, content))
            if len(self.kept) > _COLUMNS:
                self.kept, self._stride = self.kept[::2], self._stride * 2
        self._count += 1
        self.fresh = False

    def due(self) -> bool:
        if self._count < self._next or not self.kept:
            return False
        self._next = max(self._count + self._then, self._count * 5 // 4)
        self.fresh = True
        return True

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.kept]


class LayerPicture:
    """The heatmap of layers by steps."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.columns: _Columns[array[float]] = _Columns(20, 80)
        """Levels along `_names`."""
        self._names: list[str] = []
        self._rows: Sequence[str] = ()

    def add(self, step: int, levels: Mapping[str, float], rows: Sequence[str]) -> None:
        """Add the log10 of a step's norms, by layer; `rows` are all layers in the order of the forward pass."""
        if rows is not self._rows:
            if set(rows) != set(self._names):  # another model, and another picture
                self._names, self.columns.kept = list(rows), []
            self._rows = rows
        column = array("d", [levels.get(name, math.nan) for name in self._names])
        if not math.isfinite(sum(column)):
            # What is not finite is not what is not there, which is NaN from here on.
            known = zip(self._names, column, strict=True)
            column = array("d", [math.inf if math.isnan(n) and name in levels else n for name, n in known])
        self.columns.add(step, column)

    def png(self) -> tuple[int, int, bytes]:
        """Draw it; see `heatmap`."""
        import numpy as np

        place = {name: i for i, name in enumerate(self._names)}
        values = np.array([column for _, column in self.columns.kept]).T[[place[row] for row in self._rows]]
        return heatmap(values, self._rows, self.columns.steps, title="log10 of the gradient norm", named=True)


class LagPicture:
    """The heatmap of lags by steps of one module, with its horizon; it keeps at most half a megabyte."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.columns: _Columns[tuple[Floats, float]] = _Columns(4, 16)
        """Levels by rows of `_width` lags, and the horizon in lags, NaN where it is not known."""
        self._width = 1
        self._lags = 0

    def add(self, step: int, levels: Sequence[float], horizon: int | None) -> None:
        """Add the log10 of a gain over its maximum, from lag 0 back."""
        import numpy as np

        column = np.array([math.inf if math.isnan(level) else level for level in levels])
        self._lags = max(self._lags, len(column))
        while len(column) > _ROWS * self._width:
            self._width *= 2
            self.columns.kept = [(s, (folded(old, 2), h)) for s, (old, h) in self.columns.kept]
        self.columns.add(step, (folded(column, self._width), math.nan if horizon is None else float(horizon)))

    def png(self) -> tuple[int, int, bytes]:
        """Draw it; see `heatmap`."""
        import numpy as np

        rows = max(len(column) for _, (column, _) in self.columns.kept)
        values = np.array(
            [np.pad(column, (0, rows - len(column)), constant_values=math.nan) for _, (column, _) in self.columns.kept]
        ).T
        names = [f"lag {row * self._width}" for row in range(rows)]
        names[-1] = f"lag {self._lags - 1}"
        line = [horizon / self._width for _, (_, horizon) in self.columns.kept]
        return heatmap(
            values,
            names,
            self.columns.steps,
            title="log10 of the gain by lag; white: horizon",
            line=line,
            deepest=_DEEPEST,
        )


def depth_picture(stats: SequenceStats) -> tuple[int, int, bytes]:
    """Draw the gain by lag of a model's input, and below it of what enters each module on its way; see `heatmap`.

    Args:
        stats: of the model; with a `lag_gain` and more than one of `places`.

    """
    import numpy as np

    shown = places(stats)[:_PLACES]
    lags = min(stats.length, _COLUMNS)
    values = np.array([[log10(share) for share in resampled(one, stats.length, lags)] for _, one in shown])
    values[values == FLOOR] = _SHALLOW
    values[[one.horizon is None for _, one in shown]] = math.nan
    return heatmap(
        values,
        [f"{_short(name)}: {'?' if one.horizon is None else one.horizon * one.clock}" for name, one in shown],
        [column * stats.length // lags for column in range(lags)],
        title="log10 of the gain by lag",
        deepest=_SHALLOW,
        columns="lag",
    )


def folded(column: Floats, width: int) -> Floats:
    """Return the largest of every `width` entries; of the last ones, of as many as there are."""
    import numpy as np

    return np.fmax.reduceat(column, np.arange(0, len(column), width))


def heatmap(
    values: Floats,
    rows: Sequence[str],
    steps: Sequence[int],
    *,
    title: str,
    line: Sequence[float] | None = None,
    deepest: float = -math.inf,
    columns: str = "step",
    named: bool = False,
) -> tuple[int, int, bytes]:
    """Draw a matrix of log10 values, one row per layer from the input (top) to the output, or per lag.

    Args:
        values: shape (rows, steps); NaN (no gradient) is grey, infinity (a gradient that is not finite) red, and what
            is exactly at `FLOOR` (a norm of exactly 0) black.
        rows: their names; the first and the last are written, or where the columns are lags, all.
        steps: the numbers of the columns; the first, the middle and the last are written.
        title: written on top.
        line: drawn in white over each column, so many rows from the top; NaN where there is none.
        deepest: what is below it has its colour.
        columns: what they are: "step", or "lag".
        named: whether each row has its name written over it, where there is room.

    Returns:
        Width and height in pixels, and the PNG.

    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    low, high = _span(values, deepest)
    pixels, legend = _coloured(values, low, high)
    body = min(max(24 * len(rows), 160), 560) if len(rows) <= 560 else len(rows)  # no row may fall between two pixels
    picture = Image.new("RGB", (_WIDTH, _TOP + body + _BOTTOM + 24 * bool(legend)), "white")
    bar = _viridis(np.linspace(1, 0, body)[:, None])
    for part, width, left in ((pixels, _INSIDE, _LEFT), (bar, 14, _LEFT + _INSIDE + 8)):
        picture.paste(Image.fromarray(part).resize((width, body), Image.Resampling.NEAREST), (left, _TOP))
    pen = ImageDraw.Draw(picture)
    if line is not None:
        _draw_line(pen, line, body / len(rows), body)
    below = _TOP + body + 22
    font = ImageFont.load_default(size=18)
    for x, y, text, anchor in (
        (_LEFT, 20, title, "ls"),
        (_LEFT, _TOP - 8, _ends_of(rows) if columns == "step" else "of what enters each module; its horizon", "ls"),
        *_level_labels(low, high, body),
        *_step_labels(steps, below, columns),
        (_LEFT, below + 24, ", ".join(legend), "ls"),
    ):
        pen.text((x, y), text, fill="black", font=font, anchor=anchor)
    side = (_LEFT + _INSIDE - 6, "rm") if columns == "lag" else (_LEFT + 5, "lm")
    for number in range(len(rows) if columns == "lag" or (named and body / len(rows) >= _ROOM) else 0):
        at = side[0], _TOP + (number + 0.5) * body / len(rows)
        name = _short(rows[number])
        pen.text(at, name, fill="white", font=font, anchor=side[1], stroke_width=2, stroke_fill="black")
    return picture.width, picture.height, _png(picture)


def _span(values: Floats, deepest: float) -> tuple[float, float]:
    """Return the lowest and the highest level that have a colour of their own."""
    import numpy as np

    drawn = values[np.isfinite(values) & (values != FLOOR)]
    low, high = (float(drawn.min()), float(drawn.max())) if drawn.size else (-1.0, 0.0)
    return max(min(low, high - 3), deepest), high  # at least three decades: noise must not look like a fault


def _coloured(values: Floats, low: float, high: float) -> tuple[Pixels, list[str]]:
    """Return the colours of a matrix, shape (rows, steps, 3), and what those mean that are no level."""
    import numpy as np

    pixels = _viridis(np.clip((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low), 0, 1))
    legend = []
    for name, where, colour in (
        ("black: exactly 0", values == FLOOR, (0, 0, 0)),
        ("grey: none", np.isnan(values), (150, 150, 150)),
        ("red: NaN or inf", np.isinf(values), (220, 0, 0)),
    ):
        pixels[where] = colour
        legend += [name] * bool(where.any())
    return pixels, legend


def _draw_line(pen: ImageDraw.ImageDraw, line: Sequence[float], row: float, body: int) -> None:
    """Draw a white line over the columns, so many rows of so many pixels from the top of the body."""
    for k, at in enumerate(line):
        if not math.isnan(at):
            y = _TOP + min(round(at * row), body - 2)
            left, right = (_LEFT + _INSIDE * column / len(line) for column in (k, k + 1))
            pen.rectangle((left, y - 3, right, y + 2), fill="black")  # so that it stands out from any colour
            pen.rectangle((left, y - 1, right, y), fill="white")


def _level_labels(low: float, high: float, body: int) -> Iterator[Label]:
    """Return the numbers beside the bar of colours."""
    digits = int(high - low < 6)
    for share, level, anchor in ((0.0, high, "la"), (0.5, (low + high) / 2, "lm"), (1.0, low, "ld")):
        yield _LEFT + _INSIDE + 26, _TOP + share * body, f"{round(level, digits) + 0.0:.{digits}f}", anchor


def _step_labels(steps: Sequence[int], y: float, columns: str) -> Iterator[Label]:
    """Return the first, the middle and the last step."""
    yield _LEFT, y, f"{columns} {steps[0]}", "ls"
    if len(steps) > 2:
        yield _LEFT + _INSIDE / 2, y, f"{steps[len(steps) // 2]}", "ms"
    if len(steps) > 1:
        yield _LEFT + _INSIDE, y, f"{steps[-1]}", "rs"


def _png(picture: Image.Image) -> bytes:
    """Return a picture as PNG, each row as its difference from the one above, which of a heatmap is mostly 0.

    PIL tries five ways for each row, and takes four times as long.
    """
    import numpy as np

    pixels = np.asarray(picture).reshape(picture.height, -1)
    rows = np.full((picture.height, 1 + pixels.shape[1]), 2, np.uint8)  # 2 is the name of that difference
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 3)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _ends_of(rows: Sequence[str]) -> str:
    return f"top: {_short(rows[0])}, bottom: {_short(rows[-1])}"


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"...{name[-17:].lstrip('.')}"


def _viridis(values: Floats) -> Pixels:
    """Return the colours of values from 0 to 1, interpolated between nine of matplotlib's map of that name (CC0)."""
    import numpy as np

    anchors = np.array(
        [
            (68, 1, 84),
            (71, 44, 122),
            (59, 81, 139),
            (44, 113, 142),
            (33, 144, 141),
            (39, 173, 129),
            (92, 200, 99),
            (170, 220, 50),
            (253, 231, 37),
        ]
    )
    at = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, at, anchors[:, k]) for k in range(3)], axis=-1).astype(np.uint8)
