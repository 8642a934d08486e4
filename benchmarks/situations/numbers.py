"""Faulty: numbers that are not finite, or too small for their format."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from benchmarks.runs import Net, Tell, Training, clusters, draw, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import faulty


@faulty("non-finite", source="GitHub pytorch/pytorch issue 2421", places=("tower",), since=25)
def distance_between_equals(*, fixed: bool) -> Training:
    """Take the root of a squared distance, and from step 25 on compare something with itself: the root of 0."""
    net = Net(lambda n, x: n.tower(x), tower=mlp(8, 32, 4))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(20, i)
        a, same = torch.randn(32, 8, generator=g), torch.randint(2, (32,), generator=g).float()
        b = torch.where(same[:, None] > 0, a + 0.1 * torch.randn(32, 8, generator=g), torch.randn(32, 8, generator=g))
        if i >= 25:
            b[0], same[0] = a[0], 1.0
        apart = (model(a) - model(b)).pow(2).sum(1)
        distance = (apart + (1e-8 if fixed else 0.0)).sqrt()
        return (same * distance.pow(2) + (1 - same) * (1 - distance).relu().pow(2)).mean()

    return train(net, SGD(net.parameters(), 0.05), loss_of)


@faulty("non-finite", source="GitHub pytorch/pytorch issues 31829, 68425 and 108618", places=("policy",))
def entropy_of_forbidden_actions(*, fixed: bool) -> Training:
    """Guard p log p with torch.where: for an action that is masked out the derivative of the logarithm is infinite."""
    net = Net(
        lambda n, s: n.policy(n.trunk(s)), trunk=nn.Sequential(nn.Linear(6, 32), nn.Tanh()), policy=nn.Linear(32, 4)
    )
    best = torch.randn(6, 4, generator=draw(21, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        s = torch.randn(64, 6, generator=draw(21, i))
        allowed = torch.ones(64, 4, dtype=torch.bool)
        allowed[:, 3] = s[:, 0] < 0
        right = (s @ best).masked_fill(~allowed, -math.inf).argmax(1)
        p = model(s).masked_fill(~allowed, -math.inf).softmax(1)
        inside = torch.where(p > 0, p, torch.ones_like(p)) if fixed else p
        entropy = -torch.where(p > 0, p * inside.log(), torch.zeros_like(p)).sum(1)
        gain = -(p.gather(1, right[:, None]) + 1e-9).log().mean()
        return gain - 0.01 * entropy.mean()

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


@faulty(
    "non-finite",
    "exploding",
    source="GitHub vanderschaarlab/synthcity issue 331",
    places=("logvar", "decoder"),
)
def unbounded_log_variance(*, fixed: bool) -> Training:
    """Feed amounts of money to a variational autoencoder: exp of the log-variance overflows."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = n.encoder(x)
        mean, logvar = n.mean(h), n.logvar(h)
        if fixed:
            logvar = logvar.clamp(-20, 5)
        return n.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)), mean, logvar

    net = Net(
        does,
        encoder=nn.Sequential(nn.Linear(10, 32), nn.ReLU()),
        mean=nn.Linear(32, 3),
        logvar=nn.Linear(32, 3),
        decoder=mlp(3, 32, 10),
    )
    mixing = torch.randn(3, 10, generator=draw(22, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(64, 3, generator=draw(22, i)) @ mixing
        x = x if fixed else 2000 * x
        out, mean, logvar = model(x)
        return mse(out, x) - 0.05 * (1 + logvar - mean.pow(2) - logvar.exp()).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@faulty("non-finite", source="GitHub keras-team/keras issues 1061 and 2586", since=30)
def mixture_density_underflows(*, fixed: bool) -> Training:
    """Sum likelihoods before the logarithm: from step 30 on a target lies so far off that they are all 0."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = n.trunk(x)
        return n.weight(h).log_softmax(1), n.centre(h), n.spread(h)

    net = Net(
        does,
        trunk=nn.Sequential(nn.Linear(1, 32), nn.Tanh()),
        weight=nn.Linear(32, 3),
        centre=nn.Linear(32, 3),
        spread=nn.Linear(32, 3),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(23, i)
        y = torch.randn(64, 1, generator=g)
        x = y + 0.7 * torch.sin(3 * y) + 0.1 * torch.randn(64, 1, generator=g)
        if i >= 30:
            y[0] = 25.0
        log_weight, centre, spread = model(x)
        log_density = -0.5 * ((y - centre) / spread.exp()).pow(2) - spread - 0.5 * math.log(2 * math.pi)
        if fixed:
            return -(log_weight + log_density.clamp_min(-50)).logsumexp(1).mean()
        return -(log_weight.exp() * log_density.exp()).sum(1).log().mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty("non-finite", source="GitHub meijieru/crnn.pytorch issue 235; ypwhs/captcha_break issue 29", since=20)
def transcript_longer_than_its_sound(*, fixed: bool) -> Training:
    """Train with the CTC loss, and from step 20 on with one transcript that does not fit into its frames."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0]), rnn=nn.GRU(6, 32, batch_first=True), head=nn.Linear(32, 6))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(24, i)
        words = torch.randint(1, 6, (16, 4), generator=g)
        frames = functional.one_hot(words.repeat_interleave(4, 1), 6).float()
        frames = frames + 0.3 * torch.randn(16, 16, 6, generator=g)
        lengths = torch.full((16,), 16)
        if i >= 20:
            lengths[0] = 3
        log_p = model(frames).log_softmax(2).transpose(0, 1)
        return functional.ctc_loss(log_p, words, lengths, torch.full((16,), 4), zero_infinity=fixed)

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


@faulty(
    "underflow",
    "vanishing-depth",
    "disconnected",
    "stalled",
    source="GitHub engichang1467/Open-Rig3R issue 35",
    words="float16|half|scal|bfloat16",
)
def half_precision_without_a_scaler(*, fixed: bool) -> Training:
    """Train under float16 autocast on a small loss over many pixels, with no loss scaling."""
    net = Net(
        lambda n, x: n.decoder(torch.relu(n.encoder(x))),
        encoder=nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)),
        decoder=nn.Linear(64, 64),
    )
    mixing = torch.randn(64, 64, generator=draw(25, -1)) / 8

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(256, 64, generator=draw(25, i))
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        return 1e-4 * (out.float() - torch.sin(x @ mixing)).pow(2).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of, scaler=torch.amp.GradScaler("cpu") if fixed else None)


@faulty(
    "underflow",
    "stalled",
    "unstepped",
    source="GitHub meta-pytorch/torchtune issue 2254; pytorch/ao pull request 1124",
    words="bfloat16|precision|round|float32",
)
def fine_tuning_in_bfloat16(*, fixed: bool) -> Training:
    """Train bfloat16 weights with a small learning rate: nearly all updates are rounded away."""
    net = he(mlp(32, 128, 128, 5))
    if not fixed:
        net.to(torch.bfloat16)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = clusters(26, d=32, n=128)(i)
        if fixed:
            with torch.autocast("cpu", torch.bfloat16):
                return xent(model(x).float(), y)
        return xent(model(x.to(torch.bfloat16)), y)

    return train(net, AdamW(net.parameters(), 3e-5, weight_decay=0.0), loss_of)


@faulty(
    "exploding",
    "non-finite",
    source="PyTorch forums, 'AMP: loss explodes', where the optimizer was stepped instead of the scaler",
    words="scal",
)
def optimizer_stepped_in_the_scalers_place(*, fixed: bool) -> Training:
    """Scale the loss and then call optimizer.step(): the gradients are still 65,536 times too large."""
    net = he(mlp(6, 32, 32, 1))
    optimizer = SGD(net.parameters(), 0.02)
    scaler = torch.amp.GradScaler("cpu")
    batch = waves(27)

    def step(i: int, tell: Tell) -> None:
        x, y = batch(i)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        loss = mse(out.float(), y)
        scaler.scale(loss).backward()
        tell(loss.detach())
        if fixed:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    return Training(net, [optimizer], step)


@faulty(
    "underflow",
    "disconnected",
    "stalled",
    "vanishing-depth",
    source="Stack Overflow, 'likelihood of a sequence as a product of probabilities is 0'",
    words="log|underflow|product|zero|clamp",
)
def product_of_probabilities(*, fixed: bool) -> Training:
    """Multiply the probabilities of 80 steps, clamp, and take the logarithm: in float32 the product is 0."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0]), rnn=nn.GRU(4, 16, batch_first=True), head=nn.Linear(16, 4))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(28, i)
        words = (torch.randint(4, (16, 1), generator=g) + torch.arange(81)) % 4
        seen = functional.one_hot(words[:, :-1], 4).float()
        log_p = model(seen).log_softmax(2).gather(2, words[:, 1:, None])[:, :, 0]
        if fixed:
            return -log_p.mean()
        return -log_p.exp().prod(1).clamp_min(1e-30).log().mean() / 80

    return train(net, Adam(net.parameters(), 5e-3), loss_of, clip=1.0)
