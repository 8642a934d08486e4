"""A training that is cut, saved and taken up in another process says what it would have said in one go."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch
from interpreters import warm
from models import deep
from torch import nn

import gradwatch

STEPS = 90
FOLDERS = [str(folder) for folder in Path(__file__).parents[:2]]
"""Where another process finds this module, and what it imports."""


def setting(logdir, optimizers=1):
    torch.manual_seed(0)
    model = deep(8, 6)
    parts = (
        [list(model.parameters())] if optimizers == 1 else [list(model[:4].parameters()), list(model[4:].parameters())]
    )
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
    """What a record says, but for the time of day."""
    snapshots = [dataclasses.replace(s, wall_time=0.0) for s in run.snapshots]
    return snapshots, run.alerts


@pytest.mark.parametrize(
    ("at", "optimizers", "form", "how"),
    [
        pytest.param(50, 1, "hooks", "json", id="in an alert and in a window"),
        pytest.param(33, 1, "hooks", "torch", id="between alerts", marks=pytest.mark.slow),
        pytest.param(49, 1, "hooks", "torch", id="before a probe", marks=pytest.mark.slow),
        pytest.param(27, 1, "hooks", "json", id="before a probe out of turn", marks=pytest.mark.slow),
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
            f"import sys; sys.path[:0] = {FOLDERS}; from pathlib import Path; import test_resume as t;"
            f" t.{what}(Path({str(two)!r}), {at}, {optimizers}, {form!r}, {how!r})"
        )
        subprocess.run([*warm(), "-c", program], check=True)

    whole, resumed = gradwatch.read_run(one), gradwatch.read_run(two)

    assert whole.alerts  # else there is nothing to compare
    assert any(a.cleared is not None for a in whole.alerts)
    assert told(resumed)[1] == told(whole)[1]
    for mine, theirs in zip(told(resumed)[0], told(whole)[0], strict=True):
        again = (
            mine.weight_norm if mine.step == at else theirs.weight_norm
        )  # what is new to a process is weighed at once
        assert mine == dataclasses.replace(theirs, weight_norm=again)
    axes = [
        {tag: [step for step, _ in values] for tag, values in scalars(folder).items() if "sensitivity" not in tag}
        for folder in (one, two)
    ]
    assert axes[0] == axes[1]


class Aside(nn.Module):
    """Has a layer that runs for nothing, or never runs and is given zeros for a gradient."""

    def __init__(self, runs):
        super().__init__()
        self.lower, self.upper, self.side, self.runs = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1), runs

    def forward(self, x):
        low = self.lower(x).tanh()
        if self.runs:
            self.side(low)
        return self.upper(low)


def reports_of(model, optimizer, steps, state=None):
    reports = []
    with gradwatch.watch(
        model, optimizer, every_n_steps=1, probe_every_n_steps=30, sinks=[reports.append], on_alert=lambda _: None
    ) as watcher:
        if state is not None:
            watcher.load_state_dict(state)
        for number in steps:
            loss = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(number))).square().mean()
            loss.backward()
            if not model.runs:
                for p in model.side.parameters():
                    p.grad = torch.zeros_like(p)
            watcher.record(loss)
            optimizer.step()
            optimizer.zero_grad()
    return reports, json.loads(json.dumps(watcher.state_dict()))


@pytest.mark.parametrize("at", [70, 90], ids=["between probes", "before a probe"])
@pytest.mark.parametrize("runs", [True, False], ids=["disconnected", "unused"])
def test_what_is_known_of_layers_without_a_gradient_is_known_after_a_resume(runs, at):
    torch.manual_seed(0)
    model = Aside(runs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before, state = reports_of(model, optimizer, range(at))
    after, _ = reports_of(model, optimizer, range(at, at + 35), state)
    open_before = [(a.finding.code, a.finding.place, a.began) for a in before[-1].open]
    assert open_before == ([("GW401", "side", 30)] if runs else [])
    assert [r.snapshot.step for r in after if r.began or r.cleared] == []
    assert {r.snapshot.absent for r in after} == {before[-1].snapshot.absent}


def test_a_probe_that_is_the_first_step_of_a_resumed_run_sees_the_forward_pass():
    def run(steps, state=None):
        reports = []
        torch.manual_seed(0)
        model = nn.LSTM(3, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with gradwatch.watch(
            model, optimizer, probe_every_n_steps=5, horizon=6, sinks=[reports.append], on_alert=lambda _: None
        ) as watcher:
            if state is not None:
                watcher.load_state_dict(state)
            for _ in range(steps):
                model(torch.randn(8, 2, 3))[0][-1].sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return reports, watcher.state_dict()

    _, state = run(10)
    reports, _ = run(6, state)
    assert [r.snapshot.step for r in reports if r.snapshot.sequences] == [10, 15]
    assert [s.module for s in reports[0].snapshot.sequences] == [s.module for s in reports[5].snapshot.sequences]


def test_numbers_of_steps_that_are_told_in_strides_go_on_after_a_resume():
    def run(numbers, state=None):
        reports = []
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with gradwatch.watch(
            model, optimizer, probe_every_n_steps=8, sinks=[reports.append], on_alert=lambda _: None
        ) as watcher:
            if state is not None:
                watcher.load_state_dict(state)
            for number in numbers:
                model(torch.ones(2, 3)).sum().backward()
                watcher.step(number)
                optimizer.step()
                optimizer.zero_grad()
        return reports, watcher.state_dict()

    _, state = run(range(0, 20, 4))
    reports, _ = run(range(20, 40, 4), state)
    assert [r.snapshot.step for r in reports if r.snapshot.activations] == [24, 32]


def test_a_turn_past_the_last_parameter_begins_anew():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, probe_every_n_steps=1) as watcher:
        state = watcher.state_dict()
        state["slots"][0]["turn"] = 9
        watcher.load_state_dict(state)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert None not in watcher.report.snapshot.update_ratio


@pytest.mark.parametrize(
    "wrong",
    [3, [], [{}], [{"stride": "x"}], [{"absent": {"weight": "gone"}}], [{"absent": [1]}], [{"turn": None}]],
    ids=str,
)
def test_a_state_whose_slots_cannot_be_read_changes_nothing(wrong):
    model = nn.Linear(3, 1)
    with gradwatch.watch(model, torch.optim.SGD(model.parameters())) as watcher:
        before = watcher.state_dict()
        given = [before["slots"][0] | slot if slot else slot for slot in wrong] if isinstance(wrong, list) else wrong
        with pytest.raises(ValueError, match=r"state must be what state_dict\(\) gave, and could not be read"):
            watcher.load_state_dict(before | {"slots": given, "counts": [7]})
        assert json.dumps(watcher.state_dict()) == json.dumps(before)
