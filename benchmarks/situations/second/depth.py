"""Held out, faulty: vision, tabular and scientific networks, as people reported them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adam

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, mlp, mse, train, waves, xent
from benchmarks.situations.situation import faulty

# --- normalization ---


def _gratings(seed: int, n: int = 32, classes: int = 4) -> Any:
    """Tell the direction of a noisy grating in a 16 x 16 image."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")

    def batch(i: int) -> tuple[Tensor, Tensor]:
        g = draw(seed, i)
        y = torch.randint(classes, (n,), generator=g)
        angle = (y * math.pi / classes)[:, None, None]
        phase = 6.28 * torch.rand(n, 1, 1, generator=g)
        wave = torch.sin(1.3 * (rows * angle.cos() + columns * angle.sin()) + phase)
        return wave[:, None] + 0.5 * torch.randn(n, 1, 16, 16, generator=g), y

    return batch


@faulty(
    "rounding",
    "disconnected",
    "vanishing-depth",
    "stalled",
    source=(
        "GitHub HomericIntelligence/Odyssey issue 3871 ('sum(x_norm) = 0' of GroupNorm and InstanceNorm); "
        "pytorch/pytorch pull request 79800 (gradients behind an instance norm 'are so close to 0 (around 1e-10)')"
    ),
    places=("features", "head"),
    words=r"norm|mean|averag|pool|constant|rounding|cancel",
    steps=200,
)
def textures_standardized_and_pooled(*, fixed: bool) -> Training:
    """Average over each channel right after an instance norm, which has made that average 0."""
    net = Net(
        lambda n, x: n.head(n.features(x).mean((2, 3))),
        features=nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.InstanceNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.InstanceNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.InstanceNorm2d(32),
            *([nn.ReLU()] if fixed else []),
        ),
        head=nn.Linear(32, 4),
    )
    return train(net, Adam(net.parameters(), 2e-3), fit(_gratings(501), xent))


@faulty(
    "vanishing-depth",
    "stalled",
    "dead-units",  # all images look alike to the upper layers: a unit fires for all of them or for none
    source=(
        "GitHub isht7/pytorch-deeplab-resnet issue 39 (eval mode in training); PyTorch forums, "
        "'model.eval() called for validation and never train() again'"
    ),
    places=("body", "stem"),
    words=r"norm|eval|train\(|init|residual|skip",
    steps=200,
)
def validated_before_the_first_epoch(*, fixed: bool) -> Training:
    """Check the validation score once before training, and stay in eval(): the batch norms have no statistics yet."""

    def block(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())

    net = Net(
        lambda n, x: n.head(n.body(n.stem(x)).flatten(1)),
        stem=block(1, 12),
        body=nn.Sequential(*(block(12, 12) for _ in range(11)), nn.MaxPool2d(2)),
        head=nn.Linear(192, 4),
    )
    batch = bumps(502)
    net.eval()
    with torch.no_grad():
        for i in range(2):
            net(batch(10_000 + i)[0])
    if fixed:
        net.train()
    return train(net, SGD(net.parameters(), 0.01, momentum=0.9), fit(batch, xent))


# --- pooling, heads, losses ---


@faulty(
    "disconnected",
    "rounding",
    "vanishing-depth",
    source=(
        "GitHub localminimum/R-net issue 8; DEEP-PolyU/KEQA_WSDM19 issue 2; catalyst-team/catalyst pull request 285"
    ),
    places=("score",),
    words=r"softmax|dim|saturat|constant|one|cancel|zero|shift",
)
def slides_of_twenty_patches(*, fixed: bool) -> Training:
    """Pool the patches of a slide by attention whose scores have a last dimension of 1, over which softmax is taken."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = torch.relu(n.patch(x))
        weight = n.score(h).softmax(1 if fixed else -1)
        return n.head((weight * h).sum(1))

    net = Net(
        does,
        patch=mlp(10, 32, 32),
        score=nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1)),
        head=nn.Linear(32, 1),
    )
    sign = torch.randn(10, generator=draw(503, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(503, i)
        x = torch.randn(48, 20, 10, generator=g)
        ill = torch.randint(2, (48,), generator=g).float()
        x[:, 0] += ill[:, None] * 1.5 * sign
        x = x[:, torch.randperm(20, generator=g)]
        return functional.binary_cross_entropy_with_logits(model(x)[:, 0], ill)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "stalled",
    source=(
        "PyTorch forums 148155, 'Output of the model depends on the shape of the weights tensor': "
        "a target of (N) against a forecast of (N, 1) is broadcast to (N, N)"
    ),
    since=10,
    steps=250,
)
def quantiles_of_demand(*, fixed: bool) -> Training:
    """Take the pinball loss of (N, 1) against (N): every forecast is compared with every customer's demand."""
    net = mlp(6, 48, 48, 3, act=nn.SiLU)
    batch, levels = waves(504), (0.1, 0.5, 0.9)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        demand = y[:, 0]
        forecast = model(x)
        total = torch.zeros(())
        for k, q in enumerate(levels):
            error = (demand[:, None] if fixed else demand) - forecast[:, k : k + 1]
            total = total + torch.maximum(q * error, (q - 1) * error).mean()
        return total

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


class CumulativeLink(nn.Module):
    """The ordinal likelihood, with thresholds of its own."""

    def __init__(self, levels: int) -> None:
        """Put the thresholds one apart."""
        super().__init__()
        self.thresholds = nn.Parameter(torch.arange(levels - 1.0))

    def forward(self, score: Tensor, rating: Tensor) -> Tensor:
        """Return the negative log-likelihood."""
        below = torch.sigmoid(self.thresholds - score)
        below = functional.pad(functional.pad(below, (1, 0)), (0, 1), value=1.0)
        p = below.diff(dim=1).clamp_min(1e-6)
        return -p.gather(1, rating[:, None]).log().mean()


@faulty(
    "unstepped",
    source=(
        "GitHub jonbarron/robust_loss_pytorch issue 7 and open-mmlab/mmdetection issue 4967: "
        "the parameters of a loss do not change"
    ),
    places=("criterion",),
    words="optimizer|param",
    steps=200,
)
def ratings_from_one_to_five(*, fixed: bool) -> Training:
    """Learn ratings with an ordinal loss that has thresholds of its own, and optimize only the network."""
    net = Net(
        lambda n, x, y: n.criterion(n.scorer(x), y),
        scorer=mlp(6, 48, 48, 1, act=nn.SiLU, norm=nn.LayerNorm),
        criterion=CumulativeLink(5),
    )
    batch = waves(505)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        rating = torch.bucketize(y[:, 0].contiguous(), torch.tensor([-0.2, 0.0, 0.2, 1.0]))
        return model(x, rating)

    return train(net, Adam((net if fixed else net.scorer).parameters(), 3e-3), loss_of)


# --- networks that make or change weights ---


@faulty(
    "disconnected",
    "unstepped",
    source=(
        "GitHub lezcano/geotorch issue 12 (a hypernetwork whose weights go into nn.Parameter()); "
        "google/qhbm-library issue 93"
    ),
    places=("writer", "filter"),
    words=r"Parameter|detach|graph|data|no_grad|optimizer|never|none|replac|reassign",
    steps=250,
)
def filters_written_for_each_sensor(*, fixed: bool) -> Training:
    """Write the weights of a layer by a second network, and put them in as nn.Parameter(...), which cuts them off."""

    def does(n: Any, x: Tensor, sensor: Tensor) -> Tensor:
        weight = n.writer(sensor).view(16, 8)
        if fixed:
            h = functional.linear(x, weight, n.filter.bias)
        else:
            n.filter.weight = nn.Parameter(weight)
            h = n.filter(x)
        return n.head(torch.tanh(h))

    net = Net(does, writer=mlp(4, 32, 128, act=nn.Tanh), filter=nn.Linear(8, 16), head=mlp(16, 32, 1, act=nn.Tanh))
    if fixed:
        net.filter.register_parameter("weight", None)
    a = torch.randn(4, 8, generator=draw(506, -1)) / 2

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(506, i)
        total = torch.zeros(())
        for _ in range(4):
            sensor, x = torch.randn(4, generator=g), torch.randn(32, 8, generator=g)
            total = total + mse(model(x, sensor), torch.sin(x @ (sensor @ a))[:, None]) / 4
        return total

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "stalled",
    "unstepped",
    source=(
        "GitHub PKU-YuanGroup/Open-Sora-Plan issue 186; aqlaboratory/openfold pull request 90; "
        "harubaru/waifu-diffusion pull request 31"
    ),
    since=10,
    steps=200,
)
def averaged_weights_for_the_preview(*, fixed: bool) -> Training:
    """Load the averaged weights of a denoiser for a preview every 10 steps, and never put its own ones back."""
    net = Net(lambda n, x, t: n.net(torch.cat([x, t], 1)), net=mlp(9, 64, 64, 8, act=nn.SiLU))
    mixing = torch.randn(2, 8, generator=draw(507, -1)) / 1.4

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(507, i)
        x = torch.tanh(2 * torch.randn(128, 2, generator=g)) @ mixing
        t, noise = torch.rand(128, 1, generator=g), torch.randn(128, 8, generator=g)
        return mse(model((1 - t) * x + t * noise, t), noise - x)

    optimizer = Adam(net.parameters(), 1e-3)
    plain = train(net, optimizer, loss_of)
    average = copy.deepcopy(net.state_dict())

    def step(i: int, tell: Tell) -> None:
        plain.step(i, tell)
        with torch.no_grad():
            for name, w in net.state_dict().items():
                average[name].lerp_(w, 1e-3)
            if i % 10 == 9:
                own = copy.deepcopy(net.state_dict())
                net.load_state_dict(average)
                net(torch.randn(4, 8), torch.ones(4, 1))
                if fixed:
                    net.load_state_dict(own)

    return Training(net, [optimizer], step)


@faulty(
    "underflow",
    "unstepped",
    "stalled",
    source=(
        "GitHub hpi-xnor/BMXNet issue 30 ('effectively quantizing the weight updates themselves'); "
        "eladhoffer/quantized.pytorch issue 12"
    ),
    places=("layers",),
    words=r"round|quanti|precision|grid|lost|small|learning rate|undone|overwrit|optimizer",
    steps=200,
)
def weights_on_a_grid_of_fifteen(*, fixed: bool) -> Training:
    """Train for 4-bit weights by writing the rounded ones back after each step, in place of keeping precise ones."""

    def rounded(w: Tensor, grid: float) -> Tensor:
        return (w / grid).round().clamp(-7, 7) * grid

    def does(n: Any, x: Tensor) -> Tensor:
        for k, layer in enumerate(n.layers):
            w = layer.weight
            w = w + (rounded(w, grids[k]) - w).detach() if fixed else w
            x = functional.linear(torch.relu(x) if k else x, w, layer.bias)
        return x

    net = Net(does, layers=nn.ModuleList(nn.Linear(a, b) for a, b in ((16, 64), (64, 64), (64, 5))))
    grids = [float(layer.weight.detach().abs().max()) / 7 for layer in net.layers]
    optimizer = Adam(net.parameters(), 1e-3)
    plain = train(net, optimizer, fit(clusters(508), xent))

    def step(i: int, tell: Tell) -> None:
        plain.step(i, tell)
        if not fixed:
            with torch.no_grad():
                for layer, grid in zip(net.layers, grids, strict=True):
                    layer.weight.copy_(rounded(layer.weight, grid))

    return Training(net, [optimizer], step)


# --- generative models ---


class Coupling(nn.Module):
    """An affine coupling layer that starts as the identity."""

    def __init__(self, width: int, *, flip: bool, zero_the_gain: bool) -> None:
        """Make its network, whose last layer is normalized by weight."""
        super().__init__()
        self.flip = flip
        self.first = weight_norm(nn.Linear(width // 2, 32))
        out = nn.Linear(32, width)
        nn.init.zeros_(out.bias)
        if not zero_the_gain:
            nn.init.zeros_(out.weight)
        self.out = weight_norm(out)
        if zero_the_gain:
            nn.init.zeros_(self.out.parametrizations.weight.original0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed input and the log-determinant."""
        a, b = x.chunk(2, 1)
        a, b = (b, a) if self.flip else (a, b)
        scale, shift = self.out(torch.tanh(self.first(a))).chunk(2, 1)
        scale = torch.tanh(scale)
        b = b * scale.exp() + shift
        return torch.cat((b, a) if self.flip else (a, b), 1), scale.sum(1)


@faulty(
    "non-finite",
    source="GitHub pytorch/pytorch issue 19126 and google/flax issue 1671: weight norm of weights that are zero",
    words=r"zero|norm|divi|0 ?/ ?0|init|weight",
)
def couplings_that_start_as_the_identity(*, fixed: bool) -> Training:
    """Zero the last layer of each coupling, as Glow does, and normalize it by its weight: 0 / 0."""

    def does(n: Any, x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for coupling in n.couplings:
            x, log = coupling(x)
            total = total + log
        return (0.5 * x.pow(2)).sum(1) - total

    net = Net(does, couplings=nn.ModuleList(Coupling(6, flip=k % 2 == 1, zero_the_gain=fixed) for k in range(4)))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(509, i)
        z = torch.randn(128, 6, generator=g)
        z[:, 3:] = 0.3 * z[:, 3:] + torch.sin(2 * z[:, :3])
        return model(z).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "exploding",
    source=(
        "GitHub LTH14/mar issue 70 (1 / sqrt(alpha_bar) 'will have an extremely large value' with the cosine "
        "schedule); kwsong0113/diffusion-forcing-transformer issue 11"
    ),
    steps=200,
)
def clean_image_from_forecast_noise(*, fixed: bool) -> Training:
    """Let a network forecast the noise, and compare the clean image that follows, at the last times divided by 0."""
    steps = 1000
    f = torch.cos((torch.linspace(0, 1, steps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
    kept = (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0).float()
    mixing = torch.randn(2, 16, generator=draw(510, -1)) / 1.4

    def does(n: Any, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * 6.28 * torch.arange(1, 5)
        return n.net(torch.cat([x, angle.sin(), angle.cos()], 1))

    net = Net(does, net=mlp(24, 64, 64, 16, act=nn.SiLU))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(510, i)
        x = torch.tanh(2 * torch.randn(64, 2, generator=g)) @ mixing
        t, noise = torch.randint(steps, (64,), generator=g), torch.randn(64, 16, generator=g)
        a = kept[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        forecast = model(noisy, t / steps)
        if fixed:
            return mse(forecast, noise)
        return mse((noisy - (1 - a).sqrt() * forecast) / a.sqrt(), x)

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


# --- scientific networks ---


@faulty(
    "disconnected",
    "vanishing-depth",
    source=(
        "GitHub lululxvi/deepxde issue 80 ('Don't use relu, which is not second order differentiable'); "
        "ComputationalDomain/PINNs issue 1"
    ),
    places=("conductivity",),
    words=r"relu|second|derivativ|smooth|twice|zero|multipl|activation|constant",
    steps=200,
)
def conductivity_from_temperatures(*, fixed: bool) -> Training:
    """Infer a conductivity by the heat equation from a temperature of ReLUs, whose second derivative is 0."""
    act = nn.Tanh if fixed else nn.ReLU
    net = Net(
        lambda n, x: n.temperature(x),
        temperature=mlp(2, 48, 48, 1, act=act),
        conductivity=nn.Sequential(mlp(1, 24, 1, act=nn.Tanh), nn.Softplus()),
    )

    def truth(x: Tensor) -> Tensor:
        return torch.sin(3 * x[:, :1]) * torch.exp(-x[:, 1:])

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(511, i)
        x = torch.rand(128, 2, generator=g) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
        x.requires_grad_()
        u = model(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        bend = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)[0][:, :1]
        true_k = 0.3 + 0.2 * torch.cos(2 * x[:, :1])
        source = -truth(x) + true_k * 9 * truth(x)
        residual = slope[:, 1:] - model.conductivity(x[:, :1]) * bend - source.detach()
        return mse(u, truth(x).detach()) + 0.1 * residual.pow(2).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


class Sine(nn.Module):
    """A layer of sines."""

    def __init__(self, a: int, b: int, *, first: bool, fixed: bool) -> None:
        """Make it, with the initialization for its frequency or torch's own."""
        super().__init__()
        self.linear = nn.Linear(a, b)
        if fixed:
            bound = 1 / a if first else math.sqrt(6 / a) / 30
            nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return sin(30 (Wx + b))."""
        return torch.sin(30 * self.linear(x))


@faulty(
    "exploding",
    "stalled",
    source="GitHub lucidrains/siren-pytorch issue 1; vsitzmann/siren issues 19 and 57",
    steps=200,
)
def picture_as_a_field_of_sines(*, fixed: bool) -> Training:
    """Represent a picture by sin(30 (Wx + b)), five deep, and leave the initialization to torch."""
    net = Net(
        lambda n, x: n.head(n.field(x)),
        field=nn.Sequential(
            Sine(2, 48, first=True, fixed=fixed), *(Sine(48, 48, first=False, fixed=fixed) for _ in range(4))
        ),
        head=nn.Linear(48, 1),
    )
    if fixed:
        nn.init.uniform_(net.head.weight, -math.sqrt(6 / 48) / 30, math.sqrt(6 / 48) / 30)

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.rand(256, 2, generator=draw(512, i)) * 2 - 1
        picture = torch.sin(5 * x[:, :1] + 3 * x[:, 1:].pow(2)) * torch.cos(4 * x[:, 1:])
        return mse(model(x), picture)

    return train(net, Adam(net.parameters(), 5e-4), loss_of)


class Hop(nn.Module):
    """A graph convolution."""

    def __init__(self, width: int, *, skip: bool) -> None:
        """Make it, with a normalized skip connection or without."""
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width) if skip else None

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Average over neighbours, then transform."""
        if self.norm is not None:
            return x + torch.relu(adjacency @ self.linear(self.norm(x)))
        return torch.relu(adjacency @ self.linear(x))


@faulty(
    "vanishing-depth",
    "stalled",
    "dead-units",  # all nodes look alike: a unit fires for all of them or for none
    source=(
        "GitHub lightaime/deep_gcns_torch issue 10; Li, Han and Wu, 'Deeper insights into graph convolutional networks'"
    ),
    words=r"residual|skip|norm|depth|deep|init|layer",
    steps=150,
)
def papers_sixteen_citations_away(*, fixed: bool) -> Training:
    """Classify the nodes of a graph by 16 plain graph convolutions in a row."""
    g = draw(513, -1)
    which = torch.randint(4, (120,), generator=g)
    edge = torch.rand(120, 120, generator=g) < torch.where(which[:, None] == which, 0.12, 0.015)
    links = (edge | edge.T | torch.eye(120, dtype=torch.bool)).float()
    root = links.sum(1).rsqrt()
    adjacency = links * root[:, None] * root
    centres = torch.randn(4, 12, generator=g)

    def does(n: Any, x: Tensor) -> Tensor:
        h = torch.relu(n.embed(x))
        for hop in n.hops:
            h = hop(h, adjacency)
        return n.head(h)

    net = Net(
        does, embed=nn.Linear(12, 32), hops=nn.ModuleList(Hop(32, skip=fixed) for _ in range(16)), head=nn.Linear(32, 4)
    )

    def loss_of(model: Any, i: int) -> Tensor:
        return xent(model(centres[which] + 1.5 * torch.randn(120, 12, generator=draw(513, i))), which)

    return train(net, Adam(net.parameters(), 5e-4), loss_of)


@faulty(
    "dead-units",
    "exploding",  # the first losses: what is large is the mean
    source=(
        "Simon et al., 'On the Relationship Between Activation Outliers and Feature Death in Sparse Autoencoders' "
        "(GitHub AkihikoWatanabe/paper_notes issue 5822): activations not centred"
    ),
    places=("encoder",),
    words=r"relu|bias|negative|never|fire|centr|center|mean|standardi|normali|leaky|dead",
    steps=200,
)
def dictionary_of_what_a_model_sees(*, fixed: bool) -> Training:
    """Learn a sparse dictionary of activations whose mean is far larger than how they vary, and do not centre them."""
    g = draw(514, -1)
    atoms = functional.normalize(torch.randn(24, 16, generator=g), dim=1)
    mean = 20 * functional.normalize(torch.randn(16, generator=g), dim=0)

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.relu(n.encoder(x - n.decoder.bias))
        return n.decoder(code), code

    net = Net(does, encoder=nn.Linear(16, 64), decoder=nn.Linear(64, 16))
    nn.init.zeros_(net.encoder.bias)
    nn.init.zeros_(net.decoder.bias)
    with torch.no_grad():
        net.decoder.weight.copy_(functional.normalize(net.decoder.weight, dim=0))
        net.encoder.weight.copy_(net.decoder.weight.T)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(514, i)
        use = torch.rand(128, 24, generator=g) * (torch.rand(128, 24, generator=g) < 0.15)
        x = use @ atoms + (0.0 if fixed else mean)
        out, code = model(x)
        return (out - x).pow(2).sum(1).mean() + 0.05 * code.sum(1).mean()

    return train(net, Adam(net.parameters(), 1e-2), loss_of)
