"""The options are the same at every face, and stay as they were checked. Their errors: tests/test_messages.py."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import gradwatch
from gradwatch.lightning import GradientMonitor
from gradwatch.watcher.cadence import Cadence
from gradwatch.watcher.options import Options

OWN = {
    "watch": {"model", "optimizer", "logdir", "scaler"},
    "GradientMonitor": {"self", "logdir"},
    "check": {"model", "batch", "loss"},
}
FEWER = {"check": {"thresholds", "ignore", "detectors"}}


@pytest.mark.parametrize("face", [gradwatch.watch, GradientMonitor, gradwatch.check], ids=lambda f: f.__name__)
def test_every_face_takes_the_options_with_their_defaults(face):
    fields = {field.name: field for field in dataclasses.fields(Options)}
    taken = inspect.signature(face.__init__ if inspect.isclass(face) else face).parameters
    options = {name: p for name, p in taken.items() if name not in OWN[face.__name__]}

    assert set(options) == FEWER.get(face.__name__, set(fields))
    for name, parameter in options.items():
        expected = None if name == "thresholds" else fields[name].default  # made when it is asked for
        assert parameter.default == expected, name
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


def test_options_stay_as_they_were_checked():
    ignore, sinks = ["GW101"], [print]
    options = Options(every_n_steps=3, ignore=ignore, sinks=sinks, detectors=list(gradwatch.DETECTORS))
    ignore.append(7)
    sinks.append("no function")

    assert (options.ignore, options.sinks, options.detectors) == (("GW101",), (print,), tuple(gradwatch.DETECTORS))
    assert options.cadence == Cadence(3, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.every_n_steps = 0
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        dataclasses.replace(options, every_n_steps=0)
