"""Healthy: gradients that are zero, tiny, absent or one-sided by design."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from benchmarks.runs import Net, Training, bumps, clusters, draw, fit, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import healthy


@healthy(source="GitHub microsoft/LoRA issues 98 and 167")
def adapters_of_attention() -> Training:
    """Begin low-rank adapters of frozen query and value projections: the first factor gets exactly 0 at step 0."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 2 * self.up(self.down(x))

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.stem(x)
        weights = (n.query(h) @ n.key(h).transpose(1, 2) / math.sqrt(32)).softmax(2)
        return n.head((h + weights @ n.value(h)).mean(1))

    net = Net(
        does,
        stem=nn.Linear(6, 32),
        query=nn.Linear(32, 32),
        key=nn.Linear(32, 32),
        value=nn.Linear(32, 32),
        head=nn.Linear(32, 1),
    )
    net.requires_grad_(False)
    net.query, net.value = Adapted(net.query), Adapted(net.value)

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(32, 8, 6, generator=draw(60, i))
        return mse(model(x), x[:, :, 0].amax(1, keepdim=True))

    return train(net, AdamW([p for p in net.parameters() if p.requires_grad], 5e-3), loss_of)


@healthy(source="GitHub ckczzj/PDAE issue 3; lllyasviel/ControlNet issue 51")
def control_branch_behind_zeros() -> Training:
    """Join a trainable copy to a frozen network by convolutions that begin at zero: the copy gets nothing at first."""
    frozen = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
    copied = copy.deepcopy(frozen)
    frozen.requires_grad_(False)
    join = nn.Conv2d(8, 8, 1)
    nn.init.zeros_(join.weight), nn.init.zeros_(join.bias)
    net = Net(
        lambda n, x: n.out(n.frozen(x) + n.join(n.copied(x))),
        frozen=frozen,
        copied=copied,
        join=join,
        out=nn.Conv2d(8, 1, 1).requires_grad_(False),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(16, 1, 8, 8, generator=draw(61, i))
        return mse(model(x), functional.avg_pool2d(x, 3, 1, 1))

    return train(net, Adam([p for p in net.parameters() if p.requires_grad], 2e-3), loss_of)


@healthy(source="GitHub lhoyer/DAFormer issue 59")
def student_and_averaged_teacher() -> Training:
    """Follow a teacher that is the moving average of the student and never gets a gradient."""
    student = mlp(16, 48, 48, 8, norm=nn.LayerNorm)
    teacher = copy.deepcopy(student).requires_grad_(False)
    net = Net(lambda n, x: n.head(n.student(x)), student=student, teacher=teacher, head=nn.Linear(8, 5))
    batch = clusters(62)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        with torch.no_grad():
            for old, new in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                old.lerp_(new, 0.02)
            goal = model.teacher(x)
        noisy = x + 0.1 * torch.randn_like(x)
        return xent(model(x), y) + 0.5 * mse(model.student(noisy), goal)

    return train(net, Adam([p for p in net.parameters() if p.requires_grad], 2e-3), loss_of)


@healthy(source="GitHub lucidrains/vector-quantize-pytorch issue 40")
def codebook_by_moving_average() -> Training:
    """Quantize with a codebook that is a buffer, moved by averages and never by gradients."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = n.encoder(x)
        which = torch.cdist(z, n.codes).argmin(1)
        code = n.codes[which]
        with torch.no_grad():
            hit = functional.one_hot(which, 16).float()
            seen = hit.sum(0)
            mean = (hit.t() @ z) / seen.clamp_min(1)[:, None]
            n.codes[seen > 0] = 0.9 * n.codes[seen > 0] + 0.1 * mean[seen > 0]
        return n.decoder(z + (code - z).detach()), z, code

    net = Net(does, encoder=mlp(8, 32, 4), decoder=mlp(4, 32, 8))
    net.register_buffer("codes", 0.3 * torch.randn(16, 4))
    mixing = torch.randn(3, 8, generator=draw(63, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.tanh(torch.randn(64, 3, generator=draw(63, i)) @ mixing)
        out, z, code = model(x)
        return mse(out, x) + 0.25 * mse(z, code.detach())

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@healthy(source="GitHub google-research/vmoe issue 6")
def experts_that_idle() -> Training:
    """Route each sample to the best two of eight experts: in many batches some get nothing."""

    def does(n: Any, x: Tensor) -> Tensor:
        gate, which = n.router(x).softmax(1).topk(2, dim=1)
        out = torch.zeros(len(x), 16)
        for k, expert in enumerate(n.experts):
            rows, slot = (which == k).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * gate[rows, slot, None])
        return n.head(out)

    net = Net(
        does,
        router=nn.Linear(16, 8),
        experts=nn.ModuleList(mlp(16, 32, 16) for _ in range(8)),
        head=nn.Linear(16, 5),
    )
    return train(net, Adam(net.parameters(), 3e-3), fit(clusters(64, n=12), xent))


@healthy(source="GitHub huggingface/pytorch-openai-transformer-lm pull request 6")
def tied_language_model() -> Training:
    """Use the embedding as the output layer too: one weight, two uses, and rows that a batch does not hold."""

    def does(n: Any, words: Tensor) -> Tensor:
        out, _ = n.rnn(n.embed(words))
        return n.project(out) @ n.embed.weight.t()

    net = Net(does, embed=nn.Embedding(60, 24), rnn=nn.GRU(24, 32, batch_first=True), project=nn.Linear(32, 24))
    nn.init.normal_(net.embed.weight, std=0.1)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(65, i)
        words = (torch.randint(60, (16, 1), generator=g) + 7 * torch.arange(13)) % 60
        return xent(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


@healthy(source="GitHub vwxyzjn/cleanrl issue 441; open-mmlab/mmsegmentation issue 365")
def tasks_of_unequal_weight() -> Training:
    """Weigh an auxiliary task 1/10,000: its head gets that much less, and learns with Adam all the same."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = n.trunk(x)
        return n.main(h), n.auxiliary(h)

    net = Net(does, trunk=nn.Sequential(mlp(6, 48, 48), nn.ReLU()), main=nn.Linear(48, 1), auxiliary=mlp(48, 16, 1))
    batch = waves(66)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        main, auxiliary = model(x)
        return mse(main, y) + 1e-4 * mse(auxiliary, x[:, :1] ** 2)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@healthy(source="GitHub ShoufaChen/DiffusionDet issue 58; open-mmlab/mmsegmentation issue 365")
def exits_at_every_depth() -> Training:
    """Supervise an exit after each of five blocks: early blocks get five gradients, the last one."""

    def does(n: Any, x: Tensor) -> list[Tensor]:
        h, exits = n.stem(x), []
        for block, leave in zip(n.blocks, n.exits, strict=True):
            h = h + block(h)
            exits.append(leave(h))
        return exits

    net = Net(
        does,
        stem=nn.Linear(16, 32),
        blocks=nn.ModuleList(nn.Sequential(nn.LayerNorm(32), mlp(32, 32, 32)) for _ in range(5)),
        exits=nn.ModuleList(nn.Linear(32, 5) for _ in range(5)),
    )
    batch = clusters(67)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        return sum((0.5 ** (4 - k) * xent(out, y) for k, out in enumerate(model(x))), torch.zeros(()))

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@healthy(source="GitHub pytorch/pytorch issue 90171; huggingface/accelerate issue 1191")
def blocks_dropped_at_random() -> Training:
    """Drop whole residual blocks at random: in half of the steps a block has no gradient at all."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.stem(x)
        for block in n.blocks:
            if torch.rand(()) < 0.5:
                h = h + 2 * block(h)
        return n.head(h)

    net = Net(
        does,
        stem=nn.Linear(16, 32),
        blocks=nn.ModuleList(nn.Sequential(nn.LayerNorm(32), mlp(32, 32, 32)) for _ in range(6)),
        head=nn.Linear(32, 5),
    )
    return train(net, Adam(net.parameters(), 2e-3), fit(clusters(68), xent))


@healthy(source="GitHub omoindrot/tensorflow-triplet-loss issue 6")
def triplets_become_easy() -> Training:
    """Learn triplets until none violates the margin: then the loss and all gradients are exactly 0, and rightly so."""
    net = Net(lambda n, x: functional.normalize(n.embed(x), dim=1), embed=mlp(16, 64, 8))
    centres = 3 * torch.randn(4, 16, generator=draw(69, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(69, i)
        x = centres[:, None] + 0.2 * torch.randn(4, 6, 16, generator=g)
        e = model(x)
        near = (e[:, :3] - e[:, 3:]).pow(2).sum(2)
        far = (e[:, :3] - e[[1, 2, 3, 0], 3:]).pow(2).sum(2)
        return (near - far + 0.3).relu().mean()

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


@healthy(source="Stack Overflow, 'reconstruction loss of the autoencoder is 0.0001 from the beginning'", steps=200)
def reconstruction_of_small_numbers() -> Training:
    """Reconstruct daily returns of a hundredth: the loss is 0.0001 at the start and a tenth of that at the end."""
    net = mlp(12, 24, 4, 24, 12, act=nn.Tanh)
    with torch.no_grad():
        net[-1].weight.mul_(0.01), net[-1].bias.zero_()
    mixing = 0.01 * torch.randn(3, 12, generator=draw(70, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(64, 3, generator=draw(70, i)) @ mixing
        return mse(model(x), x)

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@healthy(source="Stack Overflow, 'LSTM for stock direction stays at 50 % accuracy and loss 0.693'")
def direction_of_returns_is_noise() -> Training:
    """Learn the direction of returns, of which next to nothing is known: the loss stays near ln 2, as it must."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0][:, -1]), rnn=nn.LSTM(2, 24, batch_first=True), head=nn.Linear(24, 1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(71, i)
        x = torch.randn(64, 20, 2, generator=g)
        up = (0.25 * x[:, -1, :1] + torch.randn(64, 1, generator=g) > 0).float()
        return functional.binary_cross_entropy_with_logits(model(x), up)

    return train(net, Adam(net.parameters(), 1e-3), loss_of)


@healthy(source="PyTorch forums, 'gradients become very small when the training has converged'", steps=250)
def learnt_to_the_last_digit() -> Training:
    """Go on with training a solved regression: gradients shrink by many orders of magnitude because all is learnt."""
    net = mlp(4, 16, 1, act=nn.Identity)
    x = torch.randn(64, 4, generator=draw(72, 0))
    y = x @ torch.tensor([[1.0], [-0.5], [0.3], [0.0]])
    return train(net, SGD(net.parameters(), 0.2), lambda m, _: mse(m(x), y))


@healthy(source="PyTorch forums, 'frozen feature extractor in train mode under no_grad'")
def features_under_no_grad_on_purpose() -> Training:
    """Train a head on frozen features that are computed under no_grad()."""

    def does(n: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = n.backbone(x).flatten(1)
        return n.head(features)

    net = Net(
        does,
        backbone=nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()
        ),
        head=mlp(64, 32, 4),
    )
    he(net)
    net.backbone.requires_grad_(False).eval()
    return train(net, Adam(net.head.parameters(), 5e-3), fit(bumps(73), xent))


@healthy(source="GitHub yunjey/pytorch-tutorial issue 90; dpressel/dliss-tutorial issue 1")
def state_carried_on_and_detached() -> Training:
    """Carry the state of a language model from window to window and detach it, as truncated backpropagation does."""
    net = Net(
        lambda n, x, h: n.rnn(x, h if h.numel() else None),
        rnn=nn.GRU(7, 32, batch_first=True),
        head=nn.Linear(32, 7),
    )
    held = [torch.zeros(0)]

    def loss_of(model: Any, i: int) -> Tensor:
        words = (torch.arange(16)[:, None] + 3 * (12 * i + torch.arange(13))) % 7
        out, state = model(functional.one_hot(words[:, :-1], 7).float(), held[0])
        held[0] = state.detach()
        return xent(model.head(out).flatten(0, 1), words[:, 1:].flatten())

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


@healthy(source="Stack Overflow, 'how many timesteps does my GRU look back', where five are enough", horizon=5)
def need_of_five_steps() -> Training:
    """Forecast from the newest five of 30 bars with a stock GRU, and say so: that is within its reach."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0][:, -1]), rnn=nn.GRU(2, 32, batch_first=True), head=nn.Linear(32, 1))

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(32, 30, 2, generator=draw(74, i))
        return mse(model(x), x[:, -5:, :1].mean(1))

    return train(net, Adam(net.parameters(), 5e-3), loss_of)
