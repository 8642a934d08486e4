"""A few steps of training: sick models fail, sound ones do not, and all is left as it was."""

from __future__ import annotations

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import gradwatch


def data(count=20, rows=32):
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(count, rows, 16, generator=draws)
    return [(one, torch.sin(one.sum(1, keepdim=True))) for one in x]


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def deep(activation=nn.ReLU, layers=6, width=32, spread=1.0):
    sizes = [16, *[width] * layers]
    net = nn.Sequential(
        *(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), activation())),
        nn.Linear(width, 1),
    )
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            module.weight.data *= spread
            nn.init.zeros_(module.bias)
    return net


def setup(make, rate=1e-3, optimizer=torch.optim.Adam):
    def made():
        torch.manual_seed(0)
        net = make()
        return net, optimizer(net.parameters(), rate), mse

    return made


class Cut(nn.Module):
    """Its first layer gets no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 1)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)).detach())


def dead():
    net = deep(layers=2)
    net[2].bias.data -= 20
    return net


SICK = {
    "vanishing": (setup(lambda: deep(nn.Sigmoid, 12, spread=0.3)), "vanishing-depth"),
    "exploding": (setup(lambda: deep(nn.Identity, 20, spread=3.0)), "exploding"),
    "dead": (setup(dead), "dead-units"),
    "disconnected": (setup(Cut), "disconnected"),
    "non-finite after some steps": (setup(lambda: deep(layers=3), 1e4, torch.optim.SGD), "non-finite"),
}


@pytest.mark.parametrize("name", SICK)
def test_what_is_sick_fails(name):
    make, kind = SICK[name]
    with pytest.raises(gradwatch.GradientHealthError, match=kind) as error:
        gradwatch.assert_trains(make, data())
    assert "this does not train well" in str(error.value)
    assert kind in {alert.finding.kind for alert in error.value.alerts}


def test_what_is_sound_passes_and_is_returned():
    run = gradwatch.assert_trains(setup(deep), data())
    assert len(run.snapshots) == 60
    assert run.snapshots[-1].loss < run.snapshots[0].loss
    assert not [a for a in run.alerts if a.worst > gradwatch.Severity.INFO]


def test_an_alert_that_has_cleared_fails_too():
    net, optimizer, _ = SICK["disconnected"][0]()
    count = itertools.count()

    def loss(model, batch):  # whole from step 15 on
        hidden = torch.relu(model.first(batch[0]))
        return nn.functional.mse_loss(model.second(hidden.detach() if next(count) < 15 else hidden), batch[1])

    with pytest.raises(gradwatch.GradientHealthError) as error:
        gradwatch.assert_trains((net, optimizer, loss), data())
    assert [alert.finding.code for alert in error.value.alerts if alert.cleared is not None] == ["GW401"]


def test_one_batch_would_not_have_shown_it():
    make, _ = SICK["non-finite after some steps"]
    model, _, _ = make()
    x, y = data()[0]
    gradwatch.assert_healthy(model, x, loss=lambda given: nn.functional.mse_loss(given, y))


def test_all_is_left_as_it_was():
    model, optimizer, loss = setup(deep)()
    for batch in data(3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    random, gradients = torch.get_rng_state(), [p.grad.clone() for p in model.parameters()]

    def slower(model, batch):
        optimizer.param_groups[0]["lr"] /= 2
        return loss(model, batch)

    gradwatch.assert_trains((model, optimizer, slower), data(), steps=5)
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert str(state) == str(optimizer.state_dict())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    twin, other, _ = copy.deepcopy((model, optimizer, None))
    for net, its in ((model, optimizer), (twin, other)):  # it goes on as if nothing had been
        its.zero_grad()
        loss(net, data()[0]).backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class Module(pl.LightningModule):
    def __init__(self, net, *, manual=False):
        super().__init__()
        self.net, self.automatic_optimization = net, not manual

    def training_step(self, batch, _):
        return {"loss": mse(self.net, batch)}

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]


def test_lightning_modules():
    torch.manual_seed(0)
    assert len(gradwatch.assert_trains(Module(deep()), data(), steps=12).snapshots) == 12
    with pytest.raises(gradwatch.GradientHealthError, match="disconnected"):
        gradwatch.assert_trains(Module(Cut()), data())
    with pytest.raises(TypeError, match="Module steps its optimizers itself"):
        gradwatch.assert_trains(Module(deep(), manual=True), data())


class OwnLoss(nn.Module):
    """Gives its loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.net = deep()

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


def test_a_model_that_gives_its_loss():
    torch.manual_seed(0)
    model = OwnLoss()
    batches = [{"x": x, "labels": y} for x, y in data()]
    run = gradwatch.assert_trains((model, torch.optim.Adam(model.parameters(), 1e-3)), batches, steps=11)
    assert len(run.snapshots) == 11


def test_several_optimizers():
    torch.manual_seed(0)
    net = deep(layers=2)
    pair = [torch.optim.Adam(net[:2].parameters(), 1e-3), torch.optim.SGD(net[2:].parameters(), 1e-3)]
    run = gradwatch.assert_trains((net, pair, mse), data(), steps=11)
    assert {snapshot.optimizer for snapshot in run.snapshots} == {0, 1}


def test_a_declared_need_is_judged():
    def made():
        torch.manual_seed(0)
        net = nn.RNN(2, 8, batch_first=True)
        return (
            net,
            torch.optim.Adam(net.parameters(), 1e-3),
            lambda model, batch: model(batch)[0][:, -1].square().mean(),
        )

    batches = list(torch.randn(5, 16, 60, 2, generator=torch.Generator().manual_seed(2)))
    with pytest.raises(gradwatch.GradientHealthError, match="vanishing-time"):
        gradwatch.assert_trains(made, batches, horizon=50)
    gradwatch.assert_trains(made, batches)


def test_options_reach_the_rules():
    gradwatch.assert_trains(SICK["disconnected"][0], data(), ignore=["GW401"])
    patient = gradwatch.Thresholds(window=100)
    gradwatch.assert_trains(SICK["vanishing"][0], data(), thresholds=patient)
    assert not gradwatch.assert_trains(SICK["dead"][0], data(), detectors=[]).alerts


def test_bad_arguments():
    net = deep()
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(ValueError, match="steps must be a whole number from 1 on, got 0"):
        gradwatch.assert_trains((net, optimizer, mse), data(), steps=0)
    with pytest.raises(TypeError, match=r"setup must be \(model, optimizer\).*got \(Adam, Sequential\)"):
        gradwatch.assert_trains((optimizer, net), data())
    with pytest.raises(TypeError, match=r"setup must be .*got int"):
        gradwatch.assert_trains(3, data())
    with pytest.raises(TypeError, match=r"setup must hold an optimizer beside the model \(Sequential\)"):
        gradwatch.assert_trains(net, data())
    with pytest.raises(TypeError, match="loss must be a function of the model and a batch, got int"):
        gradwatch.assert_trains((net, optimizer, 1), data())
    with pytest.raises(ValueError, match=r"the loss must be a scalar tensor .*, got \(32, 1\)"):
        gradwatch.assert_trains((net, optimizer, lambda model, batch: model(batch[0])), data())
    with pytest.raises(ValueError, match="data must give 60 batches, and gave 20 batches, and cannot"):
        gradwatch.assert_trains((net, optimizer, mse), iter(data()))
    with pytest.raises(ValueError, match="data must give 60 batches, and gave no batch"):
        gradwatch.assert_trains((net, optimizer, mse), [])
    with pytest.raises(ValueError, match="optimizer must step parameters of the model"):
        gradwatch.assert_trains((net, torch.optim.Adam(deep().parameters()), mse), data())
