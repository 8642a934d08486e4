"""At which steps a watcher measures, and at which it probes."""

from __future__ import annotations

import pytest
import torch
from loops import Watched, train
from models import tall
from torch import nn

import gradwatch
from gradwatch.values.report import Finding, Severity


def seen(steps, **options):
    """Return the numbers of the steps that were measured, and of those that were probed."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    watched = Watched(model, optimizer, **options)
    train(model, optimizer, steps)
    assert watched.snapshots[0].update_ratio is not None  # of the first step always: it may throw the weights
    return [s.step for s in watched.snapshots], [s.step for s in watched.snapshots if s.zeros is not None]


def test_by_default_the_first_200_steps_are_measured_and_then_every_tenth():
    measured, probed = seen(401)
    assert measured == [*range(200), *range(200, 401, 10)]
    assert probed == [1, *range(10, 201, 10), 250, 300, 350, 400]


@pytest.mark.parametrize("every", [1, 7, 100])
def test_a_number_of_steps_is_obeyed_exactly(every):
    measured, probed = seen(250, every_n_steps=every)
    assert measured == list(range(0, 250, every))
    assert set(probed) <= set(measured)
    assert len(probed) > 1


@pytest.mark.parametrize(("every", "probe"), [(None, 3), (7, 3), (4, 10), (1, 1)])
def test_a_number_of_probes_is_obeyed_exactly_and_a_probe_is_measured(every, probe):
    measured, probed = seen(230, every_n_steps=every, probe_every_n_steps=probe)
    regular = {s for s in range(230) if s % every == 0} if every else {*range(200), 200, 210, 220}
    assert probed == list(range(0, 230, probe))
    assert measured == sorted(regular | set(probed))


def test_after_an_alert_has_begun_the_next_step_is_a_probe_even_between_two_of_the_cadence():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def found(history):
        if history.snapshot.step >= 6:
            yield Finding("X1", "found", Severity.WARNING, "")
        if history.snapshot.step >= 18:
            yield Finding("X2", "found", Severity.INFO, "")

    watched = Watched(
        model, optimizer, every_n_steps=6, probe_every_n_steps=12, detectors=[found], on_alert=lambda _: None
    )
    train(model, optimizer, 31)

    assert [s.step for s in watched.snapshots] == [0, 6, 7, 12, 18, 19, 24, 30]
    assert [s.step for s in watched.snapshots if s.update_ratio is not None] == [0, 7, 12, 19, 24]
    assert all(s.weight_norm is not None for s in watched.snapshots if s.step in (7, 19))


@pytest.mark.parametrize("number", [0, -3])
def test_a_cadence_below_one_is_refused(number):
    for option in ("every_n_steps", "probe_every_n_steps"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got {number}"):
            gradwatch.watch(tall(), **{option: number})
        with pytest.raises(TypeError, match=f"{option} must be a whole number or None, got 2.5"):
            gradwatch.watch(tall(), **{option: 2.5})
