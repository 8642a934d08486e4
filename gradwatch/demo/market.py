"""Market data for the demo: daily S&P 500 prices where they are installed, and synthetic order flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Series = NDArray[np.float64]
    Inputs = NDArray[np.float32]
    Targets = NDArray[np.float32]
    Labels = NDArray[np.int64]

FEATURES = ("return", "range", "volume change", "volatility")
"""The last axis of what `windows` returns."""
FLOW_FEATURES = ("imbalance", "return", "spread", "volume")
"""The last axis of what `order_flow` returns."""
KNOWN = 0.6
"""The oldest share of the windows, which everything is standardised by; train on these alone to forecast the others."""

_SMALLEST = 1e-6  # a bar without any movement has no logarithm; a basis point is 1e-4
_WIDEST = 6.0  # in standard deviations; half-day volumes and crashes would else be most of a batch's gradient
_TICKS = 16  # trades in a synthetic bar: enough for its range to say more of the volatility than its return does


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """Prices of consecutive bars, oldest first; each array has the shape (bars,)."""

    name: str
    source: str
    """Where they come from, in words."""
    first: str
    """ISO date of the first bar; empty for synthetic prices, as is `last`."""
    last: str
    open: Series
    high: Series
    low: Series
    close: Series
    """Adjusted for dividends and splits, where `source` adjusts."""
    volume: Series
    """Units traded in the bar."""


def prices_of(source: str, seed: int) -> Prices:
    """Return the prices of the S&P 500, or as many synthetic ones.

    Args:
        source: "sp500", "synthetic", or "auto": the first if it is installed.
        seed: of the synthetic ones.

    Raises:
        ValueError: `source` is "sp500", and it is not installed.

    """
    prices = sp500() if source != "synthetic" else None
    if prices is None and source == "sp500":
        raise ValueError(
            'the S&P 500 comes with the package arch, which is not installed: pip install "torch-gradwatch[demo]"'
        )
    return prices or flow_prices(seed, 5031)


def sp500() -> Prices | None:
    """Read the daily S&P 500 (1999 to 2018, index points) that the package `arch` ships, None if it is missing."""
    import csv
    import gzip

    import numpy as np

    path = _sp500_file()
    if path is None:
        return None
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("Open", "High", "Low", "Adj Close", "Volume")
    opened, high, low, close, volume = (np.array([float(row[column]) for row in rows]) for column in columns)
    first, last = (_iso(rows[at]["Date"]) for at in (0, -1))
    return Prices("S&P 500, daily", f"{path.name} of the package arch", first, last, opened, high, low, close, volume)


def windows(prices: Prices, length: int = 250, ahead: int = 20) -> tuple[Inputs, Targets]:
    """Cut prices into what a forecast of volatility may know, and what then came.

    Args:
        prices: at least `length + ahead + 1` bars.
        length: bars in a window.
        ahead: bars after a window over which the realised volatility is taken.

    Returns:
        `x` of shape (N, length, 4), the `FEATURES` of each bar, of which none looks past its bar, and `y` of shape
        (N,), the logarithm of the root mean square of the log returns of the `ahead` bars after each window. Oldest
        first, and N = bars - length - ahead. Both in standard deviations from the mean; mean and deviation are those of
        the first `KNOWN` share of the windows.

    Raises:
        ValueError: there are too few bars.

    """
    import numpy as np

    count = len(prices.close) - length - ahead
    if min(length, ahead, count) < 1:
        given = f"windows of {length} bars and {ahead} bars ahead"
        raise ValueError(f"{len(prices.close)} bars are too few for {given}: 1 more than both is the least")
    known = max(int(KNOWN * count), 1)
    returns = _log_change(prices.close)
    target = _log(_root_mean_square(returns, ahead))[length:]
    features = _standardise(_features(prices, returns), known + length - 1)
    x = np.lib.stride_tricks.sliding_window_view(features[: count + length - 1], length, axis=0)
    return np.ascontiguousarray(x.transpose(0, 2, 1), dtype=np.float32), _standardise(target, known).astype(np.float32)


def order_flow(
    seed: int,
    bars: int = 250,
    count: int = 2000,
    event: tuple[int, int] = (10, 40),
    shift: float = 1.0,
) -> tuple[Inputs, Labels]:
    """Draw sequences of order flow, half of them with an event long before their end that decides the label.

    Args:
        seed: of the random numbers; the same seed gives the same sequences.
        bars: length of a sequence.
        count: number of sequences.
        event: first bar of the event, and the first bar after it.
        shift: by how much the imbalance is higher during the event, in standard deviations.

    Returns:
        `x` of shape (count, bars, 4), the `FLOW_FEATURES`, each in standard deviations from its mean without an event,
        and `y` of shape (count,), 1 where the event took place.

    Raises:
        ValueError: the event does not lie within the sequence.

    """
    import numpy as np

    begin, end = event
    if not 0 <= begin < end <= bars:
        raise ValueError(f"the event from bar {begin} to {end} does not lie within {bars} bars")
    random = np.random.default_rng(seed)
    x = random.standard_normal((count, bars, len(FLOW_FEATURES)), dtype=np.float32)
    y = random.permutation(np.arange(count, dtype=np.int64) % 2)
    x[:, begin:end, FLOW_FEATURES.index("imbalance")] += np.float32(shift) * y[:, None].astype(np.float32)
    return x, y


def flow_prices(seed: int, bars: int) -> Prices:
    """Draw prices whose volatility comes in clusters, and whose volume rises with it, as with stocks."""
    import numpy as np

    random = np.random.default_rng(seed)
    volatility = _clustered(random, bars)
    ticks = random.standard_normal((bars, _TICKS)) * (volatility / np.sqrt(_TICKS))[:, None]
    path = np.cumsum(ticks.ravel()).reshape(bars, _TICKS)
    before = np.concatenate([[0.0], path[:-1, -1]])
    level = np.concatenate([before[:, None], path], axis=1)
    opened, high, low, close = (
        100.0 * np.exp(values) for values in (before, level.max(axis=1), level.min(axis=1), path[:, -1])
    )
    volume = 1e6 * np.exp(0.5 * np.log(volatility / 0.01) + 0.2 * random.standard_normal(bars))
    return Prices("synthetic prices", f"random numbers of seed {seed}", "", "", opened, high, low, close, volume)


def _sp500_file() -> Path | None:
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("arch")  # importing the package would import pandas, scipy and statsmodels: seconds
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = (path for folder in folders for path in sorted((Path(folder) / "data" / "sp500").glob("*.csv.gz")))
    return next(files, None)


def _iso(date: str) -> str:
    """Turn month/day/year into year-month-day."""
    month, day, year = date.split("/")
    return f"{year}-{int(month):02}-{int(day):02}"


def _clustered(random: np.random.Generator, bars: int) -> Series:
    """Draw the volatility of each bar's log return: its logarithm reverts to 1 % with a half-life of 34 bars.

    Shape (bars,).
    """
    import numpy as np

    shocks = 0.12 * random.standard_normal(bars)
    logs = np.empty(bars)
    log = 0.0
    for bar, shock in enumerate(shocks.tolist()):
        log = 0.98 * log + shock
        logs[bar] = log
    volatility: Series = 0.01 * np.exp(logs)
    return volatility


def _features(prices: Prices, returns: Series) -> Series:
    """Return the `FEATURES` of each bar but the first, before they are standardised. Shape (bars - 1, 4)."""
    import numpy as np

    width = _log(np.log(prices.high / prices.low))[1:]
    recent = np.concatenate([np.zeros(4), returns])  # as if nothing had moved before the first bar
    return np.stack([returns, width, _log_change(prices.volume), _log(_root_mean_square(recent, 5))], axis=1)


def _log(values: Series) -> Series:
    import numpy as np

    logs: Series = np.log(np.maximum(values, _SMALLEST))
    return logs


def _log_change(values: Series) -> Series:
    """Return the change of the logarithm from each bar to the next. Shape (bars - 1,)."""
    import numpy as np

    change: Series = np.diff(_log(values))
    return change


def _root_mean_square(values: Series, bars: int) -> Series:
    """Return the root mean square of each run of so many values. Shape (values - bars + 1,)."""
    import numpy as np

    runs = np.lib.stride_tricks.sliding_window_view(values, bars)
    root: Series = np.sqrt(np.mean(np.square(runs), axis=1))
    return root


def _standardise(values: Series, known: int) -> Series:
    """Return each column less the mean of its first `known` rows, over their deviation; what is far out is cut off."""
    import numpy as np

    deviation = np.maximum(values[:known].std(axis=0), _SMALLEST)  # a feature that never moves stays at zero
    scaled: Series = np.clip((values - values[:known].mean(axis=0)) / deviation, -_WIDEST, _WIDEST)
    return scaled
