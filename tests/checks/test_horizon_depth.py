"""Where on its way through a model a horizon is won and lost: what enters each module, against its own Jacobian."""

from __future__ import annotations

import pytest
import torch
from models import Loop, Model
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import gradwatch
from gradwatch.timesteps import chain, input_gain
from gradwatch.values.chain import limiting, narrowed_before
from gradwatch.values.sequences import horizon_of

B, T, F, H = 6, 60, 4, 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def data(*shape):
    return torch.randn(*shape or (B, T, F), dtype=torch.float64)


def built(does, **modules):
    return Model(does, **modules).double()


def truth(rest, value, time=1):
    """Return the horizon of what the rest of a model makes of a value, by the whole Jacobian."""
    leaf = value.detach().clone().requires_grad_()
    squares = torch.zeros(value.shape[time], dtype=torch.float64)
    for column in rest(leaf).flatten(1).unbind(1):
        (gradient,) = torch.autograd.grad(column.sum(), leaf, retain_graph=True)
        squares += gradient.movedim(time, 0).flatten(1).square().sum(1)
    return horizon_of(squares.sqrt().flip(0).tolist()).timesteps


def places(stats):
    return {one.module: one.horizon for one in stats.chain}


def holds(stats, name, horizon):
    (one,) = (one for one in stats.chain if one.module == name)
    low, high = one.interval
    assert low <= horizon <= high


def test_a_convolution_before_a_recurrent_network_has_its_own_share():
    net = built(
        lambda net, x: net.out(net.rnn(net.conv(x.mT).mT)[0][:, -1]),
        conv=nn.Conv1d(F, H, 9),
        rnn=nn.RNN(H, H, batch_first=True),
        out=nn.Linear(H, 1),
    )
    x = data()
    stats = gradwatch.horizon(net, x)
    assert list(places(stats)) == ["conv", "rnn"]
    holds(stats, "conv", truth(net, x))
    holds(stats, "rnn", truth(lambda y: net.out(net.rnn(y)[0][:, -1]), net.conv(x.mT).mT))
    assert stats.chain[0].lag_gain == stats.lag_gain
    assert [one.clock for one in stats.chain] == [1, 1]  # it is shorter, and on the same clock
    assert stats.horizon == stats.chain[1].horizon + 8


def test_behind_a_stride_there_is_another_clock():
    net = built(
        lambda net, x: net.out(net.rnn(net.conv(x.mT).mT)[0][:, -1]),
        conv=nn.Conv1d(F, H, 3, stride=3),
        rnn=nn.GRU(H, H, batch_first=True),
        out=nn.Linear(H, 1),
    )
    x = data()
    stats = gradwatch.horizon(net, x)
    (rnn,) = stats.chain  # a window that goes on to where the next begins sees no farther
    assert (rnn.module, rnn.clock, rnn.length) == ("rnn", 3, T // 3)
    holds(stats, "rnn", truth(lambda y: net.out(net.rnn(y)[0][:, -1]), net.conv(x.mT).mT))
    assert abs(stats.horizon - 3 * rnn.horizon) <= 3


def test_stacked_networks_add_up_and_what_mixes_nothing_is_left_out():
    class Scaled(nn.Module):
        def forward(self, x):
            return 2 * x

    net = built(
        lambda net, x: net.out(net.upper(net.scaled(net.norm(net.lower(x)[0])))[0][:, -1]),
        lower=nn.LSTM(F, H, batch_first=True),
        norm=nn.LayerNorm(H),
        scaled=Scaled(),
        upper=nn.GRU(H, H, batch_first=True),
        out=nn.Linear(H, 1),
    )
    x = data()
    stats = gradwatch.horizon(net, x)
    assert list(places(stats)) == ["lower", "upper"]
    between = net.scaled(net.norm(net.lower(x)[0]))
    holds(stats, "upper", truth(lambda y: net.out(net.upper(y)[0][:, -1]), between))
    assert stats.horizon > stats.chain[1].horizon


class Block(nn.Module):
    """Attention and a network on each timestep, each beside what it takes."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.LayerNorm(H), nn.LayerNorm(H)
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, H))

    def forward(self, x):
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.after(x))


@pytest.mark.parametrize("layers", [2, 20])  # the dimensions of 20 are not followed to their end
def test_attention_is_where_a_transformer_sees_far(layers):
    net = built(
        lambda net, x: net.out(net.blocks(net.into(x))[:, -1]),
        into=nn.Linear(F, H),
        blocks=nn.Sequential(*(Block() for _ in range(layers))),
        out=nn.Linear(H, 1),
    )
    stats = gradwatch.horizon(net, data())
    last = f"blocks.{layers - 1}"
    assert stats.horizon == T
    assert stats.chain[-1].module in (last, f"{last}.attention")
    assert stats.chain[-1].horizon == T
    assert limiting(stats) == stats.chain[-1].module


def test_cells_in_a_loop_are_places_whose_timesteps_are_calls():
    class Cell(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.of, self.on = nn.Linear(inputs, H), nn.Linear(H, H)

        def forward(self, x, h):
            return torch.tanh(self.of(x) + self.on(h))

    def loop(net, x, *, kept=None):
        h = g = x.new_zeros(len(x), H)
        for t in range(x.shape[1]):
            h = net.lower(x[:, t], h)
            if kept is not None:
                kept.append(h)
            g = net.upper(h, g)
        return net.out(g)

    def upper(net, states):
        g = states.new_zeros(len(states), H)
        for t in range(states.shape[1]):
            g = net.upper(states[:, t], g)
        return net.out(g)

    net = built(loop, lower=Cell(F), upper=Cell(H), out=nn.Linear(H, 1))
    net.upper.on.weight.data = 0.8 * torch.eye(H, dtype=torch.float64)
    x = data()
    stats = gradwatch.horizon(net, x)
    assert list(places(stats)) == ["lower", "upper"]
    # The state of the lower cell goes on to its next call too, so all of what is made of it counts.
    leaf = x.clone().requires_grad_()
    kept: list[torch.Tensor] = []
    gradients = torch.autograd.grad(loop(net, leaf, kept=kept).sum(), kept)
    total = [float(g.square().sum().sqrt()) for g in reversed(gradients)]
    holds(stats, "upper", horizon_of(total).timesteps)
    assert stats.chain[1].horizon >= truth(lambda s: upper(net, s), torch.stack(kept, 1)) - 1


def test_only_the_way_of_the_models_own_input_is_shown():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = nn.Conv1d(F, H, 4), nn.GRU(F, H, batch_first=True)
            self.out = nn.Linear(H, 1)

        def forward(self, target, known):
            return self.out(self.near(target.mT)[..., -1] + self.far(known)[0][:, -1])

    stats = gradwatch.horizon(Two().double(), (data(), data(B, 2 * T, F)))
    assert stats.input == "target"
    assert list(places(stats)) == ["near"]


def test_packed_timesteps_are_a_place():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.rnn, self.out = nn.Linear(F, H), nn.RNN(H, H, batch_first=True), nn.Linear(H, 1)

        def forward(self, x, lengths):
            return self.out(self.rnn(pack_padded_sequence(self.into(x), lengths, batch_first=True))[1][-1])

    net = Packed().double()
    stats = gradwatch.horizon(net, (data(), torch.tensor([T, 50, 40, 30, 20, 10])))
    assert list(places(stats)) == ["rnn"]
    assert abs(stats.chain[0].horizon - stats.horizon) <= 1


class Gated(nn.Module):
    """Adds the newest value to each timestep, and hardly any of its own."""

    def forward(self, y):
        return 1e-5 * y + y[:, -1:] * torch.ones_like(y)


def narrowed():
    net = built(
        lambda net, y: net.head(net.rnn(net.gate(net.into(y)))[0][:, -1]),
        into=nn.Sequential(nn.Linear(1, H), nn.Tanh()),
        gate=Gated(),
        rnn=nn.GRU(H, 4, batch_first=True),
        head=nn.Linear(4, 1),
    )
    net.rnn.bias_ih_l0.data[4:8] = 9.0  # it keeps everything
    return net


def test_where_a_horizon_is_narrowed_both_modules_are_named():
    net, y = narrowed(), data(B, T, 1)
    stats = gradwatch.horizon(net, y)
    assert stats.horizon == truth(net, y) == 1
    assert narrowed_before(stats) == ("rnn", T, "gate", "")
    with pytest.raises(gradwatch.GradientHealthError) as caught:
        gradwatch.assert_horizon(net, y, at_least=50)
    said = " ".join(str(caught.value).split())
    assert "what enters rnn reaches 60 timesteps back, and what enters gate, before it, does not" in said
    assert "Through depth" in said
    assert "bias" not in said


class Branch(nn.Module):
    """Adds next to nothing of a long view to what passes it by."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(H, H, 30)

    def forward(self, x):
        return x + 1e-5 * self.conv(nn.functional.pad(x.mT, (29, 0))).mT


def test_a_branch_that_is_next_to_nothing_is_not_narrowed_before():
    net = built(
        lambda net, x: net.out(net.branch(net.into(x))[:, -1]),
        into=nn.Linear(F, H),
        branch=Branch(),
        out=nn.Linear(H, 1),
    )
    stats = gradwatch.horizon(net, data())
    assert stats.horizon == 1
    assert narrowed_before(stats) == ("branch.conv", 30, "", "branch")
    with pytest.raises(gradwatch.GradientHealthError) as caught:
        gradwatch.assert_horizon(net, data(), at_least=20)
    said = " ".join(str(caught.value).split())
    assert "next to nothing beside what branch, which holds it, passes by" in said
    assert "a larger scale of that branch" in said


def test_what_is_told_besides_never_costs_what_is_asked(monkeypatch):
    class Routed(nn.Module):
        """Sends no row to one of its parts."""

        def __init__(self):
            super().__init__()
            self.into, self.part, self.rnn = nn.Linear(F, H), Gated(), nn.GRU(H, H, batch_first=True)

        def forward(self, x):
            z = self.into(x)
            return self.rnn(torch.cat([z, self.part(z[:0])]))[0][:, -1]

    net, x = Routed().double(), data()
    expected = gradwatch.horizon(net, x)
    assert list(places(expected)) == ["rnn"]

    def broken(*_, **__):
        raise RuntimeError("no")

    for name in ("entered", "sources"):
        with monkeypatch.context() as patch:
            patch.setattr(chain.Chain, name, broken)
            assert gradwatch.horizon(net, x).lag_gain == expected.lag_gain
    with monkeypatch.context() as patch:
        patch.setattr(
            input_gain.Source,
            "on_the_way",
            property(lambda s: frozenset("x") if s.module else frozenset(), lambda *_: None),
        )
        patch.setattr(input_gain, "gain_and_error", lambda *_, **__: broken())
        with pytest.raises(RuntimeError, match="no"):  # of what was asked it is told
            gradwatch.horizon(net, x)


def alert_of(net, x):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with gradwatch.watch(
        net, optimizer, horizon=50, probe_every_n_steps=1, every_n_steps=1, on_alert=lambda _: None
    ) as watcher:
        for _ in range(7):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    (alert,) = (a for a in watcher.report.open if a.finding.code == "GW301")
    return alert


def test_watch_places_its_alert_there():
    alert = alert_of(narrowed(), data(B, T, 1))
    assert alert.finding.place == "gate"
    assert "what enters rnn reaches 60" in alert.cause


def test_without_a_recurrent_network_it_is_the_module_that_most_comes_from():
    net = built(
        lambda net, x: net.out(net.long(net.short(x.mT))[..., -1]),
        short=nn.Conv1d(F, H, 2),
        long=nn.Conv1d(H, H, 12),
        out=nn.Linear(H, 1),
    )
    assert alert_of(net, data()).finding.place == "long"
    stats = gradwatch.horizon(net, data())
    assert places(stats) == {"short": 13, "long": 12}
    assert limiting(stats) == "long"
    with pytest.raises(gradwatch.GradientHealthError, match="in long: a longer field of view"):
        gradwatch.assert_horizon(net, data(), at_least=50)


def test_a_loop_over_torchs_cells_is_no_other_than_before():
    stats = gradwatch.horizon(Loop(nn.GRUCell, F, H).double(), data(T, B, F))
    assert list(places(stats)) == ["cell"]
    assert stats.chain[0].horizon == stats.horizon


def test_training_is_left_alone():
    net, x = narrowed(), data(B, T, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradwatch.horizon(net, x)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
