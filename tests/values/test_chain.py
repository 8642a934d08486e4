"""Where a horizon is won and where it is narrowed, from gains alone."""

from __future__ import annotations

import math

import pytest

from gradwatch.values.chain import limiting, mixing, narrowed_before, resampled
from gradwatch.values.sequences import SequenceStats


def place(name, horizon, length=100, clock=1, error=0.0):
    gain = tuple(1.0 if lag < horizon else 1e-9 for lag in range(length))
    return SequenceStats(
        name,
        "model",
        length,
        lag_gain=gain,
        lag_gain_error=(0.0, *(error,) * (length - 1)) if error else None,
        clock=clock,
    )


def names(places):
    return [one.module for one in places]


def test_only_modules_that_change_the_horizon_are_kept():
    ways = [place("a", 30), place("b", 30), place("c", 10), place("norm", 10), place("d", 10), place("head", 1)]
    assert names(mixing(ways)) == ["b", "d"]
    assert mixing([place("head", 1)]) == ()
    assert mixing([]) == ()


def test_a_change_within_the_interval_is_none():
    fading = tuple(0.5**lag for lag in range(100))
    unsure = SequenceStats("a", "model", 100, lag_gain=fading, lag_gain_error=(0.0, *(2.0,) * 99))
    assert unsure.interval == (8, 13)
    assert names(mixing([unsure, place("b", 9)])) == ["b"]
    assert names(mixing([unsure, place("b", 7)])) == ["a", "b"]


def test_another_clock_is_compared_in_timesteps_of_the_input():
    assert names(mixing([place("strided", 40), place("rnn", 10, 25, clock=4)])) == ["rnn"]
    assert names(mixing([place("strided", 40), place("rnn", 40, 25, clock=1)])) == ["strided", "rnn"]


def test_what_is_not_finite_is_passed_over():
    wrong = SequenceStats("wrong", "model", 3, lag_gain=(1.0, math.nan, 1.0))
    assert names(mixing([place("a", 30), wrong, place("b", 10)])) == ["a", "b"]


def whole(horizon, *chain):
    return SequenceStats("", "model", 100, lag_gain=place("", horizon).lag_gain, chain=chain)


@pytest.mark.parametrize(
    ("chain", "found"),
    [
        ((place("a", 30), place("b", 10)), None),
        ((place("a", 30), place("b", 61)), ("b", 61, "a", "")),
        ((place("a", 30), place("b", 60)), None),  # not more than twice as far
        ((place("enc.a", 61), place("b", 61)), ("enc.a", 61, "", "")),
        ((place("enc", 30), place("enc.b", 61)), ("enc.b", 61, "", "enc")),  # that holds it
        ((place("a", 30), place("b", 20, 25, clock=4)), ("b", 80, "a", "")),
        ((), None),
    ],
)
def test_where_it_is_narrowed(chain, found):
    assert narrowed_before(whole(30, *chain)) == found


def test_which_module_most_comes_from():
    assert limiting(whole(30, place("a", 30), place("b", 12), place("c", 11))) == "a"
    assert limiting(whole(30, place("a", 30), place("b", 28), place("c", 2))) == "b"
    assert limiting(whole(30, place("a", 30), place("b", 7, 25, clock=4))) == "b"
    assert limiting(whole(30)) is None
    nothing = SequenceStats("a", "model", 100, lag_gain=(0.0,) * 100)
    assert limiting(whole(30, nothing)) is None


def test_columns_are_on_the_clock_of_the_input():
    strided = SequenceStats("s", "model", 5, lag_gain=(4.0, 2.0, 1.0, 0.0, 0.0), clock=2)
    assert resampled(strided, 10, 10) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert resampled(strided, 10, 5) == [1.0, 0.5, 0.25, 0.0, 0.0]
    assert resampled(strided, 20, 5) == [1.0, 0.25, 0.0, 0.0, 0.0]  # it ends before the input does
    assert resampled(SequenceStats("s", lag_gain=(0.0, 0.0)), 2, 2) == [0.0, 0.0]
