"""Weights that a model applies without calling their module."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch import Severity


class ByHand(nn.Module):
    """Layers whose weights `apply` uses; `take` makes of a weight what is applied, in the layer `at` alone."""

    def __init__(self, layers, activation, take=None, at=0, cut=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.spare, self.activation, self.take, self.at, self.cut = nn.Linear(16, 16), activation, take, at, cut

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            weight, bias = layer.weight, layer.bias
            if self.take is not None and i == self.at:
                weight, bias = self.take(weight), self.take(bias)
            x = self.activation(functional.linear(x, weight, bias))
            x = x.detach() if i == self.cut else x
        assert self.spare.weight.shape == (16, 16)  # looked at, and nothing is made of it
        assert self.spare.weight.detach().data_ptr()
        return x


def found(report):
    return {(a.finding.code, a.finding.place, a.severity): a for a in report.open}


@pytest.mark.parametrize("take", [lambda p: p.data, torch.Tensor.detach, lambda p: p.detach().clone()])
@pytest.mark.parametrize("at", [0, 2])
def test_one_that_is_passed_by_is_an_error_in_a_check(take, at):
    torch.manual_seed(0)
    model, x = ByHand(4, torch.relu, take, at), torch.randn(8, 16)
    state = torch.random.get_rng_state()

    report = gradwatch.check(model, x)

    assert set(found(report)) == {("GW401", f"layers.{at}", Severity.ERROR)}
    assert {p.name: a for p, a in zip(report.snapshot.model.parameters, report.snapshot.absent, strict=True) if a} == {
        f"layers.{at}.weight": "disconnected",
        f"layers.{at}.bias": "disconnected",
        "spare.weight": "unused",
        "spare.bias": "unused",
    }
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_those_before_a_cut_are_one_error_and_a_sound_model_is_sound():
    torch.manual_seed(0)
    x = torch.randn(8, 16)

    (alert,) = gradwatch.check(ByHand(4, torch.relu, cut=1), x).open
    assert (alert.finding.code, alert.finding.place, alert.finding.names["last"]) == ("GW401", "layers.0", "layers.1")
    assert gradwatch.check(ByHand(4, torch.relu), x).open == ()


def test_they_vanish_by_depth_as_others_do():
    torch.manual_seed(0)
    model, said = ByHand(14, torch.sigmoid), {}

    def hear(report):
        said.update({(a.finding.code, a.finding.place): a.severity for a in report.open})

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with gradwatch.watch(model, optimizer, sinks=[hear], on_alert=lambda _: None) as watcher:
        for _ in range(40):
            optimizer.zero_grad()
            x = torch.randn(16, 16)
            loss = (model(x) - x).square().mean()
            watcher.record(loss)
            loss.backward()
            optimizer.step()

    assert said == {("GW101", "layers.0"): Severity.WARNING}
