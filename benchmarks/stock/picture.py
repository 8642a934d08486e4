"""The picture on top of the atlas: which of its models see far enough to learn what happened long ago, and do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.stock.learning import EVENT

if TYPE_CHECKING:
    from benchmarks.stock.atlas import Row

TASK = "order flow"
SHOWN = (
    *(("torch", name) for name in ("RNN", "GRU", "LSTM", "LSTM, 4 layers", "LSTM, gate biases ±log T")),
    *(("minGRU-pytorch", name) for name in ("minGRU", "minLSTM")),
    *(("ncps", name) for name in ("LTC", "CfC")),
    *(("mambapy", name) for name in ("Mamba, 1 layer", "Mamba, 4 layers")),
    *(("s5-pytorch", "S5"), ("xlstm", "sLSTM block"), ("xlstm", "mLSTM block"), ("torchcde", "neural CDE")),
    *(("pytorch-tcn", "TCN"), ("torch", "TransformerEncoder, no positions")),
    *(("pyqlib", name) for name in ("ALSTM", "KRNN", "Localformer", "SFM", "TCN")),
    *(("neuralforecast", name) for name in ("TFT", "DeepAR", "NHITS", "PatchTST", "DLinear", "TimesNet")),
    *(("transformers", f"{name}/causal") for name in ("gpt2", "llama", "mistral", "mamba", "rwkv")),
)
"""Library and name."""
LEARNED = 0.9
"""Share of right answers from which a model has learned the task."""
WIDTH, LEFT, RIGHT, TOP, STEP = 1240, 430, 1130, 190, 30
FINER = 2
"""Pixels drawn for one that is shown, in each direction: smooth edges."""
INK, PALE, LINE, BAR = "#222222", "#6b6b6b", "#e4e4e4", "#c9d3df"
WELL, SICK, SIGNAL = "#1b7f4d", "#c62828", "#fff0c2"


class _Sheet:
    """Something to draw on, in pixels that are shown."""

    def __init__(self, height: int) -> None:
        """Begin with an empty one."""
        self.height = height
        self.image = Image.new("RGB", (WIDTH * FINER, height * FINER), "white")
        self._pen = ImageDraw.Draw(self.image)

    def write(self, x: float, y: float, text: str, *, size: int = 20, colour: str = INK, anchor: str = "lm") -> None:
        """Write a line of text."""
        font = ImageFont.load_default(size=size * FINER)
        self._pen.text((x * FINER, y * FINER), text, fill=colour, font=font, anchor=anchor)

    def box(self, *corners: float, colour: str) -> None:
        """Fill a rectangle."""
        self._pen.rectangle([at * FINER for at in corners], fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: str, inside: str) -> None:
        """Draw a dot, or a ring of another colour inside."""
        corners = [at * FINER for at in (x - radius, y - radius, x + radius, y + radius)]
        self._pen.ellipse(corners, fill=inside, outline=colour, width=3 * FINER)


def draw(rows: Sequence[Row]) -> Image.Image:
    """Draw them, from the one that sees the shortest way back as it is made."""
    known = {(one.library, one.name): one for one in rows if one.horizon is not None and TASK in one.trained}
    some = sorted((known[key] for key in SHOWN if key in known), key=lambda one: (_share(one), one.library, one.name))
    bottom = TOP + STEP * len(some)
    sheet = _Sheet(bottom + 90)
    sheet.box(_x(EVENT[0]), TOP - 20, _x(EVENT[1]), bottom, colour=SIGNAL)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        sheet.box(_x(share) - 0.5, TOP - 20, _x(share) + 0.5, bottom, colour=LINE)
        sheet.write(_x(share), bottom + 18, "newest" if not share else f"{share:.0%} back", colour=PALE, anchor="mm")
    sheet.write(30, 40, "How far back can it learn?", size=34)
    sheet.write(
        30,
        80,
        "A ring: as its library makes it. A dot: after a short training on a signal that lies in the",
        colour=PALE,
    )
    sheet.write(
        30,
        106,
        "yellow band. Green has learned it (right answers: 90 % and more), red has not (a coin: 50 %).",
        colour=PALE,
    )
    sheet.write(_x(sum(EVENT) / 2), TOP - 32, "the signal", colour=PALE, anchor="mm")
    sheet.write(
        30,
        bottom + 60,
        "measured with gradwatch.horizon; each held against the whole Jacobian: docs/atlas.md",
        colour=PALE,
    )
    for at, one in enumerate(some):
        _line(sheet, TOP + STEP * at + STEP / 2 - 10, one)
    return sheet.image.resize((WIDTH, sheet.height), Image.Resampling.LANCZOS).quantize(96)


def _line(sheet: _Sheet, y: float, one: Row) -> None:
    after: dict[str, Any] = one.trained[TASK]
    made, then = _x(_share(one)), _x(after["horizon"] / one.length)
    colour = WELL if after["score"] >= LEARNED else SICK
    sheet.write(LEFT - 24, y, f"{one.name.removesuffix('/causal')}  ({one.library})", anchor="rm")
    sheet.box(LEFT, y - 3, max(made, then), y + 3, colour=BAR)
    sheet.dot(made, y, 9, INK, "white")
    sheet.dot(then, y, 6, colour, colour)
    sheet.write(RIGHT + 24, y, f"{after['score']:.0%}", colour=colour)


def _share(one: Row) -> float:
    return (one.horizon or 0) / one.length


def _x(share: float) -> float:
    return LEFT + (RIGHT - LEFT) * min(share, 1.0)
