"""How columns of parameters fold into layers: norms, sensitivities, order, and where a module lies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradwatch.values.layer_columns import LayerColumns, inside, norms, sensitivities, trunk
from gradwatch.values.snapshot import LayerInfo, ModelInfo, ParameterInfo, Snapshot

LAYERS = (LayerInfo("head", "Linear", 2), LayerInfo("idle", "Linear"), LayerInfo("body", "Mine", 0))
PARAMETERS = (
    ParameterInfo("head.weight", "head", (4, 9), "float32", 0, "weight"),
    ParameterInfo("body.weight", "body", (16, 2), "float32", 0, "weight"),
    ParameterInfo("head.bias", "head", (4,), "float32", 0, "bias"),
    ParameterInfo("body.gain", "body", (2,), "float32", 0, "gain"),
    ParameterInfo("body.small", "body", (3, 3), "float32", 0, "weight"),
    ParameterInfo("idle.weight", "idle", (2, 2), "float32", 0, "weight"),
)
MODEL = ModelInfo(LAYERS, PARAMETERS)


def test_the_norm_of_a_layer_is_the_root_of_the_sum_of_squares_in_the_order_of_the_forward_pass():
    assert list(norms(MODEL, (3.0, 1.0, 4.0, 2.0, 2.0, None)).items()) == [("body", 3.0), ("head", 5.0), ("idle", None)]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_passed_on_and_none_is_not_zero(bad):
    found = norms(MODEL, (bad, None, 1.0, None, None, 0.0))

    assert (found["body"], found["idle"]) == (None, 0.0)
    assert str(found["head"]) == str(bad)


def test_a_column_of_another_model_is_refused():
    with pytest.raises(ValueError, match="zip"):
        norms(MODEL, (1.0,))


def test_the_sensitivity_of_the_rules_is_that_of_the_tables_and_leaves_out_biases_and_lone_gains():
    column, weights = (3.0, 2.0, 1e9, 1e9, 6.0, None), (2.0, 1.0, 1e9, 1e9, 0.5, 1.0)
    folded = LayerColumns(MODEL)
    known = dict(zip((p.name for p in PARAMETERS), weights, strict=True))
    rules = folded.sensitivity(np.array(column, dtype=float), folded.weights(known))
    tables = norms(MODEL, sensitivities(Snapshot(0, 0.0, MODEL, norm=column, weight_norm=weights)))

    assert tables == {"body": pytest.approx(math.hypot(2.0, 3.0)), "head": 6.0, "idle": None}
    assert rules.tolist() == [6.0, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.hypot(2.0, 3.0))]


def test_a_ratio_is_over_the_largest_of_the_layers_after_it():
    ratios = LayerColumns(MODEL).over_later(np.array([2.0, math.nan, 1.0]))

    assert ratios.tolist() == [pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True), 0.5]


def test_the_gain_is_that_of_the_largest_weight():
    gains = LayerColumns(MODEL).gains((6.0, 8.0, 1.0, 1.0, 9.0, None))

    assert gains.tolist() == [3.0, pytest.approx(math.nan, nan_ok=True), 2.0]


def test_the_innermost_layers_are_those_that_no_other_lies_in():
    layers = tuple(LayerInfo(name, "Mine", order) for order, name in enumerate(("block", "block.b", "", "block.a")))

    assert LayerColumns(ModelInfo(layers, ())).innermost == ["block.b", "block.a"]


@pytest.mark.parametrize(
    ("name", "around", "lies"),
    [
        ("block.a", "block", True),
        ("block", "block", True),
        ("blocks.a", "block", False),
        ("block", "block.a", False),
        ("any", "", True),
    ],
)
def test_a_module_lies_in_those_whose_path_its_own_begins_with(name, around, lies):
    assert inside(name, around) is lies


@pytest.mark.parametrize(
    ("names", "deepest"),
    [
        (["net.a", "net.b", "head"], "net"),
        (["net.a", "head"], ""),
        (["net.x.a", "net.x.b", "net.x.c", "head"], "net.x"),
    ],
)
def test_the_trunk_is_the_deepest_module_with_more_than_half_of_the_layers(names, deepest):
    assert trunk(ModelInfo(tuple(LayerInfo(name, "Linear") for name in names), ())) == deepest
