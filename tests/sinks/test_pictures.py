"""The picture in the README: drawn by the committed command, of what it says, and small."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import pictures

    return pictures


def coloured(picture, colour):
    """Return the columns and rows in which a colour stands."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    pixels = picture.convert("RGB").load()
    return [
        (x, y)
        for x in range(picture.width)
        for y in range(picture.height)
        if max(abs(a - b) for a, b in zip(pixels[x, y], wanted, strict=True)) < 40
    ]


def test_a_curve_is_where_its_gains_are_and_ends_at_the_floor_with_its_horizon_marked(pictures):
    gain = tuple(0.5**lag for lag in range(250))  # below 1/1000 from lag 10 on, at the floor of 1e-9 at lag 29.9
    picture = pictures.draw([pictures.Curve(gain, 10, False, pictures.SICK, ("", ""), (52, 4.0))])
    plot = pictures.Plot(250)
    seen = coloured(picture, pictures.SICK)
    mark = [y for x, y in seen if abs(x - plot.x(10)) <= 1]

    assert any(abs(x - plot.x(0)) <= 3 and abs(y - plot.y(0)) <= 3 for x, y in seen)
    assert any(abs(x - plot.x(20)) <= 2 and abs(y - plot.y(6.02)) <= 3 for x, y in seen)
    assert min(mark) <= plot.y(3) + 4
    assert max(mark) >= plot.y(9) - 4
    assert max(x for x, y in seen if y < plot.y(7.5)) < plot.x(27)


def test_a_curve_that_does_not_fade_has_no_horizon_in_the_picture(pictures):
    gain = (1.0,) + (0.1,) * 249
    picture = pictures.draw([pictures.Curve(gain, 250, True, pictures.WELL, ("", ""), (52, 2.0))])
    rows = [y for _, y in coloured(picture, pictures.WELL)]

    assert max(rows) < pictures.Plot(250).y(3)


def test_the_committed_picture_has_both_curves_and_is_small(pictures):
    file = ROOT / "docs" / "how-far-back.png"
    with Image.open(file) as picture:
        assert picture.size == (pictures.WIDTH, pictures.HEIGHT)
        assert min(len(coloured(picture, colour)) for colour in (pictures.SICK, pictures.WELL)) > 500
    assert file.stat().st_size < 150_000
    assert "docs/how-far-back.png" in (ROOT / "README.md").read_text(encoding="utf-8")
