"""Held out: losses, numerics, normalization, initialization and scales, and six healthy ones that look ill."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import faulty, healthy

# --- logarithms, divisions, means of nothing ---


@faulty(
    "non-finite",
    source=(
        "GitHub pytorch/pytorch issues 68425, 108618 and 156212: what torch.where does not select, a logarithm of what "
        "is not positive, still sends NaN backward"
    ),
    words=r"where|log|negativ|domain|nan|mask|branch|select|clamp|0 ?\* ?(inf|nan)",
    steps=150,
)
def logarithm_of_forecasts_below_zero(*, fixed: bool) -> Training:
    """Compare logarithms where the forecast is above a half, and plain values where it is low, by torch.where."""
    net = Net(lambda n, x: n.body(x), body=mlp(6, 48, 48, 1, act=nn.SiLU))
    batch = waves(2001)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        demand, forecast = (0.5 * y).exp(), model(x)
        high = forecast > 0.5
        inside = torch.where(high, forecast, torch.ones(())) if fixed else forecast
        relative = (inside.log() - demand.log()).pow(2)
        return torch.where(high, relative, (forecast - demand).pow(2)).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "non-finite",
    source="GitHub HobbitLong/SupContrast issues 50 and 141: 0 / 0 for an anchor that has no positive in its batch",
    since=23,
    words=r"0 ?/ ?0|divi|zero|nan|mean|empty|loss|batch|positive|mask",
    steps=150,
)
def class_with_one_picture_in_the_batch(*, fixed: bool) -> Training:
    """Average a supervised contrastive loss over the other pictures of the same class; a rare class may have none."""
    net = Net(
        lambda n, x: functional.normalize(n.project(n.encoder(x)), dim=1),
        encoder=nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
        ),
        project=mlp(256, 48, 16, act=lambda: nn.LeakyReLU(0.1)),
    )
    task = bumps(2002, n=40)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = task(i)
        keep = (y < 3) | (torch.rand(len(y), generator=draw(2003, i)) < 0.35)
        x, y = x[keep], y[keep]
        z = model(x)
        itself = torch.eye(len(y), dtype=torch.bool)
        log_p = (z @ z.T / 0.2).masked_fill(itself, -1e9).log_softmax(1)
        alike = (y[:, None] == y) & ~itself
        many = alike.sum(1)
        if fixed:
            return -((alike * log_p).sum(1) / many.clamp_min(1))[many > 0].mean()
        return -((alike * log_p).sum(1) / many).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@faulty(
    "non-finite",
    "underflow",
    source=(
        "GitHub afiaka87/glide-finetune issue 5 and pytorch/pytorch issue 8860; PyTorch forums 1765, "
        "'Adam + Half Precision = NaNs?'"
    ),
    words=r"eps|half|float16|precision|underflow|optimizer|divi|adam|weights",
    steps=150,
)
def half_weights_and_the_usual_epsilon(*, fixed: bool) -> Training:
    """Turn the network to float16 and keep Adam as it is: its epsilon of 1e-8 is 0 there, and so are small squares."""
    net = mlp(16, 64, 64, 5, act=nn.SiLU)
    model = Net(lambda n, x: n.net(x), net=net)
    if not fixed:
        model.half()
    return train(model, Adam(model.parameters(), 1e-3), fit(clusters(2004), xent))


@faulty(
    "non-finite",
    source=(
        "GitHub NVIDIA-NeMo/Automodel issue 3796 (a batch without a label: NaN goes 'into every parameter'); "
        "londonaicentre/FLIP pull request 766; ultralytics/ultralytics issue 25096; meta-pytorch/torchtune issue 2341"
    ),
    since=8,
    words=r"0 ?/ ?0|divi|zero|nan|mean|empty|loss|label|ignor|mask|batch",
    steps=150,
)
def tiles_that_nobody_labelled(*, fixed: bool) -> Training:
    """Segment tiles, two in a batch, 255 where nobody looked, and divide by the number of labels: sometimes by 0."""

    def does(n: Any, x: Tensor) -> Tensor:
        fine = n.down1(x)
        coarse = functional.interpolate(n.down2(fine), scale_factor=2.0)
        return n.head(torch.cat([fine, coarse], 1))

    net = Net(
        does,
        down1=nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU()),
        down2=nn.Sequential(nn.Conv2d(12, 24, 3, padding=1, stride=2), nn.GroupNorm(3, 24), nn.ReLU()),
        head=nn.Conv2d(36, 3, 1),
    )
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(2005, i)
        at, size = 3 + 10 * torch.rand(2, 2, 1, 1, generator=g), 2 + 3 * torch.rand(2, 1, 1, generator=g)
        inside = (rows - at[:, 0]).abs().maximum((columns - at[:, 1]).abs()) < size
        kind = 1 + torch.randint(2, (2, 1, 1), generator=g)
        y = inside * kind
        x = (inside * (2.0 * kind - 3))[:, None] + 0.4 * torch.randn(2, 1, 16, 16, generator=g)
        y[torch.rand(2, generator=g) < 0.3] = 255
        known = y != 255
        each = functional.cross_entropy(model(x), y.where(known, 0), reduction="none")
        return (each * known).sum() / (known.sum().clamp_min(1) if fixed else known.sum())

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


# --- where gradients end ---


def _overlap(a: Tensor, b: Tensor, *, distant: bool) -> Tensor:
    """Return the intersection over union of boxes (centre, size), less the squared distance if that shall count."""
    low, high = (torch.stack([a[:, :2] + s * a[:, 2:] / 2, b[:, :2] + s * b[:, 2:] / 2]) for s in (-1, 1))
    shared = (high.amin(0) - low.amax(0)).clamp(min=0).prod(1)
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - shared
    value = shared / union
    if distant:
        hull = (high.amax(0) - low.amin(0)).pow(2).sum(1)
        value = value - (a[:, :2] - b[:, :2]).pow(2).sum(1) / hull
    return value


@faulty(
    "disconnected",
    "stalled",
    "vanishing-depth",
    "unstepped",  # Adam does not move on gradients that are exactly 0
    source=(
        "GitHub lilanxiao/Rotated_IoU issue 9 ('if there is no intersection, there is no gradient and the learnable "
        "parameters would not be updated'); generalized-iou/g-tensorflow-models issue 5 (the loss stays at 1.0)"
    ),
    words=r"clamp|zero|loss|overlap|constant|never|no gradient|saturat|flat",
    steps=200,
)
def boxes_that_do_not_touch_yet(*, fixed: bool) -> Training:
    """Regress boxes in pixels by 1 - IoU: the first forecasts lie in the corner, and touch no object."""
    net = Net(
        lambda n, x: n.head(n.body(x)),
        body=nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(12, 24, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(384, 48),
            nn.SiLU(),
        ),
        head=nn.Linear(48, 4),
    )
    he(net.body)
    places = torch.arange(16.0) + 0.5

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(2006, i)
        box = torch.cat([5 + 7 * torch.rand(32, 2, generator=g), 3 + 2 * torch.rand(32, 2, generator=g)], 1)
        near = (places - box[:, :2, None]).abs() < box[:, 2:, None] / 2
        x = (near[:, 1, :, None] & near[:, 0, None, :])[:, None] + 0.2 * torch.randn(32, 1, 16, 16, generator=g)
        out = model(x)
        forecast = torch.cat([out[:, :2], functional.softplus(out[:, 2:])], 1)
        return (1 - _overlap(forecast, box, distant=fixed)).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "disconnected",
    "vanishing-depth",
    "unstepped",
    source=(
        "GitHub pytorch/pytorch issue 4620 ('torch.normal accepts Variables but does not propagate gradients'); "
        "nicola-decao/s-vae-pytorch issue 9"
    ),
    places=("encoder",),
    words=r"sampl|random|detach|differentiab|zero|graph|no gradient|never|discrete|argmax|round|reparam",
    steps=200,
)
def symbols_over_a_noisy_channel(*, fixed: bool) -> Training:
    """Learn a code for a noisy channel that is torch.normal(symbols, 0.25): its gradient is defined, and is 0."""

    def does(n: Any, message: Tensor) -> Tensor:
        sent = n.encoder(message)
        sent = sent / sent.pow(2).mean().sqrt()
        noise = torch.full_like(sent, 0.25)
        received = sent + noise * torch.randn_like(sent) if fixed else torch.normal(sent, noise)
        return n.decoder(received)

    net = Net(does, encoder=mlp(16, 32, 2, act=nn.Tanh), decoder=mlp(2, 48, 48, 16, act=nn.SiLU))

    def loss_of(model: Any, i: int) -> Tensor:
        which = torch.randint(16, (128,), generator=draw(2007, i))
        return functional.cross_entropy(model(functional.one_hot(which, 16).float()), which)

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


# --- normalization and initialization ---


@faulty(
    "rounding",
    "disconnected",
    "vanishing-depth",
    "stalled",
    "unstepped",
    source=(
        "GitHub pytorch/pytorch pull request 12968 ('LN with dim=1 is producing zero constant gradient') and issue "
        "108956 ('nn.LayerNorm outputs zeros for single column batch')"
    ),
    places=("body", "score", "norm"),
    words=r"norm|one|single|constant|zero|mean|rounding|cancel|shift",
    steps=200,
)
def score_normalized_by_itself(*, fixed: bool) -> Training:
    """Put a layer norm behind the one score of a click model: a single number less its mean is 0."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.body(x)
        return n.score(n.norm(h)) if fixed else n.norm(n.score(h))

    net = Net(
        does,
        body=nn.Sequential(mlp(6, 32, 32, act=nn.SiLU), nn.SiLU()),
        score=nn.Linear(32, 1),
        norm=nn.LayerNorm(32 if fixed else 1),
    )
    batch = waves(2008)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        return functional.binary_cross_entropy_with_logits(model(x), (y > 0).float())

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "exploding",
    "non-finite",
    source=(
        "GitHub alibaba/graph-learn issue 153 (a GCN that adds up neighbours without coefficients); "
        "pyg-team/pytorch_geometric issue 2722; cvignac/SMP issue 3; snap-stanford/ogb issue 38"
    ),
    words=r"norm|init|scale|learning rate|clip|residual|sum|degree|large|grow|explod",
    steps=150,
)
def neighbours_added_up(*, fixed: bool) -> Training:
    """Classify the nodes of a graph by four convolutions over its plain adjacency, where a node has 20 neighbours."""
    g = draw(2009, -1)
    y = torch.randint(4, (120,), generator=g)
    edges = torch.rand(120, 120, generator=g) < torch.where(y[:, None] == y, 0.4, 0.06)
    graph = ((edges.triu(1) | edges.triu(1).T) | torch.eye(120, dtype=torch.bool)).float()
    if fixed:
        root = graph.sum(1).rsqrt()
        graph = root[:, None] * graph * root
    centres = torch.randn(4, 12, generator=g)

    def does(n: Any, x: Tensor) -> Tensor:
        for layer in n.layers:
            x = torch.relu(layer(graph @ x))
        return n.head(x)

    net = Net(does, layers=nn.ModuleList(nn.Linear(a, 32) for a in (12, 32, 32, 32)), head=nn.Linear(32, 4))
    he(net.layers)

    def loss_of(model: Any, i: int) -> Tensor:
        return functional.cross_entropy(model(centres[y] + 1.5 * torch.randn(120, 12, generator=draw(2010, i))), y)

    return train(net, SGD(net.parameters(), 0.02, momentum=0.9), loss_of)


@faulty(
    "dead-units",
    "disconnected",
    "vanishing-depth",
    "stalled",
    "unstepped",
    source="GitHub kazuto1011/deeplab-pytorch issue 44 ('copy paste typo in initializing batch norm?')",
    words=r"relu|dead|zero|init|norm|scale|gamma|weight|never|constant",
    steps=150,
)
def scale_zeroed_in_place_of_the_shift(*, fixed: bool) -> Training:
    """Set the scale of each batch norm to 1, and in the next line to 0, where the shift was meant."""

    def block(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())

    net = Net(
        lambda n, x: n.head(n.body(x)),
        body=nn.Sequential(block(1, 12), block(12, 24), nn.MaxPool2d(2), block(24, 24), nn.MaxPool2d(2), nn.Flatten()),
        head=nn.Linear(96, 4),
    )
    he(net)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.constant_(layer.weight, 1.0)
            nn.init.constant_(layer.bias if fixed else layer.weight, 0.0)
    return train(net, Adam(net.parameters(), 2e-3), fit(bumps(2011), xent))


@faulty(
    "vanishing-depth",
    "stalled",
    "dead-units",  # biases outweigh what is left of the signal: a unit fires for all samples or for none
    source=(
        "PyTorch forums 163725, 'Please help me understand not improving *training* (not test) with more layers'; "
        "GitHub pytorch/pytorch issues 63626 and 15314"
    ),
    words=r"init|residual|skip|norm|depth|deep|relu|gain|kaiming|small",
    steps=200,
)
def more_layers_do_worse_than_few(*, fixed: bool) -> Training:
    """Stack sixteen pairs of Linear and ReLU by SGD, with the initialization that nn.Linear has by itself."""
    net = mlp(6, *[48] * 16, 1)
    if fixed:
        he(net)
    return train(net, SGD(net.parameters(), 1e-3, momentum=0.9), fit(waves(2012), mse))


# --- scales ---


@faulty(
    "unstepped",
    "underflow",  # an update of 1e-11 is lost in a weight of 0.1
    "stalled",
    source=(
        "GitHub joeyan/gaussian_splatting issue 33 (Adam's epsilon against gradients far smaller than it); "
        "pytorch/torchtitan pull request 917 ('epsilon dominates the updates when gradients become extremely small')"
    ),
    words=r"eps|small|scale|unit|normaliz|standard|lost|tiny|precision|learning rate|rounding",
    steps=150,
)
def deflections_in_metres(*, fixed: bool) -> Training:
    """Turn forecasts back into metres, which are nanometres, before the mean squared error; Adam is as it is."""
    net = mlp(6, 48, 48, 1, act=nn.SiLU)
    unit, batch = 2e-8, waves(2013)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        return mse(model(x), y) if fixed else mse(unit * model(x), unit * y)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "vanishing-depth",
    "dead-units",  # saturated for every client
    "stalled",
    source=(
        "openillumi.com, 'PyTorch Performance Drop? Missing Standardization'; GitHub ageron/handson-ml3 "
        "pull request 20; Stack Exchange AI 16557"
    ),
    words=r"saturat|scale|standard|normaliz|tanh|sigmoid|input|large",
    steps=200,
)
def clients_with_incomes_in_euros(*, fixed: bool) -> Training:
    """Tell bad loans by a network of tanh from age, income, debt and so on, each in its own unit."""
    net = mlp(6, 32, 32, 1, act=nn.Tanh)
    batch = waves(2014)
    middle = torch.tensor([45.0, 42_000.0, 18_000.0, 36.0, 640.0, 7.0])
    spread = torch.tensor([12.0, 9_000.0, 4_000.0, 14.0, 60.0, 2.0])

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        client = middle + spread * x
        if fixed:
            client = (client - middle) / spread
        return functional.binary_cross_entropy_with_logits(model(client), (y > 0).float())

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


# --- healthy ---


@healthy(source="GitHub facebookresearch/simsiam issues 21 and 44; PatrickHua/SimSiam issue 39", steps=200)
def alike_without_opposites() -> Training:
    """Learn as SimSiam does: one side is detached, and the loss is a negative cosine that nears -1."""
    net = Net(
        lambda n, x: n.encoder(x),
        encoder=mlp(16, 64, 64, 32, norm=nn.BatchNorm1d),
        norm=nn.BatchNorm1d(32, affine=False),
        predictor=mlp(32, 16, 32, norm=nn.BatchNorm1d),
    )
    task = clusters(2020, n=96)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(2021, i)
        x, _ = task(i)
        views = [
            model.norm(model(x * (torch.rand(x.shape, generator=g) > 0.1) + 0.2 * torch.randn(x.shape, generator=g)))
            for _ in range(2)
        ]
        return (
            -(
                functional.cosine_similarity(model.predictor(views[0]), views[1].detach()).mean()
                + functional.cosine_similarity(model.predictor(views[1]), views[0].detach()).mean()
            )
            / 2
        )

    return train(net, SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-4), loss_of)


@healthy(
    source="GitHub Megum1/DFST issue 4 (the discriminator's loss stays where it is); knazeri/edge-connect issue 33",
    steps=250,
)
def forger_and_judge_in_balance() -> Training:
    """Train a GAN that finds its balance: the judge's loss stands near 2 log 2, its gradients become small."""
    net = Net(
        lambda n, z: n.forger(z),
        forger=mlp(4, 48, 48, 2),
        judge=mlp(2, 48, 48, 1, act=lambda: nn.LeakyReLU(0.2)),
    )
    forging = Adam(net.forger.parameters(), 1e-3, betas=(0.5, 0.9))
    judging = Adam(net.judge.parameters(), 1e-3, betas=(0.5, 0.9))

    def step(i: int, tell: Tell) -> None:
        g = draw(2022, i)
        real = torch.randn(128, 2, generator=g) * torch.tensor([0.3, 0.6]) + torch.tensor([1.0, -0.5])
        real.requires_grad_()
        fake = net(torch.randn(128, 4, generator=g))
        verdict = net.judge(real)
        (slope,) = torch.autograd.grad(verdict.sum(), real, create_graph=True)
        judging.zero_grad()
        loss = functional.softplus(-verdict).mean() + functional.softplus(net.judge(fake.detach())).mean()
        (loss + 0.1 * slope.pow(2).sum(1).mean()).backward()
        tell(loss.detach())
        judging.step()
        forging.zero_grad()
        functional.softplus(-net.judge(fake)).mean().backward()
        forging.step()

    return Training(net, [forging, judging], step)


@healthy(source="GitHub lllyasviel/ControlNet issue 51 and its FAQ on zero convolutions", steps=200)
def trunk_steered_through_zero_convolutions() -> Training:
    """Copy a trained, frozen trunk, and let the copy steer it through convolutions that begin at zero."""

    def block(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.SiLU())

    def does(n: Any, x: Tensor, hint: Tensor) -> Tensor:
        c = n.zero_in(n.hint(hint))
        h = x
        for k, (layer, twin, zero) in enumerate(zip(n.trunk, n.copy, n.zeros, strict=True)):
            c = twin(x + c if k == 0 else c)
            h = layer(h) + zero(c)
        return n.out(h)

    def zero(a: int, b: int) -> nn.Conv2d:
        layer = nn.Conv2d(a, b, 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    trunk = nn.ModuleList([block(1, 12), block(12, 12), block(12, 12)])
    out = nn.Conv2d(12, 1, 3, padding=1)
    task = bumps(2023, n=16)
    before = Adam([*trunk.parameters(), *out.parameters()], 3e-3)
    for i in range(60):
        x = task(5000 + i)[0]
        h = x + 0.3 * torch.randn(x.shape, generator=draw(2024, i))
        for layer in trunk:
            h = layer(h)
        before.zero_grad()
        mse(out(h), x).backward()
        before.step()
    before.zero_grad()
    net = Net(
        does,
        hint=block(1, 8),
        zero_in=zero(8, 1),
        copy=copy.deepcopy(trunk),
        zeros=nn.ModuleList(zero(12, 12) for _ in range(3)),
        trunk=trunk.requires_grad_(requires_grad=False),
        out=out.requires_grad_(requires_grad=False),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(2025, i)
        x = task(i)[0]
        hint = (torch.rand(x.shape, generator=g) < 0.3).float()
        return mse(model(x + 0.3 * torch.randn(x.shape, generator=g), hint), x * (1 - hint) + hint)

    return train(net, Adam([p for p in net.parameters() if p.requires_grad], 2e-3), loss_of)


@healthy(
    source="GitHub ultralytics/yolov3 pull request 198 (no targets: only the confidence has a loss); DETR issue 9",
    steps=200,
)
def photographs_without_an_animal() -> Training:
    """Detect what is rare: in two batches of three there is none, and the heads of class and place have exactly 0."""
    net = Net(
        lambda n, x: tuple(head(n.body(x)) for head in (n.there, n.kind, n.place)),
        body=nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(512, 48),
            nn.SiLU(),
        ),
        there=nn.Linear(48, 1),
        kind=nn.Linear(48, 4),
        place=nn.Linear(48, 2),
    )
    he(net.body)
    task = bumps(2026, n=16)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(2027, i)
        x, y = task(i)
        there = (torch.rand(16, generator=g) < 0.5) & (i % 3 == 2)
        x = torch.where(there[:, None, None, None], x, 0.3 * torch.randn(x.shape, generator=g))
        at = torch.stack([y // 2, y % 2], 1) - 0.5
        found, kind, place = model(x)
        loss = functional.binary_cross_entropy_with_logits(found[:, 0], there.float())
        if there.any():
            return loss + functional.cross_entropy(kind[there], y[there]) + mse(place[there], at[there])
        return loss + 0.0 * (kind.sum() + place.sum())

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@healthy(
    source=(
        "GitHub facebookresearch/improved_vrnn issue 4 ('this is normal VAE behavior. First the KL increases'); "
        "molecularsets/moses issue 42 and asyml/texar issue 87 (annealing)"
    ),
    steps=240,
)
def divergence_that_comes_to_count() -> Training:
    """Raise the weight of a VAE's divergence from 0 to 1 over 160 steps: the loss falls, and then rises with it."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = n.encoder(x)
        mean, log_variance = n.mean(h), n.log_variance(h)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return n.decoder(code), mean, log_variance

    net = Net(
        does,
        encoder=nn.Sequential(nn.Linear(12, 48), nn.SiLU()),
        mean=nn.Linear(48, 3),
        log_variance=nn.Linear(48, 3),
        decoder=mlp(3, 48, 12, act=nn.SiLU),
    )
    mixing = torch.randn(3, 12, generator=draw(2028, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(2028, i)
        x = torch.tanh(torch.randn(64, 3, generator=g) @ mixing) + 0.1 * torch.randn(64, 12, generator=g)
        again, mean, log_variance = model(x)
        divergence = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return (x - again).pow(2).sum(1).mean() / (2 * 0.3**2) + min(1.0, i / 160) * divergence

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@healthy(
    source=(
        "GitHub hpcaitech/Open-Sora issue 286 ('For DDPM, the loss is almost the same'); ermongroup/ddim issue 33; "
        "facebookresearch/DiT issue 17"
    ),
    steps=250,
)
def noise_forecast_down_to_its_floor() -> Training:
    """Forecast the noise in pictures at random times: the loss falls at once, then jumps about a floor."""

    def does(n: Any, x: Tensor, t: Tensor) -> Tensor:
        angle = t * torch.exp(torch.linspace(0, math.log(200.0), 8))
        when = n.time(torch.cat([angle.sin(), angle.cos()], 1))
        h = functional.silu(n.first(x) + when)
        return n.last(h + n.middle(h))

    net = Net(
        does, time=mlp(16, 64, 64, act=nn.SiLU), first=nn.Linear(8, 64), middle=mlp(64, 64, 64), last=nn.Linear(64, 8)
    )
    mixing = torch.randn(4, 8, generator=draw(2029, -1)) / 2

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(2029, i)
        x = torch.tanh(2 * torch.randn(32, 4, generator=g)) @ mixing
        t, noise = torch.rand(32, 1, generator=g), torch.randn(32, 8, generator=g)
        return mse(model((t * math.pi / 2).cos() * x + (t * math.pi / 2).sin() * noise, t), noise)

    return train(net, Adam(net.parameters(), 2e-3), loss_of)
