"""Losses that do not change: compared with themselves, by rounding, by products of next to nothing, by a slow rate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch import Severity


def said_of(model, loss_of, *, steps=40, optimizer=None, told=lambda loss: loss):
    """Train; return by code the worst alert that was open."""
    found, optimizer = {}, optimizer or torch.optim.Adam(model.parameters(), 3e-3)

    def note(report):
        for alert in report.open:
            known = found.get(alert.finding.code)
            if known is None or alert.severity > known.severity:
                found[alert.finding.code] = alert

    torch.manual_seed(1)
    with gradwatch.watch(model, optimizer, sinks=[note], on_alert=lambda _: None) as watcher:
        for _ in range(steps):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            watcher.record(told(loss.detach()))
            optimizer.step()
    return found


def net(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, outputs))


def preferred(reference):
    """Prefer some rows over others, relative to what a reference gives them."""

    def loss_of(model):
        x, other = torch.randn(2, 32, 8)
        with torch.no_grad():
            before = reference(x) - reference(other)
        sign = (x[:, :1] > other[:, :1]).float() * 2 - 1
        return -functional.logsigmoid(sign * (model(x) - model(other) - before)).mean()

    return loss_of


def test_a_loss_whose_reference_moves_along_is_told():
    model = net()
    alert = said_of(model, preferred(model))["GW803"]
    assert (alert.severity, alert.finding.place, alert.began) == (Severity.WARNING, "", 19)
    assert "the loss has been 0.693147 at every batch since step 0" in alert.message
    assert "a reference" in alert.cause
    assert "copy.deepcopy(model)" in alert.remedy


def test_one_whose_reference_is_a_copy_is_not():
    model = net()
    found = said_of(model, preferred(copy.deepcopy(model).requires_grad_(requires_grad=False)))
    assert not {"GW803", "GW402"} & found.keys()


@pytest.mark.parametrize("terms", [1, 3])
def test_terms_that_are_divided_by_their_own_value_are_not(terms):
    model = net()

    def loss_of(model):
        x = torch.randn(32, 8)
        losses = [(model(x) - x[:, :1] * (k + 1)).square().mean() for k in range(terms)]
        return sum(loss / loss.detach() for loss in losses)

    assert not {"GW803", "GW402"} & said_of(model, loss_of).keys()


def test_a_surrogate_that_is_zero_by_design_is_not():
    model = net(4)

    def loss_of(model):
        x, gain = torch.randn(32, 8), torch.randn(32)
        log = model(x).log_softmax(1)[:, 0]
        gain = gain - gain.mean()
        return -((log - log.detach()) * gain).sum()  # 0, and its gradient is not

    assert not {"GW803", "GW402"} & said_of(model, loss_of).keys()


@pytest.mark.parametrize(("weights", "constant"), [((1.0, 0.3), 1.3), ((0.25, 0.25, 0.25), 0.75 + 0.011)])
def test_a_constant_that_is_made_by_design_is_information(weights, constant):
    model = net()
    offset = constant - sum(weights)

    def loss_of(model):
        x = torch.randn(32, 8)
        losses = [(model(x) - x[:, :1] * (k + 1)).square().mean() for k in range(len(weights))]
        return sum(w * loss / loss.detach() for w, loss in zip(weights, losses, strict=True)) + offset

    assert said_of(model, loss_of)["GW803"].severity == Severity.INFO


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_in_few_digits_may_fall_and_nobody_sees_it(dtype):
    model = net()

    def loss_of(model):
        x = torch.randn(256, 8)
        return functional.softplus(-0.01 * model(x) * x[:, :1].sign()).mean()

    assert not {"GW803", "GW402"} & said_of(model, loss_of, told=lambda loss: loss.to(dtype)).keys()


# --- rounding ---


def each_alone(model, dtype=torch.float32):
    """Return the likelihood that each row is chosen from itself alone."""
    scores = model(torch.randn(20, 8, dtype=dtype))
    return sum(-(score - score.logcumsumexp(0)).sum() / 20 for score in scores)


def test_a_loss_of_zero_with_gradients_of_rounding_is_told():
    exact, rounded = net().double(), net()
    each_alone(exact, torch.float64).backward()
    each_alone(rounded).backward()
    largest = [max(float(p.grad.abs().max()) for p in model.parameters()) for model in (exact, rounded)]
    assert largest[0] < 1e-14
    assert largest[1] > 1e-10
    alert = said_of(net(), each_alone)["GW402"]
    assert (alert.severity, alert.finding.place) == (Severity.WARNING, "")
    assert "the loss has been 0 at every batch" in alert.message


# --- next to nothing, and slow ---


class Tastes(nn.Module):
    """The product of two embeddings."""

    def __init__(self, std):
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items = nn.Embedding(40, 8), nn.Embedding(30, 8)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=std)

    def forward(self, users, items):
        return (self.users(users) * self.items(items)).sum(-1)


def ranked(model):
    user, pair = torch.randint(40, (128, 1)), torch.randint(30, (128, 2)).sort(1).values
    scores = model(user, pair)
    return -functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean()


def test_gradients_that_are_small_and_true_are_no_rounding():
    model = Tastes(1e-3)
    found = said_of(model, ranked, optimizer=torch.optim.SGD(model.parameters(), 1.0))
    assert found["GW102"].severity == Severity.WARNING
    assert "GW402" not in found
    healthy = Tastes(0.3)
    assert (
        not {"GW102", "GW402"} & said_of(healthy, ranked, optimizer=torch.optim.SGD(healthy.parameters(), 1.0)).keys()
    )


@pytest.mark.parametrize(("rate", "slow"), [(3e-6, True), (3e-3, False)])
def test_a_loss_that_stands_still_for_a_slow_rate_is_told(rate, slow):
    def loss_of(model):
        return (model(torch.randn(32, 8)) - torch.randn(32, 1)).square().mean()  # which nobody learns, at whatever rate

    model = net()
    found = said_of(model, loss_of, steps=260, optimizer=torch.optim.Adam(model.parameters(), rate))
    alert = found["GW801"]
    assert alert.severity == Severity.INFO
    assert ("learning rate is 3e-06" in alert.cause) is slow
    assert ("raise the learning rate tenfold" in alert.remedy) is slow


def test_a_loss_that_falls_slowly_does_not_stand_still():
    x = torch.randn(64, 8)

    def loss_of(model):
        return (model(x) - x[:, :1]).square().mean()

    model = net()
    assert "GW801" not in said_of(model, loss_of, steps=260, optimizer=torch.optim.Adam(model.parameters(), 2e-5))
