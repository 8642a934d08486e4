"""What TensorBoard's own readers find of horizons and gradients through time."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from truth import decode, gain

from gradwatch import LayerInfo, ModelInfo, ParameterInfo, Report, Snapshot, TensorBoardSink
from gradwatch.sinks.tensorboard import scalars
from gradwatch.sinks.tensorboard.heatmaps import LagPicture
from gradwatch.sinks.tensorboard.scalars import tag_safe
from gradwatch.values.sequences import SequenceStats

MODEL = ModelInfo((LayerInfo("rnn", "RNN", 0),), (ParameterInfo("rnn.w", "rnn", (2,), "float32", 0, "weight"),))
TOP, LEFT, RIGHT, BOTTOM = 56, 8, 74, 32


def report(*sequences, step=1):
    return Report(Snapshot(step, 1e9 + step, MODEL, norm=(1.0,), weight_norm=(1.0,), sequences=sequences or None))


def write(folder, *reports):
    sink = TensorBoardSink(folder)
    for each in reports:
        sink(each)
    sink.close()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    return events


def through_time(events, *more):
    return {
        t: events.Scalars(t)[0].value
        for t in events.Tags()["scalars"]
        if t.startswith(
            (
                "gradwatch_time",
                "gradwatch/horizon",
                "gradwatch_horizon",
                "gradwatch_half_life",
                "gradwatch/half_life",
                *more,
            )
        )
    }


def test_a_memory_is_two_numbers_and_its_gain_at_a_few_lags(tmp_path):
    unit = 7.0
    stats = SequenceStats("net.rnn", length=64, lag_gain=tuple(unit * g for g in gain(0.5, 64)))
    found = through_time(write(tmp_path, report(stats)))

    lags = {f"gradwatch_time/net.rnn/lag_{lag:05d}": lag * math.log10(0.5) for lag in (0, 1, 2, 4, 8, 16, 32)}
    assert found == pytest.approx(
        {"gradwatch_horizon/net.rnn": 10.0, "gradwatch_half_life/net.rnn": 1.0, **lags}, rel=1e-6, abs=1e-6
    )


def test_there_is_a_point_at_each_probe_and_none_between(tmp_path):
    stats = SequenceStats("rnn", length=64, lag_gain=gain(0.5, 64))
    events = write(tmp_path, report(stats, step=1), report(step=2), report(stats, step=10))

    assert [e.step for e in events.Scalars("gradwatch_horizon/rnn")] == [1, 10]
    assert [e.step for e in events.Scalars("gradwatch_time/rnn/lag_00004")] == [1, 10]
    assert [e.step for e in events.Scalars("gradwatch_norm/rnn")] == [1, 2, 10]


def test_a_memory_that_does_not_shrink_has_no_half_life(tmp_path):
    found = through_time(write(tmp_path, report(SequenceStats("rnn", length=8, lag_gain=(1.0,) * 8))))

    assert found["gradwatch_horizon/rnn"] == 8
    assert "gradwatch_half_life/rnn" not in found


def test_the_model_is_called_model_and_a_module_of_that_name_is_not(tmp_path):
    whole, module = (
        SequenceStats("", "model", 4, lag_gain=gain(1.0, 4)),
        SequenceStats("model", length=4, lag_gain=gain(1e-4, 4)),
    )
    found = through_time(write(tmp_path, report(module, whole)))
    horizons = {tag: value for tag, value in found.items() if "horizon" in tag}

    assert len(horizons) == 2
    assert horizons["gradwatch/horizon"] == 4
    (other,) = horizons.keys() - {"gradwatch/horizon"}
    assert horizons[other] == 1
    assert through_time(write(tmp_path / "alone", report(module))).keys() & {other}  # the same with and without


def test_the_models_own_memory_goes_before_that_of_its_input(tmp_path):
    whole, own = SequenceStats("", "model", 4, lag_gain=gain(1.0, 4)), SequenceStats("", "", 4, lag_gain=gain(1e-4, 4))
    for number, sequences in enumerate([(whole, own), (own, whole)]):
        assert through_time(write(tmp_path / str(number), report(*sequences)))["gradwatch/horizon"] == 4


def test_tags_are_safe(tmp_path):
    found = through_time(
        write(tmp_path, report(SequenceStats("net.a b", length=4, lag_gain=gain(0.5, 4), grad_input=(1.0,) * 4)))
    )

    assert {tag.split("/")[-2] for tag in found if tag.startswith("gradwatch_time/")} == {tag_safe("net.a b")}
    assert all(set(tag) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-") for tag in found)


def test_gradients_are_log10_by_lag_from_the_newest_timestep(tmp_path):
    series = tuple(10.0**-t for t in range(9, 0, -1))  # the newest is 0.1
    module = SequenceStats("rnn", length=9, grad_input=series)
    layer = SequenceStats("rnn", "l0_reverse", 9, grad_hidden=(0.0, *series[1:]))
    found = through_time(write(tmp_path, report(module, layer)))

    expected = {
        f"gradwatch_time_grad/rnn/{part}/lag_{lag:05d}": -1.0 - lag
        for part in ("input", "l0_reverse")
        for lag in (0, 1, 2, 4, 8)
    }
    expected["gradwatch_time_grad/rnn/l0_reverse/lag_00008"] = -45.0
    assert found == pytest.approx(expected)


def test_under_an_unknown_loss_scale_only_the_ratios_are_drawn(tmp_path):
    module = SequenceStats("rnn", length=4, grad_input=(1.0,) * 4, lag_gain=gain(0.5, 4), scaled=True)
    layer = SequenceStats("rnn", "l0", 4, grad_hidden=(1.0,) * 4, scaled=True)
    found = through_time(write(tmp_path, report(module, layer)))

    assert found
    assert not any(tag.startswith("gradwatch_time_grad") for tag in found)


def test_what_is_not_finite_is_shown_as_what_it_is(tmp_path):
    found = through_time(
        write(tmp_path, report(SequenceStats("rnn", length=5, lag_gain=(1.0, 100.0, math.inf, 0.0, math.nan))))
    )

    assert found["gradwatch_time/rnn/lag_00000"] == pytest.approx(-2)
    assert found["gradwatch_time/rnn/lag_00001"] == 0
    assert found["gradwatch_time/rnn/lag_00002"] == math.inf
    assert math.isnan(found["gradwatch_time/rnn/lag_00004"])
    assert "gradwatch_horizon/rnn" not in found


def test_nothing_that_arrives_anywhere_is_at_the_floor(tmp_path):
    found = through_time(write(tmp_path, report(SequenceStats("rnn", length=2, lag_gain=(0.0, 0.0)))))

    assert found == {
        "gradwatch_horizon/rnn": 0,
        "gradwatch_time/rnn/lag_00000": -45,
        "gradwatch_time/rnn/lag_00001": -45,
    }


def test_a_logger_that_knows_only_numbers_gets_them_too():
    numbers = scalars(report(SequenceStats("rnn", length=64, lag_gain=gain(0.5, 64))))

    assert numbers["gradwatch_horizon/rnn"] == 10
    assert numbers["gradwatch_time/rnn/lag_00008"] == pytest.approx(8 * math.log10(0.5))


# --- the ridge plot and the heatmap ---


def test_the_ridge_plot_has_a_bucket_per_lag(tmp_path):
    events = write(tmp_path, report(SequenceStats("rnn", length=5, lag_gain=(1.0, 1e-3, 1e-6, 1e-15, 0.0))))
    histogram = events.Histograms("gradwatch_profile/lags/rnn")[0].histogram_value

    assert histogram.bucket == pytest.approx([12, 9, 6, 0, 0])
    assert histogram.bucket_limit == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_the_ridge_plot_of_a_long_sequence_is_bounded_and_loses_no_peak(tmp_path):
    long = [1e-9] * 2000
    long[1234], long[0] = 1e-3, 1.0
    histogram = (
        write(tmp_path, report(SequenceStats("rnn", length=2000, lag_gain=tuple(long))))
        .Histograms("gradwatch_profile/lags/rnn")[0]
        .histogram_value
    )

    assert len(histogram.bucket) <= 128
    assert histogram.bucket[1234 // 16] == pytest.approx(9)
    assert histogram.bucket_limit[1234 // 16] == (1234 // 16 + 1) * 16 - 0.5


def test_the_heatmaps_of_lags_and_layers_are_drawn_at_the_end(tmp_path):
    events = write(
        tmp_path, *(report(SequenceStats("rnn", length=64, lag_gain=gain(0.5, 64)), step=s) for s in (1, 10))
    )

    assert set(events.Tags()["images"]) == {"gradwatch_heatmap/layers", "gradwatch_heatmap/lags/rnn"}
    (image,) = events.Images("gradwatch_heatmap/lags/rnn")
    assert image.step == 10
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (image.width, image.height)
    assert image.width == 480


def test_a_long_run_draws_the_lags_on_the_way_ever_more_rarely(tmp_path):
    events = write(
        tmp_path, *(report(SequenceStats("rnn", length=8, lag_gain=gain(0.5, 8)), step=s) for s in range(100))
    )
    steps = [i.step for i in events.Images("gradwatch_heatmap/lags/rnn")]

    assert steps[:2] == [3, 19]
    assert steps[-1] == 99
    assert len(steps) < 10


def test_lags_run_down_and_the_horizon_is_a_white_line_at_its_lag():
    picture = LagPicture()
    for step in range(4):
        picture.add(step, [-0.1 * lag for lag in range(100)], 30)
    width, height, png = picture.png()
    pixels = decode(png)
    body = height - TOP - BOTTOM
    assert pixels[TOP + 2, 200].tolist() == [253, 231, 37]
    assert pixels[TOP + body - 3, 200].tolist() == [68, 1, 84]
    white = (pixels[TOP : TOP + body, LEFT + 2 : width - RIGHT - 2] == 255).all(axis=2)
    at = TOP + round(body * 0.3) - TOP
    assert white[at].all() or white[at - 1].all()
    assert white.any(axis=1).sum() == 2


def test_each_column_has_its_own_horizon_and_one_without_has_none():
    picture = LagPicture()
    for step, horizon in enumerate([10, 90, None, 100]):
        picture.add(step, [-0.1 * lag for lag in range(100)], horizon)
    width, height, png = picture.png()
    body, inside = height - TOP - BOTTOM, width - LEFT - RIGHT
    white = (decode(png)[TOP : TOP + body] == 255).all(axis=2)
    at = [np.flatnonzero(white[:, LEFT + inside * (2 * k + 1) // 8]) for k in range(4)]

    assert [round(float(rows.mean()) / body, 1) if rows.size else None for rows in at] == [0.1, 0.9, None, 1.0]


def test_sequences_of_different_lengths_are_aligned_at_the_newest_timestep():
    picture = LagPicture()
    picture.add(0, [0.0] * 50, 50)
    picture.add(1, [0.0] * 100, 100)
    _, height, png = picture.png()
    pixels = decode(png)
    body = height - TOP - BOTTOM - 24  # a legend for the grey
    assert pixels[TOP + body * 3 // 4, LEFT + 50].tolist() == [150, 150, 150]
    assert pixels[TOP + body * 3 // 4, LEFT + 350].tolist() == [253, 231, 37]
    assert pixels[TOP + body // 4, LEFT + 50].tolist() == [253, 231, 37]


def test_a_picture_of_very_long_sequences_is_bounded_and_keeps_the_largest_of_each_row():
    picture = LagPicture()
    picture.add(0, [-1.0, -2.0, -3.0, -4.0], 2)
    levels = [-9.0] * 5000
    levels[4000] = -1.0
    picture.add(1, levels, 4001)

    short, long = (column for _, (column, _) in picture.columns.kept)
    assert len(long) <= 256
    assert short.tolist() == [-1.0]
    assert np.flatnonzero(long == -1.0).tolist() == [4000 // 32]
    _, _, png = picture.png()
    assert decode(png).shape[1] == 480


def test_the_columns_of_the_picture_are_bounded():
    picture = LagPicture()
    for step in range(3000):
        picture.add(step, [0.0, -1.0], 2)
        assert len(picture.columns.kept) <= 240
    assert picture.columns.steps[0] == 0
    assert picture.columns.steps[-1] > 2900


def test_the_model_has_its_interval_its_other_inputs_and_what_it_uses(tmp_path):
    known = SequenceStats("", "model", 64, lag_gain=gain(0.9, 64), input="known", time=1)
    entered = SequenceStats("rnn", "model", 64, lag_gain=gain(0.9, 64))
    whole = SequenceStats(
        "",
        "model",
        64,
        lag_gain=gain(0.5, 64),
        lag_gain_error=(0.0,) + (math.log(4.0),) * 63,
        lag_use=(0.0,) * 5 + (1.0,) + (0.0,) * 58,
        input="target",
        time=1,
        beside=(known, entered),
    )
    found = through_time(write(tmp_path, report(whole)), "gradwatch/used")

    timesteps = {tag: v for tag, v in found.items() if not tag.startswith("gradwatch_time")}
    assert timesteps.pop("gradwatch/half_life") == pytest.approx(1.0, rel=0.2)
    assert timesteps == {
        "gradwatch/horizon": 10,
        "gradwatch/horizon_low": 8,
        "gradwatch/horizon_high": 12,
        "gradwatch_horizon/model/known": 64,
        "gradwatch/used": 6,
    }


def test_a_half_life_beyond_the_sequence_is_its_length_and_does_not_tear_the_axis(tmp_path):
    slow = SequenceStats("rnn", length=64, rows=8, lag_gain=tuple(0.99999**lag for lag in range(64)))
    assert slow.half_life > 60_000
    assert through_time(write(tmp_path, report(slow)))["gradwatch_half_life/rnn"] == 64


def on_its_way(length=100):
    """Return a model whose recurrent module sees 10 timesteps, and whose convolution adds 20."""
    (rnn, conv) = (
        SequenceStats(n, "model", length, lag_gain=(1.0,) * h + (1e-9,) * (length - h))
        for n, h in (("rnn", 10), ("conv", 30))
    )
    return SequenceStats("", "model", length, lag_gain=conv.lag_gain, input="x", time=1, chain=(conv, rnn))


def test_the_way_through_a_model_is_a_picture_of_its_places_by_lag(tmp_path):
    stats = on_its_way()
    events = write(tmp_path, *(report(stats, step=s) for s in range(5)))
    images = events.Images("gradwatch_heatmap/depth/model")

    assert [i.step for i in images] == [3, 4]  # when it is due, and at the end
    pixels = decode(images[-1].encoded_image_string)
    body, inside = pixels.shape[0] - TOP - BOTTOM, 480 - LEFT - RIGHT
    bright, dark = [253, 231, 37], [68, 1, 84]
    for row, horizon in ((0.1, 30), (0.9, 10)):
        y = TOP + int(row * body)
        assert pixels[y, LEFT + inside * (horizon - 1) // 100].tolist() == bright
        assert pixels[y, LEFT + inside * (horizon + 2) // 100].tolist() == dark


def test_a_way_that_is_not_known_is_not_drawn(tmp_path):
    stats = SequenceStats("", "model", 8, lag_gain=gain(0.5, 8))
    tags = write(tmp_path, *(report(stats, step=s) for s in range(5))).Tags()["images"]
    assert "gradwatch_heatmap/lags/model" in tags
    assert not [tag for tag in tags if "depth" in tag]
