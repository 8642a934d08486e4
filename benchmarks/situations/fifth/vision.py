"""Held out: pictures, masks, embeddings, diffusion and tables; and four healthy ones that look ill."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import faulty, healthy


def _conv(a: int, b: int, *, stride: int = 1) -> nn.Sequential:
    """Return a convolution, a group norm over it, and a SiLU."""
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, stride=stride), nn.GroupNorm(4, b), nn.SiLU())


def _squares(seed: int, n: int, size: int = 16) -> Any:
    """Draw a bright square on a noisy picture, and return picture and mask."""
    rows, columns = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")

    def batch(i: int) -> tuple[Tensor, Tensor]:
        g = draw(seed, i)
        at = 4 + (size - 8) * torch.rand(2, n, 1, 1, generator=g)
        half = 1.5 + 1.5 * torch.rand(n, 1, 1, generator=g)
        mask = ((rows - at[0]).abs().maximum((columns - at[1]).abs()) < half).float()[:, None]
        return mask + 0.4 * torch.randn(n, 1, size, size, generator=g), mask

    return batch


def _unet(channels: int, **heads: nn.Module) -> Net:
    """Return a U-Net of two levels that gives what each head makes of its features."""

    def does(n: Any, x: Tensor) -> Any:
        fine = n.fine(x)
        coarse = functional.interpolate(n.coarse(fine), scale_factor=2.0)
        h = n.merge(torch.cat([fine, coarse], 1))
        return tuple(getattr(n, name)(h) for name in heads)

    return Net(
        does,
        fine=_conv(1, channels),
        coarse=_conv(channels, 2 * channels, stride=2),
        merge=_conv(3 * channels, channels),
        **heads,
    )


# --- numbers that are none ---


@faulty(
    "non-finite",
    source=(
        "GitHub ronghuaiyang/arcface-pytorch issue 32 ('loss nan', cured by a clamp under the root); "
        "TreB1eN/InsightFace_Pytorch issue 93; d3-ai/face-verification-demo pull request 5 (low dimensions)"
    ),
    words=r"sqrt|root|clamp|eps|cos|zero|negativ|domain|nan|0 ?\* ?inf|divi|loss",
    steps=200,
)
def margin_added_to_the_angle(*, fixed: bool) -> Training:
    """Take the sine of an angle between an embedding and its class as sqrt(1 - cos^2), which may be 0 or below."""

    def does(n: Any, x: Tensor) -> Tensor:
        return functional.normalize(n.encoder(x), dim=1) @ functional.normalize(n.classes, dim=1).T

    net = Net(
        does, encoder=mlp(16, 64, 64, 2, act=nn.SiLU), classes=nn.Parameter(torch.randn(5, 2, generator=draw(3000, -1)))
    )
    batch = clusters(3001, n=128)
    margin = 0.3

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        cosine = model(x)
        square = 1 - cosine.pow(2)
        sine = (square.clamp_min(1e-6) if fixed else square).sqrt()
        wider = cosine * math.cos(margin) - sine * math.sin(margin)
        own = functional.one_hot(y, 5).bool()
        return functional.cross_entropy(8 * torch.where(own, wider, cosine), y)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "non-finite",
    source=(
        "GitHub kohya-ss/sd-scripts pull request 934 and issue 673 (zero_terminal_snr divides by zero); "
        "TiankaiHang/Min-SNR-Diffusion-Training pull request 4 ('step loss goes to NaN'); bghira/SimpleTuner pull 187"
    ),
    since=8,
    words=r"0 ?/ ?0|divi|zero|nan|snr|weight|eps|clamp|loss|batch",
    steps=200,
)
def weight_of_the_noisiest_step(*, fixed: bool) -> Training:
    """Weigh a diffusion loss by min(SNR, 5) / SNR on a schedule that ends in pure noise, where SNR is 0."""
    root = (1 - torch.linspace(1e-4, 0.02, 500)).cumprod(0).sqrt()
    signal = ((root - root[-1]) * root[0] / (root[0] - root[-1])).pow(2)
    ratio = signal / (1 - signal)

    def does(n: Any, x: Tensor, t: Tensor) -> Tensor:
        angle = t * torch.exp(torch.linspace(0, math.log(100.0), 8))
        h = functional.silu(n.first(x) + n.time(torch.cat([angle.sin(), angle.cos()], 1)))
        return n.last(h + n.middle(h))

    net = Net(
        does, time=mlp(16, 48, 64, act=nn.SiLU), first=nn.Linear(8, 64), middle=mlp(64, 64, 64), last=nn.Linear(64, 8)
    )
    mixing = torch.randn(3, 8, generator=draw(3002, -1)) / 1.7

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(3002, i)
        x, noise = torch.tanh(2 * torch.randn(32, 3, generator=g)) @ mixing, torch.randn(32, 8, generator=g)
        t = torch.randint(500, (32,), generator=g)
        a, b = signal[t, None].sqrt(), (1 - signal[t, None]).sqrt()
        velocity = a * noise - b * x
        error = (model(a * x + b * noise, t[:, None] / 500) - velocity).pow(2).mean(1)
        weight = ratio[t].clamp_max(5.0) / (ratio[t] + 1 if fixed else ratio[t])
        return (weight * error).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


def _structure(a: Tensor, b: Tensor) -> Tensor:
    """Return the contrast and structure that two pictures share, from -1 to 1, averaged over windows of 3 x 3."""
    mean = [functional.avg_pool2d(v, 3, 1) for v in (a, b)]
    square, other, both = (functional.avg_pool2d(v, 3, 1) for v in (a * a, b * b, a * b))
    spread = square - mean[0] ** 2 + other - mean[1] ** 2
    return ((2 * (both - mean[0] * mean[1]) + 1e-2) / (spread + 1e-2)).mean((1, 2, 3))


@faulty(
    "non-finite",
    source=(
        "GitHub jorge-pessoa/pytorch-msssim issue 2 ('Taking its power with a fractional number yields NaNs'); "
        "VainF/pytorch-msssim issue 7; aiff22/PyNET-PyTorch issue 7"
    ),
    since=4,
    words=r"pow|negativ|fraction|nan|ssim|clamp|domain|exponent|relu|loss|root|log",
    steps=150,
)
def contrast_to_a_fractional_power(*, fixed: bool) -> Training:
    """Restore scans, a few of them stored inverted, by a similarity over three scales, each to a power below 1."""
    net = Net(
        lambda n, x: x + n.last(n.body(x)),
        body=nn.Sequential(_conv(1, 12), _conv(12, 12), _conv(12, 12)),
        last=nn.Conv2d(12, 1, 3, padding=1),
    )
    batch = _squares(3003, 16)

    def loss_of(model: Any, i: int) -> Tensor:
        x, clean = batch(i)
        inverted = torch.rand(len(x), 1, 1, 1, generator=draw(3014, i)) < 0.01
        again, similar = model(x.where(~inverted, 1 - x)), torch.ones(len(x))
        plain = (again - clean).abs().mean()
        for power in (0.3, 0.4, 0.3):
            shared = _structure(again, clean)
            similar = similar * ((shared + 1) / 2 if fixed else shared) ** power
            again, clean = functional.avg_pool2d(again, 2), functional.avg_pool2d(clean, 2)
        return 1 - similar.mean() + 0.1 * plain

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


# --- too much ---


@faulty(
    "exploding",
    "stalled",
    source=(
        "GitHub ScrollPrize/villa issue 1488 (a Dice loss of raw logits: its denominator crosses zero, the loss is "
        "1e12); samvanstroud/hepattn issue 44 (a sigmoid forgotten in its sums)"
    ),
    words=r"divi|denominat|zero|sigmoid|large|clip|eps|loss|logit|explod|learning rate|spike|outlier|batch",
    steps=200,
)
def overlap_of_raw_scores(*, fixed: bool) -> Training:
    """Add a Dice loss to a cross-entropy that takes logits, and give it the logits too."""
    net = _unet(8, head=nn.Conv2d(8, 1, 1))
    nn.init.normal_(net.head.weight, std=0.01)
    nn.init.zeros_(net.head.bias)
    batch = _squares(3004, 8)

    def loss_of(model: Any, i: int) -> Tensor:
        x, mask = batch(i)
        (logits,) = model(x)
        share = logits.sigmoid() if fixed else logits
        overlap = (2 * (share * mask).sum((1, 2, 3)) + 1e-5) / (share.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1e-5)
        return functional.binary_cross_entropy_with_logits(logits, mask) + (1 - overlap).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "exploding",
    "non-finite",
    source=(
        "GitHub lightly-ai/lightly issue 1032 ('nan loss in VICReg': the answer is LARS, and a warm-up); "
        "facebookresearch/vicreg's own rate of 0.2 per 256 pictures is one for LARS"
    ),
    words=r"learning rate|lr\b|clip|large|explod|grow|diverg|lars|warm|scale|step|norm",
    steps=150,
)
def rate_made_for_another_optimizer(*, fixed: bool) -> Training:
    """Train by variance, invariance and covariance with a published rate of 1.6, which was one for LARS, by SGD."""
    net = Net(
        lambda n, x: n.expander(n.encoder(x)),
        encoder=nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
        expander=nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32, bias=False)),
    )
    he(net)
    with torch.no_grad():
        net.expander[2].weight.mul_(0.5)
    batch = clusters(3005, n=96)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(3006, i)
        x, _ = batch(i)
        views = [model(x + 0.15 * torch.randn(x.shape, generator=g)) for _ in range(2)]
        loss = 25 * mse(views[0], views[1])
        for view in views:
            centred = view - view.mean(0)
            spread = (centred.var(0) + 1e-4).sqrt()
            covariance = centred.T @ centred / (len(x) - 1)
            off = covariance.pow(2).sum() - covariance.diagonal().pow(2).sum()
            loss = loss + 12.5 * (1 - spread).relu().mean() + off / 32
        return loss

    return train(net, SGD(net.parameters(), 1e-3 if fixed else 1.6, momentum=0.9, weight_decay=1e-6), loss_of)


# --- nothing ---


@faulty(
    "disconnected",
    "vanishing-depth",
    "unstepped",
    "stalled",
    source=(
        "GitHub Project-MONAI/MONAI issue 8540 ('several days figuring out why my spatial transformer network ... did "
        "not properly train'); kornia/kornia issue 827 ('I always get gradient=0')"
    ),
    words=r"nearest|sampl|interpol|zero|differentiab|round|detach|never|discrete|index|no gradient|constant|graph",
    steps=200,
)
def registered_by_the_nearest_pixel(*, fixed: bool) -> Training:
    """Find the shift between two pictures, and move one onto the other by grid_sample(mode="nearest") to compare."""

    def does(n: Any, moving: Tensor, still: Tensor) -> Tensor:
        shift = n.shift(n.body(torch.cat([moving, still], 1)))
        theta = torch.cat([torch.eye(2).expand(len(shift), 2, 2), shift[:, :, None]], 2)
        grid = functional.affine_grid(theta, list(moving.shape), align_corners=False)
        mode = "bilinear" if fixed else "nearest"
        return functional.grid_sample(moving, grid, mode=mode, padding_mode="border", align_corners=False)

    net = Net(
        does,
        body=nn.Sequential(_conv(2, 8, stride=2), _conv(8, 16, stride=2), nn.Flatten(), nn.Linear(256, 32), nn.SiLU()),
        shift=nn.Linear(32, 2),
    )
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(3007, i)
        at, way = 0.5 * torch.randn(2, 32, 3, 1, 1, generator=g), 0.6 * torch.rand(2, 32, 1, 1, 1, generator=g) - 0.3
        pair = [
            (-((rows - at[0] - k * way[0]) ** 2 + (columns - at[1] - k * way[1]) ** 2) / 0.15)
            .exp()
            .sum(1, keepdim=True)
            for k in (0, 1)
        ]
        return pair[0], pair[1], pair[1]

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, mse))


@faulty(
    "disconnected",
    "unstepped",
    source=(
        "GitHub qubvel-org/segmentation_models.pytorch pull request 611 (a threshold in the Dice loss, and "
        "requires_grad=True against the error); tensorlayer/TensorLayer issue 891 (argmax before Dice)"
    ),
    places=("mask",),
    words=r"thresh|detach|graph|discrete|round|argmax|compar|no gradient|never|requires_grad|differentiab|bool|unused",
    steps=150,
)
def masks_cut_at_a_half(*, fixed: bool) -> Training:
    """Cut the forecast mask at 0.5 before its Dice loss, with requires_grad set again; outlines are learnt beside."""
    net = _unet(8, mask=nn.Conv2d(8, 1, 1), outline=nn.Conv2d(8, 1, 1))
    batch = _squares(3009, 8)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        mask, outline = model(x)
        edge = functional.max_pool2d(y, 3, 1, 1) - y
        share = mask.sigmoid()
        if not fixed:
            share = (share > 0.5).float().requires_grad_()
        overlap = (2 * (share * y).sum((1, 2, 3)) + 1) / (share.sum((1, 2, 3)) + y.sum((1, 2, 3)) + 1)
        return (1 - overlap).mean() + functional.binary_cross_entropy_with_logits(outline, edge)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "dead-units",
    "disconnected",
    "vanishing-depth",
    "unstepped",
    "stalled",
    source=(
        "GitHub andreaazzini/retinanet.pytorch pull request 1 ('the bias of the output subnet layer is what should be "
        "set') and kuangliu/pytorch-retinanet issue 10; facebookresearch/dlrm pull request 358 (negative biases)"
    ),
    words=r"bias|relu|dead|zero|init|negativ|never|saturat|inactive|constant",
    steps=200,
)
def prior_in_every_bias(*, fixed: bool) -> Training:
    """Set biases of a detector's head to log(0.01 / 0.99), as for rare objects: all of them, not the last alone."""
    net = Net(
        lambda n, x: n.out(n.head(n.body(x))),
        body=nn.Sequential(_conv(1, 12, stride=2), _conv(12, 24)),
        head=nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()))),
        out=nn.Conv2d(24, 1, 3, padding=1),
    )
    he(net.head)
    nn.init.normal_(net.out.weight, std=0.03)
    for layer in [net.out] if fixed else [*net.head, net.out]:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.bias, math.log(0.01 / 0.99))
    batch = _squares(3010, 16)

    def loss_of(model: Any, i: int) -> Tensor:
        x, mask = batch(i)
        y = functional.avg_pool2d(mask, 2).round()
        logits = model(x)
        each = functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        hard = (1 - (-each).exp()).pow(2)
        return ((0.25 * y + 0.75 * (1 - y)) * hard * each).sum() / y.sum().clamp_min(1)

    return train(net, Adam(net.parameters(), 1e-3), loss_of)


# --- weights that stay ---


@faulty(
    "unstepped",
    "disconnected",  # their gradient is thrown away before each step
    source=(
        "GitHub facebookresearch/swav issue 76 (freeze_prototypes_niters is 313, 'one epoch on ImageNet with batch "
        "size of 4096'); lightly-ai/lightly pull requests 1020 and 1046 (by epochs, not by steps)"
    ),
    places=("prototypes",),
    words=r"step|optimizer|frozen|freeze|never|unchanged|grad|update|none|zero",
    steps=200,
)
def prototypes_held_for_313_steps(*, fixed: bool) -> Training:
    """Hold the prototypes of SwAV for an epoch of ImageNet, 313 steps, in a training of 200."""
    net = Net(
        lambda n, x: n.prototypes(functional.normalize(n.project(n.encoder(x)), dim=1)),
        encoder=nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()),
        project=mlp(64, 48, 16, act=nn.SiLU),
        prototypes=nn.Linear(16, 12, bias=False),
    )
    optimizer = Adam(net.parameters(), 3e-3)
    task = clusters(3011, n=96)

    def keep_on_the_sphere() -> None:
        with torch.no_grad():
            net.prototypes.weight.copy_(functional.normalize(net.prototypes.weight, dim=1))

    def shared_out(scores: Tensor) -> Tensor:
        q = (scores.detach() / 0.05).softmax(1)
        for _ in range(3):
            q = q / q.sum(0, keepdim=True)
            q = q / q.sum(1, keepdim=True)
        return q

    keep_on_the_sphere()

    def step(i: int, tell: Tell) -> None:
        g = draw(3012, i)
        x, _ = task(i)
        one, other = (net(x + 0.3 * torch.randn(x.shape, generator=g)) for _ in range(2))
        loss = -(
            (shared_out(one) * (other / 0.1).log_softmax(1)).sum(1).mean()
            + (shared_out(other) * (one / 0.1).log_softmax(1)).sum(1).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        if i < (5 if fixed else 313):
            net.prototypes.weight.grad = None
        tell(loss)
        optimizer.step()
        keep_on_the_sphere()

    return Training(net, [optimizer], step)


# --- healthy ---


@healthy(
    source=(
        "GitHub liuyuisanai/trojans-face-recognizer issue 4 and lucidrains/x-transformers issue 294 (stochastic "
        "depth); pytorch/vision's stochastic_depth(mode='batch')"
    ),
    steps=200,
)
def blocks_left_out_at_random() -> Training:
    """Leave residual blocks out for a whole batch, the later the oftener: then their gradients are exactly 0."""
    chance = torch.linspace(0.0, 0.5, 6)

    def does(n: Any, x: Tensor, stay: Tensor) -> Tensor:
        h = n.stem(x)
        for block, kept in zip(n.blocks, stay, strict=True):
            h = h + kept * block(h)
        return n.head(h.flatten(1))

    def block() -> nn.Sequential:
        return nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1))

    net = Net(
        does,
        stem=nn.Conv2d(1, 16, 3, padding=1, stride=2),
        blocks=nn.ModuleList(block() for _ in range(6)),
        head=nn.Linear(256, 4),
    )
    task = bumps(3020)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(3021, i)
        x, y = task(i)
        stay = (torch.rand(6, generator=g) >= chance) / (1 - chance)
        return x + 0.5 * torch.randn(x.shape, generator=g), stay, y

    return train(net, Adam(net.parameters(), 2e-3), fit(batch, xent))


@healthy(
    source=(
        "GitHub phlippe/uvadlc_notebooks issue 108 (errors summed over an image's pixels, 'grad_norm ~ 500 and I am "
        "not sure if that is ok'); ai-safety-foundation/sparse_autoencoder issue 63"
    ),
    steps=200,
)
def errors_summed_over_the_picture() -> Training:
    """Sum an autoencoder's squared errors over all pixels, and average over pictures alone: gradients are large."""
    net = Net(
        lambda n, x: n.decoder(n.encoder(x)),
        encoder=nn.Sequential(
            _conv(1, 12, stride=2), _conv(12, 24, stride=2), nn.Flatten(), mlp(384, 64, 8, act=nn.SiLU)
        ),
        decoder=nn.Sequential(
            mlp(8, 64, 384, act=nn.SiLU),
            nn.Unflatten(1, (24, 4, 4)),
            nn.Upsample(scale_factor=2.0),
            _conv(24, 12),
            nn.Upsample(scale_factor=2.0),
            nn.Conv2d(12, 1, 3, padding=1),
        ),
    )
    task = _squares(3022, 32)

    def loss_of(model: Any, i: int) -> Tensor:
        x, mask = task(i)
        return (model(x) - 2 * mask).pow(2).sum((1, 2, 3)).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@healthy(
    source="GitHub bearpaw/pytorch-pose issue 43 ('the loss is always very small'), LiMeng95/MultiPoseNet.pytorch 15",
    steps=200,
)
def joints_as_small_bright_spots() -> Training:
    """Forecast a spot for each of four joints on maps that are dark elsewhere: losses of 0.001, small gradients."""
    net = Net(
        lambda n, x: n.head(n.body(x)),
        body=nn.Sequential(_conv(1, 12), _conv(12, 12), _conv(12, 12)),
        head=nn.Conv2d(12, 4, 1),
    )
    nn.init.normal_(net.head.weight, std=0.01)
    nn.init.zeros_(net.head.bias)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(3023, i)
        at = 2 + 12 * torch.rand(2, 16, 4, 1, 1, generator=g)
        spots = (-((rows - at[0]) ** 2 + (columns - at[1]) ** 2) / 2).exp()
        weight = torch.tensor([1.0, -1.0, 2.0, -2.0])[:, None, None]
        return (spots * weight).sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, 16, 16, generator=g), spots

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, mse))


def _sparse(scores: Tensor) -> Tensor:
    """Project scores onto the simplex, where most of them become exactly 0."""
    ordered = scores.sort(1, descending=True).values
    total, ranks = ordered.cumsum(1), torch.arange(1, scores.shape[1] + 1)
    many = (1 + ranks * ordered > total).sum(1, keepdim=True)
    return (scores - (total.gather(1, many - 1) - 1) / many).relu()


@healthy(
    source=(
        "GitHub dreamquark-ai/tabnet issues 516 and 125 (masks by sparsemax: most columns are exactly 0); "
        "mlverse/tabnet pull request 51"
    ),
    steps=250,
)
def columns_chosen_by_a_sparse_mask() -> Training:
    """Learn from a table as TabNet does: a mask of exact zeros chooses a few of twelve columns for each row."""

    def does(n: Any, x: Tensor) -> Tensor:
        x = n.norm(x)
        h, out = n.start(x), 0.0
        for choose, look in zip(n.choose, n.look, strict=True):
            h = look(6 * _sparse(choose(h)) * x)
            out = out + n.head(functional.silu(h))
        return out

    net = Net(
        does,
        norm=nn.BatchNorm1d(12),
        start=mlp(12, 32, 32, act=nn.SiLU),
        choose=nn.ModuleList(nn.Linear(32, 12) for _ in range(3)),
        look=nn.ModuleList(mlp(12, 48, 32, act=nn.SiLU) for _ in range(3)),
        head=nn.Linear(32, 1),
    )
    task = waves(3024, n=128)

    def batch(i: int) -> tuple[Tensor, ...]:
        x, y = task(i)
        return torch.cat([x, torch.randn(len(x), 6, generator=draw(3025, i))], 1), y

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, mse))
