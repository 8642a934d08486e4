"""Labelled training runs of our own, none in the zoo: healthy ones that look ill, and faulty ones with a cured twin.

python -m benchmarks.runs    # first and last loss of each, plain and cured: the labels come without gradwatch's help

They are there to tell whether detectors fit the zoo or training at large. A label is known from how its run is
made, and was checked against the gradients alone (in float64 where precision is in doubt): nothing here may be
changed to suit a detector.
"""

from __future__ import annotations

import fnmatch
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.command import parsed, parser
from gradwatch.demo import market

Tell = Callable[[Tensor], object]
Batch = Callable[[int], tuple[Tensor, ...]]
LossOf = Callable[[Any, int], Any]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Label:
    """What is wrong with a run."""

    kind: str
    places: tuple[str, ...] = ()
    """Names of modules, each with all that is in it, where an alert is right; none: anywhere."""
    onset: int = 0
    """The first step at which it is there."""


@dataclass
class Training:
    """A model, what trains it, and the loop."""

    model: nn.Module
    optimizers: list[Optimizer]
    step: Callable[[int, Tell], None]
    """Make step i, and tell the loss just before an optimizer's step, when gradients are complete and unscaled.

    They are not clipped yet.
    """
    loss_of: LossOf | None = None
    """The loss of step i, of this model or of a copy of it: for those who check the labels."""
    steps: int = 0
    seed: int = 0

    def run(self, tell: Tell) -> None:
        """Train from beginning to end; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for i in range(self.steps):
                self.step(i, tell)


@dataclass(frozen=True)
class Run:
    """A training, how to make it, and what is wrong with it."""

    name: str
    why: str
    make: Callable[..., Training] = field(repr=False)
    faults: tuple[Label, ...]
    also: frozenset[str]
    """Kinds that are true consequences of the fault: neither asked for nor false."""
    horizon: int | None
    """How many of the newest timesteps matter, as a user would declare it."""
    steps: int

    def build(self, *, cured: bool = False) -> Training:
        """Make it anew, always the same, or its twin without the fault; a healthy run is its own."""
        seed = zlib.crc32(self.name.encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.make(cured=cured) if self.faults else self.make()
        made.steps, made.seed = self.steps, seed
        return made


RUNS: list[Run] = []
QUICK = ("q_learning", "functional_relus", "burst_of_orders")
"""Short ones: what `--quick` takes."""


def healthy(
    *, horizon: int | None = None, steps: int = 200
) -> Callable[[Callable[[], Training]], Callable[[], Training]]:
    """Register a run that nothing is wrong with."""

    def register(make: Callable[[], Training]) -> Callable[[], Training]:
        RUNS.append(Run(make.__name__, make.__doc__ or "", make, (), frozenset(), horizon, steps))
        return make

    return register


def faulty(
    *faults: Label, also: Iterable[str] = (), horizon: int | None = None, steps: int = 200
) -> Callable[[Callable[..., Training]], Callable[..., Training]]:
    """Register a run with faults, which `cured=True` leaves out."""

    def register(make: Callable[..., Training]) -> Callable[..., Training]:
        RUNS.append(Run(make.__name__, make.__doc__ or "", make, faults, frozenset(also), horizon, steps))
        return make

    return register


# --- the loop ---


def take_step(optimizer: Optimizer, loss: Tensor, tell: Tell) -> None:
    """Take a step as most loops do, and tell of its loss."""
    optimizer.zero_grad()
    loss.backward()
    tell(loss.detach())
    optimizer.step()


def train(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    loss_of: LossOf,
    *,
    clip: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rate: Callable[[int], float] | None = None,
    parts: int = 1,
) -> Training:
    """Make the usual loop.

    Args:
        model: what is trained.
        optimizers: one, or several that step together.
        loss_of: gives the loss of a step.
        clip: the gradient norm to clip to.
        scaler: scales the loss.
        rate: the learning rate's factor by step.
        parts: batches whose gradients are accumulated in a step.

    """
    chosen = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    schedules = [LambdaLR(o, rate) for o in chosen] if rate else []

    def step(i: int, tell: Tell) -> None:
        for optimizer in chosen:
            optimizer.zero_grad()
        total = torch.zeros(())
        for part in range(parts):
            loss = loss_of(model, i * parts + part)
            if parts > 1:
                loss = loss / parts
            (scaler.scale(loss) if scaler else loss).backward()
            total = total + loss.detach()
        if scaler:
            for optimizer in chosen:
                scaler.unscale_(optimizer)
        tell(total if parts > 1 else loss)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        _move(chosen, scaler)
        for schedule in schedules:
            schedule.step()

    return Training(model, chosen, step, loss_of)


def _move(optimizers: Iterable[Optimizer], scaler: torch.amp.GradScaler | None) -> None:
    for optimizer in optimizers:
        if scaler:
            scaler.step(optimizer)
        else:
            optimizer.step()
    if scaler:
        scaler.update()


def fit(batch: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> LossOf:
    """Return the loss of what a model makes of all of a batch but the last, against the last."""

    def loss_of(model: Any, i: int) -> Any:
        *inputs, target = batch(i)
        return loss(model(*inputs), target)

    return loss_of


def mse(forecast: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error, never in less than float32."""
    return (forecast.to(torch.promote_types(forecast.dtype, target.dtype)) - target).pow(2).mean()


def xent(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy, never in less than float32."""
    return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


# --- networks ---


class Net(nn.Module):
    """Layers by name, and what they do with their inputs, in the precision of the first weight: most are used once."""

    def __init__(self, does: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        """Take both."""
        super().__init__()
        self._does = does
        for name, layer in layers.items():
            setattr(self, name, layer)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return a layer."""

    def forward(self, *inputs: Tensor) -> Any:
        """Do it."""
        dtype = next(self.parameters()).dtype
        return self._does(self, *(x.to(dtype) if x.is_floating_point() else x for x in inputs))


def mlp(
    *widths: int, act: Callable[[], nn.Module] = nn.ReLU, norm: Callable[[int], nn.Module] | None = None
) -> nn.Sequential:
    """Stack linear layers with an activation, and a normalization before it, after all but the last."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), *([norm(b)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def he(model: M) -> M:
    """Initialize all linear and convolutional layers for ReLU."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def remember(rnn: nn.RNNBase, steps: int) -> None:
    """Bias the gates of an LSTM or GRU so that it keeps its state for about so many steps."""
    size = rnn.hidden_size
    with torch.no_grad():
        rnn.get_parameter("bias_hh_l0")[size : 2 * size] = math.log(steps)
        rnn.get_parameter("bias_ih_l0")[size : 2 * size] = 0.0


def last(rnn: nn.RNNBase, outputs: int) -> Net:
    """Read out the newest state."""
    return Net(lambda n, x: n.head(n.rnn(x)[0][:, -1]), rnn=rnn, head=nn.Linear(rnn.hidden_size, outputs))


class Causal(nn.Conv1d):
    """A convolution over time that never sees what comes after."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Pad the past, then convolve."""
        return super().forward(functional.pad(input, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


def temporal(
    features: int, channels: int, outputs: int, dilations: Iterable[int], norm: Callable[[int], nn.Module] = nn.Identity
) -> Net:
    """Build a residual temporal convolutional network; the norm stands after convolutions with a bias."""
    blocks = [nn.Sequential(Causal(channels, channels, 3, dilation=d), norm(channels), nn.ReLU()) for d in dilations]

    def does(n: Any, x: Tensor) -> Any:
        h = n.inp(x.transpose(1, 2))
        for block in n.blocks:
            h = h + block(h)
        return n.head(h[:, :, -1])

    return Net(
        does, inp=nn.Conv1d(features, channels, 1), blocks=nn.ModuleList(blocks), head=nn.Linear(channels, outputs)
    )


def residual(
    width: int, blocks: int, scale: float = 1.0, branch: Callable[[], nn.Module] | None = None
) -> nn.Sequential:
    """Stack residual blocks whose branches count `scale` times."""
    return nn.Sequential(
        *(
            Net(lambda n, x: x + scale * n.branch(x), branch=branch() if branch else mlp(width, width, width))
            for _ in range(blocks)
        )
    )


# --- tasks; every batch is a function of the seed and of its number ---


def draw(seed: int, i: int) -> torch.Generator:
    """Return the random numbers of a batch."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + i)


def waves(seed: int, n: int = 64, d: int = 6) -> Batch:
    """Learn a sine of one direction plus a product of two others; variance about 1."""
    a = torch.randn(d, 3, generator=draw(seed, -1)) / math.sqrt(d)

    def batch(i: int) -> tuple[Tensor, ...]:
        x = torch.randn(n, d, generator=draw(seed, i))
        u = x @ a
        return x, (torch.sin(2 * u[:, :1]) + u[:, 1:2] * u[:, 2:])

    return batch


def clusters(seed: int, n: int = 64, d: int = 16, classes: int = 5) -> Batch:
    """Tell clusters apart, two to a class."""
    centres = torch.randn(2 * classes, d, generator=draw(seed, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        which = torch.randint(2 * classes, (n,), generator=g)
        return centres[which] + 0.7 * torch.randn(n, d, generator=g), which % classes

    return batch


def bumps(seed: int, n: int = 32) -> Batch:
    """Tell in which quadrant of a noisy 8 x 8 image there is a bump, or a dent."""

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        y = torch.randint(4, (n,), generator=g)
        at = torch.randint(3, (n, 2), generator=g) + torch.stack([y // 2, y % 2], 1) * 4
        r, sign = torch.arange(8), torch.randint(2, (n,), generator=g) * 2.0 - 1
        rows, columns = ((r >= at[:, k : k + 1]) & (r < at[:, k : k + 1] + 2) for k in (0, 1))
        return 0.3 * torch.randn(n, 1, 8, 8, generator=g) + (rows[:, :, None] & columns[:, None, :])[:, None] * sign[
            :, None, None, None
        ], y

    return batch


def book(seed: int, n: int = 64, levels: int = 5, *, noise: float = 0.5, raw: bool = False) -> Batch:
    """Tell the next tick's direction from the sizes in an order book: logarithms, standardised unless `raw`."""
    weight = 0.6 ** torch.arange(levels)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        logs = torch.randn(n, 2, levels, generator=g)
        sizes = torch.exp(logs) * weight
        bid, ask = sizes[:, 0].sum(1), sizes[:, 1].sum(1)
        up = (bid - ask) / (bid + ask) + noise * torch.randn(n, generator=g) > 0
        return (12 + logs if raw else logs).flatten(1), up.long()

    return batch


def returns(seed: int, n: int = 32, length: int = 40, freedom: float = 3.0) -> Batch:
    """Forecast the size of the next return from heavy-tailed ones whose volatility comes in clusters."""

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        log = torch.zeros(n)
        shocks, normal = torch.randn(length + 6, n, generator=g), torch.randn(length + 6, n, generator=g)
        chi = sum(torch.randn(length + 6, n, generator=g) ** 2 for _ in range(int(freedom))) / freedom
        path = []
        for bar in range(length + 6):
            log = 0.9 * log + 0.4 * shocks[bar]
            path.append(torch.exp(log))
        r = torch.stack(path) * normal / torch.as_tensor(chi).sqrt()
        return r[:length].t()[:, :, None].contiguous(), r[length:].abs().mean(0)[:, None]

    return batch


def panel(seed: int, n: int = 16, assets: int = 12, features: int = 4) -> Batch:
    """Forecast the returns of all assets of a day: an asset's score over the mean of those with a like sector."""
    a = torch.randn(features - 1, generator=draw(seed, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        x = torch.randn(n, assets, features, generator=g)
        x[:, :, -1] = torch.randint(2, (n, assets), generator=g) * 2.0 - 1
        score = x[:, :, :-1] @ a
        same = (x[:, :, None, -1] == x[:, None, :, -1]).float()
        return x, (score - (same @ score[:, :, None])[:, :, 0] / same.sum(2))[:, :, None]

    return batch


def flow(seed: int, bars: int, event: tuple[int, int], n: int = 32, shift: float = 1.0) -> Batch:
    """Tell whether the order flow was shifted in some bars long ago."""
    x, y = (torch.from_numpy(v) for v in market.order_flow(seed, bars, 4096, event, shift))

    def batch(i: int) -> tuple[Tensor, ...]:
        pick = torch.randint(len(y), (n,), generator=draw(seed, i))
        return x[pick], y[pick]

    return batch


def volatility(seed: int, bars: int, n: int = 48, count: int = 2000) -> Batch:
    """Forecast the volatility of the next bars from a window of prices."""
    prices = market.flow_prices(seed, count + bars + 10)
    x, y = (torch.from_numpy(v) for v in market.windows(prices, bars, 10))

    def batch(i: int) -> tuple[Tensor, ...]:
        pick = torch.randint(len(y), (n,), generator=draw(seed, i))
        return x[pick], y[pick, None]

    return batch


# --- healthy: gradients that are zero, or nearly, by construction ---


@healthy(steps=150)
def groupnorm_bias() -> Training:
    """Biases before a normalization of each channel by itself: their gradient is zero but for rounding."""
    layers = [m for k in range(3) for m in (nn.Conv2d(8 if k else 1, 8, 3, padding=1), nn.GroupNorm(8, 8), nn.SiLU())]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    return train(net, AdamW(net.parameters(), 3e-3), fit(bumps(1), xent))


@healthy()
def lora_after_pretraining() -> Training:
    """Adapt a trained and frozen network to a turned market by low-rank updates that begin at zero."""
    base = he(mlp(6, 48, 48, 1))
    before, optimizer, task = fit(waves(2), mse), Adam(base.parameters(), 5e-3), waves(2)
    for i in range(150):
        optimizer.zero_grad()
        before(base, i + 5000).backward()
        optimizer.step()
    base.requires_grad_(requires_grad=False).zero_grad()
    for k, layer in enumerate(base):
        if isinstance(layer, nn.Linear):
            up = nn.Linear(4, layer.out_features, bias=False)
            nn.init.zeros_(up.weight)
            base[k] = Net(
                lambda n, x: n.base(x) + n.up(n.down(x)),
                base=layer,
                down=nn.Linear(layer.in_features, 4, bias=False),
                up=up,
            )
    turned = fit(lambda i: (task(i)[0], task(i)[0][:, :1] - task(i)[1]), mse)
    return train(base, AdamW([p for p in base.parameters() if p.requires_grad], 1e-2), turned)


@healthy()
def rezero_twelve() -> Training:
    """Twelve residual branches with a factor that begins at zero: at first only the factors get a gradient."""
    blocks = [
        Net(
            lambda n, x: x + n.alpha * torch.tanh(n.linear(x)),
            linear=nn.Linear(24, 24),
            alpha=nn.Parameter(torch.zeros(())),
        )
        for _ in range(12)
    ]
    net = nn.Sequential(nn.Linear(6, 24), *blocks, nn.Linear(24, 1))
    return train(net, Adam(net.parameters(), 5e-3), fit(waves(3), mse))


@healthy()
def fixup() -> Training:
    """Fixup: the last layer of every branch and the head begin at zero, so at first only the head gets a gradient."""
    net = nn.Sequential(nn.Linear(6, 32), residual(32, 6), nn.Linear(32, 1))
    he(net)
    for name, weight in net.named_parameters():
        if name.endswith("branch.0.weight"):
            weight.data.mul_(6**-0.5)
        elif name.endswith(("branch.2.weight", "2.weight")):
            nn.init.zeros_(weight)
    return train(net, SGD(net.parameters(), 0.02, momentum=0.9), fit(waves(4), mse))


@healthy(steps=120)
def frozen_backbone() -> Training:
    """Train a new head on a trained, frozen backbone in evaluation mode, of which the optimizer does not know."""
    backbone = he(
        nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
    )
    net = nn.Sequential(backbone, nn.Linear(48, 4))
    optimizer, before, task = Adam(net.parameters(), 1e-2), fit(bumps(5), xent), bumps(5)
    for i in range(60):
        optimizer.zero_grad()
        before(net, i + 5000).backward()
        optimizer.step()
    backbone.requires_grad_(requires_grad=False).eval().zero_grad()
    net[1] = nn.Linear(48, 2)
    return train(net, SGD(net[1].parameters(), 0.1, momentum=0.9), fit(lambda i: (task(i)[0], task(i)[1] // 2), xent))


@healthy()
def experts_by_regime() -> Training:
    """One of twelve experts for each row, by its regime: in most batches some experts have no rows, and no gradient."""
    experts = nn.ModuleList(mlp(6, 12, 1, act=nn.Tanh) for _ in range(12))
    slopes, often = torch.randn(12, 6, generator=draw(6, -1)), 1 / torch.arange(1.0, 13.0)

    def does(n: Any, x: Tensor, regime: Tensor) -> Any:
        out = x.new_zeros(len(x), 1)
        for k in sorted(set(regime.tolist())):
            rows = (regime == k).nonzero()[:, 0]
            out = out.index_add(0, rows, n.experts[k](n.shared(x[rows])))
        return out

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(6, i)
        regime, x = torch.multinomial(often, 24, replacement=True, generator=g), torch.randn(24, 6, generator=g)
        return x, regime, torch.tanh((x * slopes[regime]).sum(1, keepdim=True))

    net = Net(does, shared=nn.Linear(6, 6), experts=experts)
    return train(net, Adam(net.parameters(), 1e-2), fit(batch, mse))


@healthy()
def rare_instruments() -> Training:
    """Embed 400 instruments, most of them rarely traded: sparse gradients of a few rows, and two optimizers."""
    net = Net(
        lambda n, signal, which: n.head(n.rows(which) * signal),
        rows=nn.Embedding(400, 8, sparse=True),
        head=nn.Linear(8, 1),
    )
    side, often = torch.randn(400, generator=draw(7, -1)), 1 / torch.arange(1.0, 401.0)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(7, i)
        which, signal = torch.multinomial(often, 128, replacement=True, generator=g), torch.randn(128, 1, generator=g)
        return signal, which, side[which, None] * signal

    return train(net, [SparseAdam(net.rows.parameters(), 2e-2), Adam(net.head.parameters(), 1e-2)], fit(batch, mse))


@healthy()
def auxiliary_now_and_then() -> Training:
    """Use an auxiliary head in every fifth batch only; in the others its gradient is None."""
    net = Net(
        lambda n, x: (n.head(n.body(x)), n.aux),
        body=nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU()),
        head=nn.Linear(40, 1),
        aux=nn.Linear(40, 6),
    )
    task = waves(8)

    def loss_of(model: Any, i: int) -> Any:
        x, y = task(i)
        loss = mse(model(x)[0], y)
        return loss + 0.3 * mse(model.aux(model.body(x.to(model.head.weight.dtype))), x) if i % 5 == 0 else loss

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@healthy()
def panel_attention() -> Training:
    """Attention across the assets of a day: the bias of the keys has no gradient, and dimension 1 is no time."""

    def does(n: Any, x: Tensor) -> Any:
        h = n.inp(x)
        mixed = functional.scaled_dot_product_attention(n.query(h), n.key(h), n.value(h))
        return n.head(torch.cat([h, n.out(mixed)], -1))

    net = Net(
        does,
        inp=nn.Linear(4, 16),
        **{k: nn.Linear(16, 16) for k in ("query", "key", "value", "out")},
        head=mlp(32, 32, 1),
    )
    return train(net, Adam(net.parameters(), 5e-3), fit(panel(9), mse))


# --- healthy: small gradients and updates ---


@healthy()
def tiny_returns() -> Training:
    """Forecast returns of 1e-4: losses of 1e-8, gradients to match, and an optimizer with its epsilon set for that."""
    net = Net(lambda n, x: 1e-4 * n.net(x), net=he(mlp(6, 32, 32, 1)))
    task = waves(10)
    return train(net, RMSprop(net.parameters(), 2e-3, eps=1e-14), fit(lambda i: (task(i)[0], 1e-4 * task(i)[1]), mse))


@healthy(steps=250)
def learnt_by_heart() -> Training:
    """Twenty samples with random classes, learnt by heart: loss and gradients fall to nothing, for all is done."""
    net, g = mlp(10, 64, 64, 3, act=nn.SELU), draw(11, 0)
    x, y = torch.randn(20, 10, generator=g), torch.randint(3, (20,), generator=g)
    return train(net, Adam(net.parameters(), 1e-2), fit(lambda _: (x, y), xent))


@healthy(steps=220)
def warmup_and_cosine() -> Training:
    """Let the learning rate rise from 1e-8 to 5e-3 by factors, then fall to zero by a cosine."""
    net = he(mlp(16, 48, 48, 5))

    def rate(i: int) -> float:
        return (2e-6) ** (1 - i / 60) if i < 60 else 0.5 + 0.5 * math.cos(math.pi * min(1, (i - 60) / 159))

    return train(net, AdamW(net.parameters(), 5e-3), fit(clusters(12), xent), rate=rate)


@healthy()
def strong_decay() -> Training:
    """Decay the weights by a hundredth at each step, as is meant."""
    net = he(mlp(16, 64, 64, 5, act=nn.GELU))
    return train(net, AdamW(net.parameters(), 1e-2, weight_decay=1.0), fit(clusters(13), xent))


@healthy(steps=250)
def deep_relu() -> Training:
    """Twenty-four plain ReLU layers, initialized as they should be."""
    net = he(mlp(16, *[64] * 24, 5))
    return train(net, SGD(net.parameters(), 2e-3, momentum=0.9), fit(clusters(14), xent))


# --- healthy: activity that is low, or gradients that are noisy ---


@healthy()
def sparse_code() -> Training:
    """Keep 48 ReLU units of an autoencoder sparse by a penalty: a quarter are active for a sample, each for some."""
    net = Net(
        lambda n, x: n.decoder(n.code(x)), code=nn.Sequential(nn.Linear(20, 48), nn.ReLU()), decoder=nn.Linear(48, 20)
    )
    atoms = functional.normalize(torch.randn(24, 20, generator=draw(15, -1)), dim=1)

    def loss_of(model: Any, i: int) -> Any:
        g = draw(15, i)
        x = ((torch.rand(128, 24, generator=g) < 0.08) * (1 + torch.rand(128, 24, generator=g))) @ atoms
        code = model.code(x.to(model.decoder.weight.dtype))
        return (model.decoder(code) - x).pow(2).sum(1).mean() + 0.1 * code.sum(1).mean()

    return train(net, Adam(net.parameters(), 1e-2), loss_of)


@healthy()
def clipped_activations() -> Training:
    """ReLU6 and Hardtanh, which have no slope on either side."""
    net = he(
        nn.Sequential(
            nn.Linear(6, 48),
            nn.ReLU6(),
            nn.Linear(48, 48),
            nn.Hardtanh(),
            nn.Linear(48, 48),
            nn.ReLU6(),
            nn.Linear(48, 1),
        )
    )
    return train(net, SGD(net.parameters(), 0.02, momentum=0.9), fit(waves(16), mse))


@healthy()
def dropout_seventy() -> Training:
    """Dropout of 0.7 after every ReLU."""
    net = he(
        nn.Sequential(
            nn.Linear(16, 96),
            nn.ReLU(),
            nn.Dropout(0.7),
            nn.Linear(96, 96),
            nn.ReLU(),
            nn.Dropout(0.7),
            nn.Linear(96, 5),
        )
    )
    return train(net, Adam(net.parameters(), 3e-3), fit(clusters(17), xent))


@healthy()
def book_mlp() -> Training:
    """Forecast the next tick from the order book: so noisy that the loss of a perfect model is most of a coin's."""
    net = he(mlp(10, 48, 48, 2, norm=nn.LayerNorm))
    return train(net, Adam(net.parameters(), 2e-3), fit(book(18, noise=1.0), xent))


@healthy(steps=120)
def book_accumulated() -> Training:
    """Gradients of four small batches of order books, accumulated for each step."""
    net = he(mlp(10, 48, 48, 2, act=nn.SiLU))
    return train(net, SGD(net.parameters(), 0.1, momentum=0.9), fit(book(19, 16, noise=0.1), xent), parts=4)


@healthy(steps=120)
def gru_heavy_tails() -> Training:
    """Read returns with tails so heavy that single batches have many times others' gradient; clipped, as one does."""
    net = last(nn.GRU(1, 24, batch_first=True), 1)
    return train(net, Adam(net.parameters(), 5e-3), fit(returns(20), mse), clip=1.0)


@healthy(horizon=5, steps=120)
def lstm_five_bars() -> Training:
    """Run an LSTM over 60 bars, of which the newest five decide: it forgets the rest, rightly."""
    net = last(nn.LSTM(4, 16, batch_first=True), 2)
    return train(net, Adam(net.parameters(), 1e-2), fit(flow(21, 60, (55, 60), shift=1.5), xent))


@healthy(steps=120)
def lstm_summed() -> Training:
    """Sum the loss over all bars of all sequences: two thousand times the mean, and a learning rate to match."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0]), rnn=nn.LSTM(2, 16, batch_first=True), head=nn.Linear(16, 1))

    def loss_of(model: Any, i: int) -> Any:
        x = torch.randn(48, 40, 2, generator=draw(22, i))
        return (model(x)[:, 1:] - x[:, 1:, :1] - x[:, :-1, 1:]).pow(2).sum()

    return train(net, SGD(net.parameters(), 2e-4, momentum=0.9), loss_of, clip=200.0)


@healthy(steps=150)
def tcn_volatility() -> Training:
    """Forecast volatility by dilated convolutions whose biases before batch norm have no gradient but for rounding."""
    net = temporal(4, 16, 1, (1, 2, 4, 8, 16), nn.BatchNorm1d)
    return train(net, Adam(net.parameters(), 3e-3), fit(volatility(23, 64), mse))


# --- healthy: unusual loops and architectures ---


@healthy(steps=100)
def wasserstein_returns() -> Training:
    """Train a generator of returns against a critic with a twice differentiated penalty: two optimizers, two losses."""
    net = Net(
        lambda n, z: n.generator(z),
        generator=mlp(4, 32, 32, 2, act=nn.LeakyReLU),
        critic=mlp(2, 32, 32, 1, act=nn.Softplus),
    )
    optimizers: list[Optimizer] = [
        Adam(getattr(net, name).parameters(), 2e-3, betas=(0.0, 0.9)) for name in ("generator", "critic")
    ]

    def penalty(real: Tensor, fake: Tensor, g: torch.Generator) -> Tensor:
        between = (fake + torch.rand(len(real), 1, generator=g) * (real - fake)).requires_grad_()
        (slope,) = torch.autograd.grad(net.critic(between).sum(), between, create_graph=True)
        size: Tensor = slope.pow(2).sum(1).sqrt()
        return (size - 1).pow(2).mean()

    def step(i: int, tell: Tell) -> None:
        g = draw(24, i)
        critic: Any = net.critic
        for turn in (1, 1, 0):
            optimizers[turn].zero_grad()
            fake = net(torch.randn(64, 4, generator=g))
            if turn:
                real = torch.randn(64, 2, generator=g) * torch.tensor([0.5, 2.0]) + 1.5
                loss = critic(fake.detach()).mean() - critic(real).mean() + penalty(real, fake.detach(), g)
            else:
                loss = -critic(fake).mean()
            loss.backward()
            tell(loss.detach())
            optimizers[turn].step()

    return Training(net, optimizers, step)


@healthy(steps=250)
def vae_curves() -> Training:
    """Train a variational autoencoder of yield curves, with a loss that goes below zero."""
    net = Net(
        lambda n, x: n.decoder(n.encoder(x)[:, :3]),
        encoder=mlp(10, 32, 6, act=nn.Tanh),
        decoder=mlp(3, 32, 10, act=nn.Tanh),
        spread=nn.Parameter(torch.zeros(())),
    )
    tenor = torch.linspace(0, 1, 10)
    shapes = torch.stack([torch.ones(10), 1 - 2 * tenor, 4 * tenor * (1 - tenor) - 0.5])

    def loss_of(model: Any, i: int) -> Any:
        g = draw(25, i)
        x = torch.randn(64, 3, generator=g) @ shapes + 0.05 * torch.randn(64, 10, generator=g)
        mean, log = model.encoder(x.to(model.spread.dtype)).chunk(2, -1)
        rebuilt = model.decoder(mean + torch.randn(len(x), 3, generator=g) * torch.exp(log / 2))
        rough = ((rebuilt - x).pow(2) * torch.exp(-2 * model.spread) / 2 + model.spread).sum(1)
        return (rough + (mean.pow(2) + log.exp() - 1 - log).sum(1) / 2).mean()

    return train(net, Adam(net.parameters(), 1e-2), loss_of)


@healthy(steps=120)
def unet_denoising() -> Training:
    """Take the noise from a wave with a small U-Net: what goes round the bottom carries most of the signal."""

    def does(n: Any, x: Tensor) -> Any:
        top = torch.relu(n.down1(x))
        low = torch.relu(n.bottom(torch.relu(n.down2(top))))
        return n.out(torch.cat([torch.relu(n.up(low)), top], 1))

    net = Net(
        does,
        down1=nn.Conv1d(1, 12, 5, padding=2),
        down2=nn.Conv1d(12, 24, 4, stride=2, padding=1),
        bottom=nn.Conv1d(24, 24, 3, padding=1),
        up=nn.ConvTranspose1d(24, 12, 4, stride=2, padding=1),
        out=nn.Conv1d(24, 1, 5, padding=2),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(26, i)
        phase, pace = torch.rand(2, 24, 1, 1, generator=g)
        clean = torch.sin(6.3 * (phase + (1 + 3 * pace) * torch.linspace(0, 1, 48)))
        return clean + 0.5 * torch.randn(24, 1, 48, generator=g), clean

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, mse))


@healthy()
def siamese() -> Training:
    """One encoder called twice a step; a margin beyond which most pairs give no gradient."""
    net = Net(lambda n, a, b: (n.encoder(a) - n.encoder(b)).pow(2).sum(1), encoder=mlp(16, 48, 8))
    task = clusters(27, 128)

    def loss_of(model: Any, i: int) -> Any:
        x, y = task(i)
        far = model(x[:64], x[64:])
        return torch.where(y[:64] == y[64:], far, torch.relu(1 - (far + 1e-6).sqrt()).pow(2)).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@healthy()
def tied_autoencoder() -> Training:
    """Decode with the transposed encoder: one weight, used twice."""
    net = Net(
        lambda n, x: functional.linear(torch.tanh(n.encoder(x)), n.encoder.weight.t(), n.offset),
        encoder=nn.Linear(20, 6),
        offset=nn.Parameter(torch.zeros(20)),
    )
    mix = torch.randn(4, 20, generator=draw(28, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(28, i)
        x = 0.5 * torch.randn(64, 4, generator=g) @ mix + 0.1 * torch.randn(64, 20, generator=g)
        return x, x

    return train(net, SGD(net.parameters(), 0.1, momentum=0.9), fit(batch, mse))


@healthy()
def bfloat16_large_steps() -> Training:
    """Keep everything in bfloat16, with steps that are large enough for it: few of them are rounded away."""
    net = Net(lambda n, x: n.net(x), net=he(mlp(10, 48, 48, 2))).to(torch.bfloat16)
    return train(net, Adam(net.parameters(), 2e-2), fit(book(29, noise=0.2), xent))


@healthy()
def scaler_overflows() -> Training:
    """Float16 autocast with a scale from 2**26 on, growing every 12 steps: steps are skipped at times, as designed."""

    def does(n: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.float16, enabled=x.dtype is not torch.float64):
            return n.net(x)

    net = Net(does, net=he(mlp(16, 64, 64, 5, norm=nn.LayerNorm)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=12)
    return train(net, SGD(net.parameters(), 0.05, momentum=0.9), fit(clusters(30), xent), scaler=scaler)


@healthy()
def q_learning() -> Training:
    """Q-learning of when to trade: the target is a frozen copy, renewed every 20 steps, unknown to the optimizer."""
    online, target = he(mlp(4, 32, 32, 3)), he(mlp(4, 32, 32, 3)).requires_grad_(requires_grad=False)
    net = Net(lambda n, x: n.online(x), online=online, target=target)

    def loss_of(model: Any, i: int) -> Any:
        if i % 20 == 0:
            target.load_state_dict(online.state_dict())
        g = draw(31, i)
        state, act = torch.randn(64, 4, generator=g), torch.randint(3, (64,), generator=g)
        then = 0.7 * state + 0.7 * torch.randn(64, 4, generator=g)
        reward = (act - 1) * torch.tanh(2 * state[:, 0]) - 0.3 * (act != 1)
        goal = reward + 0.6 * model.target(then.to(model.target[0].weight.dtype)).max(1).values
        return mse(model(state).gather(1, act[:, None])[:, 0], goal)

    return train(net, Adam(online.parameters(), 3e-3), loss_of)


# --- vanishing-depth ---

DEPTH, TIME, EXPLODING, DEAD, CUT, NAN, LOST = (
    "vanishing-depth",
    "vanishing-time",
    "exploding",
    "dead-units",
    "disconnected",
    "non-finite",
    "underflow",
)


@faulty(Label(DEPTH, ("convs.0", "convs.2", "convs.4", "convs.6", "convs.8", "convs.10", "convs.12")), also={LOST})
def sigmoid_convolutions(*, cured: bool) -> Training:
    """Ten convolutions over order flow with sigmoids between them, as torch makes them."""
    layers = [
        m
        for k in range(10)
        for m in (nn.Conv1d(12 if k else 4, 12, 3, padding=1), nn.ReLU() if cured else nn.Sigmoid())
    ]
    convs = nn.Sequential(*layers)
    net = Net(
        lambda n, x: n.head(n.convs(x.transpose(1, 2)).mean(2)),
        convs=he(convs) if cured else convs,
        head=nn.Linear(12, 2),
    )
    return train(net, SGD(net.parameters(), 0.02, momentum=0.9), fit(flow(40, 24, (4, 20)), xent))


@faulty(
    Label(DEPTH, ("inp", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5.gate", "blocks.6.gate")),
    also={LOST},
)
def closed_highway(*, cured: bool) -> Training:
    """Close the gates of a highway network to what should be carried (bias 5 instead of -2), over weak layers."""

    def block() -> Net:
        made = Net(
            lambda n, x: x + torch.sigmoid(n.gate(x)) * (torch.tanh(n.layer(x)) - x),
            layer=nn.Linear(24, 24),
            gate=nn.Linear(24, 24),
        )
        nn.init.constant_(made.gate.bias, -2.0 if cured else 5.0)
        nn.init.normal_(made.layer.weight, std=0.05)
        return made

    net = Net(
        lambda n, x: n.head(n.blocks(n.inp(x))),
        inp=nn.Linear(6, 24),
        blocks=nn.Sequential(*(block() for _ in range(10))),
        head=nn.Linear(24, 1),
    )
    return train(net, SGD(net.parameters(), 0.02, momentum=0.9), fit(waves(41), mse))


@faulty(Label(DEPTH, ("branches",)), also={LOST})
def branches_that_do_not_count(*, cured: bool) -> Training:
    """Residual branches times 1e-5, which was meant to be learnt and is a constant: all but the trunk stands still."""
    net = Net(
        lambda n, x: n.head(n.branches(n.inp(x))),
        inp=nn.Linear(6, 32),
        branches=residual(32, 4, 0.3 if cured else 1e-5),
        head=nn.Linear(32, 1),
    )
    return train(net, SGD(he(net).parameters(), 0.02, momentum=0.9), fit(waves(42), mse))


@faulty(Label(DEPTH, tuple(str(2 * k) for k in range(16))), also={DEAD, LOST})
def deep_relu_by_default(*, cured: bool) -> Training:
    """Twenty-four ReLU layers with torch's initialization: signals shrink at each. The healthy one is `deep_relu`."""
    net = mlp(16, *[64] * 24, 5)
    return train(
        he(net) if cured else net, SGD(net.parameters(), 2e-3, momentum=0.9), fit(clusters(44), xent), clip=5.0
    )


@faulty(Label(DEPTH, ("0", "2", "4"), onset=40))
def body_decayed_away(*, cured: bool) -> Training:
    """Decay the body by a slip of the pen (1 instead of 1e-4): layers shrink together until none passes anything on."""
    net = mlp(16, 48, 48, 48, 48, 5, act=nn.Tanh)
    groups = [
        {"params": net[:-1].parameters(), "weight_decay": 1e-4 if cured else 1.0},
        {"params": net[-1].parameters(), "weight_decay": 0.0},
    ]
    return train(net, SGD(groups, 0.05), fit(clusters(45), xent))


# --- vanishing-time ---


@faulty(Label(TIME, ("rnn",)), horizon=70, steps=100)
def gru_forgets(*, cured: bool) -> Training:
    """Take a GRU as torch makes it, and an event in the order flow 60 to 79 bars ago."""
    net = last(nn.GRU(4, 16, batch_first=True), 2)
    if cured:
        remember(net.rnn, 80)
    return train(net, Adam(net.parameters(), 1e-2), fit(flow(50, 80, (0, 20), shift=1.5), xent), clip=1.0)


@faulty(Label(TIME), horizon=50, steps=150)
def tcn_too_short(*, cured: bool) -> Training:
    """Dilations that reach back 15 bars, and an event 40 to 55 bars ago: no weights can learn it."""
    net = temporal(4, 16, 2, (1, 2, 4, 8, 16) if cured else (1, 2, 4))
    return train(net, Adam(net.parameters(), 3e-3), fit(flow(51, 60, (5, 20)), xent))


@faulty(Label(TIME), horizon=40, steps=120)
def leaky_cells(*, cured: bool) -> Training:
    """Cells called in a loop that keep half of their state at each bar, and volatility of 30 to 40 bars ago."""

    def does(n: Any, x: Tensor) -> Any:
        keep, h = 0.97 if cured else 0.5, x.new_zeros(len(x), 24)
        for bar in x.unbind(1):
            h = keep * h + (1 - keep) * n.cell(torch.cat([bar, torch.tanh(0.1 * h)], -1))
        return n.head(h)

    net = Net(does, cell=nn.Sequential(nn.Linear(28, 24), nn.Tanh()), head=nn.Linear(24, 2))
    return train(net, Adam(net.parameters(), 1e-2), fit(flow(52, 40, (0, 10), shift=1.5), xent))


@faulty(Label(TIME), horizon=60, steps=120)
def convolution_then_gru(*, cured: bool) -> Training:
    """Let a GRU read what a strided convolution makes of 80 bars: half as many steps, and still too many for it."""
    net = Net(
        lambda n, x: n.head(n.rnn(functional.silu(n.conv(x.transpose(1, 2))).transpose(1, 2))[0][:, -1]),
        conv=nn.Conv1d(4, 12, 4, stride=2),
        rnn=nn.GRU(12, 16, batch_first=True),
        head=nn.Linear(16, 2),
    )
    if cured:
        remember(net.rnn, 40)
    return train(net, Adam(net.parameters(), 1e-2), fit(flow(53, 80, (5, 25), shift=1.5), xent), clip=1.0)


# --- exploding ---


@faulty(Label(EXPLODING), also={NAN, DEAD, DEPTH, CUT}, steps=80)
def sum_over_assets(*, cured: bool) -> Training:
    """Sum the messages between 12 assets instead of averaging: several times too much at each of four layers."""

    def does(n: Any, x: Tensor) -> Any:
        h = n.inp(x)
        for layer in n.layers:
            h = h + functional.gelu(layer(h.mean(1, keepdim=True) - h if cured else h.sum(1, keepdim=True) - h))
        return n.head(h)

    net = Net(
        does, inp=nn.Linear(4, 24), layers=nn.ModuleList(nn.Linear(24, 24) for _ in range(4)), head=nn.Linear(24, 1)
    )
    return train(net, SGD(net.parameters(), 0.01 if cured else 1e-4, momentum=0.9), fit(panel(60), mse))


@faulty(Label(EXPLODING, onset=80), also={NAN, DEAD, DEPTH, CUT}, steps=160)
def typo_in_the_schedule(*, cured: bool) -> Training:
    """Make the learning rate ten times as large from step 80 on, by a typo, where it should fall to a tenth."""
    net = he(mlp(6, 32, 32, 32, 1, act=nn.GELU))
    return train(
        net, SGD(net.parameters(), 0.02), fit(waves(61), mse), rate=lambda i: 1 if i < 80 else 0.1 if cured else 10
    )


@faulty(Label(EXPLODING), also={NAN, DEAD, TIME, DEPTH, CUT}, steps=60)
def growing_state(*, cured: bool) -> Training:
    """Let the matrix of a ReLU RNN grow its state by 1.5 at each of 50 bars; clipped, its small steps lead nowhere."""
    net = last(nn.RNN(4, 24, nonlinearity="relu", batch_first=True), 2)
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_((0.9 if cured else 1.5) * torch.eye(24))
    return train(net, SGD(net.parameters(), 0.01), fit(flow(62, 50, (30, 50)), xent), clip=1.0)


# --- dead-units ---


@faulty(Label(DEAD, ("second",)), also={DEPTH, CUT})
def functional_relus(*, cured: bool) -> Training:
    """Dead ReLUs that are no modules: the second layer's bias of -15 is never reached."""
    net = Net(
        lambda n, x: n.head(functional.relu(n.second(functional.relu(n.first(x))))),
        first=nn.Linear(6, 40),
        second=nn.Linear(40, 40),
        head=nn.Linear(40, 1),
    )
    he(net)
    if not cured:
        nn.init.constant_(net.second.bias, -15.0)
    return train(net, SGD(net.parameters(), 0.02, momentum=0.9), fit(waves(70), mse))


@faulty(Label(DEAD, ("blocks",)), also={DEPTH, CUT}, steps=150)
def dead_behind_batchnorm(*, cured: bool) -> Training:
    """Shift what all residual blocks compute by -8 in their batch norms: all dead, and training goes round them."""

    def branch() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)
        )

    blocks = residual(12, 2, branch=branch)
    net = Net(
        lambda n, x: n.head(n.blocks(n.inp(x)).flatten(1)),
        inp=nn.Conv2d(1, 12, 3, padding=1, stride=2),
        blocks=blocks,
        head=nn.Linear(192, 4),
    )
    he(net)
    if not cured:
        for block in net.blocks:
            nn.init.constant_(block.branch[1].bias, -8.0)
    return train(net, SGD(net.parameters(), 0.01, momentum=0.9), fit(bumps(71), xent))


@faulty(Label(DEAD, ("0", "1", "2", "3"), onset=83), also={EXPLODING, DEPTH, CUT})
def kicked_dead(*, cured: bool) -> Training:
    """Take eight steps with 300 times the learning rate, from step 80 on: then no order book reaches the ReLUs."""
    task = book(72, noise=0.1)
    net = he(mlp(10, 48, 48, 2))
    optimizer = SGD(net.parameters(), 0.01, momentum=0.9)
    return train(
        net,
        optimizer,
        fit(lambda i: (task(i)[0] + 2, task(i)[1]), xent),
        rate=lambda i: 300 if 80 <= i < 88 and not cured else 1,
    )


@faulty(Label(DEAD, ("0", "1", "2", "3"), onset=2), also={DEPTH, CUT, EXPLODING})
def raw_sizes(*, cured: bool) -> Training:
    """Logarithms of order sizes as they come, all about 12: the first steps push whole layers below zero for good."""
    net = he(mlp(10, 48, 48, 2))
    return train(net, SGD(net.parameters(), 0.05, momentum=0.9), fit(book(73, noise=0.1, raw=not cured), xent))


# --- disconnected ---


@faulty(Label(CUT, ("encoder",)))
def encoder_through_a_list(*, cured: bool) -> Training:
    """Copy what the encoder of a window of prices gives to a list and back, for a cache."""

    def does(n: Any, x: Tensor) -> Any:
        code = n.encoder(x.flatten(1))
        return n.forecast(code if cured else torch.tensor(code.tolist(), dtype=code.dtype))

    net = Net(does, encoder=mlp(256, 8, 2, act=nn.Tanh), forecast=mlp(2, 16, 1, act=nn.Tanh))
    return train(net, Adam(net.parameters(), 3e-3), fit(volatility(80, 64), mse))


@faulty(Label(CUT, ("encoder",)), also={DEPTH})
def code_of_signs(*, cured: bool) -> Training:
    """Use a code of signs without a straight-through estimator: the encoder's gradient is there and exactly zero."""

    def does(n: Any, x: Tensor) -> Any:
        soft = torch.tanh(n.encoder(x))
        return n.decoder(soft + (soft.sign() - soft).detach() if cured else soft.sign())

    net = Net(does, encoder=mlp(16, 24, 4, act=nn.SiLU), decoder=mlp(4, 32, 5, act=nn.SiLU))
    return train(net, AdamW(net.parameters(), 5e-3), fit(clusters(81), xent))


@faulty(Label(CUT, ("news",)), also={DEPTH})
def masked_tower(*, cured: bool) -> Training:
    """Invert the mask of what news are available, so that their tower is multiplied by zero whenever there are any."""
    net = Net(
        lambda n, x: n.head(torch.cat([n.prices(x[:, :3]), n.news(x[:, 3:]) * (1.0 if cured else 0.0)], -1)),
        prices=mlp(3, 24, 12, act=nn.SiLU),
        news=mlp(3, 24, 12, act=nn.SiLU),
        head=mlp(24, 24, 1, act=nn.SiLU),
    )
    return train(net, Adam(net.parameters(), 5e-3), fit(waves(82), mse))


# --- non-finite ---


@faulty(Label(NAN, onset=60), also={EXPLODING}, steps=120)
def burst_of_orders(*, cured: bool) -> Training:
    """Fit order counts with an intensity of exp(score), unbounded: at step 60 four inputs are 1000 times too large."""
    net = he(mlp(6, 32, 32, 1))
    a = torch.randn(6, generator=draw(90, -1)) / 3

    def loss_of(model: Any, i: int) -> Any:
        g = draw(90, i)
        x = torch.randn(64, 6, generator=g)
        count = torch.poisson(torch.exp(x @ a), generator=g)
        x[:4] *= 1000.0 if i == 60 else 1.0
        score = model(x.to(next(model.parameters()).dtype))[:, 0]
        score = score.clamp(-8, 8) if cured else score
        return (torch.exp(score) - count * score).mean()

    return train(net, SGD(net.parameters(), 0.02, momentum=0.9), loss_of, clip=1.0)


@faulty(Label(NAN, onset=40), also={EXPLODING}, steps=120)
def halted_stock(*, cured: bool) -> Training:
    """Divide features by their deviation over time: a halted stock has none, and a root's slope at zero is infinite."""

    def does(n: Any, x: Tensor) -> Any:
        h = n.conv(x.transpose(1, 2))
        spread = (h.var(2) + (1e-6 if cured else 0.0)).sqrt()
        return n.head(torch.log(1e-3 + spread))

    net = Net(does, conv=nn.Conv1d(1, 12, 3), head=mlp(12, 16, 1, act=nn.Tanh))
    task = returns(91, 32, 20)

    def batch(i: int) -> tuple[Tensor, ...]:
        x, y = task(i)
        if i >= 40 and i % 10 == 0:
            x[0] = 0.0
        return x, torch.log(y)

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, mse))


# --- underflow ---


@faulty(Label(LOST), also={DEPTH, CUT})
def half_precision_returns(*, cured: bool) -> Training:
    """Forecast returns of 1e-3 in float16: what comes back from a loss of 1e-6 is below the smallest number it has."""
    net = Net(lambda n, x: 1e-3 * n.net(x), net=he(mlp(6, 48, 48, 1, act=nn.SiLU))).to(
        torch.float32 if cured else torch.float16
    )
    task = waves(100, 256)
    return train(net, SGD(net.parameters(), 5e4), fit(lambda i: (task(i)[0], 1e-3 * task(i)[1]), mse))


@faulty(Label(LOST))
def bfloat16_fine_steps(*, cured: bool) -> Training:
    """Weights in bfloat16 and Adam with a learning rate of 5e-5: most weights are too large to be changed by that."""
    net = Net(lambda n, x: n.net(x), net=mlp(16, 96, 96, 5, norm=nn.LayerNorm)).to(
        torch.float32 if cured else torch.bfloat16
    )
    return train(net, Adam(net.parameters(), 5e-5), fit(clusters(101), xent))


@faulty(Label(LOST))
def epsilon_over_returns(*, cured: bool) -> Training:
    """Forecast returns of 3e-5, those of minutes, under Adam as torch makes it: its epsilon of 1e-8 dominates."""
    net = Net(lambda n, x: 3e-5 * n.net(x), net=he(mlp(6, 32, 32, 1)))
    task = waves(102)
    return train(
        net,
        Adam(net.parameters(), 2e-3, eps=1e-18 if cured else 1e-8),
        fit(lambda i: (task(i)[0], 3e-5 * task(i)[1]), mse),
    )


@faulty(Label(LOST), steps=120)
def epsilon_of_one(*, cured: bool) -> Training:
    """Take an epsilon of 1, meant for one image network, on an LSTM with gradients of 1e-3: Adam becomes a slow SGD."""
    net = last(nn.LSTM(4, 16, batch_first=True), 1)
    return train(net, Adam(net.parameters(), 3e-3, eps=1e-8 if cured else 1.0), fit(volatility(103, 30), mse))


def main() -> None:
    """Print one line for each run."""
    mine = parser(__doc__)
    mine.add_argument("--pattern", default="*")
    options = parsed(mine)
    torch.set_num_threads(1)
    for run in RUNS:
        if not fnmatch.fnmatch(run.name, options.pattern) or (options.quick and run.name not in QUICK):
            continue
        line = f"{run.name:28} {', '.join(f'{f.kind} from {f.onset}' for f in run.faults) or 'healthy':28}"
        for cured in (False, True) if run.faults else (False,):
            losses: list[float] = []
            began = time.perf_counter()
            run.build(cured=cured).run(lambda loss, losses=losses: losses.append(float(loss)))  # type: ignore[misc]
            many = min(10, len(losses))
            start, end = sum(losses[:many]) / many, sum(losses[-many:]) / many
            seconds = time.perf_counter() - began
            line += f"  {'cured' if cured else 'loss':5} {start:10.3g} to {end:10.3g} ({seconds:.1f} s)"
        print(line, flush=True)


if __name__ == "__main__":
    main()
