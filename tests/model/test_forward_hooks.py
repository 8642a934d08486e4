"""Which modules ran and which of them got a gradient back, and that nobody looks between probes."""

from __future__ import annotations

import pytest
import torch
from loops import Watched, batches, loss_of, train
from torch import nn
from torch.nn.modules import module as torch_modules
from truth import column

import gradwatch


def test_a_step_that_is_not_measured_costs_no_look_at_the_forward_pass():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    gradwatch.watch(model, optimizer, probe_every_n_steps=3)
    armed = []
    for _ in range(7):
        armed.append(bool(torch_modules._global_forward_pre_hooks))
        train(model, optimizer, 1)
    assert armed == [False, False, False, True, False, False, True]  # before steps 3 and 6
    assert not torch_modules._global_forward_pre_hooks


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.cut = nn.Linear(4, 3)
        self.idle = nn.Linear(4, 3)

    def forward(self, x):
        return self.body(x) + self.cut(x).detach()


def test_a_module_that_did_not_run_is_unused_and_one_whose_output_was_cut_is_disconnected():
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    reasons = [column(s, s.absent) for s in watched.snapshots]
    unknown = dict.fromkeys(["cut.weight", "cut.bias", "idle.weight", "idle.bias"], "unused")
    seen = {**unknown, "cut.weight": "disconnected", "cut.bias": "disconnected"}
    assert reasons == [unknown, seen, seen, seen]  # step 1 is the first probe, and later steps remember what it said


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.use = ("one",)

    def forward(self, x):
        return sum(getattr(self, name)(torch.tanh(self.body(x))) for name in self.use)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("probe", [1, 50])
def test_a_head_that_is_not_used_for_long_is_unused_and_no_fault_whatever_zero_grad_leaves(set_to_none, probe):
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watched = Watched(model, optimizer, every_n_steps=1, probe_every_n_steps=probe)
    for step, batch in enumerate(batches(100)):
        model.use = ("one", "two") if step in (1, 2, 50) else ("one",)
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, batch).backward()
        optimizer.step()
    assert [a.finding.code for r in watched.reports for a in r.began] == []
    last = watched.snapshots[-1 if probe == 1 else 49]
    assert column(last, last.norm).get("two.weight") == (None if set_to_none else 0)
    if probe == 1:
        assert column(last, last.absent) == {"two.weight": "unused", "two.bias": "unused"}
    assert not (watched.snapshots[50].absent and column(watched.snapshots[50], watched.snapshots[50].absent))


def test_a_head_that_runs_and_gets_zeros_is_disconnected_at_every_step_of_its_alert():
    model = Experts()
    model.use = ("one", "two")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watched = Watched(model, optimizer, every_n_steps=1, probe_every_n_steps=60)
    for batch in batches(140):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        for parameter in model.two.parameters():
            parameter.grad.zero_()
        optimizer.step()
    assert [(a.finding.code, a.finding.place) for r in watched.reports for a in r.began] == [("GW401", "two")]
    assert [a.finding.place for a in watched.reports[-1].open] == ["two"]
    assert not any(r.cleared for r in watched.reports)


def test_a_module_under_no_grad_in_training_is_disconnected_and_one_in_validation_did_not_run():
    class Feature(nn.Module):
        def __init__(self):
            super().__init__()
            self.cut, self.checked, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.cut(x)
            return self.head(x)

    model = Feature()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for batch in batches(2):
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model.checked(batch[0])
        model.train()
        loss_of(model, batch).backward()
        optimizer.step()
    reasons = column(watched.snapshots[1], watched.snapshots[1].absent)
    assert (reasons["cut.weight"], reasons["checked.weight"]) == ("disconnected", "unused")
