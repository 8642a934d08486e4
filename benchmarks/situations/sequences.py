"""Faulty: what lies too far back is forgotten, or grows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from benchmarks.runs import Batch, Net, Training, draw, fit, mse, remember, train, xent
from benchmarks.situations.situation import faulty


def recall(seed: int, length: int, n: int = 32, cues: int = 4) -> Batch:
    """Name at the end which cue stood at the beginning, noise in between."""

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        y = torch.randint(cues, (n,), generator=g)
        x = 0.3 * torch.randn(n, length, cues + 1, generator=g)
        x[torch.arange(n), 0, y] += 2.0
        x[:, -1, -1] += 2.0
        return x, y

    return batch


@faulty(
    "vanishing-time",
    source="GitHub karpathy/char-rnn issue 60; mila-iqia/blocks issue 792; chainer/chainer pull request 2425",
    places=("rnn",),
    words="gate|bias",
    horizon=80,
)
def cue_eighty_steps_back(*, fixed: bool) -> Training:
    """Ask a stock GRU for a cue that stood 80 steps back."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0][:, -1]), rnn=nn.GRU(5, 32, batch_first=True), head=nn.Linear(32, 4))
    if fixed:
        remember(net.rnn, 160)
    return train(net, Adam(net.parameters(), 5e-3), fit(recall(50, 80), xent), clip=1.0)


@faulty(
    "vanishing-time",
    "disconnected",
    source="GitHub yunjey/pytorch-tutorial issue 90; gabrielloye/RNN-walkthrough issue 3",
    places=("cell",),
    words="detach|cut",
    horizon=15,
)
def state_detached_at_every_step(*, fixed: bool) -> Training:
    """Detach the hidden state inside the loop over time: nothing is learned from anything but the newest step."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 32)
        for t in range(x.shape[1]):
            h = n.cell(x[:, t], h if fixed else h.detach())
        return n.head(h)

    net = Net(does, cell=nn.GRUCell(5, 32), head=nn.Linear(32, 4))
    if fixed:
        with torch.no_grad():
            net.cell.bias_hh[32:64] = math.log(30)
            net.cell.bias_ih[32:64] = 0.0
    return train(net, Adam(net.parameters(), 5e-3), fit(recall(51, 15), xent))


@faulty(
    "exploding",
    "non-finite",
    source="PyTorch forums, 'RNN with ReLU gives nan', all weights were drawn from one normal distribution",
    places=("rnn",),
    words="orthogonal|identity|clip|weight|initial|scale",
)
def rectified_recurrence_grows(*, fixed: bool) -> Training:
    """Draw the recurrent weights of a ReLU network too large: the state grows by half at each of 60 steps."""
    net = Net(
        lambda n, x: n.head(n.rnn(x)[0][:, -1]),
        rnn=nn.RNN(3, 32, nonlinearity="relu", batch_first=True),
        head=nn.Linear(32, 1),
    )
    if fixed:
        with torch.no_grad():
            net.rnn.weight_hh_l0.copy_(0.9 * torch.eye(32))
    else:
        nn.init.normal_(net.rnn.weight_hh_l0, std=0.375)

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(32, 60, 3, generator=draw(52, i))
        return mse(model(x), x[:, -8:, 0].mean(1, keepdim=True))

    return train(net, SGD(net.parameters(), 0.01) if not fixed else Adam(net.parameters(), 2e-3), loss_of)


@faulty(
    "vanishing-time",
    source="Stack Overflow, 'RNN predicts the same for all, sequence length 50', a plain tanh network",
    places=("rnn",),
    words="orthogonal|identity|LSTM|GRU|skip|attention",
    horizon=50,
    steps=250,
)
def plain_network_over_fifty_days(*, fixed: bool) -> Training:
    """Ask a plain tanh network whether a price began low or high, 50 days ago."""
    net = Net(
        lambda n, x: n.head(n.rnn(x)[0][:, -1]),
        rnn=nn.RNN(5, 32, nonlinearity="relu" if fixed else "tanh", batch_first=True),
        head=nn.Linear(32, 4),
    )
    if fixed:
        with torch.no_grad():
            net.rnn.weight_hh_l0.copy_(torch.eye(32))
            net.rnn.weight_ih_l0.mul_(0.3)
            net.rnn.bias_hh_l0.zero_(), net.rnn.bias_ih_l0.zero_()
    return train(net, Adam(net.parameters(), 1e-3 if fixed else 3e-3), fit(recall(53, 50), xent), clip=1.0)


@faulty(
    "vanishing-time",
    source="GitHub craffel/nntools issue 19; coetaur0/ESIM issue 2",
    places=("rnn",),
    words="gate|bias|skip|attention",
    horizon=60,
    steps=250,
)
def closed_forget_gates(*, fixed: bool) -> Training:
    """Begin with all biases of an LSTM at -1, the forget gate's among them: it forgets within a few steps."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0][:, -1]), rnn=nn.LSTM(5, 32, batch_first=True), head=nn.Linear(32, 4))
    with torch.no_grad():
        if fixed:
            remember(net.rnn, 600)
        else:
            net.rnn.bias_ih_l0.fill_(-0.5)
            net.rnn.bias_hh_l0.fill_(-0.5)
    return train(net, Adam(net.parameters(), 5e-3), fit(recall(54, 60), xent), clip=1.0)
