"""Weights that a model computes with and does not own: found, and what others own or step left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from loops import Watched
from torch import nn

from gradwatch import Severity


def quiet(_alert):
    """Take an alert, and say nothing."""


def alerts(watched):
    """Every alert by code, in its last state."""
    return {a.finding.code: a for report in watched.reports for a in (*report.open, *report.cleared)}


def run(model, loss_of, *, steps=40, optimizers=(), **options):
    """Train by an optimizer that is watched and others that are not; return the watcher and the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watched = Watched(model, optimizer, on_alert=quiet, **options)
    losses = []
    for _ in range(steps):
        for each in (optimizer, *optimizers):
            each.zero_grad()
        loss = loss_of(model)
        watched.watcher.record(loss)
        loss.backward()
        for each in (optimizer, *optimizers):
            each.step()
        losses.append(loss.item())
    watched.watcher.close()
    return watched, losses


def whole(model):
    x = torch.randn(6, 4)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


class Stack(nn.Module):
    """Layers in what `container` makes of them, and a head that is registered."""

    def __init__(self, container):
        super().__init__()
        self.layers = container([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        for layer in self.layers.values() if isinstance(self.layers, dict) else self.layers:
            x = layer(x).tanh()
        return self.head(x)


@pytest.mark.parametrize("container", [list, lambda layers: dict(enumerate(layers))], ids=["list", "dict"])
def test_modules_in_a_plain_container_are_a_warning_that_counts_them(container):
    torch.manual_seed(0)
    model = Stack(container)
    layers = list(model.layers.values() if isinstance(model.layers, dict) else model.layers)
    before = copy.deepcopy(layers)
    watched, _ = run(model, whole)

    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, old.weight)
        assert layer.weight.grad is not None
    (alert,) = alerts(watched).values()
    assert (alert.finding.code, alert.severity, alert.finding.place) == ("GW906", Severity.WARNING, "")
    assert alert.finding.evidence["tensors"] == 4
    assert "4 tensors of Linear" in alert.message
    assert "(4, 4), (4,)" in alert.message
    assert "nn.ModuleList" in alert.remedy


def test_the_remedy_moves_them_and_is_silent():
    torch.manual_seed(0)
    model = Stack(nn.ModuleList)
    before = model.layers[0].weight.detach().clone()
    watched, _ = run(model, whole)

    assert not torch.equal(model.layers[0].weight, before)
    assert alerts(watched) == {}


class Scaled(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.body, self.made = nn.Linear(4, 1), make

    def forward(self, x):
        return self.body(x) + x @ self.made()


def kept(tensor):
    return lambda: tensor


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (kept(torch.ones(4, 1, requires_grad=True)), "no nn.Parameter"),
        (kept(nn.Parameter(torch.ones(4, 1, dtype=torch.float64)).to(torch.float32)), "before it was assigned"),
        (lambda: nn.Parameter(torch.ones(4, 1)), "are gone after it"),
        (lambda: nn.Linear(1, 4).weight, "are gone after it"),
    ],
    ids=["a tensor", "made of a parameter", "made in forward", "a layer made in forward"],
)
def test_weights_that_are_no_parameters_are_a_warning_with_the_reason(make, cause):
    torch.manual_seed(0)
    watched, _ = run(Scaled(make), whole)

    alert = alerts(watched)["GW906"]
    assert alert.severity == Severity.WARNING
    assert alert.message.startswith("1 tensor")
    assert "(4, 1)" in alert.message
    assert cause in alert.cause


def critic_of_a_generator():
    """The other network's weights stand before what the model takes; the loss goes through both."""
    generator = nn.Linear(4, 4)
    return nn.Linear(4, 1), lambda m: m(generator(torch.randn(6, 4))).square().mean(), ()


def adversarial():
    """The input itself is differentiated by, and stays the same."""
    x = nn.Parameter(torch.randn(6, 4))
    return nn.Linear(4, 1), lambda m: m(x).square().mean(), ()


def prompts():
    """Learned by an optimizer that is not watched."""
    prompt = nn.Parameter(torch.randn(4, 1))
    return Scaled(kept(prompt)), whole, (torch.optim.SGD([prompt], lr=0.05),)


def frozen():
    model = Stack(list)
    for layer in model.layers:
        layer.requires_grad_(False)
    return model, whole, ()


def collocation():
    """Coordinates that a model holds, differentiates by, and does not train."""
    x = torch.randn(6, 4, requires_grad=True)
    return nn.Sequential(nn.Linear(4, 8), Scaled8(x), nn.Linear(8, 1)), lambda m: m(x.detach()).square().mean(), ()


class Scaled8(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.kept = [x]

    def forward(self, hidden):
        return hidden.tanh() + self.kept[0].sum(1, keepdim=True)


def functional():
    """The parameters are the loop's own, and fast weights are no leaves."""
    model = nn.Linear(4, 1)

    def loss_of(module):
        x = torch.randn(6, 4)
        first = module(x).square().mean()
        grads = torch.autograd.grad(first, list(module.parameters()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(module.named_parameters(), grads, strict=True)}
        return torch.func.functional_call(module, fast, (x,)).square().mean()

    return model, loss_of, ()


def unused():
    """A leaf that only makes a reentrant checkpoint work, and gets nothing but zeros."""
    dummy = torch.ones(1, requires_grad=True)
    return Scaled(lambda: dummy * 0 + torch.ones(4, 1)), whole, ()


@pytest.mark.parametrize(
    "healthy", [critic_of_a_generator, adversarial, prompts, frozen, collocation, functional, unused]
)
def test_what_others_own_step_or_differentiate_by_is_not_accused(healthy):
    torch.manual_seed(0)
    model, loss_of, optimizers = healthy()
    watched, _ = run(model, loss_of, optimizers=optimizers)

    assert "GW906" not in alerts(watched)


def test_a_teacher_in_evaluation_mode_is_information():
    torch.manual_seed(0)
    model = Stack(list)
    for layer in model.layers:
        layer.eval()
    watched, _ = run(model, whole)

    assert alerts(watched)["GW906"].severity == Severity.INFO


def test_nothing_of_it_changes_the_training():
    losses = []
    for watch in (True, False):
        torch.manual_seed(0)
        model = Stack(list)
        losses.append(run(model, whole, probe_every_n_steps=1 if watch else 1000)[1])

    assert losses[0] == losses[1]
