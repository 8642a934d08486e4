"""Tests of a forecaster of volatility, as a desk keeps them: it sees 200 bars, it does not see tomorrow, it trains.

pytest examples/test_market.py      # three are there to fail: a memory that was cut, and two looks ahead
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from gradwatch.demo.market import prices_of

BARS, FEATURES = 250, ["return", "range", "volatility"]


@pytest.fixture(scope="module")
def frame():
    """Prices of some thousand bars, oldest first."""
    prices = prices_of("synthetic", seed=0)
    columns = {name: getattr(prices, name) for name in ("open", "high", "low", "close", "volume")}
    return pd.DataFrame(columns).tail(1500).reset_index(drop=True)


@pytest.fixture(scope="module")
def batch(frame):
    """Windows of the features, (rows, bars, features)."""
    known = features(frame)[FEATURES].dropna().to_numpy(np.float32)
    starts = range(0, len(known) - BARS, 40)
    return torch.from_numpy(np.stack([known[start : start + BARS] for start in starts]))


def features(frame: pd.DataFrame) -> pd.DataFrame:
    """Say of each bar what is known at its close."""
    returns = np.log(frame["close"]).diff()
    spread = np.log(frame["high"] / frame["low"])
    scale = returns.rolling(60).std()
    return pd.DataFrame(
        {"return": returns / scale, "range": spread / scale, "volatility": np.log(scale / scale.rolling(120).mean())}
    )


class Forecaster(nn.Module):
    """Smooths, remembers, and forecasts at each bar."""

    def __init__(self, *, remembers: int | None = BARS, centred: bool = False) -> None:
        """Build it: with a memory for so many bars or as torch makes it; with a smoothing that is centred, or not."""
        super().__init__()
        torch.manual_seed(0)
        self.centred = centred
        self.smooth = nn.Conv1d(len(FEATURES), 8, 5)
        self.memory, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 1)
        if remembers is not None:
            with torch.no_grad():
                self.memory.bias_ih_l0[:32] = -math.log(remembers)
                self.memory.bias_ih_l0[32:64] = math.log(remembers)
                self.memory.bias_hh_l0[:64] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a forecast for each bar, (rows, bars, 1)."""
        padded = nn.functional.pad(x.transpose(1, 2), (2, 2) if self.centred else (4, 0))
        return self.head(self.memory(self.smooth(padded).transpose(1, 2))[0])


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the error of forecasting the size of the next return from all bars but the last."""
    return (model(batch[:, :-1])[:, -1] - batch[:, -1, :1].abs()).square().mean()


def test_it_sees_200_bars(gradwatch, batch):
    gradwatch.assert_horizon(Forecaster(), batch, at_least=200)


@pytest.mark.xfail(raises=AssertionError, strict=True, reason="the gates are left as torch makes them: a memory of 20")
def test_a_memory_that_was_cut_fails(gradwatch, batch):
    gradwatch.assert_horizon(Forecaster(remembers=None), batch, at_least=200)


def test_it_does_not_see_tomorrow(gradwatch, batch):
    gradwatch.assert_causal(Forecaster(), batch)


@pytest.mark.xfail(raises=AssertionError, strict=True, reason="the smoothing is centred: it sees two bars ahead")
def test_a_look_ahead_fails(gradwatch, batch):
    gradwatch.assert_causal(Forecaster(centred=True), batch)


def test_its_features_do_not_see_tomorrow(gradwatch, frame):
    gradwatch.assert_causal_features(features, frame)


@pytest.mark.xfail(raises=AssertionError, strict=True, reason="scaled by the mean and deviation of all years")
def test_features_scaled_by_all_years_fail(gradwatch, frame):
    gradwatch.assert_causal_features(lambda f: (f["close"] - f["close"].mean()) / f["close"].std(), frame)


def test_its_gradients_are_as_they_were(gradwatch, batch):
    gradwatch.assert_profile(Forecaster(), batch)


def test_it_trains(gradwatch, batch):
    model = Forecaster()
    gradwatch.assert_trains((model, torch.optim.Adam(model.parameters(), lr=1e-3), loss), [batch], steps=20)
