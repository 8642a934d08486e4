"""Features that depend on later rows: of pandas, polars and numpy, each told apart from those that do not."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import polars as pl
import pytest

import gradwatch

ROWS = 120


def frame():
    draws = np.random.default_rng(0)
    index = pd.date_range("2024-01-01 09:30", periods=ROWS, freq="h")
    close = 100 * np.exp(np.cumsum(draws.normal(0, 0.01, ROWS)))
    return pd.DataFrame(
        {"close": close, "volume": draws.integers(1, 1000, ROWS), "side": ["buy", "sell"] * (ROWS // 2)}, index=index
    )


def returns(f):
    return f[["close"]].pct_change()


PANDAS_CAUSAL = {
    "returns": returns,
    "rolling": lambda f: f["close"].rolling(20).agg(["mean", "std"]),
    "ewm": lambda f: f["close"].ewm(span=10).mean().to_frame("ewm"),
    "expanding": lambda f: (f["close"] - f["close"].expanding().mean()) / f["close"].expanding().std(),
    "lags": lambda f: pd.concat({f"lag {n}": f["close"].shift(n) for n in (1, 2, 5)}, axis=1),
    "dropped warm-up": lambda f: f["close"].pct_change().dropna(),
    "ffill": lambda f: f["close"].where(f["volume"] > 500).ffill(),
    "words": lambda f: f["side"].shift(1),
    "higher frequency": lambda f: f["close"].resample("30min").ffill(),
    "daily bars by their end": lambda f: f["close"].resample("D", label="right", closed="right").last().pct_change(),
}
PANDAS_LEAKING = {
    "zscore": lambda f: (f[["close"]] - f[["close"]].mean()) / f[["close"]].std(),
    "next return": lambda f: f["close"].pct_change().shift(-1),
    "next return, dropped": lambda f: f["close"].pct_change().shift(-1).dropna(),
    "centred rolling": lambda f: f["close"].rolling(5, center=True).mean(),
    "bfill": lambda f: f["close"].where(f["volume"] > 500).bfill(),
    "interpolate": lambda f: f["close"].where(f["volume"] > 500).interpolate(),
    "rank": lambda f: f["close"].rank(pct=True),
    "last": lambda f: f["close"] / f["close"].iloc[-1],
    "daily bars by their beginning": lambda f: f["close"].resample("D").last(),
    "min-max": lambda f: (f["close"] - f["close"].min()) / (f["close"].max() - f["close"].min()),
    "reversed rolling": lambda f: f["close"][::-1].rolling(5).mean()[::-1],
    "categories of all rows": lambda f: pd.get_dummies((f["close"] > 1.05 * f["close"].iloc[0]).astype(str)),
    "missing words": lambda f: f["side"].where(f["volume"] > 500).bfill(),
    "quantiles": lambda f: pd.qcut(f["close"], 4, labels=False),
}


@pytest.mark.parametrize("name", PANDAS_CAUSAL)
def test_pandas_that_does_not_look_ahead(name):
    found = gradwatch.assert_causal_features(PANDAS_CAUSAL[name], frame())
    assert found.causal
    assert "no feature of a row changed when later ones were gone" in str(found)


@pytest.mark.parametrize("name", PANDAS_LEAKING)
def test_pandas_that_looks_ahead(name):
    with pytest.raises(gradwatch.GradientHealthError, match="looks ahead"):
        gradwatch.assert_causal_features(PANDAS_LEAKING[name], frame())


def test_the_error_names_feature_rows_and_function():
    def momentum(f):
        return pd.DataFrame({"past": f["close"].pct_change(3), "future": f["close"].shift(-3) / f["close"]})

    with pytest.raises(gradwatch.GradientHealthError) as error:
        gradwatch.assert_causal_features(momentum, frame())
    text = " ".join(str(error.value).split())
    assert "feature 'future' of row 116 depends on row 119, 3 ahead" in text
    assert "by what momentum computes" in text
    assert "shift(-n)" in text


def test_a_bar_that_is_named_by_its_beginning_leaks_from_the_row_before_it():
    with pytest.raises(gradwatch.GradientHealthError, match=r"of row 110 depends on row 119, 9 ahead"):
        gradwatch.assert_causal_features(PANDAS_LEAKING["daily bars by their beginning"], frame())


def test_missing_values_of_every_kind_are_themselves():
    def missing(f):
        whole = f["volume"].astype("Int64").where(f["volume"] > 500)
        times = pd.Series(f.index, f.index).where(f["volume"] > 500)
        return pd.DataFrame({"whole": whole, "times": times, "words": f["side"].where(f["volume"] > 500).shift(1)})

    assert gradwatch.assert_causal_features(missing, frame()).causal
    words = lambda x: np.array([float("nan") if n < 100 else "high" for n in x], dtype=object)
    assert gradwatch.assert_causal_features(words, frame()["close"].to_numpy()).causal


def test_a_row_that_all_depend_on_is_named():
    def normalized(f):
        return f["close"] / f["close"].iloc[50] if len(f) > 50 else f["close"]

    with pytest.raises(gradwatch.GradientHealthError, match=r"of row 0 depends on row 50, 50 ahead"):
        gradwatch.assert_causal_features(normalized, frame())


KINDS = ["string", "object", "category", "boolean", "Int64"]
KINDS += ["str"] * (int(pd.__version__.split(".")[0]) >= 3)  # before, that makes words of what is missing


@pytest.mark.filterwarnings("ignore:Downcasting:FutureWarning")  # pandas 2.2, of this function's bfill
@pytest.mark.parametrize("kind", KINDS)
def test_missing_values_of_every_kind_that_are_filled_from_later(kind):
    draws = np.random.default_rng(1)
    values = draws.integers(0, 2, 200).astype(bool) if kind == "boolean" else draws.integers(0, 3, 200)
    words = pd.Series(values).astype(str) if kind in ("string", "category", "str") else pd.Series(values)
    gaps = words.astype("object").where(pd.Series(draws.random(200) > 0.5), None).astype(kind)
    table = pd.DataFrame({"s": gaps})
    assert gradwatch.assert_causal_features(lambda f: f["s"].ffill(), table).causal
    for leaking in (lambda f: f["s"].bfill(), lambda f: f["s"].shift(-1)):
        with pytest.raises(gradwatch.GradientHealthError):
            gradwatch.assert_causal_features(leaking, table)


def test_lists_of_polars():
    table = pl.DataFrame({"s": [[i, i + 1] for i in range(40)]})
    assert gradwatch.assert_causal_features(lambda f: f["s"].shift(1), table).causal
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(lambda f: f["s"].shift(-1), table)


@pytest.mark.parametrize("names", [("c", "c"), (1, "1")])
def test_columns_of_one_name_are_all_looked_at(names):
    both = lambda f: pd.concat([f["close"].shift(-1), f["close"]], axis=1, keys=names)
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(both, frame())


def test_whole_numbers_are_compared_exactly():
    big = lambda f: pd.Series(np.arange(len(f)) + 10**15, f.index) + f["volume"].shift(-1, fill_value=1)
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(big, frame())


def test_a_leak_of_a_few_rows_is_found():
    monthly = lambda f: f["close"].where(~f.index.is_month_end, f["close"].shift(-1).ffill())
    table = frame().set_axis(pd.date_range("2024-01-01", periods=ROWS, freq="D"))
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(monthly, table)


def test_offset_allows_what_is_known_by_then():
    late = lambda f: f["close"].shift(-2)
    assert gradwatch.assert_causal_features(late, frame(), offset=2).causal
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(late, frame(), offset=1)
    with pytest.raises(ValueError, match="offset must be a whole number of rows from 0 on, got -1"):
        gradwatch.assert_causal_features(late, frame(), offset=-1)


def test_repeated_index():
    twice = frame()
    twice.index = twice.index.floor("3h")
    assert gradwatch.assert_causal_features(returns, twice).causal
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(PANDAS_LEAKING["next return"], twice)


def test_polars():
    table = pl.DataFrame({name: list(values) for name, values in frame().items()})
    assert gradwatch.assert_causal_features(lambda f: f.select(pl.col("close").pct_change().fill_null(0)), table).causal
    assert gradwatch.assert_causal_features(lambda f: f["close"].rolling_mean(5), table).causal
    with pytest.raises(gradwatch.GradientHealthError, match="feature 'close' of row"):
        gradwatch.assert_causal_features(lambda f: f.select(pl.col("close") / pl.col("close").mean()), table)
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(lambda f: f["close"].shift(-1), table)
    with pytest.raises(ValueError, match="gives 119 rows for 120, and which of them belong together cannot be told"):
        gradwatch.assert_causal_features(lambda f: f["close"].shift(-1).drop_nulls(), table)


def test_numpy():
    close = frame()["close"].to_numpy()
    assert gradwatch.assert_causal_features(np.cumsum, close).causal
    assert gradwatch.assert_causal_features(lambda x: np.stack([x, np.maximum.accumulate(x)], 1), close).causal
    with pytest.raises(gradwatch.GradientHealthError, match="the feature of row"):
        gradwatch.assert_causal_features(lambda x: x - x.mean(), close)
    with pytest.raises(gradwatch.GradientHealthError, match="'column 1' of row"):
        gradwatch.assert_causal_features(lambda x: np.stack([x, np.roll(x, -1)], 1), close)
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(lambda x: np.abs(np.fft.ifft(np.fft.fft(x) * (np.arange(len(x)) < 9))), close)


def test_rounding_is_no_leak():
    close = frame()["close"].to_numpy()
    pairwise = lambda x: np.array([x[: i + 1].sum() for i in range(len(x))]) + 1e-12 * len(x)
    assert gradwatch.assert_causal_features(pairwise, close).causal
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_causal_features(lambda x: x + 1e-4 * len(x), close)


def test_a_function_that_needs_rows_is_given_enough():
    def needs(f):
        if len(f) < 100:
            raise ValueError("too short")
        return f["close"].diff()

    found = gradwatch.assert_causal_features(needs, frame())
    assert found.causal
    assert min(found.positions) >= 99

    def always(f):
        if len(f) < ROWS:
            raise ValueError("too short")
        return f["close"].diff()

    with pytest.raises(ValueError, match="always fails with fewer rows than 120: too short"):
        gradwatch.assert_causal_features(always, frame())


def test_a_function_that_draws_or_remembers():
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="gives other features for the same rows when it is called again"):
        gradwatch.assert_causal_features(lambda f: f["close"] + generator.normal(size=len(f)), frame())
    assert gradwatch.assert_causal_features(lambda f: f["close"] + np.random.rand(), frame()).causal  # noqa: NPY002
    assert gradwatch.assert_causal_features(lambda f: f["close"] + random.random(), frame()).causal


def test_the_frame_is_left_as_it_was_and_nothing_of_it_is_reached():
    table = frame()
    before = table.copy(deep=True)

    def greedy(f):
        f["close"] = f["close"] * 2
        base = f["close"].to_numpy().base
        return f["close"] if base is None or base.size <= f.size else f["close"] * base.size

    assert gradwatch.assert_causal_features(greedy, table).causal
    pd.testing.assert_frame_equal(table, before)

    def in_place(x):
        x *= 2
        return x

    close = table["close"].to_numpy(copy=True)
    kept = close.copy()
    assert gradwatch.assert_causal_features(in_place, close).causal
    assert np.array_equal(close, kept)


def test_bad_arguments():
    with pytest.raises(TypeError, match="function must take a frame"):
        gradwatch.assert_causal_features("close", frame())
    with pytest.raises(TypeError, match=r"frame, and what function makes of it, must be a DataFrame .*; got list"):
        gradwatch.assert_causal_features(returns, [1, 2, 3])
    with pytest.raises(TypeError, match="got int"):
        gradwatch.assert_causal_features(len, frame())
    with pytest.raises(ValueError, match="frame must have at least 3 rows, got 2"):
        gradwatch.assert_causal_features(returns, frame().head(2))
    with pytest.raises(ValueError, match="gives an index that is not the frame's"):
        gradwatch.assert_causal_features(lambda f: f["close"].groupby(f["side"]).mean(), frame())
