"""Every face that watches takes the options of `watch`: the same names, defaults, types and words of refusal."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

import gradwatch
from gradwatch.huggingface import GradientCallback
from gradwatch.lightning import GradientMonitor

MODEL = nn.Linear(3, 1)
THE_TRAINER_HAS = {"model", "optimizer", "logdir", "scaler"}
"""What a Trainer knows by itself, and only `watch` has to be told."""
FACES = [GradientMonitor, GradientCallback]
MAY_BE_TOLD = {GradientMonitor: {"logdir"}, GradientCallback: {"logdir"}}
"""What of that a face takes all the same, for who wants it otherwise."""


def options(face):
    return {name: p for name, p in inspect.signature(face).parameters.items() if name not in THE_TRAINER_HAS}


@pytest.mark.parametrize("face", FACES)
def test_a_face_takes_the_options_of_watch(face):
    ours, theirs = options(gradwatch.watch), options(face)

    assert list(theirs) == list(ours)  # in the same order, as they stand in the documents
    assert set(inspect.signature(face).parameters) & THE_TRAINER_HAS == MAY_BE_TOLD[face]
    for name, option in theirs.items():
        assert (name, option.kind, option.default) == (name, inspect.Parameter.KEYWORD_ONLY, ours[name].default)
        if name != "on_alert":  # a Trainer can also stop
            assert (name, option.annotation) == (name, ours[name].annotation)


@pytest.mark.parametrize("face", FACES)
def test_a_face_documents_each_option(face):
    for name in options(face):
        assert f"\n        {name}: " in face.__doc__


WRONG = [
    {"name": ""},
    {"name": 3},
    {"every_n_steps": 0},
    {"every_n_steps": 1.5},
    {"probe_every_n_steps": -1},
    {"timesteps": "all"},
    {"timesteps": {"rnn": -1}},
    {"horizon": 0},
    {"horizon": {}},
    {"horizon": 5, "timesteps": False},
    {"thresholds": 0.5},
    {"ignore": "GW101"},
    {"detectors": [3]},
    {"sinks": "page"},
]


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_face_refuses_what_watch_refuses_and_with_the_same_words(face, wrong):
    with pytest.raises((TypeError, ValueError)) as ours:
        gradwatch.watch(MODEL, **wrong)
    with pytest.raises((TypeError, ValueError)) as theirs:
        face(**wrong)

    assert (theirs.type, str(theirs.value)) == (ours.type, str(ours.value))


def test_every_option_has_a_wrong_value_in_this_table():
    assert {name for wrong in WRONG for name in wrong} == set(options(gradwatch.watch)) - {"on_alert"}


@pytest.mark.parametrize("face", FACES)
def test_only_a_trainer_can_be_stopped(face):
    face(on_alert="stop")
    with pytest.raises(ValueError, match='on_alert must be "warn", "raise" or a function'):
        gradwatch.watch(MODEL, on_alert="stop")
    with pytest.raises(ValueError, match='on_alert must be "warn", "raise", "stop" or a function'):
        face(on_alert="loud")
