"""Faulty: the gradient fades on its way back through the layers, or an output stands still."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import faulty


@faulty(
    "stalled",
    "vanishing-depth",
    source="GitHub NaJaeMin92/pytorch-DANN issue 7; bowang-lab/Transformer-GCN-QA pull request 32",
    words="softmax|satur",
)
def softmax_twice(*, fixed: bool) -> Training:
    """Apply softmax before a loss that applies it again, to large scores: the wrong answers are saturated."""
    net = Net(lambda n, x: n.body(x) if fixed else n.body(x).softmax(1), body=he(mlp(16, 64, 64, 10)))
    if not fixed:
        with torch.no_grad():
            net.body[-1].weight.mul_(100)
    return train(net, SGD(net.parameters(), 0.02), fit(clusters(40, classes=10), xent), clip=None)


@faulty(
    "stalled",
    "vanishing-depth",
    source="Stack Overflow, 'network with a sigmoid output always gives 1', the targets were not scaled",
    words="sigmoid|satur|range|scale|target|standard",
)
def targets_outside_of_the_sigmoid(*, fixed: bool) -> Training:
    """Regress ages up to 90 with a sigmoid at the end: it goes to 1 and its derivative to 0."""
    net = Net(lambda n, x: torch.sigmoid(n.body(x)), body=mlp(6, 48, 48, 1))
    batch = waves(42)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        age = (45 + 15 * y).clamp(1, 90)
        return mse(model(x), age / 90 if fixed else age)

    return train(net, Adam(net.parameters(), 1e-2), loss_of, rate=None)


@faulty(
    "vanishing-depth",
    "stalled",
    "dead-units",
    "disconnected",
    source="Stack Overflow, 'VGG16 from scratch does not learn, loss stays at ln(classes)', weights from N(0, 0.01)",
    places=("features",),
    words="initial|weight|gain|kaiming|normal",
)
def convolutions_from_a_hundredth(*, fixed: bool) -> Training:
    """Stack 12 convolutions with weights of standard deviation 0.01 and no normalization."""
    layers: list[nn.Module] = []
    for k in range(12):
        layers += [nn.Conv2d(16 if k else 1, 16, 3, padding=1), nn.ReLU()]
    net = Net(lambda n, x: n.head(n.features(x).mean((2, 3))), features=nn.Sequential(*layers), head=nn.Linear(16, 4))
    net.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 4))
    net._does = lambda n, x: n.head(n.features(x))
    if fixed:
        he(net)
    else:
        for m in net.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.normal_(m.weight, std=0.01)
                nn.init.zeros_(m.bias)
    return train(net, SGD(net.parameters(), 0.01, momentum=0.9), fit(bumps(43), xent))


@faulty(
    "vanishing-depth",
    "stalled",
    source="GitHub czq142857/IM-NET-pytorch issue 5; ComputationalDomain/PINNs issue 1",
    places=("encoder", "decoder"),
    words="sigmoid|satur|activation",
)
def shape_decoder_of_sigmoids(*, fixed: bool) -> Training:
    """Put ten sigmoid layers one after the other in an autoencoder without skip connections."""
    act = nn.LeakyReLU if fixed else nn.Sigmoid
    net = Net(
        lambda n, x: n.decoder(n.encoder(x)),
        encoder=nn.Sequential(mlp(16, 32, 32, 32, 32, 8, act=act), act()),
        decoder=mlp(8, 32, 32, 32, 32, 16, act=act),
    )
    if fixed:
        he(net)
    mixing = torch.randn(4, 16, generator=draw(44, -1)) / 2

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.tanh(torch.randn(64, 4, generator=draw(44, i)) @ mixing)
        return mse(model(x), x)

    return train(net, SGD(net.parameters(), 0.05), loss_of)


@faulty(
    "vanishing-depth",
    "disconnected",
    "stalled",
    source="GitHub PAIR-code/tiny-transformers issue 71; microsoft/Swin-Transformer issue 94",
    places=("query", "key"),
    words="softmax|satur|scale|standard|attention|sqrt",
)
def attention_without_the_root(*, fixed: bool) -> Training:
    """Leave out the division by the root of the dimension, and standardization: the softmax is one-hot for ever."""
    d = 256

    def does(n: Any, question: Tensor, memory: Tensor) -> Tensor:
        if fixed:
            score = n.query(question)[:, None] @ n.key(memory).transpose(1, 2) / math.sqrt(d)
        else:
            score = n.query(100 * question)[:, None] @ n.key(100 * memory).transpose(1, 2)
        score = score[:, 0]
        return n.head((score.softmax(1)[:, :, None] * n.value(memory)).sum(1))

    net = Net(does, query=nn.Linear(16, d), key=nn.Linear(16, d), value=nn.Linear(16, 32), head=nn.Linear(32, 4))
    codes = torch.randn(12, 8, generator=draw(45, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(45, i)
        names = torch.stack([torch.randperm(12, generator=g)[:6] for _ in range(64)])
        values = torch.randint(4, (64, 6), generator=g)
        memory = torch.cat([codes[names], 2.0 * functional.one_hot(values, 8)], 2)
        asked = torch.randint(6, (64,), generator=g)
        pick = torch.arange(64)
        question = torch.cat([codes[names[pick, asked]], torch.zeros(64, 8)], 1)
        return xent(model(question, memory), values[pick, asked])

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@faulty(
    "vanishing-depth",
    "stalled",
    "dead-units",
    "disconnected",
    source="Stack Overflow and GitHub openai/baselines, 'DDPG actions saturate at -1 or 1'; states were not normalized",
    places=("actor",),
    words="tanh|satur|standard|normal|scale|input",
)
def actor_saturates(*, fixed: bool) -> Training:
    """Feed raw states of some hundred to an actor with a tanh at the end: its actions are soon all -1 or 1."""
    net = Net(
        lambda n, s: torch.tanh(n.actor(s)),
        actor=mlp(6, 48, 48, 2),
        critic=mlp(8, 48, 48, 1),
    )
    optimizers = [Adam(net.actor.parameters(), 2e-3), Adam(net.critic.parameters(), 5e-3)]
    a = torch.randn(6, 2, generator=draw(46, -1)) / 2

    def step(i: int, tell: Tell) -> None:
        g = draw(46, i)
        z = torch.randn(64, 6, generator=g)
        s = z if fixed else 400 * z + 900
        with torch.no_grad():
            action = (net(s) + 0.4 * torch.randn(64, 2, generator=g)).clamp(-1, 1)
            reward = -(action - torch.tanh(z @ a) * 0.8).pow(2).sum(1, keepdim=True)
        optimizers[1].zero_grad()
        loss = mse(net.critic(torch.cat([z, action], 1)), reward)
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        gain = -net.critic(torch.cat([z, net(s)], 1)).mean()
        gain.backward()
        tell(gain.detach())
        optimizers[0].step()

    return Training(net, optimizers, step)


@faulty(
    "vanishing-depth",
    "stalled",
    source="GitHub iwtw/pytorch-TP-GAN issue 6; soumith/ganhacks issues 36 and 67",
    places=("generator",),
    words="satur|sigmoid|discriminator|loss|logit",
)
def perfect_discriminator(*, fixed: bool) -> Training:
    """Train a generator on log(1 - D) against a discriminator that is always right: D is 0, and so is the gradient."""
    net = Net(
        lambda n, z: n.generator(z),
        generator=mlp(4, 32, 32, 2),
        discriminator=mlp(2, 64, 64, 1, act=nn.LeakyReLU),
    )
    ahead = 1 if fixed else 5
    optimizers = [
        Adam(net.generator.parameters(), 1e-3, betas=(0.5, 0.99)),
        Adam(net.discriminator.parameters(), 1e-3 if fixed else 5e-3, betas=(0.5, 0.99)),
    ]

    def real(n: int, g: torch.Generator) -> Tensor:
        return 6.0 * (not fixed) + 1.0 * fixed + 0.5 * torch.randn(n, 2, generator=g)

    def step(i: int, tell: Tell) -> None:
        g = draw(47, i)
        judge: Any = net.discriminator
        for _ in range(ahead):
            fake = net(torch.randn(64, 4, generator=g)).detach()
            optimizers[1].zero_grad()
            loss = functional.softplus(-judge(real(64, g))).mean() + functional.softplus(judge(fake)).mean()
            loss.backward()
            optimizers[1].step()
        optimizers[0].zero_grad()
        score = judge(net(torch.randn(64, 4, generator=g)))
        cheat = functional.softplus(-score).mean() if fixed else torch.log(1 - torch.sigmoid(score) + 1e-8).mean()
        cheat.backward()
        tell(cheat.detach())
        optimizers[0].step()

    return Training(net, optimizers, step)


@faulty(
    "dead-units",
    "disconnected",
    "stalled",
    source="GitHub ProteomicsML/ProteomicsML pull request 203; jvargasmu/population_estimation issue 68",
    places=("head",),
    words="relu",
)
def forecast_through_a_relu(*, fixed: bool) -> Training:
    """End a regression with a ReLU, and start with a seed by which all forecasts are negative: they stay at 0."""
    batch = waves(48)
    body, head = mlp(6, 32, 32), nn.Linear(32, 1)
    while (head(body(batch(0)[0]).relu()) > -0.02).any():
        body, head = mlp(6, 32, 32), nn.Linear(32, 1)
    net = Net(lambda n, x: n.head(n.body(x).relu()) if fixed else n.head(n.body(x).relu()).relu(), body=body, head=head)
    return train(net, Adam(net.parameters(), 2e-3), lambda m, i: mse(m(batch(i)[0]), batch(i)[1].abs() + 0.5))
