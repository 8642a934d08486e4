"""The steps of an optimizer: through which states they go, and that nobody else writes what belongs to them."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from loops import Watched
from torch import nn
from torch.nn.modules import module as torch_modules

import gradwatch
from gradwatch.watcher.optimizer_steps import State


class Seen:
    """An optimizer's states, asked for by hooks around those of the watcher."""

    def __init__(self, *, explicit=False, optimizer=True, every_n_steps=1):
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.reports, self.explicit = [], explicit
        self.watcher = gradwatch.watch(
            self.model,
            self.optimizer if optimizer else None,
            every_n_steps=every_n_steps,
            sinks=[self.reports.append],
            on_alert=lambda _: None,
        )
        self.steps = self.watcher._steps[0]
        self.optimizer.register_step_pre_hook(lambda *_: self.states.append(self.steps.state))
        self.optimizer.register_step_post_hook(lambda *_: self.states.append(self.steps.state))
        self.states = []

    def go(self, *, step=True, factor=1.0):
        """Return the states before, within and after a step."""
        self.states = [self.steps.state]
        self.optimizer.zero_grad()
        (self.model(torch.ones(2, 3)).sum() * factor).backward()
        if self.explicit:
            self.watcher.step()
            self.states.append(self.steps.state)
        if step:
            self.optimizer.step()
        return self.states

    def skipped(self):
        return [report.snapshot.skipped for report in self.reports]


def test_a_step_that_the_hooks_tell_of_is_applied_and_then_done():
    seen = Seen()

    assert seen.go() == [State.IDLE, State.APPLIED, State.DONE]
    assert seen.go() == [State.DONE, State.APPLIED, State.DONE]
    assert seen.skipped() == [False, False]


def test_a_step_that_is_read_before_clipping_waits_for_its_optimizer():
    seen = Seen(explicit=True)

    assert seen.go() == [State.IDLE, State.READ, State.APPLIED, State.DONE]
    assert seen.skipped() == [False]


def test_a_step_that_is_not_finite_and_whose_optimizer_never_comes_is_skipped_when_the_next_is_read():
    seen = Seen(explicit=True)

    assert seen.go(step=False, factor=math.inf) == [State.IDLE, State.READ]
    assert seen.skipped() == []
    assert seen.go() == [State.READ, State.READ, State.APPLIED, State.DONE]
    assert seen.skipped() == [True, False]
    seen.go(step=False, factor=math.nan)
    seen.watcher.close()
    assert seen.skipped() == [True, False, True]
    assert [report.snapshot.step for report in seen.reports] == [0, 1, 2]


def test_what_is_finite_and_whose_optimizer_never_comes_was_a_micro_batch_and_no_step():
    seen = Seen(explicit=True)
    for _ in range(3):
        assert seen.go(step=False)[-1] == State.READ
    seen.go()
    seen.go(step=False)
    seen.watcher.close()

    assert [(report.snapshot.step, report.snapshot.skipped) for report in seen.reports] == [(0, False)]


@pytest.mark.parametrize("scaled", [False, True])
def test_micro_batches_that_are_read_one_by_one_give_the_steps_that_the_hooks_alone_give(scaled):
    def run(explicit, accumulate=30):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        optimizer, reports = torch.optim.SGD(model.parameters(), lr=0.1), []
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        options = {"sinks": [reports.append], "on_alert": lambda _: None, "scaler": scaler}
        watcher = gradwatch.watch(model, optimizer, probe_every_n_steps=2, every_n_steps=1, **options)
        for batch in range(4 * accumulate):
            loss = model(torch.randn(2, 3)).square().mean() / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            if explicit:
                watcher.step(loss=loss)
            else:
                watcher.record(loss)
            if (batch + 1) % accumulate == 0:
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                optimizer.zero_grad()
                assert bool(torch_modules._global_forward_pre_hooks) == (watcher._steps[0].count % 2 == 0)
        watcher.close()
        return reports, [p.detach().clone() for p in model.parameters()]

    (read, weights), (heard, same) = run(explicit=True), run(explicit=False)

    assert all(map(torch.equal, weights, same))
    assert [r.snapshot.step for r in read] == [r.snapshot.step for r in heard] == [0, 1, 2, 3]
    for one, other in zip(read, heard, strict=True):
        assert one.snapshot.norm == pytest.approx(other.snapshot.norm, rel=1e-6)
        assert one.snapshot.loss == pytest.approx(other.snapshot.loss, rel=1e-6)
        assert one.snapshot.update_ratio == other.snapshot.update_ratio
        assert not one.snapshot.skipped
    # Of the forward passes of a step, a probe has seen the one before the last reading.
    assert [a.module for a in read[2].snapshot.activations] == [a.module for a in heard[2].snapshot.activations]
    assert [alert.finding.code for report in read for alert in report.began] == []


def test_a_step_without_an_optimizer_is_done_at_once():
    seen = Seen(explicit=True, optimizer=False)

    assert seen.go(step=False) == [State.IDLE, State.DONE]
    assert seen.skipped() == [False]


def test_a_step_that_is_not_measured_keeps_nothing():
    seen = Seen(explicit=True, every_n_steps=2)
    seen.go()

    assert seen.go() == [State.DONE, State.DONE, State.DONE, State.DONE]
    assert seen.go() == [State.DONE, State.READ, State.APPLIED, State.DONE]
    assert len(seen.reports) == 2


def test_of_optimizers_that_are_read_together_those_that_do_not_step_are_idle_again():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    reports = []
    watcher = gradwatch.watch(model, optimizers, every_n_steps=1, sinks=[reports.append], on_alert=lambda _: None)
    for stepping in optimizers:
        model(torch.ones(2, 3)).sum().backward()
        watcher.step()
        stepping.step()
    assert [steps.state for steps in watcher._steps] == [State.READ, State.DONE]
    watcher.step()
    assert [steps.state for steps in watcher._steps] == [State.READ, State.READ]
    assert [(r.snapshot.optimizer, r.snapshot.skipped) for r in reports] == [(0, False), (1, False)]
    watcher.close()
    assert [steps.state for steps in watcher._steps] == [State.IDLE, State.IDLE]


def test_a_measurement_that_fails_is_let_go_of():
    seen = Seen(explicit=True)
    seen.go(step=False)
    del seen.model
    with pytest.warns(gradwatch.GradwatchWarning, match="a measurement failed .* the watched model is gone"):
        seen.optimizer.step()

    assert seen.steps.state is State.IDLE


def writers(root, fields):
    """Places at which an object writes such a field of another."""
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)] if node else []
            for target in targets:
                for part in ast.walk(target) if isinstance(target, ast.AST) else ():
                    others = isinstance(part, ast.Attribute) and ast.unparse(part.value) not in {"self", "cls"}
                    if others and isinstance(part.ctx, ast.Store) and part.attr in fields:
                        found.append(f"{path.relative_to(root)}:{part.lineno} {ast.unparse(part)}")
    return found


def test_nobody_else_writes_the_fields_of_a_step():
    steps = Seen().steps
    fields = {*vars(steps), *vars(steps._count)}

    assert {"state", "number", "_measurement", "_stepped"} <= fields
    assert writers(Path(gradwatch.__file__).parent, fields) == []


def test_the_search_for_writers_finds_them(tmp_path):
    (tmp_path / "a.py").write_text(
        "steps.count = 3\nsteps.turn, steps._columns = 1, []\nself.count = 1\nsteps.count += 1\n"
    )

    assert writers(tmp_path, {"count", "_columns"}) == [
        "a.py:1 steps.count",
        "a.py:2 steps._columns",
        "a.py:4 steps.count",
    ]


@pytest.mark.parametrize("explicit", [False, True])
def test_the_first_update_is_measured_though_no_probe_is_there(explicit):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    before = model.weight.detach().double().clone()
    watched = Watched(model, optimizer, on_alert=lambda _: None)
    model(torch.randn(5, 4)).square().mean().backward()
    if explicit:
        watched.watcher.step()
    optimizer.step()

    (snapshot,) = watched.snapshots
    moved = ((model.weight.detach().double() - before).norm() / before.norm()).item()
    assert snapshot.step == 0
    assert snapshot.zeros is None  # so it was no probe
    assert snapshot.update_ratio[0] == pytest.approx(moved, rel=1e-6)
