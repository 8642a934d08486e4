"""Thresholds say what is wrong with them, and layers may have their own."""

from __future__ import annotations

import pytest

from gradwatch import Thresholds


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"window": 0}, ValueError, "Thresholds.window must be above 0, got 0"),
        ({"window": 2.5}, TypeError, "Thresholds.window must be a whole number, got 2.5"),
        ({"share": 1.5}, ValueError, "Thresholds.share must be at most 1, got 1.5"),
        ({"vanishing_ratio": "small"}, TypeError, "Thresholds.vanishing_ratio must be a number, got 'small'"),
        ({"vanishing_ratio": -1.0}, ValueError, "must be above 0"),
        ({"norm_below": True}, TypeError, "must be a number, got True"),
        ({"layers": {"encoder.*": {"vanish": 1.0}}}, ValueError, r"Thresholds.layers\['encoder.\*'\] must name fields of Thresholds .*, got vanish"),
        ({"layers": {"encoder.*": {"vanishing_ratio": 0}}}, ValueError, "must be above 0"),
    ],
)
def test_a_wrong_number_gets_an_error_that_says_what_is_allowed(given, error, says):
    with pytest.raises(error, match=says):
        Thresholds(**given)


def test_the_last_pattern_that_matches_a_layer_wins():
    t = Thresholds(layers={"encoder.*": {"vanishing_ratio": 1e-5, "window": 7}, "encoder.0": {"vanishing_ratio": 1e-6}})

    assert t.of("encoder.0").vanishing_ratio == 1e-6
    assert t.of("encoder.0").window == 7
    assert t.of("encoder.1").vanishing_ratio == 1e-5
    assert t.of("head").vanishing_ratio == Thresholds().vanishing_ratio
