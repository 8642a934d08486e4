"""What the networks of the demo are to learn: the volatility of prices, and an event in order flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwatch.demo import market

if TYPE_CHECKING:
    import numpy as np

LENGTH = 250
"""Bars in a window: a year of trading days."""
AHEAD = 20
"""Bars over which the volatility to forecast is taken."""
NEED = 200
"""Bars that a network must look back to see anything of the event in the order flow."""
SEQUENCES, UNSEEN = 2000, 500
"""Sequences of order flow to train on, and to try the network on."""


@dataclass(frozen=True, eq=False)
class Task:
    """What a network is to learn."""

    x: np.ndarray[Any, Any]
    """Inputs of shape (samples, bars, features)."""
    y: np.ndarray[Any, Any]
    """Targets of shape (samples,)."""
    known: int
    """The first so many samples are for training."""
    loss: str
    """Name of a function of `torch.nn.functional`."""
    batch: int
    """Samples in a batch."""
    clip: float | None = None
    """The gradient norm to clip to; None for no clipping."""
    horizon: int | None = None
    """How many of the newest bars matter; None where nobody knows."""


def volatility_task(prices: market.Prices) -> Task:
    """Forecast the volatility of the next bars from a window of bars."""
    x, y = market.windows(prices, LENGTH, AHEAD)
    return Task(x, y, int(market.KNOWN * len(y)), "mse_loss", batch=128)


def flow_task(seed: int) -> Task:
    """Tell whether an event took place 210 to 240 bars ago."""
    x, y = market.order_flow(seed, LENGTH, SEQUENCES + UNSEEN)
    return Task(x, y, SEQUENCES, "cross_entropy", batch=64, clip=1.0, horizon=NEED)
