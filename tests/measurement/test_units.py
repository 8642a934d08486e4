"""What units give, and how far apart the weights of a layer are, against all of its entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.measurement.units import far_smaller


@pytest.mark.parametrize("shape", [(40, 50), (300, 401), (64, 8, 3), (4096, 64)])
@pytest.mark.parametrize("masked", [0.0, 0.1, 0.24, 0.7])
def test_the_share_of_weights_that_are_far_smaller_is_that_of_all_entries(shape, masked):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[torch.rand(shape) < masked] = -1e4
    weight.flatten()[5::2] = 0.0
    weight[..., 0] = 10.0  # by which nobody may go alone
    entries = weight.double()
    few = entries.abs() < 0.005 * entries.square().mean().sqrt()
    truth = (few & (entries != 0)).sum() / (entries != 0).sum()

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        assert far_smaller([weight.to(dtype)]).dtype is torch.float32
        assert far_smaller([weight.to(dtype)]).item() == pytest.approx(truth.item(), abs=0.1)


def test_weights_of_one_size_are_never_far_smaller_and_those_of_a_module_are_taken_together():
    torch.manual_seed(0)
    transitions = 0.1 * torch.randn(20, 20)
    transitions[torch.rand(20, 20) < 0.05] = -1e4

    assert far_smaller([torch.randn(20, 200) / 14, transitions]).item() > 0.9
    assert far_smaller([torch.randn(3000, 400)]).item() < 0.02
    for plain in (torch.ones(8, 8), torch.zeros(8, 8), torch.eye(32)):
        assert far_smaller([plain]).item() == 0.0 + (not plain.any())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float16, torch.float8_e4m3fn])
def test_it_is_known_of_weights_of_any_format(dtype):
    assert far_smaller([torch.ones(8, 8).to(dtype)]).item() == 0.0


class Between(nn.Module):
    """A ReLU that is a function, between functions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 8)
        with torch.no_grad():
            self.last.bias.copy_(torch.tensor([-99.0] * 5 + [9.0] * 3))

    def forward(self, x):
        h = torch.relu(self.last(torch.relu(self.first(x)) * 2))
        return h @ h.T


def test_units_behind_a_function_between_functions_are_counted():
    model, seen = Between(), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    with gradwatch.watch(model, optimizer, sinks=[seen.append], probe_every_n_steps=1, on_alert=lambda _: None):
        for _ in range(6):
            x = torch.randn(32, 6)
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()
    (last,) = [a for a in seen[-1].snapshot.activations if a.module == "last"]
    truth = (torch.relu(model.last(torch.relu(model.first(x)) * 2)) == 0).all(0).float().mean().item()
    assert (last.dead, last.units, last.function) == (truth, 8, "relu") == (5 / 8, 8, "relu")
    (first,) = [a for a in seen[-1].snapshot.activations if a.module == "first"]
    assert (first.units, first.function) == (12, "relu")


@pytest.mark.parametrize(
    "does",
    [
        lambda h, w: (0.9 * torch.relu(h) + 0.1 * h) @ w,  # a leaky ReLU by hand
        lambda h, w: h @ w + torch.relu(h.abs() - 99).mean(),  # a penalty
        lambda h, w: torch.relu(h - 99).mean() + h @ w,
    ],
)
def test_a_relu_past_which_the_units_go_too_makes_none_dead(does):
    class Around(Between):
        def forward(self, x):
            return does(self.last(torch.relu(self.first(x))), self.first.weight)

    model, seen = Around(), []
    model.first, model.last = nn.Linear(6, 8), nn.Linear(8, 8)
    with torch.no_grad():
        model.last.bias.fill_(-50.0)
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    with gradwatch.watch(model, optimizer, sinks=[seen.append], probe_every_n_steps=1, on_alert=lambda _: None):
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(32, 6)).mean().backward()
            optimizer.step()
    assert not [a for r in seen for a in r.snapshot.activations or () if a.module == "last" and a.dead]
