"""How the gradient comes to layers in question, against the graph that is there and float64 autograd."""

from __future__ import annotations

import weakref

import pytest
import torch
from models import Model
from torch import nn

import gradwatch


def flows(model, take=lambda out: out):
    """Return, by layer, what a step tells at which every layer is in question; and what was drawn."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), {}
    x = torch.randn(16, 8, dtype=torch.float64)

    def hear(report):
        found.update({f.layer: f for f in report.snapshot.flows or ()})

    with gradwatch.watch(model, optimizer, sinks=[hear], every_n_steps=1, probe_every_n_steps=1):
        for _ in range(2):
            optimizer.zero_grad()
            take(model(x)).square().sum().backward()
            optimizer.step()
    return found, x


class Block(nn.Module):
    """Holds a layer, weights that multiply, and some that are added to, or put beside, what the layer gives."""

    def __init__(self):
        super().__init__()
        self.layer, self.inner = nn.Linear(8, 16), nn.Linear(16, 16)
        self.gate, self.first = Gate(), Token()

    def forward(self, x):
        h = self.layer(x)
        return h + self.first(self.gate(self.inner(h)))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.within = nn.Parameter(torch.randn(1, 16)), nn.Linear(16, 16)

    def forward(self, h):
        return self.within(h).sigmoid() * self.weight.expand(len(h), -1)


class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.within = nn.Parameter(torch.randn(16)), nn.Linear(16, 16)

    def forward(self, h):
        return self.within(h) + self.token


def block():
    torch.manual_seed(0)
    return Model(lambda m, x: m.last(m.block(x)), block=Block(), last=nn.LayerNorm(16)).double()


def test_of_each_layer_what_it_takes_and_whether_that_is_a_sum():
    found, _ = flows(block())

    assert {name: f.source for name, f in found.items()} == {
        "block.inner": "block.layer",
        "block.gate": "block.gate.within",
        "block.gate.within": "block.inner",
        "block.first": "block.first.within",
        "block.first.within": "block.gate",
        "last": "block.layer",
    }
    assert {name for name, f in found.items() if f.joined} == {"last"}
    assert {name for name, f in found.items() if f.added} == {"block.first"}


def test_what_comes_through_weights_of_a_module_that_holds_layers_is_that_of_autograd():
    model = block()
    found, x = flows(model)
    kept = {}

    def keep(module, _args, out):
        kept[module] = out
        out.retain_grad()

    for module in model.modules():
        module.register_forward_hook(keep)
    model(x).square().sum().backward()
    gate = model.block.gate
    share = gate.weight.norm() * kept[gate].grad.norm() / kept[gate.within].grad.norm()

    assert found["block.gate"].through == pytest.approx(share.item(), rel=1e-12)
    assert found["block.first"].through is None


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.within = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, x):
        return x * self.weight


def test_what_scales_the_input_is_fed_though_its_first_meeting_is_behind_it():
    torch.manual_seed(0)
    model = Model(lambda m, x: m.last(m.scale(x)), scale=Scale(), last=nn.Linear(8, 8)).double()
    found, _ = flows(model)

    assert "scale" not in found or found["scale"].fed
    assert found["last"].source == "scale"


@pytest.mark.parametrize("taken", [0, 1, slice(None)])
def test_what_is_put_beside_something_else_knows_that_the_gradient_came_to_the_whole(taken):
    torch.manual_seed(0)
    model = Model(
        lambda m, x: torch.stack([m.one(x).view(16, 2, 4), m.other(x).relu().view(16, 2, 4)]),
        one=nn.Linear(8, 8),
        other=nn.Linear(8, 8),
    ).double()
    found, x = flows(model, lambda out: out[taken])
    truth = 2 * model(x)[taken].norm()

    assert found["one"].whole == pytest.approx(truth.item(), rel=1e-12)
    assert "other" not in found  # a ReLU lies between


class Mark:
    """Lies at a node, and is gone with it."""


def test_no_node_is_kept():
    model = block()
    optimizer, marks = torch.optim.SGD(model.parameters(), lr=0.0), []

    def mark(_module, _args, out):
        out.grad_fn.metadata["mark"] = one = Mark()
        marks.append(weakref.ref(one))

    with gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=1):
        for _ in range(2):
            model(torch.randn(16, 8, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        model.block.layer.register_forward_hook(mark)
        model(torch.randn(16, 8, dtype=torch.float64))
        assert [ref() for ref in marks] == [None]


class Asks(nn.Module):
    """Attends with a query of its own, as pooling heads do; its weights are in one matrix of torch's attention."""

    def __init__(self):
        super().__init__()
        self.query, self.attention = nn.Parameter(torch.randn(1, 1, 8)), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, h):
        return self.attention(self.query.expand(len(h), -1, -1), h, h)[0][:, 0]


def test_a_query_that_only_meets_weights_is_fed_by_nothing_and_attention_by_what_it_attends_to():
    torch.manual_seed(0)
    model = Model(
        lambda m, x: m.last(m.asks(m.first(x).view(16, 2, 8))),
        first=nn.Linear(8, 16),
        asks=Asks(),
        last=nn.Linear(8, 8),
    ).double()
    found, _ = flows(model)

    assert (found["asks"].source, found["asks"].fed) == (None, False)
    attention = found["asks.attention"]
    assert (attention.source, attention.fed, attention.added) == ("first", True, False)
    assert attention.through > 0
