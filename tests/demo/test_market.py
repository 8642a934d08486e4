"""The demo's data: real where it is installed, without a look into the future, the same for the same seed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gradwatch.demo import market


def test_the_sp500_is_read_without_importing_arch():
    import sys

    before = set(sys.modules)
    prices = market.sp500()

    assert prices is not None
    assert (prices.first, prices.last, len(prices.close)) == ("1999-01-04", "2018-12-31", 5031)
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("arch", "pandas", "statsmodels")}
    assert (prices.low <= prices.high).all()


def test_features_do_not_look_past_their_bar():
    prices = market.flow_prices(seed=1, bars=900)
    cut = 700
    changed = dataclasses.replace(
        prices,
        **{
            k: np.where(np.arange(900) > cut, getattr(prices, k) * 1.5, getattr(prices, k))
            for k in ("open", "high", "low", "close", "volume")
        },
    )
    x, _ = market.windows(prices)
    y, _ = market.windows(changed)
    length = 250
    known = cut - length + 1  # windows that end at or before the last unchanged bar

    # The standardisation uses only the first 60 % of the windows, which here end before the change.
    assert np.array_equal(x[:known], y[:known])
    assert not np.array_equal(x[known:], y[known:])


def test_the_same_seed_gives_the_same_order_flow_and_the_event_decides_the_label():
    x, y = market.order_flow(seed=3, count=400)
    again, _ = market.order_flow(seed=3, count=400)

    assert np.array_equal(x, again)
    assert x.shape == (400, 250, 4)
    assert x[y == 1, 10:40, 0].mean() - x[y == 0, 10:40, 0].mean() == pytest.approx(1.0, abs=0.05)
    assert abs(x[y == 1, 40:, 0].mean() - x[y == 0, 40:, 0].mean()) < 0.02


def test_too_few_bars_are_an_error_that_says_how_many_it_takes():
    with pytest.raises(ValueError, match="100 bars are too few for windows of 250 bars"):
        market.windows(market.flow_prices(seed=0, bars=100))


def test_both_sources_have_the_same_shape():
    real = market.windows(market.sp500())
    drawn = market.windows(market.prices_of("synthetic", seed=0))

    assert [a.shape for a in real] == [a.shape for a in drawn]
    assert [a.dtype for a in real] == [np.float32, np.float32]
