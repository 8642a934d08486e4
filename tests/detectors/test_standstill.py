"""Layers that are saturated all over (GW105), and those that had a gradient and have none any more (GW908)."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch import Severity


def trained(model, batch, *, steps=150, parameters=None, after=lambda _: None):
    optimizer = torch.optim.Adam(list(model.parameters()) if parameters is None else parameters, 3e-3)
    with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
        for step in range(steps):
            x, y = batch(step)
            loss = functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watcher.record(loss)
            optimizer.step()
            after(step)
    return [a for a in watcher.report.open if a.severity > Severity.INFO]


def clients(*, standardized, learnable=True):
    """Return batches of six features, each in a unit of its own."""
    middle, spread = torch.tensor([45.0, 42e3, 18e3, 36.0, 640.0, 7.0]), torch.tensor([12.0, 9e3, 4e3, 14.0, 60.0, 2.0])

    def batch(step):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        y = x[:, :1].sign() if learnable else torch.randn(32, 1, generator=torch.Generator().manual_seed(-step - 1))
        return x if standardized else middle + spread * x, y

    return batch


def tanh_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def test_a_layer_that_raw_units_saturate_is_told_with_its_input():
    (alert,) = [a for a in trained(tanh_network(), clients(standardized=False)) if a.finding.code == "GW105"]
    assert (alert.severity, alert.finding.place) == (Severity.WARNING, "0")
    assert "saturated: its input is off-centre" in alert.cause
    assert alert.remedy.startswith("standardize the input of 0, feature by feature")


def test_standardized_it_is_not():
    assert trained(tanh_network(), clients(standardized=True)) == []


def test_a_task_that_cannot_be_learned_is_no_saturation():
    assert not [
        a for a in trained(tanh_network(), clients(standardized=True, learnable=False)) if a.finding.code == "GW105"
    ]


class Adapted(nn.Module):
    """A frozen layer and what is added to it, which can be switched off."""

    def __init__(self):
        super().__init__()
        self.base, self.add, self.on = nn.Linear(8, 8).requires_grad_(requires_grad=False), nn.Linear(8, 8), True

    def forward(self, x):
        return self.base(x) + self.add(x) if self.on else self.base(x)


def adapters(off_at, back_at=10**9, *, frozen=False):
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), nn.Tanh(), Adapted(), nn.Tanh(), nn.Linear(8, 1))

    def after(step):
        if step in (off_at, back_at):
            for module in (model[0], model[2]):
                module.on = step == back_at
                if frozen:
                    module.add.requires_grad_(requires_grad=module.on)

    def batch(step):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        return x, x[:, :1]

    mine = [p for p in model.parameters() if p.requires_grad]
    return [a for a in trained(model, batch, parameters=mine, after=after) if a.finding.code == "GW908"]


def test_adapters_that_are_switched_off_are_told():
    (alert,) = adapters(60)
    assert (alert.severity, alert.finding.kind) == (Severity.WARNING, "disconnected")
    assert alert.message.startswith("2 of the 3 weights that Adam steps had a gradient, and have had none")
    assert alert.message.endswith("since 61: 0.add, 2.add")
    assert alert.began == 61 + 50 - 1


@pytest.mark.parametrize("options", [{"off_at": 10**9}, {"off_at": 60, "back_at": 90}, {"off_at": 60, "frozen": True}])
def test_those_that_stay_or_come_back_or_are_frozen_are_not(options):
    assert adapters(**options) == []


# --- layers that steps leave where they are ---


def by_depth(factor, *, at_once=False, steps=80, learnable=True):
    """Train with a learning rate for each layer; the upper ones' falls by a factor at every step, or from the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW([{"params": m.parameters(), "lr": 5e-2} for m in model[::2]], weight_decay=0.0)
    for group in optimizer.param_groups[:2]:
        group["lr"] *= factor if at_once else 1.0
    weights = [model[0].weight.detach().clone()]
    with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
        for step in range(steps):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            y = x[:, :1] if learnable else torch.randn(32, 1, generator=torch.Generator().manual_seed(-step - 1))
            loss = functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watcher.record(loss)
            optimizer.step()
            for group in optimizer.param_groups[:2]:
                group["lr"] *= 1.0 if at_once else factor
            weights.append(model[0].weight.detach().clone())
    still = torch.equal(weights[-1], weights[-10])
    return still, [(a.finding.code, a.finding.place, a.worst) for a in watcher.report.open if a.finding.code == "GW909"]


def test_a_decay_by_depth_that_is_multiplied_in_at_every_step_is_told():
    still, found = by_depth(0.5)
    assert still
    assert found == [("GW909", "0", Severity.WARNING)]


def test_a_rate_of_0_from_the_start_may_be_meant():
    assert by_depth(0.0, at_once=True) == (True, [("GW909", "0", Severity.INFO)])
    assert by_depth(0.0, at_once=True, learnable=False) == (True, [("GW909", "0", Severity.INFO)])


@pytest.mark.parametrize("factor", [1.0, 0.95])
def test_rates_that_differ_and_fall_are_not(factor):
    assert by_depth(factor) == (False, [])
    assert by_depth(0.1, at_once=True) == (False, [])


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_weights_that_are_thrown_to_nan_are_not_left_where_they_are(spoilt):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
        for step in range(50):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            functional.mse_loss(model(x), x[:, :1]).backward()
            if step >= 20:
                for module in (model[0], model[2]):
                    module.weight.grad.fill_(spoilt)
                model[4].weight.grad.zero_()  # as behind nan_to_num: momentum alone goes on moving it
            optimizer.step()
    told = {a.finding.code for a in watcher.report.open}
    assert "GW501" in told
    assert "GW909" not in told
