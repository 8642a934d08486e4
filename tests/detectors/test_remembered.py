"""What is worked out once between two probes, and what is packed, gives what working it out anew would give."""

from __future__ import annotations

import random

import pytest

from gradwatch import History
from gradwatch.detectors.alerts import findings
from gradwatch.values import plain
from gradwatch.values.autograd import Barrier, Cut, Flow
from gradwatch.values.snapshot import (
    ActivationStats,
    Fact,
    LayerInfo,
    ModelInfo,
    OptimizerInfo,
    ParameterInfo,
    Snapshot,
)

LAYERS = ("a", "b", "c", "d")
STATES = ("sound", "vanishing", "zero", "missing", "exploding", "dead", "narrow", "still", "nan")


def model():
    parameters = [
        ParameterInfo(f"{name}.{role}", name, shape, "float32", 0, role)
        for name in LAYERS
        for role, shape in (("weight", (8, 8)), ("bias", (8,)))
    ]
    layers = tuple(LayerInfo(name, "Linear", i) for i, name in enumerate(LAYERS))
    return ModelInfo(layers, tuple(parameters), (OptimizerInfo("Adam", adaptive=True, eps=1e-8),))


def trajectory(seed, steps=130):
    """Return a run that changes from one state to another now and then, a probe among ten steps or so."""
    draw, info, found, state = random.Random(seed), model(), [], "sound"
    for step in range(steps):
        if draw.random() < 0.05:
            state = draw.choice(STATES)
        if draw.random() < 0.01:
            info = model()  # described anew, and the same
        probe = draw.random() < 0.15
        norms = [draw.uniform(0.5, 2.0) for _ in info.parameters]
        if state == "vanishing":
            norms[:4] = [n * 1e-9 for n in norms[:4]]
        if state == "narrow":
            norms[:2] = [n * 1e-8 for n in norms[:2]]
        if state in ("zero", "missing"):
            norms[:4] = [0.0 if state == "zero" else None] * 4
        if state in ("exploding", "nan"):
            norms = [n * 1e6 for n in norms] if state == "exploding" else [float("nan")] * len(norms)
        dead = 0.95 if state == "dead" else 0.0
        barrier = Barrier("c", "layer_norm", 1) if state == "narrow" else None
        look = {
            "weight_norm": (8.0, 0.1) * 4,
            "update_ratio": ({"exploding": 40.0, "still": 0.0}.get(state, 1e-3), 1e-3) * 4,
            "zeros": (0.1, 0.1) * 4,
            "activations": tuple(ActivationStats(n, 1.0, dead=dead, units=8, function="relu") for n in LAYERS),
            "facts": (Fact("a", "spectral_norm", 2.0), Fact("b", "input_size", 0.0 if state == "zero" else 1.0)),
            "flows": (Flow("a", source=None, barrier=barrier), Flow("b", "a")),
            "cuts": (Cut("a", "a", "b", graph=True, kind="between"),) if state == "missing" else None,
            "rate": 0.0 if state == "still" else 0.1,
            "left_over": 0.5 if draw.random() < 0.2 else 0.0,
        }
        absent = tuple("disconnected" if n is None else None for n in norms) if state == "missing" else None
        loss = 2.0 * draw.uniform(0.9, 1.1) * (1e3 if state == "exploding" else 1.0)
        told = look if probe or step == 1 else {}
        found.append(Snapshot(step, 0.0, info, optimizer=0, loss=loss, norm=tuple(norms), absent=absent, **told))
    return found


def judged_as_it_goes(run):
    history, found = History(), []
    for snapshot in run:
        history.note_open(f.key for f in (found[-1] if found else ()))
        history.add(snapshot)
        found.append(findings(history))
    return found


def judged_anew(run, upto, before):
    history = History()
    for snapshot in run[:upto]:
        history.add(snapshot)
    history.track.lasting.clear()
    history.note_open(f.key for f in before)
    return findings(history)


@pytest.mark.parametrize("seed", range(8))
def test_findings_are_those_of_a_history_that_has_remembered_nothing(seed):
    run = trajectory(seed)
    found = judged_as_it_goes(run)

    for upto in range(1, len(run) + 1):
        assert judged_anew(run, upto, found[upto - 2] if upto > 1 else ()) == found[upto - 1]


def test_there_is_something_to_find():
    codes = {f.code for seed in range(8) for found in judged_as_it_goes(trajectory(seed)) for f in found}
    assert {"GW101", "GW401", "GW402", "GW501", "GW601", "GW905"} <= codes


@pytest.mark.parametrize("seed", range(3))
def test_packed_columns_are_judged_as_others_are(seed, monkeypatch):
    as_they_are = judged_as_it_goes(trajectory(seed))
    monkeypatch.setattr(plain, "_MANY", 1)
    assert judged_as_it_goes(trajectory(seed)) == as_they_are
