"""What is remembered of the steps of an optimizer goes on after a stop."""

from __future__ import annotations

import numpy as np
import pytest

from gradwatch import History, LayerInfo, ModelInfo, OptimizerInfo, ParameterInfo, Snapshot
from gradwatch.values.plain import from_json, to_json
from gradwatch.values.track import Rows, medians

MODEL = ModelInfo(
    (LayerInfo("a", "Linear", 0),),
    (
        ParameterInfo("a.weight", "a", (4, 4), "float32", 0, "weight"),
        ParameterInfo("a.bias", "a", (4,), "float32", 0, "bias"),
    ),
    (OptimizerInfo("SGD", adaptive=False),),
)


def probed(ratios, *, norm=(1.0, 1.0), skipped=False):
    history = History()
    for step, ratio in enumerate(ratios):
        columns = {} if ratio is None else {"update_ratio": (ratio, None), "weight_norm": (2.0, None)}
        history.add(Snapshot(step, 0.0, MODEL, optimizer=0, norm=norm, skipped=skipped, **columns))
    return history


def test_weights_stand_where_a_step_with_a_gradient_leaves_them():
    history = probed([1e-3, None, 1e-9, None, 0.0])

    assert (history.track.update, history.track.moved, history.track.standing) == (0.0, 0, 2)
    assert probed([0.0, 1e-3]).track.standing == 0
    assert probed([0.0, 0.0], norm=(0.0, None)).track.standing == 0  # nothing to move them by
    assert probed([0.0, 0.0], skipped=True).track.standing == 0


def test_it_goes_on_after_a_stop_and_from_a_state_that_did_not_know_of_it():
    history = probed([1e-3, 0.0, 0.0])
    state = from_json(to_json(history.state_dict()))
    again = History()
    again.load_state_dict(state)

    assert (again.track.update, again.track.moved, again.track.standing) == (0.0, 0, 2)
    for track in state["tracks"]:
        for name in ("update", "moved", "standing"):
            del track[name]
    again.load_state_dict(state)
    assert (again.track.update, again.track.moved, again.track.standing) == (None, None, 0)


def test_the_update_of_all_weights_together_leaves_out_what_has_no_size():
    snapshot = Snapshot(
        0, 0.0, MODEL, optimizer=0, norm=(1.0, 1.0), weight_norm=(3.0, 0.0), update_ratio=(0.01, float("inf"))
    )

    assert snapshot.update_global == pytest.approx(0.01)
    assert Snapshot(0, 0.0, MODEL, norm=(1.0, 1.0)).update_global is None


def test_rows_are_the_last_fifty_however_many_came():
    rows, kept = Rows(), []
    with pytest.raises(LookupError, match="must be there"):
        rows.newest(1)
    for count in range(1, 200):
        rows.append(np.array([count, count / 2]))
        kept = [*kept, [count, count / 2]][-50:]
        assert rows.newest(7).tolist() == kept[-7:]
        assert rows.newest(1000).tolist() == rows.to_plain() == kept
        assert rows.oldest(3).tolist() == kept[:3]
    with pytest.raises(ValueError, match="read-only"):
        rows.newest(2)[0] = 1.0
    rows.clear()
    rows.append(np.array([1.0]))
    assert rows.to_plain() == [[1.0]]


@pytest.mark.parametrize("count", range(1, 8))
def test_medians_are_those_of_numpy(count):
    draw = np.random.default_rng(count)
    rows = draw.lognormal(size=(count, 200))
    rows[draw.random(rows.shape) < 0.1] = np.nan
    rows[draw.random(rows.shape) < 0.1] = np.inf
    assert np.array_equal(medians(rows), np.median(rows, axis=0), equal_nan=True)
