"""Of a LightningModule: the horizon of the network that its `training_step` calls."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import nn

import gradwatch

B, T, F, H = 6, 60, 4, 8
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(F, H, batch_first=True), nn.Linear(H, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Lit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.steps = Body(), 0

    def training_step(self, batch, _):
        self.steps += 1
        loss = (self.net(batch["series"]) - batch["target"]).square().mean()
        self.log("loss", loss)
        return loss


class OfItself(Lit):
    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return (self(x) - y).square().mean()


class InPieces(Lit):
    def training_step(self, batch, _):
        return self.net.out(self.net.rnn(batch["series"])[0][:, -1]).square().mean()


def data():
    torch.manual_seed(0)
    return torch.randn(B, T, F), torch.randn(B, 1)


def made(kind):
    torch.manual_seed(0)
    return kind()


def test_the_network_is_found_by_the_training_step():
    lit, (x, y) = made(Lit), data()
    before = {name: value.clone() for name, value in lit.state_dict().items()}
    found = gradwatch.horizon(lit, {"series": x, "target": y})
    alone = gradwatch.horizon(lit.net, x)
    assert (found.horizon, found.lag_gain, found.input) == (alone.horizon, alone.lag_gain, "x")
    assert found.beside == ()
    assert [one.module for one in found.chain] == [f"net.{one.module}" for one in alone.chain]
    assert lit.steps == 0
    assert all(torch.equal(before[name], value) for name, value in lit.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in lit.modules())


def test_a_forward_that_takes_a_part_of_the_batch_is_called_as_the_step_does():
    lit, (x, y) = made(OfItself), data()
    assert gradwatch.horizon(lit, (x, y)).lag_gain == gradwatch.horizon(lit, x).lag_gain
    with pytest.raises(gradwatch.GradientHealthError, match="its update gates keep 0"):
        gradwatch.assert_horizon(lit, (x, y), at_least=50)


def test_a_step_that_calls_parts_of_it_says_which():
    x, y = data()
    with pytest.raises(ValueError, match=r"several networks one after the other \(net.rnn, net.out\)"):
        gradwatch.horizon(made(InPieces), {"series": x, "target": y})


def test_what_goes_wrong_elsewhere_is_shown_as_it_is():
    x, _ = data()
    with pytest.raises(RuntimeError, match=r"input\.size"):
        gradwatch.horizon(Body(), x[..., :2])
