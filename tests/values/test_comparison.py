"""What changed between two profiles, and profiles as files."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.values.comparison import compare, with_alerts, with_cost
from gradwatch.values.profile import HorizonProfile, LayerProfile, Profile, from_toml, to_toml
from gradwatch.values.report import Alert, Finding, Severity


def layers(*norms, sensitivity=None, names="abcdefgh"):
    return {n: LayerProfile("Linear", float(v), sensitivity) for n, v in zip(names, norms, strict=False)}


def changes(before, after, **options):
    return [(c.what, c.place, c.text) for c in compare(Profile(before), Profile(after), **options).changes]


def test_another_scale_of_the_loss_is_no_change():
    found = compare(Profile(layers(-3, -2, -1, 0)), Profile(layers(2, 3, 4, 5)))
    assert found.changes == ()
    assert found.scale == 5
    assert "no change in 4 layers" in str(found)


def test_a_layer_that_vanishes_beside_the_last_ones_is_one():
    assert changes(layers(-3, -2, -1, 0), layers(-5, -2, -1, 0)) == [
        ("gradient", "a", "gradient x0.01 beside the last layers")
    ]
    most = changes(layers(-1, -1, -1, -1, 0), layers(-9, -7, -5, -3, 0))
    assert [place for _, place, _ in most] == ["a", "b", "c", "d"]


def test_half_a_decade_is_the_tolerance_and_may_be_another_for_a_layer():
    assert changes(layers(-3, -2, -1, 0), layers(-3.49, -2, -1, 0)) == []
    assert [c[1] for c in changes(layers(-3, -2, -1, 0), layers(-3.51, -2, -1, 0))] == ["a"]
    assert changes(layers(-3, -2, -1, 0), layers(-3.51, -2, -1, 0), layers={"a": 1.0}) == []
    assert changes(layers(-3, -2, -1, 0), layers(-3.2, -2, -1, 0), layers={"*": 1.0, "a": 0.1}) != []
    assert changes(layers(-3, -2, -1, 0), layers(-3.2, -2, -1, 0), tolerance=0.1) != []


def test_less_is_a_warning_and_more_an_information():
    less = compare(Profile(layers(-3, -2, -1, 0)), Profile(layers(-5, -2, -1, 0)))
    more = compare(Profile(layers(-3, -2, -1, 0)), Profile(layers(-1, -2, -1, 0)))
    assert (less.worst(), more.worst()) == (Severity.WARNING, Severity.INFO)


def test_of_one_layer_no_scale_can_be_told():
    assert [c[1] for c in changes(layers(0), layers(-2))] == []
    assert [c[1] for c in changes(layers(0, 0), layers(-2, -2))] == []
    assert [c[1] for c in changes(layers(0, 0), layers(-4, -2))] == ["a"]


def test_a_layer_of_another_kind():
    before = layers(-3, -2, -1, 0)
    after = {**before, "b": dataclasses.replace(before["b"], kind="LSTM")}
    assert changes(before, after) == [("kind", "b", "is a LSTM, and was a Linear")]


def test_zero_and_missing_gradients():
    zero, gone = layers(-math.inf, -2, -1, 0), {**layers(-3, -2, -1, 0), "a": LayerProfile("Linear")}
    before = layers(-3, -2, -1, 0)
    assert changes(before, zero)[0][2] == "gradient is 0 now beside the last layers"
    assert changes(zero, before)[0][2] == "gradient is not 0 any more beside the last layers"
    assert changes(zero, zero) == []
    assert changes(layers(math.nan, -2, -1, 0), layers(math.nan, -2, -1, 0)) == []
    assert changes(before, gone)[0][2] == "gradient is not there any more"
    assert changes(gone, before)[0][2] == "gradient is there now"
    assert changes(before, layers(math.nan, -2, -1, 0))[0][2] == "gradient is not a number beside the last layers"


def test_layers_that_were_renamed_are_compared_under_their_new_names():
    before, after = layers(-3, -2, -1, 0), layers(-5, -2, -1, 0, names=["x", "b", "c", "d"])
    assert changes(before, after) == [
        ("gradient", "x", "gradient x0.01 beside the last layers"),
        ("renamed", "x", "was called a"),
    ]


def test_layers_that_come_and_go():
    before, after = layers(-3, -2, -1, 0), layers(-3, -2, names="cd")
    assert ("gone", "a", "2 layers are gone: a to b") in changes(before, {**after})
    assert ("new", "e", "this layer is new") in changes(before, {**before, "e": LayerProfile("Conv1d", 0.0)})


def test_dead_units():
    alive = {**layers(-3, -2, -1, 0), "a": LayerProfile("Linear", -3.0, dead=0.1)}
    dead = {**alive, "a": dataclasses.replace(alive["a"], dead=0.9)}
    assert changes(alive, dead) == [("dead", "a", "10% -> 90% of the units are dead")]
    assert compare(Profile(alive), Profile(dead)).worst() is Severity.WARNING
    assert compare(Profile(dead), Profile(alive)).worst() is Severity.INFO
    assert changes(alive, {**alive, "a": dataclasses.replace(alive["a"], dead=0.29)}) == []


def horizons(before, after):
    return compare(Profile({}, {"lstm": before}), Profile({}, {"lstm": after}))


def test_the_sentence_that_a_reviewer_wants():
    found = horizons(HorizonProfile(212, 208, 216, 250), HorizonProfile(41, 40, 42, 250))
    assert str(found) == "lstm: 212 -> 41 timesteps"
    assert found.worst() is Severity.WARNING
    longer = horizons(HorizonProfile(41, 40, 42, 250), HorizonProfile(250, 250, 250, 250))
    assert (str(longer), longer.worst()) == ("lstm: 41 -> at least 250 timesteps", Severity.INFO)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (HorizonProfile(40, 38, 42, 250), HorizonProfile(45, 43, 47, 250), True),
        (HorizonProfile(40, 38, 42, 250), HorizonProfile(52, 50, 54, 250), False),
        (HorizonProfile(9, 8, 10, 60), HorizonProfile(10, 9, 11, 60), True),
        (HorizonProfile(60, 60, 60, 60), HorizonProfile(250, 250, 250, 250), True),
        (HorizonProfile(60, 60, 60, 60), HorizonProfile(20, 19, 21, 250), False),
    ],
)
def test_horizons_are_the_same_where_their_intervals_meet(before, after, same):
    assert (horizons(before, after).changes == ()) is same


def alert(code, place, severity=Severity.WARNING):
    return Alert(Finding(code, "x", severity, place), 0, 1, message="said", worst=severity)


def test_alerts_that_are_new_and_those_that_are_gone():
    found = with_alerts(compare(Profile({}), Profile({})), [alert("GW101", "a")], [alert("GW101", "b", Severity.ERROR)])
    assert [(c.what, c.place, c.severity) for c in found.changes] == [
        ("alert", "b", Severity.ERROR),
        ("cleared", "a", Severity.INFO),
    ]
    assert with_alerts(compare(Profile({}), Profile({})), [alert("GW101", "a")], [alert("GW101", "a")]).changes == ()


def test_cost():
    plain = compare(Profile({}), Profile({}))
    assert with_cost(plain, 0.010, 0.014).changes == ()
    assert str(with_cost(plain, 0.010, 0.020)) == "the model: a step takes 20 ms, and took 10"
    assert str(with_cost(plain, 0.020, 0.010)) == "the model: a step takes 10 ms, and took 20"
    assert with_cost(plain, None, 0.02).changes == ()


# --- files ---

number = st.one_of(st.none(), st.floats(-30, 30), st.sampled_from([math.inf, -math.inf]))
name = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
profile = st.builds(
    Profile,
    st.dictionaries(name, st.builds(LayerProfile, name, number, number, st.one_of(st.none(), st.floats(0, 1)))),
    st.dictionaries(name, st.builds(HorizonProfile, *[st.integers(0, 10**6)] * 4)),
    st.dictionaries(name, name),
)


@given(profile)
def test_a_file_has_what_was_written_to_two_decimals(given_):
    read = from_toml(to_toml(given_))
    assert list(read.layers) == list(given_.layers)
    assert (read.horizons, read.versions) == (given_.horizons, given_.versions)
    for key, layer in given_.layers.items():
        assert read.layers[key].kind == layer.kind
        for field in ("norm", "sensitivity", "dead"):
            one, other = getattr(layer, field), getattr(read.layers[key], field)
            assert one is other or one == pytest.approx(other, abs=0.0051)


def test_a_line_for_each_layer():
    text = to_toml(Profile(layers(-3, -2.5), {"": HorizonProfile(15, 14, 16, 250)}, {"torch": "2.13.0"}))
    assert '"a" = { kind = "Linear", norm = -3.00 }\n"b" = { kind = "Linear", norm = -2.50 }' in text
    assert '"" = { horizon = 15, low = 14, high = 16, of = 250 }' in text
    assert text.startswith("# gradwatch profile")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "it is not TOML"),
        ("format = 2", "must be a profile of format 1, got format 2"),
        ("format = 1", "it is no profile"),
        ("format = 1\n[horizons]\n[layers]\na = 3", "it is no profile"),
        ("format = 1\n[horizons]\n[layers]\na = { kind = 'x', size = 1.0 }", "it is no profile"),
        ("format = 1\n[horizons]\n[layers]\na = { kind = 'x', norm = 'y' }", "it is no profile"),
    ],
)
def test_what_is_no_profile(text, said):
    with pytest.raises(ValueError, match=said):
        from_toml(text)
