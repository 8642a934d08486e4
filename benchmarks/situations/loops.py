"""Healthy: unusual loops, losses and schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim import LBFGS, SGD, Adam, AdamW

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import healthy


@healthy(source="GitHub soumith/ganhacks issues 32 and 40", steps=120)
def generator_every_fifth_step() -> Training:
    """Train a discriminator at every step and its generator at every fifth, each with its own optimizer."""
    net = Net(
        lambda n, z: n.generator(z),
        generator=mlp(4, 32, 32, 2, act=nn.LeakyReLU),
        discriminator=mlp(2, 32, 32, 1, act=nn.LeakyReLU),
    )
    optimizers = [
        Adam(net.generator.parameters(), 2e-3, betas=(0.5, 0.99)),
        Adam(net.discriminator.parameters(), 5e-4, betas=(0.5, 0.99)),
    ]

    def step(i: int, tell: Tell) -> None:
        g = draw(80, i)
        real = torch.randn(64, 2, generator=g) * torch.tensor([0.5, 1.5]) + 1
        fake = net(torch.randn(64, 4, generator=g))
        optimizers[1].zero_grad()
        loss = functional.softplus(-net.discriminator(real)) + functional.softplus(net.discriminator(fake.detach()))
        loss.mean().backward()
        tell(loss.mean().detach())
        optimizers[1].step()
        if i % 5 == 4:
            optimizers[0].zero_grad()
            functional.softplus(-net.discriminator(fake)).mean().backward()
            optimizers[0].step()

    return Training(net, optimizers, step)


@healthy(source="PyTorch forums, 'gradient accumulation with small batches'", steps=100)
def eight_small_batches_to_a_step() -> Training:
    """Accumulate the gradients of eight batches of four before each step."""
    net = he(mlp(16, 48, 48, 5))
    return train(net, SGD(net.parameters(), 0.1, momentum=0.9), fit(clusters(81, n=4), xent), parts=8, clip=1.0)


@healthy(source="GitHub huggingface/transformers issue 34754; EleutherAI/gpt-neox issue 1373")
def warm_up_from_nothing() -> Training:
    """Warm a transformer up from a learning rate of exactly 0 over 60 steps."""
    net = Net(
        lambda n, x: n.head(n.body(n.stem(x))[:, 0]),
        stem=nn.Linear(6, 32),
        body=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True), 2
        ),
        head=nn.Linear(32, 1),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(32, 8, 6, generator=draw(82, i))
        return mse(model(x), x[:, :, 0].amax(1, keepdim=True))

    return train(net, AdamW(net.parameters(), 3e-3), loss_of, rate=lambda s: min(1.0, s / 60))


@healthy(source="GitHub DLR-RM/stable-baselines3 issues 602 and 661; CarperAI/trlx issue 491")
def clipped_surrogate() -> Training:
    """Improve a policy with a clipped surrogate: the loss is about 0 and often negative, which is how it should be."""

    def does(n: Any, s: Tensor) -> tuple[Tensor, Tensor]:
        h = n.trunk(s)
        return n.policy(h), n.value(h)

    net = Net(
        does,
        trunk=nn.Sequential(mlp(6, 32, 32, act=nn.Tanh), nn.Tanh()),
        policy=nn.Linear(32, 3),
        value=nn.Linear(32, 1),
    )
    with torch.no_grad():
        net.policy.weight.mul_(0.01)
    optimizer = Adam(net.parameters(), 1e-3)
    best = torch.randn(6, 3, generator=draw(83, -1))
    held: dict[str, Tensor] = {}

    def step(i: int, tell: Tell) -> None:
        if i % 4 == 0:
            g = draw(83, i)
            s = torch.randn(128, 6, generator=g)
            with torch.no_grad():
                logits, value = net(s)
            action = torch.multinomial(logits.softmax(1), 1, generator=g)
            reward = (action == (s @ best).argmax(1, keepdim=True)).float() + 0.3 * torch.randn(128, 1, generator=g)
            gain = reward - value
            held.update(
                s=s,
                action=action,
                reward=reward,
                gain=(gain - gain.mean()) / gain.std(),
                old=logits.log_softmax(1).gather(1, action),
            )
        logits, value = net(held["s"])
        ratio = (logits.log_softmax(1).gather(1, held["action"]) - held["old"]).exp()
        surrogate = torch.minimum(ratio * held["gain"], ratio.clamp(0.8, 1.2) * held["gain"]).mean()
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss = -surrogate + 0.5 * mse(value, held["reward"]) - 0.01 * entropy
        loss.backward()
        tell(loss.detach())
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()

    return Training(net, [optimizer], step)


@healthy(
    source="GitHub vwxyzjn/cleanrl and the TD3 paper's delayed policy updates, 'actor loss logged every other step'"
)
def actor_every_fourth_step() -> Training:
    """Move an actor at every fourth step of its critic; its loss is minus a value, and so negative."""
    net = Net(lambda n, s: torch.tanh(n.actor(s)), actor=mlp(4, 32, 32, 2), critic=mlp(6, 48, 48, 1))
    optimizers = [Adam(net.actor.parameters(), 1e-3), Adam(net.critic.parameters(), 3e-3)]
    a = torch.randn(4, 2, generator=draw(84, -1)) / 2

    def step(i: int, tell: Tell) -> None:
        g = draw(84, i)
        s = torch.randn(64, 4, generator=g)
        with torch.no_grad():
            action = (net(s) + 0.2 * torch.randn(64, 2, generator=g)).clamp(-1, 1)
            reward = 2 - (action - torch.tanh(s @ a)).pow(2).sum(1, keepdim=True)
        optimizers[1].zero_grad()
        loss = mse(net.critic(torch.cat([s, action], 1)), reward)
        loss.backward()
        tell(loss.detach())
        optimizers[1].step()
        if i % 4 == 3:
            optimizers[0].zero_grad()
            (-net.critic(torch.cat([s, net(s)], 1)).mean()).backward()
            optimizers[0].step()

    return Training(net, optimizers, step)


@healthy(source="PyTorch forums, 'online actor-critic with one transition at a time'", steps=250)
def one_transition_at_a_time() -> Training:
    """Learn values online, from one transition of a random walk at each step: gradients jump by orders of magnitude."""
    net = mlp(7, 32, 1, act=nn.Tanh)
    optimizer = SGD(net.parameters(), 0.02)
    here = [3]

    def step(i: int, tell: Tell) -> None:
        state = here[0]
        after = state + (1 if torch.rand((), generator=draw(85, i)) < 0.5 else -1)
        over, eye = after in {-1, 7}, torch.eye(7)
        with torch.no_grad():
            goal = torch.tensor([float(after == 7)]) if over else net(eye[after])
        optimizer.zero_grad()
        loss = mse(net(eye[state]), goal)
        loss.backward()
        tell(loss.detach())
        optimizer.step()
        here[0] = 3 if over else after

    return Training(net, [optimizer], step)


@healthy(source="PyTorch forums, 'cosine annealing: the loss stops moving at the end of the schedule'", steps=200)
def cosine_down_to_nothing() -> Training:
    """Let the learning rate of a convolutional network go down to 0 along a cosine, and train 40 more steps there."""
    net = Net(
        lambda n, x: n.head(n.body(x).flatten(1)),
        body=nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
        ),
        head=nn.Linear(64, 4),
    )
    return train(
        net,
        SGD(net.parameters(), 0.05, momentum=0.9),
        fit(bumps(86), xent),
        rate=lambda s: 0.5 * (1 + math.cos(math.pi * min(1.0, s / 160))),
    )


@healthy(source="PyTorch forums, 'pack_padded_sequence with lengths from 1 to 30'")
def sequences_of_all_lengths() -> Training:
    """Train a packed LSTM on sequences of 1 to 30 steps."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 1)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][0][-1])

    net = Reader()

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(87, i)
        lengths = torch.randint(1, 31, (32,), generator=g)
        x = torch.randn(32, 30, 4, generator=g)
        x[torch.arange(30) >= lengths[:, None]] = 0.0
        pick = torch.arange(32)
        return mse(model(x, lengths), x[pick, lengths - 1, :1] + 0.5 * x[pick, (lengths - 2).clamp_min(0), 1:2])

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


@healthy(source="GitHub NoamRosenberg/autodeeplab issue 12", steps=120)
def scaler_skips_the_first_steps() -> Training:
    """Begin a GradScaler far too high under float16 autocast: it skips some steps and finds its scale, as designed."""
    net = he(mlp(16, 64, 64, 5))
    batch = clusters(88)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        return xent(out.float(), y)

    return train(net, Adam(net.parameters(), 2e-3), loss_of, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**24))


@healthy(source="GitHub pytorch/pytorch issue 120376, 'autocast only around the forward pass'")
def bfloat16_autocast() -> Training:
    """Train convolutions under bfloat16 autocast, with float32 weights."""
    net = Net(
        lambda n, x: n.head(n.body(x).flatten(1)),
        body=nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()
        ),
        head=nn.Linear(64, 4),
    )
    batch = bumps(89)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return xent(out.float(), y)

    return train(net, AdamW(net.parameters(), 3e-3), loss_of)


@healthy(source="PyTorch forums, 'physics-informed network with LBFGS and a closure'", steps=40)
def second_order_with_a_closure() -> Training:
    """Fit a differential equation with LBFGS, which calls the network several times in a step."""
    net = mlp(1, 24, 24, 1, act=nn.Tanh)
    optimizer = LBFGS(net.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")
    t = torch.linspace(0, 2, 40)[:, None].requires_grad_()

    def step(_: int, tell: Tell) -> None:
        losses: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            y = net(t)
            (slope,) = torch.autograd.grad(y.sum(), t, create_graph=True)
            loss = (slope + y).pow(2).mean() + (y[0] - 1).pow(2).sum()
            loss.backward()
            if not losses:
                tell(loss.detach())
            losses.append(loss.detach())
            return loss

        optimizer.step(closure)

    return Training(net, [optimizer], step)


@healthy(source="Stack Overflow, 'negative log-likelihood becomes negative in a normalizing flow'")
def likelihood_below_zero() -> Training:
    """Fit a normalizing flow to points on a thin curve: densities are above 1 and the loss goes below 0."""

    class Coupling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(1, 32, 2, act=nn.Tanh)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift = self.net(x[:, :1]).chunk(2, 1)
            scale = 3 * torch.tanh(scale)
            return torch.cat([x[:, 1:] * scale.exp() + shift, x[:, :1]], 1), scale.sum(1)

    net = nn.ModuleList(Coupling() for _ in range(4))
    whole = Net(lambda _, x: x, flow=net)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(91, i)
        a = torch.randn(128, 1, generator=g)
        x, volume = torch.cat([a, torch.sin(a) + 0.02 * torch.randn(128, 1, generator=g)], 1), torch.zeros(128)
        for coupling in model.flow:
            x, more = coupling(x)
            volume = volume + more
        return (0.5 * x.pow(2).sum(1) + math.log(2 * math.pi) - volume).mean()

    return train(whole, Adam(whole.parameters(), 5e-3), loss_of, clip=10.0)


@healthy(source="PyTorch forums, 'loss with reduction=sum is huge'")
def loss_summed_over_everything() -> Training:
    """Sum the loss over samples and outputs, so that it is some ten thousand, and train with Adam."""
    net = he(mlp(6, 64, 64, 40))
    a = torch.randn(6, 40, generator=draw(92, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(256, 6, generator=draw(92, i))
        return (model(x) - torch.sin(x @ a) - 1).pow(2).sum()

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@healthy(source="GitHub vturrisi/solo-learn issue 135; the stop-gradient of SimSiam")
def one_side_is_detached() -> Training:
    """Learn representations from two views, of which one is always detached, with a probe on detached features."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = n.encoder(x)
        return z, n.predictor(z), n.probe(z.detach())

    net = Net(
        does,
        encoder=mlp(16, 64, 64, 16, norm=nn.BatchNorm1d),
        predictor=mlp(16, 8, 16),
        probe=nn.Linear(16, 5),
    )
    batch = clusters(93)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        g = draw(94, i)
        (z1, p1, out), (z2, p2, _) = (model(x + 0.3 * torch.randn(x.shape, generator=g)) for _ in range(2))
        alike = (
            functional.cosine_similarity(p1, z2.detach()).mean() + functional.cosine_similarity(p2, z1.detach()).mean()
        )
        return xent(out, y) - 0.5 * alike

    return train(net, SGD(net.parameters(), 0.05, momentum=0.9), loss_of)


@healthy(source="PyTorch forums, 'one outlier batch makes the loss jump, with gradient clipping it comes back'")
def an_outlier_batch_now_and_then() -> Training:
    """Meet a batch with a corrupt target at steps 60 and 110: the loss jumps once, the clipped step does no harm."""
    net = he(mlp(6, 48, 48, 1))
    batch = waves(95)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        if i in {60, 110}:
            y = y.clone()
            y[:4] += 300
        return mse(model(x), y)

    return train(net, SGD(net.parameters(), 0.05), loss_of, clip=1.0)
