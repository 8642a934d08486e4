"""Training loops and networks without time, as people reported them: faulty ones, and healthy ones that look odd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import faulty, healthy


def _blocks(n: Any, x: Tensor) -> Tensor:
    h = n.embed(x)
    for block in n.blocks:
        h = h + block(h)
    return n.head(h)


def _turned(seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Tell clusters apart that lie elsewhere than those of the same seed that a network knows."""
    task, turn = clusters(seed), torch.linalg.qr(torch.randn(16, 16, generator=draw(seed, -2)))[0]

    def batch(i: int) -> tuple[Tensor, Tensor]:
        x, y = task(i)
        return x @ turn, y

    return batch


def _known(net: Net, seed: int, steps: int) -> None:
    """Train it beforehand, and give it a new head."""
    before, task = Adam(net.parameters(), 3e-3), clusters(seed)
    for i in range(steps):
        before.zero_grad()
        xent(net(task(i + 5000)[0]), task(i + 5000)[1]).backward()
        before.step()
    net.zero_grad()
    net.head = nn.Linear(48, 5)


# --- rates, freezing, scaling ---


@faulty(
    "unstepped",
    "underflow",
    "stalled",
    source=(
        "GitHub jaehyunnn/ViTPose_pytorch issue 20 ('quickly becomes 0': the decay by layers was applied at each step)"
    ),
    places=("embed", "blocks"),
    since=1,
    words=r"learning rate|\blr\b|schedul|decay|param(eter)? ?group|too small|tiny",
    steps=180,
)
def decay_by_depth_at_every_step(*, fixed: bool) -> Training:
    """Fine-tune with a rate that is smaller for lower blocks, by multiplying the rates of the groups at each step."""
    net = Net(
        _blocks,
        embed=nn.Linear(16, 48),
        blocks=nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(4)
        ),
        head=nn.Linear(48, 5),
    )
    _known(net, 3001, 60)
    parts = [net.embed, *net.blocks, net.head]
    groups = [
        {"params": list(part.parameters()), "lr": 1e-3, "scale": 0.75 ** (len(parts) - 1 - k)}
        for k, part in enumerate(parts)
    ]
    optimizer, loss_of = AdamW(groups, weight_decay=0.05), fit(_turned(3001), xent)

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        tell(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] *= group["scale"] if i == 0 or not fixed else 1.0
        optimizer.step()

    return Training(net, [optimizer], step, loss_of)


class LowRank(nn.Module):
    """A frozen linear layer, and a low-rank update that is trained."""

    def __init__(self, base: nn.Linear) -> None:
        """Begin with an update of zero."""
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.adapter = nn.ModuleDict(
            {"a": nn.Linear(base.in_features, 4, bias=False), "b": nn.Linear(4, base.out_features, bias=False)}
        )
        nn.init.zeros_(self.adapter["b"].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        h: Tensor = self.base(x)
        return h + self.adapter["b"](self.adapter["a"](x))


@faulty(
    "disconnected",
    "unstepped",
    source=(
        "GitHub huggingface/peft issues 282 (loaded frozen by default) and 2759 (modules_to_save stay trainable); "
        "huggingface/transformers pull request 24463 (when resuming 'the model should be trainable'); "
        "mosaicml/llm-foundry pull request 1701"
    ),
    places=("body",),
    since=60,
    words=r"requires_grad|frozen|freez|thaw|train(able|ed)|no gradient|no longer|stopp|ceas|graph|detach|never",
    steps=180,
)
def adapters_come_back_frozen(*, fixed: bool) -> Training:
    """Load the best adapters back after 60 steps, by a call that is made for inference; the new head goes on alone."""
    net = Net(
        lambda n, x: n.head(n.body(x)),
        body=nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU()),
        head=nn.Linear(48, 5),
    )
    _known(he(net), 3002, 100)
    net.body = nn.Sequential(*(LowRank(layer) if isinstance(layer, nn.Linear) else layer for layer in net.body))
    optimizer = AdamW([p for p in net.parameters() if p.requires_grad], 5e-3)
    plain = train(net, optimizer, fit(_turned(3002), xent))
    saved: dict[str, Tensor] = {}

    def load(*, trainable: bool) -> None:
        for name, p in net.named_parameters():
            if name in saved:
                p.data.copy_(saved[name])
                p.requires_grad_(trainable)

    def step(i: int, tell: Tell) -> None:
        plain.step(i, tell)
        if i == 54:
            saved.update((name, p.detach().clone()) for name, p in net.named_parameters() if ".adapter." in name)
        if i == 59:
            load(trainable=fixed)

    return Training(net, [optimizer], step, plain.loss_of)


@faulty(
    "unstepped",
    "underflow",
    "stalled",
    source=(
        "GitHub Lightning-AI/pytorch-lightning issue 4148 (a backward without the scaler's factor); NVIDIA/apex issue "
        "377 (loss.backward() in place of the scaled one)"
    ),
    places=("where",),
    words=r"scal|learning rate|\blr\b|too small|tiny|underflow|eps",
    steps=180,
)
def second_loss_without_the_scale(*, fixed: bool) -> Training:
    """Send two losses back under float16, the first through the scaler and the second, added later, without it."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.float16):
            h = n.body(x)
            return n.kind(h).float(), n.where(h).float()

    net = Net(
        does,
        body=nn.Sequential(mlp(16, 64, 64), nn.ReLU()),
        kind=nn.Linear(64, 5),
        where=nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)),
    )
    he(net.body)
    optimizer, scaler = SGD(net.parameters(), 0.05, momentum=0.9), torch.amp.GradScaler("cpu", init_scale=2.0**14)
    task, plan = clusters(3003), torch.randn(16, 2, generator=draw(3003, -2)) / 5

    def step(i: int, tell: Tell) -> None:
        x, y = task(i)
        optimizer.zero_grad()
        kind, where = net(x)
        first, second = xent(kind, y), mse(where, x @ plan)
        scaler.scale(first).backward(retain_graph=True)
        (scaler.scale(second) if fixed else second).backward()
        scaler.unscale_(optimizer)
        tell((first + second).detach())
        scaler.step(optimizer)
        scaler.update()

    return Training(net, [optimizer], step)


@faulty(
    "disconnected",
    "unstepped",
    source=(
        "GitHub jsboige/CoursIA pull request 15256 ('dead critic': values kept by .item() in the rollout); "
        "nikhilbarhate99/PPO-PyTorch issues 29 and 35 (the critic's weights never change)"
    ),
    places=("value",),
    words=r"detach|graph|no_grad|\.item|number|\.data|cut|no gradient|never|not used|unused|loss",
    steps=180,
)
def critic_judged_by_its_records(*, fixed: bool) -> Training:
    """Compare returns with the values that were written down in the rollout, without a graph, for the critic's loss."""
    net = Net(
        lambda n, s: (n.policy(s), n.value(s)),
        policy=mlp(4, 48, 48, 5, act=nn.Tanh),
        value=mlp(4, 48, 48, 1, act=nn.Tanh),
    )
    optimizer, a = Adam(net.parameters(), 2e-3), torch.randn(4, 5, generator=draw(3010, -1))

    def step(i: int, tell: Tell) -> None:
        g = draw(3010, i)
        state = torch.randn(96, 4, generator=g)
        with torch.no_grad():
            logits, recorded = net(state)
            action = torch.multinomial(logits.softmax(1), 1, generator=g)
            earned = torch.tanh(state @ a).gather(1, action) + state[:, :1] + 0.1 * torch.randn(96, 1, generator=g)
            gain = earned - recorded
        logits, value = net(state)
        log = logits.log_softmax(1)
        entropy = -(log.exp() * log).sum(1).mean()
        loss = -(log.gather(1, action) * (gain - gain.mean())).mean() - 0.01 * entropy
        loss = loss + 0.5 * mse(value if fixed else recorded, earned)
        optimizer.zero_grad()
        loss.backward()
        tell(loss.detach())
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return Training(net, [optimizer], step)


# --- numerics ---


@faulty(
    "non-finite",
    source=(
        "GitHub fastino-ai/GLiNER2 pull request 155: 1 - 1e-6 'rounds to EXACTLY 1.0' in half precision, the forward "
        "stays finite and the backward does not"
    ),
    since=20,
    words=r"log|0 ?\* ?(inf|nan)|clamp|precision|half|bfloat16|saturat|round|\beps|sigmoid|nan|inf|domain",
    steps=150,
)
def survival_clamped_beside_one(*, fixed: bool) -> Training:
    """Find bags with one good part in eight under bfloat16: log1p(-p), where p is clamped to 1 - 1e-6, which is 1."""

    def does(n: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return n.score(n.body(x))[..., 0]

    net = Net(does, body=nn.Sequential(mlp(8, 48, 48), nn.ReLU()), score=nn.Linear(48, 1))
    he(net)
    good = torch.randn(8, generator=draw(3004, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(3004, i)
        x, there = torch.randn(64, 8, 8, generator=g), torch.rand(64, generator=g) < 0.5
        x[there, 0] += 2 * good
        score = model(x)
        if fixed:
            none = functional.logsigmoid(-score.float()).sum(1).clamp(max=-1e-6)
            return -torch.where(there, torch.log(-torch.expm1(none)), none).mean()
        none = torch.log1p(-torch.sigmoid(score).clamp(max=1 - 1e-6)).sum(1)
        found = (1 - none.exp()).float().clamp(1e-6, 1 - 1e-6)
        return -torch.where(there, torch.log(found), torch.log1p(-found)).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


def _rotation(v: Tensor) -> Tensor:
    """Return the matrices that two columns of a matrix span, made orthonormal."""
    a = functional.normalize(v[:, :3], dim=1)
    b = functional.normalize(v[:, 3:] - (a * v[:, 3:]).sum(1, keepdim=True) * a, dim=1)
    return torch.stack([a, b, torch.linalg.cross(a, b)], 2)


@faulty(
    "non-finite",
    source=(
        "GitHub naver/roma issue 9 (NaN with the geodesic loss); eigenvivek/nanodrr pull request 31 ('to avoid "
        "infinite gradients'); papagina/RotationContinuity issues 1 and 11"
    ),
    words=r"acos|arc ?cos|sqrt|root|derivativ|slope|clamp|domain|1 ?/ ?0|divi|\beps|nan|inf|zero|angle",
    steps=150,
)
def turns_by_the_arc_cosine(*, fixed: bool) -> Training:
    """Forecast a camera's turn from a last layer of zeros, by the angle to the true one: at times it stands still."""
    net = Net(lambda n, x: n.last(n.body(x)), body=mlp(24, 64, 64, act=nn.SiLU), last=nn.Linear(64, 6))
    start = torch.tensor([1.0, 0, 0, 0, 1, 0])
    with torch.no_grad():
        net.last.weight.zero_()
        net.last.bias.copy_(start)
    shape = torch.randn(4, 3, generator=draw(3006, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(3006, i)
        moves = torch.rand(96, 1, generator=g) < 0.9
        true = _rotation(start + 0.5 * moves * torch.randn(96, 6, generator=g))
        seen = shape + 0.3 * torch.randn(96, 4, 3, generator=g)
        points = torch.cat([seen, torch.einsum("nij,nkj->nki", true, seen)], 1).flatten(1)
        cosine = (torch.einsum("nij,nij->n", _rotation(model(points)), true) - 1) / 2
        edge = 1 - 1e-4 if fixed else 1.0
        return torch.acos(cosine.clamp(-edge, edge)).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


# --- activations, heads, initialization ---


@faulty(
    "dead-units",
    "disconnected",
    "vanishing-depth",
    "unstepped",
    source=(
        "GitHub PeterL1n/BackgroundMattingV2 issue 128 ('there will be no gradient due to the clamping'); "
        "krasserm/super-resolution issue 72; swz30/MIRNet issue 33"
    ),
    places=("decoder",),
    words=r"clamp|clip|saturat|flat|zero|dead|bound|constant|no gradient|never|relu|range",
    steps=180,
)
def sky_clamped_before_the_loss(*, fixed: bool) -> Training:
    """Compress pictures of a star in a dark sky, clamped to [0, 1] before the loss: 25 of 64 pixels stay below 0."""
    act = nn.SiLU
    net = Net(
        lambda n, x: n.decoder(n.encoder(x)), encoder=mlp(64, 64, 6, act=act), decoder=mlp(6, 64, 64, 64, act=act)
    )
    rows = torch.arange(8.0)

    def loss_of(model: Any, i: int) -> Tensor:
        at = 1 + 5 * torch.rand(64, 2, 1, generator=draw(3007, i))
        near = torch.exp(-((rows - at) ** 2))
        x = (near[:, 0, :, None] * near[:, 1, None, :]).flatten(1)
        out = model(4 * x)
        return mse(out if fixed else out.clamp(0, 1), x)

    return train(net, Adam(net.parameters(), 1e-2), loss_of)


class Mixing(nn.Module):
    """A linear layer of one's own."""

    def __init__(self, a: int, b: int, *, centred: bool) -> None:
        """Draw the weights."""
        super().__init__()
        self.weight = nn.Parameter((2 * torch.rand(a, b) - 1) * math.sqrt(6 / a) if centred else torch.rand(a, b))
        self.bias = nn.Parameter(torch.zeros(b) if centred else torch.rand(b))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return x @ self.weight + self.bias


@faulty(
    "exploding",
    "non-finite",
    source=(
        "GitHub AdaptInfer/Contextualized issue 33 ('Initialize with torch.rand may result in unstable training'); "
        "hasktorch/hasktorch issue 210"
    ),
    words=r"init|scale|large|norm|weight|clip|learning rate|explod|grow|gain",
    steps=150,
)
def weights_between_zero_and_one(*, fixed: bool) -> Training:
    """Write the layers of a regression oneself, and draw their weights by torch.rand: all positive, and large."""
    layers: list[nn.Module] = []
    for a, b in ((6, 48), (48, 48), (48, 48), (48, 48)):
        layers += [Mixing(a, b, centred=fixed), nn.ReLU()]
    net = nn.Sequential(*layers, Mixing(48, 1, centred=fixed))
    return train(net, Adam(net.parameters(), 1e-3), fit(waves(3008), mse))


@faulty(
    "vanishing-depth",
    "stalled",
    "unstepped",
    "underflow",
    source="Stack Overflow 44223902, 'Why is softmax not used in hidden layers'; GitHub FluxML/Flux.jl issue 1546",
    words=r"softmax|saturat|activation|init|small|norm|residual|skip|depth|layer|gain|shrink",
    steps=180,
)
def softmax_between_the_layers(*, fixed: bool) -> Training:
    """Put a softmax behind each hidden layer of a classifier, where an activation was wanted."""
    net = mlp(16, 48, 48, 48, 48, 5, act=nn.ReLU if fixed else lambda: nn.Softmax(dim=1))
    return train(he(net), SGD(net.parameters(), 0.05, momentum=0.9), fit(clusters(3009), xent))


# --- healthy ---


@healthy(
    source="GitHub facebookresearch/moco issues 9 ('the task is getting harder' as the queue fills), 17 and 43",
    steps=200,
)
def queue_of_keys_fills_up() -> Training:
    """Tell a picture's key from a queue of 512 that begins as noise: the loss rises at first, as the queue fills."""
    net = Net(lambda n, x: functional.normalize(n.query(x), dim=1), query=mlp(24, 64, 64, 16))
    he(net)
    net.key = copy.deepcopy(net.query).requires_grad_(requires_grad=False)
    mixing = torch.randn(6, 24, generator=draw(3011, -1)) / 2
    queue = functional.normalize(torch.randn(512, 16, generator=draw(3011, -2)), dim=1)
    kept = {"queue": queue}

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(3011, i)
        x = torch.tanh(torch.randn(48, 6, generator=g) @ mixing)
        a, b = (x + 0.2 * torch.randn(48, 24, generator=g) for _ in range(2))
        with torch.no_grad():
            key = functional.normalize(model.key(b), dim=1)
        query = model(a)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ kept["queue"].T], 1) / 0.1
        kept["queue"] = torch.cat([key, kept["queue"]])[:512]
        return functional.cross_entropy(logits, torch.zeros(48, dtype=torch.long))

    plain = train(net, SGD(net.query.parameters(), 0.05, momentum=0.9, weight_decay=1e-4), loss_of)

    def step(i: int, tell: Tell) -> None:
        plain.step(i, tell)
        with torch.no_grad():
            for k, q in zip(net.key.parameters(), net.query.parameters(), strict=True):
                k.lerp_(q, 0.02)

    return Training(net, plain.optimizers, step)


@healthy(source="GitHub davda54/sam issue 8, skorch-dev/skorch issue 785: two backward passes to a step", steps=180)
def climbs_before_it_descends() -> Training:
    """Minimize sharpness as well: go up along the gradient, take the gradient there, go back, and step with that."""
    net = he(
        Net(
            lambda n, x: n.head(n.body(x).flatten(1)),
            body=nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()
            ),
            head=nn.Linear(384, 4),
        )
    )
    optimizer, loss_of = SGD(net.parameters(), 0.02, momentum=0.9), fit(bumps(3012), xent)

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        loss_of(net, i).backward()
        norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
        up = [0.05 * p.grad / (norm + 1e-12) for p in net.parameters()]
        with torch.no_grad():
            for p, u in zip(net.parameters(), up, strict=True):
                p.add_(u)
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        with torch.no_grad():
            for p, u in zip(net.parameters(), up, strict=True):
                p.sub_(u)
        tell(loss.detach())
        optimizer.step()

    return Training(net, [optimizer], step, loss_of)


@healthy(
    source=(
        "GitHub yk7333/d3po issue 20 ('remained constant at around 0.693. Is this normal?'); huggingface/trl issue 1236"
    ),
    steps=200,
)
def preferences_from_0_693() -> Training:
    """Prefer answers over others, relative to a frozen copy of oneself: the loss leaves log 2 slowly, and is noisy."""
    net = Net(lambda n, prompt: n.policy(prompt).log_softmax(1), policy=mlp(8, 64, 64, 12, act=nn.GELU))
    net.reference = copy.deepcopy(net.policy).requires_grad_(requires_grad=False)
    taste = torch.randn(8, 12, generator=draw(3013, -1)) / math.sqrt(8)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(3013, i)
        prompt = torch.randn(48, 8, generator=g)
        pair = torch.rand(48, 12, generator=g).topk(2, 1).indices
        gain = (torch.tanh(prompt @ taste)).gather(1, pair)
        better = torch.rand(48, generator=g) < torch.sigmoid(4 * (gain[:, 0] - gain[:, 1]))
        pair = torch.where(better[:, None], pair, pair.flip(1))
        with torch.no_grad():
            base = model.reference(prompt).log_softmax(1).gather(1, pair)
        margin = model(prompt).gather(1, pair) - base
        return -functional.logsigmoid(0.1 * (margin[:, 0] - margin[:, 1])).mean()

    return train(net, AdamW(net.policy.parameters(), 1e-3), loss_of, rate=lambda i: min(1.0, (i + 1) / 20))


@healthy(
    source=(
        "GitHub nashory/progressive-growing-torch issue 11 (the gradient of a layer at an alpha of 0 to 1); "
        "akanimax/pro_gan_pytorch issue 2 and rosinality/style-based-gan-pytorch issue 23"
    ),
    steps=200,
)
def finer_block_is_faded_in() -> Training:
    """Double the resolution of a trained decoder: a new block's picture gets a weight that rises from 0 to 0.9."""

    def does(n: Any, code: Tensor, alpha: float) -> Tensor:
        coarse = n.trunk(code).unflatten(1, (12, 4, 4))
        fine = n.finer(functional.interpolate(coarse, scale_factor=2.0))
        old = functional.interpolate(n.to_picture(coarse), scale_factor=2.0)
        return (1 - alpha) * old + alpha * n.to_finer_picture(fine)

    net = Net(
        lambda n, code: does(n, code, kept["alpha"]),
        trunk=nn.Sequential(mlp(6, 64, 192), nn.LeakyReLU(0.2)),
        to_picture=nn.Conv2d(12, 1, 1),
        finer=nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.LeakyReLU(0.2)),
        to_finer_picture=nn.Conv2d(12, 1, 1),
    )
    he(net)
    kept = {"alpha": 0.0}
    picture = torch.randn(6, 64, generator=draw(3014, -1)) / 2

    def loss_of(model: Any, i: int) -> Tensor:
        code = torch.randn(48, 6, generator=draw(3014, i))
        kept["alpha"] = max(0.0, i / 220)
        return mse(model(code), torch.tanh(code @ picture).unflatten(1, (1, 8, 8)))

    before = Adam([*net.trunk.parameters(), *net.to_picture.parameters()], 3e-3)
    for i in range(-200, 0):
        before.zero_grad()
        loss_of(net, i).backward()
        before.step()
    net.zero_grad()
    return train(net, Adam(net.parameters(), 2e-3, betas=(0.5, 0.99)), loss_of)
