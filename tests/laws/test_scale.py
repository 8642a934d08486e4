"""The same trajectory at another scale of the loss gives the same verdicts (law 6)."""

from __future__ import annotations

import functools

import pytest
import torch
from models import deep
from torch import nn

import gradwatch


def sick():
    torch.manual_seed(0)
    return deep(14, 8), 0.05, 60


def well():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)), 0.02, 120


def wild():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)), 3.0, 30


def verdicts(build, *, scale=1.0, reduction="mean", scaler=None, accumulate=1, adam=False, clip=None, dtype=None):
    net, lr, steps = build()
    torch.manual_seed(1)
    batches = torch.randn(steps, 64, 8)
    total = scale * (64 if reduction == "sum" else 1)
    optimizer = (
        torch.optim.Adam(net.parameters(), lr=1e-2, eps=1e-8 * total)
        if adam
        else torch.optim.SGD(net.parameters(), lr=lr / total)
    )
    found = []
    with gradwatch.watch(net, optimizer, on_alert=found.append) as watcher:
        for x in batches:
            y = x.sum(1, keepdim=True) / 4
            optimizer.zero_grad()
            for part in range(accumulate):
                rows = slice(part * 64 // accumulate, (part + 1) * 64 // accumulate)
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    out = net(x[rows])
                loss = nn.functional.mse_loss(out.float(), y[rows], reduction=reduction) * scale / accumulate
                watcher.record(loss * accumulate)
                (loss if scaler is None else scaler.scale(loss)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    return [(a.finding.code, a.finding.place, a.severity) for a in found]


@functools.cache
def reference(build, **options):
    """Return the verdicts of the training as it is, which every other scale must give too."""
    return verdicts(build, **options)


@pytest.mark.parametrize("build", [sick, well, wild])
@pytest.mark.parametrize("scale", [1e-8, 1e4, 2.0**-30])
def test_a_loss_times_a_constant_with_the_learning_rate_to_match(build, scale):
    assert verdicts(build, scale=scale) == reference(build)


@pytest.mark.parametrize("build", [sick, well])
@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_adam_with_its_epsilon_to_match(build, scale):
    assert verdicts(build, scale=scale, adam=True) == reference(build, adam=True)


@pytest.mark.parametrize("build", [sick, well, wild])
def test_sum_instead_of_mean(build):
    assert verdicts(build, reduction="sum") == reference(build)


@pytest.mark.parametrize("build", [sick, well])
def test_a_grad_scaler(build):
    assert verdicts(build, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10)) == reference(build)


@pytest.mark.parametrize("build", [sick, well, wild])
def test_accumulation(build):
    assert verdicts(build, accumulate=4) == reference(build)


@pytest.mark.parametrize("build", [sick, well])
def test_bfloat16_autocast(build):
    assert verdicts(build, dtype=torch.bfloat16) == reference(build)


def test_clipping_hides_no_vanishing():
    assert verdicts(sick, clip=1e-3) == reference(sick)


def test_the_three_trainings_are_what_they_are_called():
    assert [code for code, _, _ in reference(sick)] == ["GW101"]
    assert reference(well) == []
    assert {"GW501", "GW205"} <= {code for code, _, _ in reference(wild)}


def test_where_scaling_truly_changes_training_the_verdict_changes():
    # Without the learning rate to match, a loss of 1e4 blows up what trained well.
    torch.manual_seed(1)
    net, lr, _ = well()
    x = torch.randn(64, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    found = []
    with gradwatch.watch(net, optimizer, on_alert=found.append):
        for _ in range(30):
            optimizer.zero_grad()
            (nn.functional.mse_loss(net(x), x.sum(1, keepdim=True)) * 1e4).backward()
            optimizer.step()

    assert {a.finding.kind for a in found} >= {"non-finite", "exploding"}
