"""How far back a gain by lag reaches: the closed forms, and what is known of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import History, LayerInfo, ModelInfo, ParameterInfo, Snapshot
from gradwatch.values.plain import from_json, from_plain, to_json, to_plain
from gradwatch.values.sequences import Horizon, SequenceStats, horizon_of, sentences, slope
from gradwatch.values.thresholds import HORIZON_GAIN


@pytest.mark.parametrize("rate", [0.03, 0.3, 0.5, 0.64, 0.9, 0.97, 0.99])
@pytest.mark.parametrize("unit", [1.0, 1e-200, 1e200])
def test_a_geometric_decay_has_its_closed_form_in_any_unit(rate, unit):
    found = horizon_of([unit * rate**lag for lag in range(1000)])

    assert found.timesteps == math.ceil(math.log(HORIZON_GAIN) / math.log(rate))
    assert not found.censored
    assert found.decay_rate == pytest.approx(rate, rel=1e-9)
    assert found.half_life == pytest.approx(math.log(0.5) / math.log(rate), rel=1e-8)


def test_a_decay_that_the_sequence_cuts_off_is_censored_at_its_length():
    found = horizon_of([0.9**lag for lag in range(30)])

    assert (found.timesteps, found.censored) == (30, True)
    assert found.decay_rate == pytest.approx(0.9)


def test_a_flat_gain_does_not_shrink():
    assert horizon_of([3.0] * 64) == Horizon(64, censored=True, decay_rate=1.0, half_life=None, low=64, high=64)


def test_a_gain_that_grows_to_its_last_lag_has_no_rate():
    assert horizon_of([1.1**lag for lag in range(64)]) == Horizon(
        64, censored=True, decay_rate=None, half_life=None, low=64, high=64
    )


def test_the_rate_counts_from_the_maximum_and_not_from_the_newest_timestep():
    rise_and_fall = [0.2, 0.5, 1.0, *(0.8**lag for lag in range(1, 100))]

    found = horizon_of(rise_and_fall)

    assert found.decay_rate == pytest.approx(0.8)
    assert found.timesteps == 2 + math.ceil(math.log(HORIZON_GAIN) / math.log(0.8))


def test_a_receptive_field_ends_at_its_last_lag():
    assert horizon_of([1.0] * 15 + [0.0] * 85) == Horizon(
        15, censored=False, decay_rate=1.0, half_life=None, low=15, high=15
    )


def test_what_comes_back_counts():
    assert horizon_of([1.0, 1e-9, 1e-9, 0.5, 1e-9, 1e-9]).timesteps == 4


def test_exactly_the_share_is_still_within_reach():
    assert horizon_of([1.0, 0.25, 0.125], share=0.25).timesteps == 2


def test_nothing_reaches_anywhere_is_a_horizon_of_zero_and_not_censored():
    assert horizon_of([0.0, 0.0]) == Horizon(0, censored=False, decay_rate=None, half_life=None)


def test_one_timestep_is_all_there_is():
    assert horizon_of([7.0]) == Horizon(1, censored=True, decay_rate=None, half_life=None, low=1, high=1)


@pytest.mark.parametrize("gain", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_there_is_no_horizon_of_what_is_not_there_or_not_finite(gain):
    assert horizon_of(gain) is None


def test_a_cliff_of_the_whole_range_of_floats_is_no_error():
    found = horizon_of([1e308, 5e-324])

    assert found.timesteps == 1
    assert found.decay_rate == 0.0
    assert found.half_life == pytest.approx(math.log(0.5) / (math.log(5e-324) - math.log(1e308)))


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=60))
def test_the_rate_is_that_of_a_least_squares_fit(gain):
    found = horizon_of(gain)
    peak = gain.index(max(gain))
    lags = range(peak, min(found.timesteps + 1, len(gain)))
    points = [(lag, math.log(gain[lag])) for lag in lags]

    if len(points) < 2:
        assert found.decay_rate is None
    else:
        assert math.log(found.decay_rate) == pytest.approx(np.polyfit(*zip(*points, strict=True), 1)[0], abs=1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(1e-6, 1))
def test_the_horizon_is_what_its_definition_says(gain, share):
    found = horizon_of(gain, share)
    if max(gain) == 0:
        assert found.timesteps == 0
        return
    limit = share * max(gain)
    assert all(g < limit for g in gain[found.timesteps :])
    assert gain[found.timesteps - 1] >= limit
    assert found.censored == (found.timesteps == len(gain))


def test_a_slope_needs_two_points():
    assert slope([(0, 1.0)]) is None
    assert slope([(0, 1.0), (2, 5.0)]) == 2.0


def test_stats_know_their_horizon_and_none_where_there_is_no_gain():
    stats = SequenceStats("rnn", length=64, lag_gain=tuple(0.5**lag for lag in range(64)))

    assert (stats.horizon, stats.decay_rate, stats.half_life) == (10, pytest.approx(0.5), pytest.approx(1.0))
    empty = SequenceStats("rnn", grad_input=(1.0,))
    assert (empty.reach, empty.horizon, empty.decay_rate, empty.half_life) == (None,) * 4


def test_stats_survive_json_to_the_last_bit():
    stats = SequenceStats(
        "a",
        "l0",
        3,
        2,
        grad_hidden=(0.1, math.inf, 0.3),
        carry_ratio=(0.1 + 0.2, math.nan),
        need=200,
        censored=False,
        scaled=True,
        note="n",
    )
    back = from_plain(SequenceStats, from_json(to_json(to_plain(stats))))

    assert repr(dataclasses.astuple(back)) == repr(dataclasses.astuple(stats))  # NaN is not equal to itself


def test_what_a_notebook_shows_is_what_a_report_says():
    whole = SequenceStats("", "model", 6, 8, lag_gain=(1.0, 0.5, 0.1, 1e-4, 1e-5, 1e-6), input="x", time=1)
    assert repr(whole) == "\n".join(text for _, text in sentences((whole,)))
    assert repr(whole).startswith("the model learns from the last 3 ")
    assert repr(SequenceStats("lstm", "l0", 60, 8, grad_hidden=(0.1,) * 60)) == "gradients of lstm through 60 timesteps"


# --- the history remembers the probes ---

MODEL = ModelInfo((LayerInfo("rnn", "RNN", 0),), (ParameterInfo("rnn.w", "rnn", (1,), "float32", 0, "weight"),))


def at(step, *, probe=False, optimizer=0, model=MODEL):
    sequences = (SequenceStats("rnn", length=step, lag_gain=(1.0, 0.5)),) if probe else None
    return Snapshot(step, 0.0, model, optimizer, norm=(1.0,) * len(model.parameters), sequences=sequences)


def test_probes_are_remembered_longer_than_the_window_and_no_more_than_eight():
    history = History()
    assert history.sequences() == []
    for step in range(700):
        history.add(at(step, probe=step % 60 == 1))

    assert [s.step for s in history.sequences()] == list(range(241, 700, 60))
    assert [s.step for s in history.sequences(2)] == [601, 661]
    assert sum(s.sequences is not None for s in history.window()) == 1


def test_each_optimizer_has_its_own_probes():
    history = History()
    history.add(at(1, probe=True, optimizer=0))
    history.add(at(2, probe=True, optimizer=1))
    assert [s.step for s in history.sequences()] == [2]
    history.add(at(3, optimizer=0))
    assert [s.step for s in history.sequences()] == [1]


def test_another_model_has_no_probes_yet():
    history = History()
    history.add(at(1, probe=True))
    history.add(
        at(
            2,
            model=ModelInfo(
                MODEL.layers, (*MODEL.parameters, ParameterInfo("rnn.b", "rnn", (1,), "float32", 0, "bias"))
            ),
        )
    )

    assert history.sequences() == []


@pytest.mark.parametrize("steps", [3, 90, 700])
def test_a_stop_forgets_no_probe_and_keeps_none_twice(steps):
    history, again = History(), History()
    for step in range(steps):
        history.add(at(step, probe=step % 60 == 1))
    state = from_json(to_json(history.state_dict()))
    again.load_state_dict(state)

    assert again.sequences() == history.sequences()
    assert sum(
        "sequences" in s for track in state["tracks"] for column in ("snapshots", "probes") for s in track[column]
    ) == len(history.sequences())
    history.add(at(steps, probe=True))
    again.add(at(steps, probe=True))
    assert again.sequences() == history.sequences()


def test_a_state_from_before_there_were_probes_is_read():
    history, again = History(), History()
    history.add(at(1))
    state = history.state_dict()
    del state["tracks"][0]["probes"]
    again.load_state_dict(state)

    assert again.sequences() == []


def test_a_horizon_whose_interval_reaches_the_end_is_censored_and_one_that_is_too_wide_is_not_sure():
    gain = [0.7**lag for lag in range(20)]  # a thousandth of the maximum at lag 19.4
    assert horizon_of([*gain, 0.0, 0.0]).censored is False
    narrow = horizon_of([*gain, 0.0009, 0.0008], error=[0.3] * 22)
    assert (narrow.timesteps, narrow.censored, narrow.low, narrow.high, narrow.sure) == (22, True, 19, 22, True)
    wide = horizon_of([*gain, 0.0, 0.0], error=[5.0] * 22)
    assert (wide.timesteps, wide.low, wide.high, wide.sure) == (20, 6, 20, False)


def test_a_sentence_says_the_interval_and_where_time_is():
    known = tuple(0.64**lag for lag in range(250))
    stats = SequenceStats(
        "", "model", 250, 8, lag_gain=known, lag_gain_error=(0.5,) * 250, input="past_target", time=2, time_assumed=True
    )
    (_, said), *_ = sentences((stats,))
    assert said.startswith(
        "the model learns from the last 16 (15 to 17) of 250 timesteps of past_target (time: dimension 2, assumed) (the"
    )
    unsure = dataclasses.replace(stats, lag_gain_error=(9.0,) * 250)
    (_, said), *_ = sentences((unsure,))
    assert said.startswith("the model learns from somewhere between the last 0 and the last 36 of 250 timesteps")
