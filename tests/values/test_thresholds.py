"""Thresholds say what is wrong with them, and layers may have their own."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest

from gradwatch import DETECTORS, History, LayerInfo, ModelInfo, OptimizerInfo, ParameterInfo, Snapshot, Thresholds
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import ActivationStats
from gradwatch.values.thresholds import PER_LAYER


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"window": 0}, ValueError, "Thresholds.window must be finite and above 0, got 0"),
        ({"window": 2.5}, TypeError, "Thresholds.window must be a whole number, got 2.5"),
        ({"share": 1.5}, ValueError, "Thresholds.share must be at most 1, got 1.5"),
        ({"horizon_gain": 1.5}, ValueError, "Thresholds.horizon_gain must be at most 1, got 1.5"),
        ({"horizon_probes": 2.5}, TypeError, "Thresholds.horizon_probes must be a whole number, got 2.5"),
        ({"vanishing_ratio": "small"}, TypeError, "Thresholds.vanishing_ratio must be a number, got 'small'"),
        ({"vanishing_ratio": -1.0}, ValueError, "must be finite and above 0"),
        ({"norm_below": True}, TypeError, "must be a number, got True"),
        ({"vanishing_ratio": math.nan}, ValueError, "Thresholds.vanishing_ratio must be finite and above 0, got nan"),
        ({"norm_above": math.inf}, ValueError, "Thresholds.norm_above must be finite and above 0, got inf"),
        (
            {"layers": {"a": {"norm_below": math.nan}}},
            ValueError,
            "Thresholds.norm_below must be finite and above 0, got nan",
        ),
        (
            {"layers": {"encoder.*": {"vanish": 1.0}}},
            ValueError,
            r"Thresholds.layers\['encoder.\*'\] must name .* \(vanishing_ratio, .*\), got vanish",
        ),
        (
            {"layers": {"a": {"norm_below": 1.0, "window": 7}}},
            ValueError,
            r"must name fields that are looked up for each layer \(.*norm_below.*\), got window",
        ),
        ({"layers": {"encoder.*": {"vanishing_ratio": 0}}}, ValueError, "must be finite and above 0"),
    ],
)
def test_a_wrong_number_gets_an_error_that_says_what_is_allowed(given, error, says):
    with pytest.raises(error, match=says):
        Thresholds(**given)


def test_the_last_pattern_that_matches_a_layer_wins():
    t = Thresholds(
        layers={"encoder.*": {"vanishing_ratio": 1e-5, "horizon_met": 7}, "encoder.0": {"vanishing_ratio": 1e-6}}
    )

    assert t.of("encoder.0").vanishing_ratio == 1e-6
    assert t.of("encoder.0").horizon_met == 7
    assert t.of("encoder.1").vanishing_ratio == 1e-5
    assert t.of("head").vanishing_ratio == Thresholds().vanishing_ratio


class Seen(Thresholds):
    """Notes which fields are read of the thresholds of a layer."""

    read: ClassVar = set()

    def of(self, *names):
        read, own = self.read, super().of(*names)

        class Asked:
            def __getattr__(self, name):
                read.add(name)
                return getattr(own, name)

        return Asked()


def test_what_may_be_said_of_a_layer_is_what_is_looked_up_for_it():
    thresholds = Seen(norm_below=1e-9, layers={"nobody": {"norm_below": 1e-9}})
    layers = tuple(LayerInfo(name, "LSTM", i) for i, name in enumerate(("rnn", "dead", "head")))
    model = ModelInfo(
        layers,
        tuple(ParameterInfo(f"{layer.name}.weight", layer.name, (4, 4), "float32", 0, "weight") for layer in layers),
        (OptimizerInfo("SGD", False),),
    )
    history = History(thresholds)
    for step in range(60):
        gain = tuple((1.5 if step % 2 else 0.5) ** lag for lag in range(60))
        sequences = (SequenceStats("rnn", length=60, lag_gain=gain, need=50 if step < 30 else None),)
        adaptive = dataclasses.replace(model, optimizers=(OptimizerInfo("Adam", step > 30),))
        history.note_open(frozenset({(code, "rnn", None, None) for code in ("GW301", "GW302")} if step > 40 else ()))
        history.add(
            Snapshot(
                step,
                0.0,
                adaptive,
                optimizer=0,
                norm=(1e-8, 0.0, 1.0),
                weight_norm=(1.0, 1.0, 1.0),
                sequences=sequences,
                activations=(ActivationStats("rnn", dead=1.0),),
            )
        )
        for detector in DETECTORS:
            list(detector(history))
    assert thresholds.read == set(PER_LAYER)
