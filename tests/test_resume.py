"""A training that is cut, saved and taken up in another process says what it would have said in one go."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch

STEPS = 90


def setting(logdir, optimizers=1):
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(6, 6), nn.Sigmoid())), nn.Linear(6, 1))
    parts = [list(model.parameters())] if optimizers == 1 else [list(model[:4].parameters()), list(model[4:].parameters())]
    steppers = [torch.optim.Adam(part, lr=1e-2) for part in parts]
    watcher = gradwatch.watch(model, steppers, logdir=logdir, probe_every_n_steps=7, on_alert=lambda _: None)
    return model, steppers, watcher


def train(model, steppers, watcher, steps, form):
    """A deep sigmoid network, in which gradients vanish; from step 40 to 60 the lower half is cut off."""
    for number in steps:
        for o in steppers:
            o.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        middle = model[:8](x)
        loss = (model[8:](middle * 0 if 40 <= number < 60 else middle) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        if form == "explicit":
            watcher.step(loss=loss)
        else:
            watcher.record(loss)
        for o in steppers:
            o.step()


def cut(folder, at, optimizers, form, how):
    model, steppers, watcher = setting(folder, optimizers)
    train(model, steppers, watcher, range(at), form)
    watcher.close()
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in steppers]}
    kept = watcher.state_dict()
    torch.save(state | ({"watcher": kept} if how == "torch" else {}), folder / "saved.pt")
    (folder / "saved.json").write_text(json.dumps(kept))


def take_up(folder, at, optimizers, form, how):
    model, steppers, watcher = setting(folder, optimizers)
    state = torch.load(folder / "saved.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for o, kept in zip(steppers, state["optimizers"], strict=True):
        o.load_state_dict(kept)
    watcher.load_state_dict(state["watcher"] if how == "torch" else json.loads((folder / "saved.json").read_text()))
    train(model, steppers, watcher, range(at, STEPS), form)
    watcher.close()


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(Path(folder).rglob("*tfevents*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    return {tag: sorted(values) for tag, values in found.items()}


def told(run):
    """What a record says, but for the time of day, and for what each process sees anew of the order of the layers."""
    snapshots = [dataclasses.replace(s, wall_time=0.0, model=run.models[0], activations=None) for s in run.snapshots]
    return snapshots, run.alerts


@pytest.mark.parametrize(
    ("at", "optimizers", "form", "how"),
    [
        pytest.param(50, 1, "hooks", "json", id="in an alert and in a window"),
        pytest.param(33, 1, "hooks", "torch", id="between alerts", marks=pytest.mark.slow),
        pytest.param(50, 2, "hooks", "torch", id="two optimizers", marks=pytest.mark.slow),
        pytest.param(71, 1, "explicit", "json", id="explicit", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_taken_up_in_another_process_says_what_it_would_have_said(at, optimizers, form, how, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    model, steppers, watcher = setting(one, optimizers)
    train(model, steppers, watcher, range(STEPS), form)
    watcher.close()
    for what in ("cut", "take_up"):
        program = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import test_resume as t;"
            f" t.{what}(Path({str(two)!r}), {at}, {optimizers}, {form!r}, {how!r})"
        )
        subprocess.run([sys.executable, "-c", program], check=True)

    whole, resumed = gradwatch.read_run(one), gradwatch.read_run(two)

    assert whole.alerts  # else there is nothing to compare
    assert any(a.cleared is not None for a in whole.alerts)
    assert told(resumed)[1] == told(whole)[1]
    for mine, theirs in zip(told(resumed)[0], told(whole)[0], strict=True):
        again = mine.weight_norm if mine.step == at else theirs.weight_norm  # what is new to a process is weighed at once
        assert mine == dataclasses.replace(theirs, absent=mine.absent, weight_norm=again)
    axes = [{tag: [step for step, _ in values] for tag, values in scalars(folder).items() if "sensitivity" not in tag} for folder in (one, two)]
    assert axes[0] == axes[1]
