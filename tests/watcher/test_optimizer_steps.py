"""The steps of an optimizer: through which states they go, and that nobody else writes what belongs to them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from loops import Watched
from torch import nn

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

    def go(self, *, step=True):
        """Return the states before, within and after a step."""
        self.states = [self.steps.state]
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 3)).sum().backward()
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


def test_a_step_whose_optimizer_never_comes_is_skipped_when_the_next_is_read():
    seen = Seen(explicit=True)

    assert seen.go(step=False) == [State.IDLE, State.READ]
    assert seen.skipped() == []
    assert seen.go() == [State.READ, State.READ, State.APPLIED, State.DONE]
    assert seen.skipped() == [True, False]
    seen.go(step=False)
    seen.watcher.close()
    assert seen.skipped() == [True, False, True]


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
    fields = set(vars(Seen().steps))

    assert {"state", "count", "_measurement", "_columns"} <= fields
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
