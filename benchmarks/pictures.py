"""Draws how far back two LSTMs learn, as measured while they train: the picture in the README.

python -m benchmarks.pictures    # writes docs/how-far-back.png; --quick: seconds, and nothing that stays
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.command import parsed, parser
from gradwatch.demo import story as demo
from gradwatch.values.thresholds import HORIZON_GAIN

WIDTH, HEIGHT = 1240, 550
LEFT, TOP, RIGHT, BOTTOM = 110, 84, 1200, 470
DECADES = 9
FINER = 3
"""Pixels drawn for one that is shown, in each direction: smooth lines."""
INK, PALE, LINE = "#222222", "#6b6b6b", "#d9d9d9"
SICK, WELL, EVENT = "#c62828", "#1b7f4d", "#fff0c2"
EVENT_LAGS = (210, 240)
"""Where the order flow has its signal."""


@dataclass(frozen=True)
class Curve:
    """A gain by lag to draw."""

    gain: tuple[float, ...]
    horizon: int
    censored: bool
    colour: str
    says: tuple[str, str]
    """Two lines of text."""
    at: tuple[int, float]
    """Where they stand: lag, and decades below the top."""


def measured(steps: int, seed: int) -> list[Curve]:
    """Train both LSTMs as the demo does, and take what the last probe saw."""
    flow = demo.flow_task(seed)
    _, sick, well = demo.FLOW
    curves = []
    for subject, colour, name, at in (
        (sick, SICK, "LSTM as PyTorch makes it", (52, 4.2)),
        (well, WELL, f"LSTM with gate biases of ±log {demo.NEED}", (62, 2.1)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            trained = demo.train(subject, flow, logdir=Path(folder), seed=seed, steps=steps, tick=lambda: None)
        stats = trained.horizons[-1]
        if stats.lag_gain is None or stats.horizon is None:
            raise RuntimeError(f"no horizon of {subject.name} was measured: {stats.note}")
        reach = (
            f"learns from {'at least' if stats.censored else 'the last'} {stats.horizon} of {stats.length} timesteps"
        )
        says = (name, f"{reach}; {trained.right:.0%} right (a coin: 50%)")
        curves.append(Curve(stats.lag_gain, stats.horizon, bool(stats.censored), colour, says, at))
        print(f"{says[0]}: {says[1]}")
    return curves


class Plot:
    """A picture with lags to the right and decades of gain downwards."""

    def __init__(self, lags: int) -> None:
        """Begin with an empty one."""
        self.lags = lags
        self.picture = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), "white")
        self._pen = ImageDraw.Draw(self.picture)

    def x(self, lag: float) -> float:
        """Return the column of a lag."""
        return LEFT + (RIGHT - LEFT) * lag / (self.lags - 1)

    def y(self, decades: float) -> float:
        """Return the row of a gain so many decades below the maximum."""
        return TOP + (BOTTOM - TOP) * min(decades, DECADES) / DECADES

    def write(self, x: float, y: float, text: str, *, size: int = 22, colour: str = INK, anchor: str = "ls") -> None:
        """Write a line of text."""
        self._pen.text(
            (x * FINER, y * FINER), text, fill=colour, font=ImageFont.load_default(size=size * FINER), anchor=anchor
        )

    def line(self, points: list[tuple[float, float]], colour: str, width: float) -> None:
        """Draw a line through the points."""
        self._pen.line(
            [(x * FINER, y * FINER) for x, y in points], fill=colour, width=round(width * FINER), joint="curve"
        )

    def axes(self) -> None:
        """Draw what stands around the curves and behind them."""
        self._pen.rectangle(
            [FINER * v for v in (self.x(EVENT_LAGS[0]), TOP, self.x(EVENT_LAGS[1]), BOTTOM)], fill=EVENT
        )
        for decade in range(0, DECADES + 1, 3):
            self.line([(LEFT, self.y(decade)), (RIGHT, self.y(decade))], LINE, 1)
            self.write(LEFT - 14, self.y(decade), "1" if decade == 0 else f"1e-{decade}", colour=PALE, anchor="rm")
        for lag in range(0, self.lags, 50):
            self.write(self.x(lag), BOTTOM + 12, str(lag), colour=PALE, anchor="mt")
        self.write(RIGHT, BOTTOM + 46, "timesteps back from the newest", colour=PALE, anchor="rt")
        self.write(self.x(sum(EVENT_LAGS) / 2), BOTTOM - 14, "the signal", colour=PALE, anchor="ms")
        self.write(20, 40, "How far back does my model learn?", size=30)
        self.write(RIGHT, 40, "norm of d(output)/d(input), over its maximum", colour=PALE, anchor="rs")
        limit = self.y(-math.log10(HORIZON_GAIN))
        for start in range(LEFT, RIGHT, 16):
            self.line([(start, limit), (min(start + 9, RIGHT), limit)], INK, 1.5)
        self.write(self.x(EVENT_LAGS[0]) - 10, limit + 8, f"below {HORIZON_GAIN:g}: out of reach", size=20, anchor="rt")

    def curve(self, curve: Curve) -> None:
        """Draw a curve as far down as the picture goes, its horizon, and what it says."""
        top = max(curve.gain)
        levels = [math.inf if gain <= 0 else -math.log10(gain / top) for gain in curve.gain]
        within = max(lag for lag, level in enumerate(levels) if level <= DECADES)
        self.line([(self.x(lag), self.y(level)) for lag, level in enumerate(levels[: within + 1])], curve.colour, 4)
        if not curve.censored:
            at = self.x(curve.horizon)
            self.line([(at, self.y(-math.log10(HORIZON_GAIN))), (at, BOTTOM)], curve.colour, 2)
            self.write(at + 6, BOTTOM - 14, f"horizon {curve.horizon}", colour=curve.colour)
        for row, text in enumerate(curve.says):
            self.write(self.x(curve.at[0]), self.y(curve.at[1]) + row * 30, text, size=24, colour=curve.colour)


def draw(curves: list[Curve]) -> Image.Image:
    """Draw them, log10 of the gain over its maximum by lag, with the signal and the horizons."""
    plot = Plot(max(len(curve.gain) for curve in curves))
    plot.axes()
    for curve in curves:
        plot.curve(curve)
    return plot.picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).quantize(128)


def main() -> None:
    """Measure and draw."""
    mine = parser(__doc__)
    mine.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "how-far-back.png")
    mine.add_argument("--steps", type=int, default=250)
    mine.add_argument("--seed", type=int, default=0)
    options = parsed(mine)
    with tempfile.TemporaryDirectory() as folder:
        out, steps = (Path(folder) / "quick.png", 2) if options.quick else (options.out, options.steps)
        draw(measured(steps, options.seed)).save(out, optimize=True)
        print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
