"""How many timesteps a model uses of those within its reach: against closed forms, whole Jacobians and known tasks."""

from __future__ import annotations

import math

import pytest
import torch
from models import Model
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import gradwatch
from gradwatch.values.sequences import SequenceStats, sentences, used_of

B, T, F = 16, 60, 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def by_jacobian(newest, x):
    """Return, lag by lag, the root mean square over rows and outputs of what a timestep adds: rows first, then time."""
    x = x.detach().clone().requires_grad_()
    y = newest(x).flatten(1)
    deviation = (x - x.mean((0, 1), keepdim=True)).detach()
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for column in y.unbind(1):
        (gradient,) = torch.autograd.grad(column.sum(), x, retain_graph=True)
        total += (gradient * deviation).sum(2).square().mean(0)
    return (total / y.shape[1]).sqrt().flip(0)


def test_a_linear_model_uses_what_its_weights_and_the_data_say():
    weights = torch.randn(T, F, dtype=torch.float64) * 0.9 ** torch.arange(T).flip(0).view(T, 1)
    x = torch.randn(B, T, F, dtype=torch.float64) + 5
    found = gradwatch.horizon(Model(lambda net, x: (x * net.w).sum((1, 2)), w=nn.Parameter(weights)), x)

    share = (((x - x.mean((0, 1))) * weights).sum(2).square().mean(0)).flip(0)
    assert found.lag_use == pytest.approx(share.sqrt().tolist(), rel=1e-12)
    left = 1 - share.cumsum(0) / share.sum()
    assert found.used == int((left > 0.05).sum()) + 1


def test_of_several_outputs_a_random_direction_tells_it():
    net = Model(lambda net, x: net.out(net.rnn(x)[0][:, -1]), rnn=nn.GRU(F, 8, batch_first=True), out=nn.Linear(8, 5))
    net, x = net.double(), torch.randn(512, T, F, dtype=torch.float64)
    found = torch.tensor(gradwatch.horizon(net, x).lag_use, dtype=torch.float64)

    truth = by_jacobian(net, x)
    within = truth > 1e-3 * truth.max()
    assert ((found / truth)[within].log().abs() < 0.2).all()


def test_an_output_of_one_number_is_exact():
    net = Model(lambda net, x: net.out(net.rnn(x)[0][:, -1]), rnn=nn.LSTM(F, 8, batch_first=True), out=nn.Linear(8, 1))
    net, x = net.double(), torch.randn(B, T, F, dtype=torch.float64)

    assert gradwatch.horizon(net, x).lag_use == pytest.approx(by_jacobian(net, x).tolist(), rel=1e-9)


def test_a_level_adds_nothing_that_all_rows_and_timesteps_share():
    """A constant input has a derivative, and no variance."""
    net = Model(lambda net, x: (x * net.w).sum((1, 2)), w=nn.Parameter(torch.ones(T, F)))
    x = torch.randn(B, T, F)
    x[..., 1:] = 7.0
    a, b = gradwatch.horizon(net, x).lag_use, gradwatch.horizon(net, x * torch.tensor([1.0, 0.0, 0.0])).lag_use
    assert a == pytest.approx(b, rel=1e-4)
    assert gradwatch.horizon(net, torch.ones(B, T, F)).used is None


def packed(net, x, lengths):
    return net.out(net.rnn(pack_padded_sequence(x, lengths, batch_first=True))[1][-1])


def test_rows_are_aligned_at_their_own_ends_where_they_are_packed():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.GRU(F, 8, batch_first=True), nn.Linear(8, 1)

        forward = packed

    net = Packed().double()
    lengths = torch.tensor([T, 40, 25, 12])
    x = torch.randn(4, T, F, dtype=torch.float64)
    x[torch.arange(T) >= lengths.view(-1, 1)] = 0.0
    found = gradwatch.horizon(net, (x, lengths))

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(packed(net, leaf, lengths).sum(), leaf)
    added = (gradient * (x - x.mean((0, 1)))).sum(2).square()
    lags = [[float(added[b, n - 1 - lag]) for b, n in enumerate(lengths.tolist()) if lag < n] for lag in range(T)]
    assert found.lag_use == pytest.approx([math.sqrt(sum(a) / len(a)) for a in lags], rel=1e-9)


def test_a_packed_input_is_laid_out_as_its_rows_are():
    net = Model(lambda net, x: net.out(net.rnn(x)[1][-1]), rnn=nn.GRU(F, 8, batch_first=True), out=nn.Linear(8, 1))
    x = pack_padded_sequence(torch.randn(3, T, F), torch.tensor([T, 30, 7]), batch_first=True)
    found = gradwatch.horizon(net.double(), x.to(torch.float64))

    leaf = x.data.double().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x._replace(data=leaf)).sum(), leaf)
    added = (gradient * (leaf - leaf.mean(0))).sum(1).square().tolist()
    lags = [[] for _ in range(T)]
    for row, length in enumerate((T, 30, 7)):
        for t in range(length):
            at = int(x.batch_sizes[:t].sum()) + row
            lags[length - 1 - t].append(added[at])
    assert found.lag_use == pytest.approx([math.sqrt(sum(a) / len(a)) for a in lags], rel=1e-6)


def test_two_embeddings_of_one_input_add_up():
    net = Model(
        lambda net, ids: net.out(net.rnn(torch.cat([net.table(ids), net.other(ids)], -1))[0][:, -1]),
        table=nn.Embedding(11, 3),
        other=nn.Embedding(11, 2),
        rnn=nn.GRU(5, 8, batch_first=True),
        out=nn.Linear(8, 1),
    ).double()
    ids = torch.randint(0, 11, (B, T))
    both = torch.cat([net.table(ids), net.other(ids)], -1)
    truth = by_jacobian(lambda x: net.out(net.rnn(x)[0][:, -1]), both)
    assert gradwatch.horizon(net, ids).lag_use == pytest.approx(truth.tolist(), rel=1e-9)


def test_what_was_edited_since_is_not_known():
    net = Model(
        lambda net, ids: (net.table(ids).mul_(2) * net.w).sum((1, 2)),
        table=nn.Embedding(11, 3),
        w=nn.Parameter(torch.rand(T, 3)),
    )
    found = gradwatch.horizon(net, torch.randint(0, 11, (B, T)))
    assert found.horizon == T
    assert found.lag_use is found.used is None


def test_tokens_add_what_their_embeddings_differ_by():
    net = Model(
        lambda net, ids: net.out(net.rnn(net.table(ids))[0][:, -1]),
        table=nn.Embedding(11, 6),
        rnn=nn.GRU(6, 8, batch_first=True),
        out=nn.Linear(8, 1),
    ).double()
    ids = torch.randint(0, 11, (B, T))
    truth = by_jacobian(lambda x: net.out(net.rnn(x)[0][:, -1]), net.table(ids))
    assert gradwatch.horizon(net, ids).lag_use == pytest.approx(truth.tolist(), rel=1e-9)


def test_an_input_that_the_model_edits_is_known_as_it_was():
    def edits(net, x):
        x = x.clone() if net.copies else x
        x.mul_(2)
        return (x * net.w).sum((1, 2))

    net = Model(edits, w=nn.Parameter(torch.rand(T, F)))
    x = torch.randn(B, T, F)
    net.copies = True
    truth = gradwatch.horizon(net, x).lag_use
    net.copies = False
    assert gradwatch.horizon(net, x).lag_use == pytest.approx(truth, rel=1e-5)


# --- tasks whose relevant lag is known ---


class Convolutions(nn.Module):
    """Sees 63 timesteps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(16 if i else 1, 16, 3, dilation=2**i) for i in range(5))
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        x = x.transpose(1, 2)
        for i, layer in enumerate(self.layers):
            x = torch.relu(layer(nn.functional.pad(x, (2 * 2**i, 0))))
        return self.out(x[..., -1])


TASKS = {
    "a_lag_of_20": (lambda x: x[:, -21], 21, 21),
    "the_sum_of_20": (lambda x: x[:, -20:].sum(1) / math.sqrt(20), 18, 20),  # 95 % of 20 equal shares
    "the_first": (lambda x: x[:, 0], 60, 60),
    "the_sign_of_the_flow_of_10": (lambda x: x[:, -10:].sum(1).sign(), 9, 12),
}


@pytest.mark.parametrize(("target", "low", "high"), TASKS.values(), ids=TASKS)
def test_a_network_that_has_learned_a_task_uses_its_lag_and_sees_more(target, low, high):
    net = Convolutions()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(400):
        x = torch.randn(64, T, 1)
        loss = (net(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2

    found = gradwatch.horizon(net, torch.randn(64, T, 1))
    assert found.horizon >= 55  # what it could learn from has not changed
    assert low <= found.used <= high
    (said,) = (text for _, text in sentences([found]))
    assert said.endswith(f"; it uses the last {found.used}") == (found.used < found.horizon)


# --- the numbers alone ---


def test_used_is_all_but_the_oldest_whose_squares_are_a_twentieth():
    assert used_of([1.0] * 100) == 95
    assert used_of([0.0] * 20 + [3.0] + [0.0] * 50) == 21
    assert used_of([2.0, 1e-200]) == 1
    assert used_of([1e-200] * 40) == 38
    assert used_of([]) is None
    assert used_of([0.0, 0.0]) is None
    assert used_of([1.0, math.nan]) is None
    assert SequenceStats("rnn").used is None
