"""Faulty: the steps are too large, too small, or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam

from benchmarks.runs import Net, Tell, Training, clusters, draw, fit, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import faulty


@faulty(
    "exploding",
    "non-finite",
    source="PyTorch forums, 'Linear regression: loss increases to nan'",
    words="learning rate|standard|normal|scale",
)
def regression_on_raw_areas(*, fixed: bool) -> Training:
    """Regress prices on areas of some thousand square feet with SGD: the loss doubles until it is not a number."""
    net = Net(lambda n, x: n.line(x), line=nn.Linear(2, 1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(30, i)
        size = torch.stack([2000 + 700 * torch.randn(32, generator=g), 3 + torch.randn(32, generator=g)], 1)
        price = (0.15 * size[:, :1] + 20 * size[:, 1:] + 10 * torch.randn(32, 1, generator=g)) / 100
        x = (size - torch.tensor([2000.0, 3.0])) / torch.tensor([700.0, 1.0]) if fixed else size
        return mse(model(x), price)

    return train(net, SGD(net.parameters(), 0.02), loss_of)


@faulty(
    "exploding",
    "stalled",
    "non-finite",
    source="GitHub wenet-e2e/wekws issue 72; pytorch/pytorch issue 47175",
    words="zero_grad|accumul",
)
def gradients_never_zeroed(*, fixed: bool) -> Training:
    """Forget zero_grad(): each step goes along the sum of all gradients so far."""
    net = he(mlp(6, 48, 48, 1))
    optimizer = SGD(net.parameters(), 0.05)
    batch = waves(31)

    def step(i: int, tell: Tell) -> None:
        x, y = batch(i)
        if fixed:
            optimizer.zero_grad()
        loss = mse(net(x), y)
        loss.backward()
        tell(loss.detach())
        optimizer.step()

    return Training(net, [optimizer], step)


@faulty(
    "unstepped",
    "stalled",
    source="GitHub Project-MONAI/tutorials issue 630; EleutherAI/gpt-neox issue 1373",
    words=r"learning rate|\blr\b",
)
def warm_up_by_whole_numbers(*, fixed: bool) -> Training:
    """Warm up with `step // 1000` in place of `step / 1000`: the learning rate is 0 all the time."""
    net = he(mlp(16, 48, 48, 5))
    return train(
        net,
        SGD(net.parameters(), 0.5),
        fit(clusters(32), xent),
        rate=lambda s: min(1.0, (s + 1) / 50 if fixed else s // 1000),
    )


@faulty(
    "exploding",
    "non-finite",
    source="Stack Overflow, 'residual network without batch normalization: loss is nan from the first batch'",
    words="normal|scale|initial|residual|learning rate",
)
def residual_sum_without_normalization(*, fixed: bool) -> Training:
    """Add up 40 He-initialized residual branches without normalization: each block triples the variance."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.relu(self.a(x)))

    net = Net(
        lambda n, x: n.head(n.blocks(n.stem(x))),
        stem=nn.Linear(16, 32),
        blocks=nn.Sequential(*(Block() for _ in range(40))),
        head=nn.Linear(32, 5),
    )
    he(net)
    if fixed:
        for block in net.blocks:
            nn.init.zeros_(block.b.weight)
    return train(net, SGD(net.parameters(), 0.01), fit(clusters(33), xent))


@faulty(
    "dead-units",
    "stalled",
    "exploding",
    "non-finite",
    "vanishing-depth",
    "disconnected",
    source="Stack Overflow, 'CIFAR-10 network stuck at loss 2.303, images were not normalized'",
    words="input|learning rate|standard|normal|scale|update",
)
def images_from_0_to_255(*, fixed: bool) -> Training:
    """Feed raw pixel values to a small convolutional network with a common learning rate: its units die at once."""
    net = Net(
        lambda n, x: n.head(n.body(x).flatten(1)),
        body=nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
        head=nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 4)),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(34, i)
        y = torch.randint(4, (32,), generator=g)
        x = 40 + 20 * torch.randn(32, 1, 8, 8, generator=g)
        for k in range(4):
            rows, columns = slice(4 * (k // 2), 4 * (k // 2) + 4), slice(4 * (k % 2), 4 * (k % 2) + 4)
            x[y == k, :, rows, columns] += 120
        x = x.clamp(0, 255)
        return xent(model((x - 70) / 60 if fixed else x), y)

    return train(net, SGD(net.parameters(), 0.05, momentum=0.9), loss_of)


@faulty(
    "stalled",
    "vanishing-depth",
    "dead-units",
    "disconnected",
    source="GitHub omoindrot/tensorflow-triplet-loss issues 6, 38 and 50; xiaolonw/caffe-video_triplet issue 8",
    words="learning rate|collaps|constant|same|batch|update",
)
def triplets_collapse_to_a_point(*, fixed: bool) -> Training:
    """Mine the hardest triplets with a large learning rate: all embeddings fall together and the loss is the margin."""
    net = Net(lambda n, x: n.embed(x), embed=mlp(16, 64, 64, 8))
    batch = clusters(35, n=40)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        e = model(x)
        if fixed:
            e = functional.normalize(e, dim=1)
        apart = (e[:, None] - e[None]).pow(2).sum(2)
        same = y[:, None] == y[None]
        if fixed:
            gap = apart[:, :, None] - apart[:, None, :] + 0.5
            valid = same[:, :, None] & ~same[:, None, :]
            return gap.relu()[valid].mean()
        hardest = apart.masked_fill(~same, -1.0).amax(1) - apart.masked_fill(same, 1e9).amin(1)
        return (hardest + 0.5).relu().mean()

    return train(net, Adam(net.parameters(), 3e-3 if fixed else 0.03), loss_of)


@faulty(
    "stalled",
    "unstepped",
    "underflow",
    source="Stack Overflow, 'loss does not decrease', a learning rate of 1e-7",
    words=r"learning rate|\blr\b",
    never="sigmoid|kaiming|He initialization|skip connection|detach",
)
def learning_rate_of_a_ten_millionth(*, fixed: bool) -> Training:
    """Train a sound network with plain SGD and a learning rate of 1e-7: its gradients are fine, nothing moves."""
    net = he(mlp(16, 48, 48, 5))
    return train(net, SGD(net.parameters(), 0.1 if fixed else 1e-7), fit(clusters(36), xent))
