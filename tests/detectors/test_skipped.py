"""Steps that a GradScaler skips again and again are found by their share and by its scale; what is designed is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import Severity


def trained(form, *, bad=lambda _: False, steps=160, size=1.0, **scaling):
    """Train with a GradScaler; of a batch that is `bad` the loss has a NaN gradient. Give the alerts and the scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler, known, seen = torch.amp.GradScaler("cpu", **scaling), {}, []
    given = {"scaler": scaler} if form == "given" else {}

    def note(report):
        seen.append(report.snapshot)
        known.update({a.finding.code: a for a in (*report.cleared, *report.open)})

    with gradwatch.watch(model, optimizer, sinks=[note], on_alert=lambda _: None, **given) as watcher:
        for step in range(steps):
            x = torch.randn(32, 6)
            if bad(step):
                x[0] = 0.0
            out = model(x) * x.abs().sum(1, keepdim=True).sign()  # an empty row gives 0
            loss = size * (out - torch.tanh(x[:, :3])).square().sum(1).sqrt().mean()
            optimizer.zero_grad()
            scaled = scaler.scale(loss)
            scaled.backward()
            if size > 1:  # as float16 would overflow
                for p in model.parameters():
                    p.grad[p.grad.abs() > 65504] = float("inf")
            if form == "hooks":
                watcher.record(loss)
            else:
                watcher.step(loss=loss)
            scaler.step(optimizer)
            scaler.update()
    return known, scaler.get_scale(), seen


@pytest.mark.parametrize("form", ["hooks", "read", "given"])
def test_every_third_batch_is_skipped_and_the_scale_falls_without_end(form):
    known, scale, _ = trained(form, bad=lambda step: step % 3 == 2)

    assert scale < 1e-8
    assert known["GW503"].severity is Severity.WARNING
    assert known["GW503"].began == 49
    said = str(known["GW503"])
    assert "its scale has fallen from" in said
    assert form == "hooks" or "a GradScaler has skipped 34% of the last 50 measured steps" in said


@pytest.mark.parametrize("form", ["hooks", "given"])
@pytest.mark.parametrize(
    "run",
    [
        {"growth_interval": 10, "size": 300.0},  # and one that is too large is halved again
        {"init_scale": 2.0**24, "size": 300.0},  # the first steps are skipped until it fits
        {"bad": lambda step: step == 60},
    ],
)
def test_a_scale_that_finds_its_size_is_as_designed(form, run):
    known, _, seen = trained(form, **run)

    assert form == "hooks" or any(s.skipped for s in seen)
    assert known.keys() == set()


def test_a_scale_of_zero_costs_no_measurement():
    _, scale, seen = trained("given", init_scale=0.0, steps=30)

    assert scale == 0.0
    assert [s.step for s in seen] == list(range(30))
