"""Healthy, and written without a look at what gradwatch says: what a naive monitor of gradients would accuse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, train, xent
from benchmarks.situations.situation import healthy

# --- zero, or nearly, at the beginning ---


def patches(x: Tensor) -> Tensor:
    """Cut 8 x 8 images into 16 patches of 2 x 2."""
    return functional.unfold(x, 2, stride=2).transpose(1, 2)


def smooth(seed: int, i: int, n: int = 32) -> Tensor:
    """Draw smooth 8 x 8 images of about unit size: sums of a few plane waves."""
    g = draw(seed, i)
    k, phase = torch.randn(n, 2, 2, generator=g), 6.28 * torch.rand(n, 2, 1, 1, generator=g)
    r = torch.linspace(-1, 1, 8)
    arg = k[:, :, :1, None] * r[None, None, :, None] + k[:, :, 1:, None] * r[None, None, None, :]
    return torch.sin(2 * arg + phase).sum(1, keepdim=True)


@healthy(source="GitHub facebookresearch/DiT issue 82; MCG-NJU/DDT issue 14; SWivid/F5-TTS issue 793", steps=180)
def modulated_denoiser() -> Training:
    """Train a diffusion transformer whose modulations and last layer begin at zero, as its authors do."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
            self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(approximate="tanh"), nn.Linear(64, width))
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            nn.init.zeros_(self.modulation[-1].weight), nn.init.zeros_(self.modulation[-1].bias)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)
            h = self.norm1(x) * (1 + scale1) + shift1
            x = x + gate1 * self.attn(h, h, h, need_weights=False)[0]
            return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    class Denoiser(nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.embed, self.time = nn.Linear(4, width), mlp(16, width, width, act=nn.SiLU)
            self.pos = nn.Parameter(0.5 * torch.randn(16, width))
            self.blocks = nn.ModuleList(Block(width) for _ in range(2))
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
            self.final = nn.Linear(width, 4)
            nn.init.zeros_(self.final.weight), nn.init.zeros_(self.final.bias)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            f = t[:, None] * 2.0 ** torch.arange(-2, 6)
            c, h = self.time(torch.cat([f.sin(), f.cos()], 1)), self.embed(x) + self.pos
            for block in self.blocks:
                h = block(h, c)
            return self.final(self.norm(h))

    net = Denoiser()

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(901, 100_000 + i)
        x, t = patches(smooth(901, i, 16)), torch.rand(16, generator=g)
        noise = torch.randn(16, 16, 4, generator=g)
        mixed = (1 - t)[:, None, None] * x + t[:, None, None] * noise
        return mse(model(mixed, t), noise - x)

    return train(net, AdamW(net.parameters(), 2e-3), loss_of)


@healthy(source="GitHub tensorpack/tensorpack issue 420; google-deepmind/sonnet issue 185", steps=150)
def pictures_by_shortcuts_first() -> Training:
    """Begin the last normalization of every residual branch at a scale of zero, as torchvision's zero_init_residual."""

    class Basic(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            nn.init.zeros_(self.bn2.weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Basic(16),
        Basic(16),
        nn.AvgPool2d(2),
        Basic(16),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    he(net)
    optimizer = SGD(net.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return train(net, optimizer, fit(bumps(902), xent), rate=lambda i: 0.5 + 0.5 * math.cos(math.pi * i / 150))


@healthy(source="GitHub chaiyujin/glow-pytorch issue 12; rosinality/glow-pytorch issue 22", steps=200)
def density_of_a_crescent() -> Training:
    """Fit a flow of six couplings that all begin as the identity; the loss may fall below zero."""

    class Coupling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2, 32, 32, 4)
            nn.init.zeros_(self.net[-1].weight), nn.init.zeros_(self.net[-1].bias)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = x.chunk(2, dim=1)
            scale, shift = self.net(a).chunk(2, dim=1)
            scale = torch.tanh(scale)
            return torch.cat([b * scale.exp() + shift, a], 1), scale.sum(1)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(Coupling() for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(len(x))
            for coupling in self.steps:
                x, logdet = coupling(x)
                total = total + logdet
            return total - 0.5 * (x**2).sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    net = Flow()

    def loss_of(model: Any, i: int) -> Tensor:
        z = torch.randn(128, 4, generator=draw(903, i))
        first, second = z[:, :1], z[:, 1:2]
        x = torch.cat(
            [
                first,
                0.4 * second + 0.7 * (first**2 - 1),
                0.4 * z[:, 2:3] + second,
                0.4 * z[:, 3:] + torch.sin(2 * first),
            ],
            1,
        )
        return -model(x).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of, clip=5.0)


@healthy(source="GitHub facebookresearch/ConvNeXt issues 27 and 44; facebookresearch/deit issue 122", steps=150)
def branches_scaled_by_a_millionth() -> Training:
    """Begin the scale of each branch of a small ConvNeXt at 1e-6: branches hardly count until it has grown."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.pwconv1, self.pwconv2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.gamma = nn.Parameter(1e-6 * torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
            h = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(h)))
            return x + h.permute(0, 3, 1, 2)

    net = nn.Sequential(
        nn.Conv2d(1, 16, 2, stride=2),
        nn.GroupNorm(1, 16),
        *(Block(16) for _ in range(5)),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 4),
    )
    return train(net, AdamW(net.parameters(), 4e-3, weight_decay=0.05), fit(bumps(904), xent))


# --- gradients by another rule than the true one ---


@healthy(source="GitHub itayhubara/BinaryNet.pytorch issues 9, 22 and 31; itayhubara/BinaryNet.tf issue 8", steps=250)
def weights_of_one_bit() -> Training:
    """Train a binarized network: signs forward, a clipped identity backward, weights kept within -1 and 1."""

    def sign(x: Tensor) -> Tensor:
        hard = x.clamp(-1, 1)
        return hard + (torch.where(x >= 0, 1.0, -1.0) - hard).detach()

    class BinaryLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, sign(self.weight), self.bias)

    def does(n: Any, x: Tensor) -> Tensor:
        h = sign(n.norm1(n.first(x)))
        h = sign(n.norm2(n.second(h)))
        h = sign(n.norm3(n.third(h)))
        return n.head(h)

    net = Net(
        does,
        first=nn.Linear(16, 64),
        norm1=nn.BatchNorm1d(64),
        second=BinaryLinear(64, 64, bias=False),
        norm2=nn.BatchNorm1d(64),
        third=BinaryLinear(64, 64, bias=False),
        norm3=nn.BatchNorm1d(64),
        head=nn.Linear(64, 5),
    )
    optimizer, loss_of = Adam(net.parameters(), 5e-3), fit(clusters(905), xent)

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        tell(loss.detach())
        optimizer.step()
        with torch.no_grad():
            net.second.weight.clamp_(-1, 1), net.third.weight.clamp_(-1, 1)

    return Training(net, [optimizer], step, loss_of)


class Spike(torch.autograd.Function):
    """A step forward, the slope of a fast sigmoid backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        """Fire above zero."""
        ctx.save_for_backward(u)
        return (u > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Blur the step."""
        (u,) = ctx.saved_tensors
        return grad / (10 * u.abs() + 1) ** 2


@healthy(source="GitHub fangwei123456/spikingjelly issue 190; jeshraghian/snntorch pull requests 46 and 239", steps=200)
def spikes_over_twelve_ticks() -> Training:
    """Train leaky neurons that spike, by a surrogate gradient: most are silent at most ticks."""

    def does(n: Any, x: Tensor) -> Tensor:
        first, second, out = torch.zeros(len(x), 48), torch.zeros(len(x), 48), torch.zeros(len(x), 5)
        fired1, fired2, total = first, second, out
        current = n.fc1(x)
        for _ in range(12):
            first = 0.8 * first + current - fired1.detach()
            fired1 = Spike.apply(first - 1)
            second = 0.8 * second + n.fc2(fired1) - fired2.detach()
            fired2 = Spike.apply(second - 1)
            out = 0.9 * out + n.fc3(fired2)
            total = total + out
        return total / 12

    net = Net(does, fc1=nn.Linear(16, 48), fc2=nn.Linear(48, 48), fc3=nn.Linear(48, 5))
    with torch.no_grad():
        net.fc2.weight.mul_(2.0)
    return train(net, Adam(net.parameters(), 3e-3, betas=(0.9, 0.999)), fit(clusters(906), xent))


@healthy(source="GitHub locuslab/deq issue 11 and the Deep Implicit Layers tutorial, chapter 4", steps=200)
def equilibrium_of_a_layer() -> Training:
    """Solve for a fixed point under no_grad, and let a hook solve the linear system of its gradient."""

    class Equilibrium(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear, self.inject = nn.Linear(width, width), nn.Linear(16, width)
            with torch.no_grad():
                self.linear.weight.mul_(0.8)

        def f(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(z) + self.inject(x))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = torch.zeros(len(x), self.linear.in_features)
                for _ in range(20):
                    z = self.f(z, x)
            z = self.f(z, x)
            if z.requires_grad:
                z0 = z.detach().requires_grad_()
                f0 = self.f(z0, x)

                def solve(grad: Tensor) -> Tensor:
                    y = grad
                    for _ in range(15):
                        y = torch.autograd.grad(f0, z0, y, retain_graph=True)[0] + grad
                    return y

                z.register_hook(solve)
            return z

    net = nn.Sequential(Equilibrium(32), nn.Linear(32, 5))
    return train(net, Adam(net.parameters(), 2e-3), fit(clusters(907), xent))


# --- gradients that are sparse, or there only now and then ---


@healthy(source="GitHub pytorch/pytorch issues 1812 and 3506; bentrevett/pytorch-seq2seq issue 167", steps=240)
def reviews_of_unequal_length() -> Training:
    """Classify padded reviews over 800 words: the padding's row and all words that a batch lacks get exactly 0."""

    def does(n: Any, words: Tensor) -> Tensor:
        there = (words > 0)[:, :, None].float()
        pooled = (n.embedding(words) * there).sum(1) / there.sum(1).sqrt()
        return n.head(torch.relu(n.hidden(n.drop(pooled))))

    net = Net(
        does,
        embedding=nn.Embedding(800, 24, padding_idx=0),
        drop=nn.Dropout(0.3),
        hidden=nn.Linear(24, 32),
        head=nn.Linear(32, 2),
    )
    often = 1 / torch.arange(5.0, 804.0)
    tone = torch.randn(800, generator=draw(908, -1))
    tone[0] = 0

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(908, i)
        words = 1 + torch.multinomial(often, 32 * 40, replacement=True, generator=g).reshape(32, 40)
        length = torch.randint(5, 41, (32, 1), generator=g)
        words = words.masked_fill(torch.arange(40) >= length, 0)
        return words, (tone[words].sum(1) > 0).long()

    return train(net, Adam(net.parameters(), 1e-2), fit(batch, xent))


@healthy(source="GitHub jiant-dev/jiant-dev issue 154; JayYip/m3tl issue 42", steps=240)
def one_of_four_tasks_at_a_time() -> Training:
    """Draw one of four tasks for each batch: three heads of four have no gradient, the rarest has one in 20 steps."""
    net = Net(
        lambda n, x: n.trunk(x),
        trunk=nn.Sequential(mlp(8, 48, 48), nn.ReLU()),
        heads=nn.ModuleDict(
            {"price": nn.Linear(48, 1), "kind": nn.Linear(48, 4), "age": nn.Linear(48, 1), "sold": nn.Linear(48, 2)}
        ),
    )
    a = torch.randn(8, 4, generator=draw(909, -1)) / math.sqrt(8)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(909, i)
        task = ("price", "kind", "age", "sold")[int(torch.multinomial(torch.tensor([10.0, 6, 3, 1]), 1, generator=g))]
        x = torch.randn(64, 8, generator=g)
        u = x @ a
        out = model.heads[task](model(x))
        if task == "kind":
            return xent(out, u.argmax(1))
        if task == "sold":
            return xent(out, (u[:, 0] > u[:, 1]).long())
        return mse(out, torch.sin(2 * u[:, :1]) if task == "price" else torch.tanh(2 * u[:, 2:3]) + u[:, :1])

    return train(net, Adam(net.parameters(), 3e-3, amsgrad=True), loss_of)


@healthy(
    source="Kipf and Welling, 'Semi-supervised classification with graph convolutional networks', and their settings",
    steps=200,
)
def few_labelled_nodes() -> Training:
    """Classify the nodes of a graph with two layers, where 40 of 400 have labels, with dropout and decay."""
    g = draw(910, -1)
    kind = torch.randint(4, (400,), generator=g)
    same = (kind[:, None] == kind).float()
    edge = (torch.rand(400, 400, generator=g) < 0.03 * same + 0.002).float().triu(1)
    edge = edge + edge.t() + torch.eye(400)
    root = edge.sum(1).rsqrt()
    mix = (root[:, None] * edge * root).to_sparse()
    words = (torch.rand(400, 60, generator=g) < 0.03 + 0.10 * (torch.arange(60) % 4 == kind[:, None])).float()
    words = words / words.sum(1, keepdim=True).clamp_min(1)
    some = torch.cat([(kind == k).nonzero()[:10, 0] for k in range(4)])

    def does(n: Any, x: Tensor) -> Tensor:
        h = torch.relu(torch.sparse.mm(mix, n.gc1(n.drop(x))))
        return torch.sparse.mm(mix, n.gc2(n.drop(h)))

    net = Net(does, gc1=nn.Linear(60, 16), gc2=nn.Linear(16, 4), drop=nn.Dropout(0.5))
    optimizer = Adam(net.parameters(), 1e-2, weight_decay=5e-4)
    return train(net, optimizer, lambda m, _: xent(m(words)[some], kind[some]))


@healthy(
    source="GitHub implus/UM-MAE issue 20; He et al., 'Masked Autoencoders Are Scalable Vision Learners'", steps=200
)
def three_quarters_of_the_picture_hidden() -> Training:
    """Show an encoder a quarter of the patches; the loss counts the hidden ones only, and falls slowly."""

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)

    place = torch.stack(
        [
            f(p * w)
            for p in torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).unbind(1)
            for w in (0.4, 0.8, 1.2, 1.6)
            for f in (torch.sin, torch.cos)
        ],
        1,
    )
    place = torch.cat([place, torch.zeros(16, 32 - place.shape[1])], 1)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.encoder, self.norm = nn.Linear(4, 32), layer(), nn.LayerNorm(32)
            self.mask_token = nn.Parameter(0.02 * torch.randn(32))
            self.enter, self.decoder, self.pixels = nn.Linear(32, 32), layer(), nn.Linear(32, 4)
            self.register_buffer("pos", place)

        def forward(self, x: Tensor, order: Tensor) -> Tensor:
            seen = order[:, :4]
            h = torch.gather(self.embed(x) + self.pos, 1, seen[:, :, None].expand(-1, -1, 32))
            h = self.enter(self.norm(self.encoder(h)))
            full = self.mask_token.expand(len(x), 16, 32).scatter(1, seen[:, :, None].expand(-1, -1, 32), h)
            return self.pixels(self.decoder(full + self.pos))

    net = Masked()

    def loss_of(model: Any, i: int) -> Tensor:
        x = patches(smooth(911, i))
        order = torch.rand(32, 16, generator=draw(911, 100_000 + i)).argsort(1)
        hidden = torch.zeros(32, 16).scatter(1, order[:, 4:], 1.0)
        return ((model(x, order) - x).pow(2).mean(2) * hidden).sum() / hidden.sum()

    return train(
        net,
        AdamW(net.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        loss_of,
        rate=lambda i: min(1.0, (i + 1) / 20),
    )


# --- losses that are tiny, huge, negative, flat or rising ---


@healthy(source="GitHub facebookresearch/deit issue 134, 'KL divergence about 4e-5 in the first epoch'", steps=200)
def student_of_soft_answers() -> Training:
    """Follow a teacher's softened answers by a mean over batch and classes: a loss of a thousandth and less."""
    batch = clusters(912, classes=40)
    teacher = mlp(16, 64, 64, 40)
    before, optimizer = fit(batch, xent), Adam(teacher.parameters(), 5e-3)
    for i in range(150):
        optimizer.zero_grad()
        before(teacher, i + 5000).backward()
        optimizer.step()
    teacher.requires_grad_(False).zero_grad()
    student = mlp(16, 32, 40)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = student, teacher.eval()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                soft = self.teacher(x)
            return self.student(x), soft

    net = Pair()

    def loss_of(model: Any, i: int) -> Tensor:
        mine, soft = model(batch(i)[0])
        return functional.kl_div((mine / 10).log_softmax(1), (soft / 10).softmax(1), reduction="mean")

    return train(net, Adam(net.student.parameters(), 3e-3), loss_of)


@healthy(source="Well-known practice: errors in the unit of the target, standardization undone in the model", steps=200)
def prices_of_houses() -> Training:
    """Regress prices in euros on a network that undoes its own standardization: errors of 100,000, which is right."""
    net = Net(lambda n, x: 450_000 + 200_000 * n.net(x), net=mlp(8, 48, 48, 1))
    a = torch.randn(8, 2, generator=draw(913, -1)) / math.sqrt(8)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(913, i)
        x = torch.randn(64, 8, generator=g)
        u = x @ a
        return x, 400_000 * torch.exp(
            0.4 * u[:, :1] + 0.2 * torch.sin(2 * u[:, 1:]) + 0.05 * torch.randn(64, 1, generator=g)
        )

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, functional.l1_loss))


@healthy(
    source=(
        "GitHub open-mmlab/mmdetection issue 1825; xingyizhou/CenterNet issue 826; zhangxiaosong18/FreeAnchor issue 15"
    ),
    steps=180,
)
def one_object_among_256_cells() -> Training:
    """Find an object with a focal loss from a prior of a hundredth: the loss is a hundredth or less from the start."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )
    he(net)
    with torch.no_grad():
        net[-1].weight.normal_(std=0.01), net[-1].bias.fill_(-math.log(99))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(914, i)
        at = torch.randint(1, 15, (16, 2), generator=g)
        r = torch.arange(16)
        near = ((r[None, :, None] - at[:, :1, None]).abs() + (r[None, None] - at[:, 1:, None]).abs()).float()
        x = (0.5 * torch.randn(16, 16, 16, generator=g) + 1.2 * (near <= 1))[:, None]
        truth = (near == 0).float()[:, None]
        logits = model(x)
        p = logits.sigmoid()
        right = torch.where(truth > 0, p, 1 - p)
        weigh = torch.where(truth > 0, 0.25, 0.75) * (1 - right) ** 2
        return (weigh * functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@healthy(source="Hyvarinen's score matching as in GitHub soran-ghaderi/torchebm issues 62 and 63", steps=200)
def score_of_an_energy() -> Training:
    """Match the score of an energy exactly, by second derivatives: the loss is negative, and a constant is free."""
    net = Net(lambda n, x: n.body(x) + 0.5 * (x**2).sum(1, keepdim=True), body=mlp(2, 48, 48, 1, act=nn.Softplus))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(915, i)
        sign = torch.randint(2, (128, 1), generator=g) * 2.0 - 1
        x = (sign * torch.tensor([[1.0, 0.7]]) + 0.4 * torch.randn(128, 2, generator=g)).requires_grad_()
        (score,) = torch.autograd.grad(-model(x).sum(), x, create_graph=True)
        trace = sum(
            (torch.autograd.grad(score[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(2)), torch.zeros(128)
        )
        return (0.5 * (score**2).sum(1) + trace).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@healthy(
    source=(
        "UvA deep learning tutorial 8; GitHub wuaalb/keras_extensions issue 7; swyoon/normalized-autoencoders issue 8"
    ),
    steps=200,
)
def energy_of_a_ring() -> Training:
    """Lower the energy of data and raise that of samples: the loss hovers around 0, and weights rest while sampling."""
    net = he(mlp(2, 48, 48, 1, act=nn.SiLU))
    optimizer = Adam(net.parameters(), 1e-2, betas=(0.0, 0.999))
    held = [2 * torch.rand(256, 2, generator=draw(916, -1)) - 1]

    def step(i: int, tell: Tell) -> None:
        g = draw(916, i)
        angle = 6.2832 * torch.rand(64, 1, generator=g)
        real = torch.cat([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(64, 2, generator=g)
        pick = torch.randint(256, (64,), generator=g)
        fake = held[0][pick]
        fake[:4] = 4 * torch.rand(4, 2, generator=g) - 2
        for p in net.parameters():
            p.requires_grad_(False)
        for _ in range(20):
            fake.requires_grad_()
            (slope,) = torch.autograd.grad(net(fake).sum(), fake)
            fake = (
                (fake - (0.05 * slope).clamp(-0.2, 0.2) + 0.1 * torch.randn(64, 2, generator=g)).clamp(-2, 2).detach()
            )
        for p in net.parameters():
            p.requires_grad_(True)
        held[0][pick] = fake
        optimizer.zero_grad()
        low, high = net(real), net(fake)
        loss = (low - high).mean() + 0.02 * (low**2 + high**2).mean()
        loss.backward()
        tell(loss.detach())
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()

    return Training(net, [optimizer], step)


@healthy(
    source="GitHub google/flax issue 4771 (its code in PyTorch); SciML/NeuralPDE.jl issue 1",
    steps=250,
)
def oscillator_by_its_equation() -> Training:
    """Solve u'' = -9 u by a physics-informed network: no data, second derivatives, a loss that begins above 10."""
    net = mlp(1, 32, 32, 32, 1, act=nn.Tanh)

    def loss_of(model: Any, i: int) -> Tensor:
        t = torch.rand(64, 1, generator=draw(917, i)).requires_grad_()
        u = model(t)
        (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), t, create_graph=True)
        start = torch.zeros(1, 1, requires_grad=True)
        u0 = model(start)
        (du0,) = torch.autograd.grad(u0.sum(), start, create_graph=True)
        return (ddu + 9 * u).pow(2).mean() + 50 * (u0 - 1).pow(2).sum() + 5 * du0.pow(2).sum()

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


@healthy(source="GitHub princeton-nlp/SimCSE issues 40 and 97; huggingface/sentence-transformers issue 3054", steps=200)
def twins_by_dropout() -> Training:
    """Pull together two dropouts of a sentence at a temperature of 0.05: the loss soon is small, gradients uneven."""

    def does(n: Any, x: Tensor) -> Tensor:
        return functional.normalize(n.project(n.encoder(n.drop(x))), dim=1)

    net = Net(does, drop=nn.Dropout(0.3), encoder=mlp(48, 64, 64, act=nn.GELU), project=nn.Linear(64, 24))
    base = torch.randn(12, 48, generator=draw(918, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(918, i)
        x = 1 + torch.randn(48, 12, generator=g) @ base / math.sqrt(12) + 0.1 * torch.randn(48, 48, generator=g)
        return xent(model(x) @ model(x).t() / 0.05, torch.arange(48))

    return train(net, AdamW(net.parameters(), 1e-3), loss_of)


@healthy(
    source="Bengio et al., 'Curriculum learning'",
    steps=200,
)
def harder_pictures_step_by_step() -> Training:
    """Add noise to the pictures in four stages: the loss jumps up at each, and ends above where it had been."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 4),
    )
    he(net)
    task = bumps(919)

    def batch(i: int) -> tuple[Tensor, ...]:
        x, y = task(i)
        return x + (0.0, 0.3, 0.5, 0.7)[min(3, i // 50)] * torch.randn(x.shape, generator=draw(920, i)), y

    return train(net, Adam(net.parameters(), 2e-3), fit(batch, xent))


# --- optimizers and schedules ---


@healthy(
    source="GitHub AlexeyAB/darknet pull request 2651; Loshchilov and Hutter, 'SGDR'; Zhang et al., 'mixup'", steps=200
)
def restarts_on_mixed_pictures() -> Training:
    """Mix pictures and smooth labels, so the loss has a high floor; restart a cosine from 0 to its top four times."""

    class Excite(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.squeeze, self.excite = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]

    layers = [
        m
        for k in range(3)
        for m in (nn.Conv2d(16 if k else 1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Excite(16))
    ]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4))
    task = bumps(921)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = task(i)
        a, b = (torch.randn(3, generator=draw(922, i)) ** 2).sum(), (torch.randn(3, generator=draw(923, i)) ** 2).sum()
        part = float(a / (a + b))
        order = torch.randperm(len(x), generator=draw(924, i))
        out = model(part * x + (1 - part) * x[order])
        return part * functional.cross_entropy(out, y, label_smoothing=0.1) + (1 - part) * functional.cross_entropy(
            out, y[order], label_smoothing=0.1
        )

    optimizer = SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    return train(net, optimizer, loss_of, rate=lambda i: 0.5 + 0.5 * math.cos(math.pi * (i % 50) / 50))


class Lars(Optimizer):
    """Layer-wise adaptive rates: a step is a share of the weight's own norm."""

    def __init__(
        self, params: Iterable[Any], lr: float, trust: float = 1e-3, momentum: float = 0.9, weight_decay: float = 1e-4
    ) -> None:
        """Take what SGD takes, and the trust coefficient."""
        super().__init__(params, {"lr": lr, "trust": trust, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Move weights; biases and normalizations are not adapted."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                move = p.grad
                if p.ndim > 1:
                    move = move + group["weight_decay"] * p
                    size, slope = p.norm(), move.norm()
                    if size > 0 and slope > 0:
                        move = move * (group["trust"] * size / slope)
                else:
                    move = move * 0.01
                state = self.state[p]
                state["v"] = group["momentum"] * state.get("v", torch.zeros_like(p)) + group["lr"] * move
                p.sub_(state["v"])


@healthy(
    source="GitHub tensorflow/models pull request 6327 (rates of 5 to 10); noahgolmant/pytorch-lars issue 1", steps=150
)
def rate_of_ten_for_large_batches() -> Training:
    """Train a convolutional network by LARS on batches of 192, with a rate that rises to 10 and falls by a square."""
    layers = [
        m
        for k in range(3)
        for m in (nn.Conv2d(12 if k else 1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    ]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 4))

    def rate(i: int) -> float:
        return (i + 1) / 25 if i < 25 else (1 - (i - 25) / 126) ** 2

    return train(net, Lars(net.parameters(), 10.0), fit(bumps(925, n=192), xent), rate=rate)


class Lion(Optimizer):
    """Steps by the sign of an average: every weight moves equally far, however small its gradient."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1
    ) -> None:
        """Take what AdamW takes."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Move weights."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                average = state.setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((group["betas"][0] * average + (1 - group["betas"][0]) * p.grad).sign(), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - group["betas"][1])


@healthy(
    source="GitHub pytorch/pytorch issue 111736; mlfoundations/open_clip pull request 432; Swin V2's cosine attention",
    steps=200,
)
def signs_and_learned_temperatures() -> Training:
    """Train cosine attention with a learned temperature per head, by Lion; branches end in norms that begin at 0."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
            self.logit_scale = nn.Parameter(torch.full((4, 1, 1), math.log(10.0)))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(len(x), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
            close = functional.normalize(q, dim=3) @ functional.normalize(k, dim=3).transpose(2, 3)
            weights = (close * self.logit_scale.clamp(max=math.log(100.0)).exp()).softmax(3)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.stem(x)
        for attend, norm1, feed, norm2 in zip(n.attend, n.norm1, n.feed, n.norm2, strict=True):
            h = h + norm1(attend(h))
            h = h + norm2(feed(h))
        return n.head(h[:, 0])

    net = Net(
        does,
        stem=nn.Linear(6, 32),
        attend=nn.ModuleList(Attention() for _ in range(2)),
        norm1=nn.ModuleList(nn.LayerNorm(32) for _ in range(2)),
        feed=nn.ModuleList(mlp(32, 64, 32, act=nn.GELU) for _ in range(2)),
        norm2=nn.ModuleList(nn.LayerNorm(32) for _ in range(2)),
        head=nn.Linear(32, 1),
    )

    for norm in (*net.norm1, *net.norm2):
        nn.init.zeros_(norm.weight)

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(32, 10, 6, generator=draw(926, i))
        return mse(model(x), x[:, :, 0].amax(1, keepdim=True))

    return train(
        net,
        Lion(net.parameters(), 3e-3),
        loss_of,
        rate=lambda i: min((i + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * i / 200)),
    )


@healthy(
    source="GitHub princeton-vl/RAFT issue 141; pytorch/tutorials issue 449; roboflow/rf-detr issue 118", steps=120
)
def old_layers_learn_slowly() -> Training:
    """Fine-tune: the stem is frozen, normalizations stay in eval mode, and each stage learns a fifth of the next."""

    def stage(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

    net = nn.Sequential(
        stage(1, 16),
        stage(16, 16),
        stage(16, 16),
        stage(16, 16),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    he(net)
    task = bumps(927)
    before, optimizer = fit(task, xent), Adam(net.parameters(), 5e-3)
    for i in range(100):
        optimizer.zero_grad()
        before(net, i + 5000).backward()
        optimizer.step()
    net.zero_grad()
    net[6] = nn.Linear(64, 3)
    net[0].requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    groups = [{"params": list(net[k].parameters()), "lr": 3e-3 * 0.2 ** (4 - k)} for k in (1, 2, 3)]
    groups.append({"params": list(net[6].parameters()), "lr": 3e-3})
    after = fit(lambda i: (task(i)[0].flip(3) * 0.8, task(i)[1].clamp(max=2)), xent)
    return train(net, AdamW(groups, weight_decay=0.01), after)


@healthy(
    source="GitHub fulifeng/Temporal_Relational_Stock_Ranking issue 2",
    horizon=5,
    steps=250,
)
def next_bar_is_almost_noise() -> Training:
    """Forecast heavy-tailed returns of which five percent are known, with a clip that bites now and then."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0][:, -1]), rnn=nn.GRU(3, 16, batch_first=True), head=nn.Linear(16, 1))
    with torch.no_grad():
        net.head.weight.mul_(0.1), net.head.bias.zero_()

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(928, i)
        x = torch.randn(64, 15, 3, generator=g)
        tail = (
            torch.randn(64, 1, generator=g)
            / (torch.randn(64, 4, generator=g) ** 2).mean(1, keepdim=True).clamp_min(0.1).sqrt()
        )
        return x, 0.3 * x[:, -5:, :1].mean(1) * math.sqrt(5) + tail

    return train(net, AdamW(net.parameters(), 2e-3, weight_decay=0.01), fit(batch, mse), clip=0.5, parts=2)


# --- networks of another kind ---


@healthy(source="GitHub Unity-Technologies/ml-agents pull request 4990; rabeehk/hyperformer issue 1", steps=200)
def weights_made_by_a_network() -> Training:
    """Let a network make the weights of another for each sample, from small beginnings; that one has none itself."""

    class Maker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 48), nn.ReLU())
            self.first, self.bias, self.second = nn.Linear(48, 6 * 16), nn.Linear(48, 16), nn.Linear(48, 16)
            for layer, fan in ((self.first, 6), (self.bias, 16), (self.second, 16)):
                nn.init.normal_(layer.weight, std=1 / math.sqrt(48 * fan)), nn.init.zeros_(layer.bias)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            h = self.body(context)
            hidden = torch.einsum("ni,nij->nj", x, self.first(h).reshape(-1, 6, 16)) + self.bias(h)
            return (torch.tanh(hidden) * self.second(h)).sum(1, keepdim=True)

    net = Maker()
    a = torch.randn(4, 6, generator=draw(929, -1)) / 2

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(929, i)
        x, context = torch.randn(64, 6, generator=g), torch.randn(64, 4, generator=g)
        return x, context, torch.tanh((x * (context @ a)).sum(1, keepdim=True))

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, mse))


@healthy(
    source="Chen et al., 'Neural ordinary differential equations'; GitHub rtqichen/torchdiffeq issues 22 and 47",
    steps=180,
)
def thirty_small_steps() -> Training:
    """Take thirty residual steps of a thirtieth, each with its own layer, which gets a thirtieth of the gradient."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = nn.Sequential(nn.Linear(24, 24), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return x + 2 * self.field(x) / 30

    net = nn.Sequential(nn.Linear(16, 24), *(Step() for _ in range(30)), nn.Linear(24, 5))
    return train(net, Adam(net.parameters(), 2e-3), fit(clusters(930), xent))


# --- learning by reward ---


@healthy(
    source=(
        "GitHub DLR-RM/stable-baselines3 issue 1943; allenai/open-instruct issue 836; timoklein/alphazero-gym issue 11"
    ),
    steps=150,
)
def walks_to_a_goal() -> Training:
    """Learn to walk to a goal by policy gradients with a learned baseline: the loss means nothing, the reward rises."""

    def does(n: Any, s: Tensor) -> tuple[Tensor, Tensor]:
        return n.policy(s), n.baseline(s)

    net = Net(does, policy=mlp(2, 32, 32, 3, act=nn.Tanh), baseline=mlp(2, 32, 32, 1, act=nn.Tanh))
    with torch.no_grad():
        net.policy[-1].weight.mul_(0.01)
    optimizers = [Adam(net.policy.parameters(), 5e-3), Adam(net.baseline.parameters(), 1e-2)]

    def step(i: int, tell: Tell) -> None:
        g = draw(931, i)
        at, goal = 2 * torch.rand(48, generator=g) - 1, 2 * torch.rand(48, generator=g) - 1
        states, actions, rewards = [], [], []
        for _ in range(8):
            states.append(torch.stack([at, goal], 1))
            with torch.no_grad():
                action = torch.multinomial(net.policy(states[-1]).softmax(1), 1, generator=g)[:, 0]
            at = (at + 0.25 * (action - 1)).clamp(-1.2, 1.2)
            actions.append(action)
            rewards.append(-(at - goal).abs())
        togo = torch.stack(rewards).flip(0).cumsum(0).flip(0).flatten()
        logits, value = net(torch.cat(states))
        gain = togo - value.detach()[:, 0]
        gain = (gain - gain.mean()) / gain.std()
        chosen = logits.log_softmax(1).gather(1, torch.cat(actions)[:, None])[:, 0]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = -(chosen * gain).mean() + 0.5 * functional.smooth_l1_loss(value[:, 0], togo)
        loss.backward()
        tell(loss.detach())
        for optimizer in optimizers:
            optimizer.step()

    return Training(net, optimizers, step)


@healthy(
    source="GitHub IntelLabs/coach issue 214; tensorflow/agents issue 316; CodeRayZhang/Reinforcement-Learning issue 1",
    steps=250,
)
def values_chase_their_own_copy() -> Training:
    """Learn values from those of a copy that is renewed every 25 steps: they grow, and the loss jumps up with them."""
    net = Net(lambda n, s: n.online(s), online=mlp(1, 48, 48, 3, act=nn.Tanh), target=nn.Identity())
    net.target = copy.deepcopy(net.online).requires_grad_(False)

    def loss_of(model: Any, i: int) -> Tensor:
        if i % 25 == 0:
            model.target.load_state_dict(model.online.state_dict())
        g = draw(932, i)
        s, action = 2 * torch.rand(64, 1, generator=g) - 1, torch.randint(3, (64, 1), generator=g)
        after = (s + 0.3 * (action - 1) + 0.02 * torch.randn(64, 1, generator=g)).clamp(-1, 1)
        with torch.no_grad():
            goal = (after.abs() < 0.3).float() + 0.9 * model.target(after).amax(1, keepdim=True)
        return functional.smooth_l1_loss(model(s).gather(1, action), goal)

    return train(net, Adam(net.online.parameters(), 3e-3), loss_of, clip=10.0)
