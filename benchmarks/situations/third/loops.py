"""Loops and their plumbing, as people reported them: faulty ones, and healthy ones that look odd."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, take_step, train, waves, xent
from benchmarks.situations.situation import faulty, healthy


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def _small_cnn() -> Net:
    return he(
        Net(
            lambda n, x: n.head(n.body(x).flatten(1)),
            body=nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 24, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ),
            head=nn.Linear(96, 4),
        )
    )


# --- schedulers, accumulation, parameter groups ---


@faulty(
    "unstepped",
    "stalled",
    "underflow",
    source="GitHub Lornatang/SRGAN-PyTorch issue 1; ivadomed/ivadomed pull request 55 (stepped in the batch loop)",
    since=20,
    words=r"learning rate|\blr\b|schedul|decay",
    steps=200,
)
def rate_falls_with_each_batch(*, fixed: bool) -> Training:
    """Plan to divide the rate by 10 at half of 20 epochs, but step the scheduler with each batch, not each epoch."""
    net, epochs, batches = _small_cnn(), 20, 10
    optimizer = Adam(net.parameters(), 2e-3)
    scheduler = StepLR(optimizer, step_size=epochs // 2, gamma=0.1)
    loss_of = fit(bumps(901), xent)

    def step(i: int, tell: Tell) -> None:
        take_step(optimizer, loss_of(net, i), tell)
        if not fixed or i % batches == batches - 1:
            scheduler.step()

    return Training(net, [optimizer], step, loss_of)


@faulty(
    "unstepped",
    "stalled",
    source=(
        "GitHub huggingface/transformers issue 2995, timoschick/pet pull request 25, microsoft/Swin-Transformer issue "
        "185: fewer batches in an epoch than gradients to accumulate"
    ),
    words=r"optimizer|step\b|accumulat|never|learning rate|\blr\b|weights",
)
def accumulation_longer_than_an_epoch(*, fixed: bool) -> Training:
    """Step after every eighth batch, counted anew in each epoch, of a data set that has six."""
    net = he(mlp(16, 48, 48, 5))
    optimizer, task = Adam(net.parameters(), 3e-3), clusters(902, n=24)
    batches, parts = 6, 8

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        total = torch.zeros(())
        for k in range(batches):
            x, y = task(batches * i + k)  # an epoch, augmented anew
            loss = xent(net(x), y) / (batches if fixed else parts)
            loss.backward()
            total = total + loss.detach()
            if k == batches - 1:
                tell(total)
            if (k + 1) % parts == 0 or (fixed and k == batches - 1):
                optimizer.step()
                optimizer.zero_grad()

    return Training(net, [optimizer], step)


@faulty(
    "unstepped",
    source="GitHub Project-MONAI/MONAI pull request 1339: empty generators in generate_param_groups",
    places=("body",),
    words=r"optimizer|param|group|generator|list",
    steps=200,
)
def groups_from_a_filter_used_up(*, fixed: bool) -> Training:
    """Count the weights of the body, which a filter yields, and give the filter, by then empty, to the optimizer."""
    net = _small_cnn()
    of_head = {id(p) for p in net.head.parameters()}
    body = filter(lambda p: id(p) not in of_head, net.parameters())
    head = filter(lambda p: id(p) in of_head, net.parameters())
    chosen = list(body) if fixed else body
    assert sum(p.numel() for p in chosen) > 0  # the user printed it
    optimizer = AdamW([{"params": chosen, "lr": 1e-3}, {"params": head, "lr": 2e-3}])
    return train(net, optimizer, fit(bumps(903), xent))


def _smooth(i: int, n: int = 32) -> Tensor:
    """Draw smooth curves of 32 points: sums of three waves."""
    g = draw(904, i)
    t = torch.linspace(0, 2 * math.pi, 33)[:-1]
    size, phase = torch.randn(n, 3, 1, generator=g), 6.3 * torch.rand(n, 3, 1, generator=g)
    return (size * torch.sin(torch.tensor([1.0, 2.0, 5.0])[:, None] * t + phase)).sum(1) / 1.7


@faulty(
    "unstepped",
    source="GitHub Lornatang/SRGAN-PyTorch issue 85, zhaoyuzhi/deepfillv2 issue 6 and pull request 3",
    places=("judge",),
    words=r"optimizer|step\b|never|learning rate|\blr\b|weights",
)
def judge_stepped_by_the_painter(*, fixed: bool) -> Training:
    """Refine curves with an adversarial loss, and call the generator's step() in the discriminator's turn as well."""
    net = Net(
        lambda n, low: n.painter(low),
        painter=mlp(8, 64, 64, 32, act=_leaky),
        judge=mlp(32, 48, 48, 1, act=_leaky),
    )
    optimizers = [Adam(net.painter.parameters(), 1e-3), Adam(net.judge.parameters(), 5e-4)]
    soft = functional.softplus

    def step(i: int, tell: Tell) -> None:
        real = _smooth(i)
        low = real[:, ::4]
        optimizers[1].zero_grad()
        loss = soft(-net.judge(real)).mean() + soft(net.judge(net(low).detach())).mean()
        loss.backward()
        tell(loss.detach())
        optimizers[1 if fixed else 0].step()
        optimizers[0].zero_grad()
        made = net(low)
        loss = mse(made, real) + 0.01 * soft(-net.judge(made)).mean()
        loss.backward()
        tell(loss.detach())
        optimizers[0].step()

    return Training(net, optimizers, step)


# --- adapters, policies ---


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank update, which can be merged into it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        """Begin with an update of zero."""
        super().__init__()
        self.base, self.merged = base.requires_grad_(requires_grad=False), False
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def merge(self, sign: int) -> None:
        """Add the update to the weight, or subtract it."""
        with torch.no_grad():
            self.base.weight.add_(self.up.weight @ self.down.weight, alpha=sign)
        self.merged = sign > 0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, and the update unless it is merged."""
        h: Tensor = self.base(x)
        return h if self.merged else h + self.up(self.down(x))


@faulty(
    "disconnected",
    "unstepped",
    source=(
        "GitHub huggingface/peft issue 2437 (merge for the rollout, then train on) and pull request 3763: "
        "once merged, a layer uses only its base weights, silently"
    ),
    places=("body",),
    since=60,
    words=r"graph|detach|merge|bypass|not used|unused|no gradient|no longer|stopp|ceas|never|optimizer|branch|adapter",
    steps=180,
)
def adapters_stay_merged(*, fixed: bool) -> Training:
    """Merge the low-rank updates for an evaluation after 60 steps, and train on without taking them out again."""
    body = he(nn.Sequential(mlp(16, 48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU()))
    net = Net(lambda n, x: n.head(n.body(x)), body=body, head=nn.Linear(48, 5))
    before, task = Adam(net.parameters(), 3e-3), clusters(905)
    for i in range(100):
        before.zero_grad()
        xent(net(task(i + 5000)[0]), task(i + 5000)[1]).backward()
        before.step()
    net.zero_grad()
    adapted = [Adapted(body[0][0], 4), Adapted(body[0][2], 4), Adapted(body[2], 4)]
    net.body = nn.Sequential(*(layer for a in adapted for layer in (a, nn.ReLU())))
    net.head = nn.Linear(48, 5)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=draw(905, -2)))[0]

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = task(i)
        return xent(model(x @ turn), y)

    optimizer = AdamW([p for p in net.parameters() if p.requires_grad], 5e-3)
    plain = train(net, optimizer, loss_of)

    def step(i: int, tell: Tell) -> None:
        plain.step(i, tell)
        if i == 59:
            for a in adapted:
                a.merge(1)
            with torch.no_grad():
                loss_of(net, 100_000)
            for a in adapted if fixed else ():
                a.merge(-1)

    return Training(net, [optimizer], step, loss_of)


def _reward(state: Tensor, action: Tensor) -> Tensor:
    """Be best where the action is a bounded function of the state."""
    goal = 0.8 * torch.tanh(torch.stack([state[:, 0] + state[:, 1], state[:, 2] - state[:, 3]], 1))
    return -(action - goal).pow(2).sum(1, keepdim=True)


@faulty(
    "disconnected",
    "unstepped",
    "stalled",
    source="GitHub jankrepl/deepdow pull request 106 (sample, not rsample); kashif/firedup issue 9",
    places=("actor",),
    words=r"sampl|reparam|detach|graph|differentiab|no gradient|argmax|no_grad|never|cut",
    steps=200,
)
def actor_of_plain_samples(*, fixed: bool) -> Training:
    """Improve an actor through its critic, on actions drawn with sample(), through which no gradient passes."""

    def does(n: Any, state: Tensor) -> Tensor:
        mean, log_std = n.actor(state).chunk(2, 1)
        wide = Normal(mean, log_std.clamp(-3, 1).exp())
        return wide.rsample() if fixed else wide.sample()

    net = Net(does, actor=mlp(4, 48, 48, 4, act=nn.SiLU), critic=mlp(6, 64, 64, 1, act=nn.SiLU))
    optimizers = [Adam(net.actor.parameters(), 1e-3), Adam(net.critic.parameters(), 3e-3)]

    def step(i: int, tell: Tell) -> None:
        state = torch.randn(96, 4, generator=draw(906, i))
        action = 1.5 * torch.randn(96, 2, generator=draw(907, i)).clamp(-2, 2)
        take_step(optimizers[1], mse(net.critic(torch.cat([state, action], 1)), _reward(state, action)), tell)
        take_step(optimizers[0], -net.critic(torch.cat([state, net(state)], 1)).mean(), tell)

    return Training(net, optimizers, step)


@faulty(
    "disconnected",
    "rounding",
    "stalled",
    "unstepped",
    "vanishing-depth",
    source=(
        "GitHub higgsfield-ai/higgsfield issue 20 (both log-probabilities are of the same policy); "
        "huggingface/trl issue 2769 and boyu-ai/Hands-on-RL issue 96 (what detach() is for in the ratio)"
    ),
    places=("policy",),
    words=r"detach|ratio|cancel|constant|zero|graph|no gradient|differ|depend",
)
def ratio_of_a_policy_to_itself(*, fixed: bool) -> Training:
    """Take the old log-probabilities of the ratio from the policy of now, with their graph: the two cancel."""
    net = Net(
        lambda n, s: (n.policy(s), n.value(s)),
        policy=mlp(4, 48, 48, 5, act=nn.Tanh),
        value=mlp(4, 48, 48, 1, act=nn.Tanh),
    )
    optimizer, a = Adam(net.parameters(), 3e-3), torch.randn(4, 5, generator=draw(908, -1))

    def step(i: int, tell: Tell) -> None:
        g = draw(908, i)
        state = torch.randn(128, 4, generator=g)
        with torch.no_grad():
            action = torch.multinomial(net.policy(state).softmax(1), 1, generator=g)
        reward = torch.tanh(state @ a).gather(1, action)
        for _ in range(2):
            logits, value = net(state)
            new = logits.log_softmax(1).gather(1, action)
            old = net.policy(state).log_softmax(1).gather(1, action)
            ratio = torch.exp(new - (old.detach() if fixed else old))
            gain = reward - value.detach()
            gain = (gain - gain.mean()) / gain.std()
            surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            take_step(optimizer, 0.5 * mse(value, reward) - surrogate, tell)

    return Training(net, [optimizer], step)


# --- precision, decay ---


@faulty(
    "non-finite",
    "underflow",
    source=(
        "PyTorch forums 1765, 'Adam + half precision = NaNs?'; GitHub afiaka87/glide-finetune issue 5; "
        "pytorch/pytorch issue 8860"
    ),
    words=r"half|float16|fp16|precision|\beps|optimizer|scal|learning rate|weights",
    steps=120,
)
def adam_on_half_weights(*, fixed: bool) -> Training:
    """Turn all weights to float16 and let Adam go on with its eps of 1e-8, which is zero there: it divides by zero."""

    def does(n: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=fixed):
            return n.net(x)

    net = Net(does, net=he(mlp(16, 64, 64, 5)))
    if not fixed:
        net.half()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if fixed else None
    return train(net, Adam(net.parameters(), 2e-3), fit(clusters(909), xent), scaler=scaler)


class Feed(nn.Module):
    """A gated feed-forward block with a norm before it, as T5 and Gemma have: frozen, with two low-rank updates."""

    def __init__(self, width: int, hidden: int, gain: float) -> None:
        """Take the norm's gain, which has grown in pre-training."""
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), gain), requires_grad=False)
        self.gate, self.inner = (Adapted(nn.Linear(width, hidden, bias=False), 4) for _ in range(2))
        self.outer = nn.Linear(hidden, width, bias=False).requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's output."""
        h = self.gain * _unit(x)
        return x + self.outer(functional.gelu(self.gate(h)) * self.inner(h))


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@faulty(
    "non-finite",
    "unstepped",
    source="GitHub huggingface/transformers issues 5651 and 14189 (T5: 66246 is over 65504), 36822 (Gemma 3 in fp16)",
    words=r"half|float16|fp16|precision|overflow|scal|large|range|bfloat16|autocast",
    steps=120,
)
def feed_forward_beyond_half_precision(*, fixed: bool) -> Training:
    """Fine-tune in float16 what was trained in bfloat16, where activations of more than 65504 were no harm."""

    def does(n: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16 if fixed else torch.float16):
            h = n.embed(x)
            for block in n.blocks:
                h = block(h)
            return n.head(_unit(h))

    net = Net(
        does,
        embed=nn.Linear(16, 32).requires_grad_(requires_grad=False),
        blocks=nn.ModuleList(Feed(32, 96, gain) for gain in (24.0, 900.0)),
        head=nn.Linear(32, 5),
    )
    scaler = None if fixed else torch.amp.GradScaler("cpu")
    optimizer = AdamW([p for p in net.parameters() if p.requires_grad], 3e-3)
    return train(net, optimizer, fit(clusters(910), xent), scaler=scaler)


@faulty(
    "vanishing-depth",
    "stalled",
    "underflow",
    source="GitHub BVLC/caffe issue 1396 (a decay of 0.5: all weights end at zero, one output for any input); "
    "tflearn/tflearn issue 772 (decays that do for Adam and not for others)",
    since=15,
    words=r"decay|regulari|weight|init|shrink|small|norm|residual",
    steps=250,
)
def decay_of_adamw_given_to_adam(*, fixed: bool) -> Training:
    """Take over the weight decay of a recipe for AdamW, but with Adam, which adds it to the gradient."""
    net = mlp(6, 48, 48, 48, 48, 1, act=nn.GELU)
    kind = AdamW if fixed else Adam
    return train(net, kind(net.parameters(), 2e-3, weight_decay=0.1), fit(waves(911), mse))


# --- losses that run away ---


@faulty(
    "exploding",
    source=(
        "GitHub facebookresearch/DomainBed issue 50 (create_graph is missing: the penalty is useless); "
        "igul222/improved_wgan_training issue 18; LixiangHan/GANs-for-1D-Signal issue 7"
    ),
    words=r"penalt|lipschitz|explod|grow|clip|norm|bound|scale|learning rate|\blr\b|large",
    steps=200,
)
def penalty_without_a_graph(*, fixed: bool) -> Training:
    """Penalize the critic's slope, but without create_graph: the number is in the loss, its gradient is not."""
    net = Net(
        lambda n, z: n.generator(z),
        generator=mlp(4, 32, 32, 2, act=_leaky),
        critic=mlp(2, 64, 64, 64, 1, act=_leaky),
    )
    optimizers = [
        Adam(net.generator.parameters(), 3e-4, betas=(0.5, 0.9)),
        Adam(net.critic.parameters(), 2e-3, betas=(0.5, 0.9)),
    ]

    def step(i: int, tell: Tell) -> None:
        g = draw(912, i)
        for turn in (1, 1, 1, 0):
            fake = net(torch.randn(64, 4, generator=g))
            if not turn:
                take_step(optimizers[0], -net.critic(fake).mean(), tell)
                continue
            angle = 6.28 * torch.rand(64, 1, generator=g)
            real = torch.cat([angle.cos(), angle.sin()], 1) + 1.5
            share = torch.rand(64, 1, generator=g)
            between = (share * real + (1 - share) * fake.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(net.critic(between).sum(), between, create_graph=fixed)
            penalty = 10 * (slope.norm(dim=1) - 1).pow(2).mean()
            take_step(optimizers[1], net.critic(fake.detach()).mean() - net.critic(real).mean() + penalty, tell)

    return Training(net, optimizers, step)


@faulty(
    "exploding",
    source="GitHub pranz24/pytorch-soft-actor-critic issue 34 (temperature explodes); DLR-RM/stable-baselines3 issue "
    "2013 and huggingface/lerobot issue 1871 (the sign of the target entropy)",
    since=20,
    words=r"explod|grow|temperature|entropy|alpha|large|clip|norm|bound|scale|learning rate|\blr\b",
    steps=250,
)
def entropy_beyond_the_uniform(*, fixed: bool) -> Training:
    """Ask a policy within [-1, 1] for an entropy of +2, more than the uniform has: the temperature never stops."""
    net = Net(
        lambda n, s: n.actor(s).chunk(2, 1),
        actor=mlp(4, 48, 48, 4, act=nn.SiLU),
        critic=mlp(6, 64, 64, 1, act=nn.SiLU),
        log_temperature=nn.Parameter(torch.tensor(-1.5)),
    )
    target = copy.deepcopy(net.critic).requires_grad_(requires_grad=False)
    wanted = -2.0 if fixed else 2.0
    optimizers = [
        Adam(net.critic.parameters(), 3e-3),
        Adam(net.actor.parameters(), 1e-3),
        Adam([net.log_temperature], 0.03),
    ]

    def act(state: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = net(state)
        wide = Normal(mean, log_std.clamp(-4, 1).exp())
        u = wide.rsample()
        log_density = wide.log_prob(u) - 2 * (math.log(2) - u - functional.softplus(-2 * u))
        return torch.tanh(u), log_density.sum(1, keepdim=True)

    def step(i: int, tell: Tell) -> None:
        g = draw(913, i)
        state, after = torch.randn(96, 4, generator=g), torch.randn(96, 4, generator=g)
        action = 2 * torch.rand(96, 2, generator=g) - 1
        temperature = net.log_temperature.exp().detach()
        with torch.no_grad():
            then, log_density = act(after)
            goal = _reward(state, action) + 0.5 * (target(torch.cat([after, then], 1)) - temperature * log_density)
        take_step(optimizers[0], mse(net.critic(torch.cat([state, action], 1)), goal), tell)
        made, log_density = act(state)
        take_step(optimizers[1], (temperature * log_density - net.critic(torch.cat([state, made], 1))).mean(), tell)
        take_step(optimizers[2], -net.log_temperature * (log_density + wanted).mean().detach(), tell)
        with torch.no_grad():
            for t, p in zip(target.parameters(), net.critic.parameters(), strict=True):
                t.lerp_(p, 0.05)

    return Training(net, optimizers, step)


# --- healthy ---


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        """Keep the share of the gradient that goes on."""
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Turn the gradient around."""
        return -ctx.share * grads[0], None


@healthy(source="GitHub fungtion/DANN_py3 issue 12, fungtion/DANN issue 12: the domain's loss does not decrease")
def features_that_hide_their_origin() -> Training:
    """Turn the gradient of a domain classifier around, by a share that begins at 0: its loss rises, as it should."""
    net = Net(
        lambda n, x, share: (n.label(h := n.features(x)), n.origin(Reversed.apply(h, float(share)))),
        features=nn.Sequential(mlp(16, 48, 48), nn.ReLU()),
        label=mlp(48, 32, 5),
        origin=mlp(48, 32, 2),
    )
    task, shift = clusters(921), 0.8 * torch.randn(16, generator=draw(921, -2))

    def loss_of(model: Any, i: int) -> Tensor:
        (x, y), (other, _) = task(i), task(i + 100_000)
        share = torch.tensor(2 / (1 + math.exp(-10 * i / 150)) - 1)
        labels, origin = model(torch.cat([x, other + shift]), share)
        return xent(labels[: len(x)], y) + xent(origin, torch.arange(2).repeat_interleave(len(x)))

    return train(he(net), SGD(net.parameters(), 0.02, momentum=0.9), loss_of)


@healthy(
    source="GitHub ultralytics/yolov5 pull request 9684, allenai/rslearn pull request 236: gradual unfreezing",
    steps=200,
)
def blocks_thaw_one_after_another() -> Training:
    """Train a head on a trained network, and thaw a block every 50 steps, each a new group with a smaller rate."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(a, 48), nn.ReLU()) for a in (16, 48, 48))

    def does(n: Any, x: Tensor) -> Tensor:
        for block in n.blocks:
            x = block(x)
        return n.head(x)

    net = he(Net(does, blocks=blocks, head=nn.Linear(48, 5)))
    before, task = Adam(net.parameters(), 3e-3), clusters(922)
    for i in range(120):
        before.zero_grad()
        xent(net(task(i + 5000)[0]), task(i + 5000)[1]).backward()
        before.step()
    net.zero_grad()
    net.head = nn.Linear(48, 5)
    blocks.requires_grad_(requires_grad=False)
    optimizer = Adam(net.head.parameters(), 3e-3)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=draw(922, -2)))[0]

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = task(i)
        return xent(model(x @ turn), y)

    def step(i: int, tell: Tell) -> None:
        if i in (50, 100, 150):
            block = blocks[3 - i // 50].requires_grad_(requires_grad=True)
            optimizer.add_param_group({"params": list(block.parameters()), "lr": 3e-3 * 0.6 ** (i // 50)})
        take_step(optimizer, loss_of(net, i), tell)

    return Training(net, [optimizer], step, loss_of)


@healthy(source="GitHub yaox12/BYOL-PyTorch issue 14, lucidrains/byol-pytorch issue 39: is a small loss a collapse?")
def student_follows_its_own_average() -> Training:
    """Predict the representation that an average of oneself has of another view; no labels, no negatives."""
    net = Net(
        lambda n, x: n.predictor(n.student(x)),
        student=mlp(24, 64, 64, 16, norm=nn.BatchNorm1d),
        predictor=mlp(16, 32, 16, norm=nn.BatchNorm1d),
    )
    net.teacher = copy.deepcopy(net.student).requires_grad_(requires_grad=False)
    optimizer = Adam([*net.student.parameters(), *net.predictor.parameters()], 2e-3)
    mixing = torch.randn(6, 24, generator=draw(923, -1)) / 2

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(923, i)
        x = torch.tanh(torch.randn(96, 6, generator=g) @ mixing)
        a, b = (x + 0.4 * torch.randn(96, 24, generator=g) for _ in range(2))
        with torch.no_grad():
            of_a, of_b = model.teacher(a), model.teacher(b)
        likeness = functional.cosine_similarity
        return 2 - likeness(model(a), of_b).mean() - likeness(model(b), of_a).mean()

    plain = train(net, optimizer, loss_of)

    def step(i: int, tell: Tell) -> None:
        plain.step(i, tell)
        with torch.no_grad():
            for t, p in zip(net.teacher.parameters(), net.student.parameters(), strict=True):
                t.lerp_(p, 0.02)

    return Training(net, [optimizer], step, loss_of)


@healthy(
    source="GitHub hill-a/stable-baselines issue 1035 (a policy loss of -3e-8), openai/spinningup issue 331", steps=200
)
def four_passes_over_each_rollout() -> Training:
    """Pass four times over each rollout with a clipped ratio, and stop for its rest once the policy has moved far."""
    net = Net(
        lambda n, s: (n.policy(s), n.value(s)),
        policy=mlp(4, 48, 48, 5, act=nn.Tanh),
        value=mlp(4, 48, 48, 1, act=nn.Tanh),
    )
    with torch.no_grad():
        net.policy[-1].weight.mul_(0.01)
    optimizer, a = Adam(net.parameters(), 4e-3), torch.randn(4, 5, generator=draw(924, -1))
    kept: list[Tensor] = []

    def step(i: int, tell: Tell) -> None:
        g = draw(924, i // 4)
        if i % 4 == 0:
            state = torch.randn(128, 4, generator=g)
            with torch.no_grad():
                log = net.policy(state).log_softmax(1)
                action = torch.multinomial(log.exp(), 1, generator=g)
                gain = torch.tanh(state @ a).gather(1, action) - net.value(state)
            kept[:] = state, action, log.gather(1, action), gain
        state, action, old, gain = kept
        logits, value = net(state)
        log = logits.log_softmax(1)
        ratio = torch.exp(log.gather(1, action) - old)
        score = (gain - gain.mean()) / gain.std()
        surrogate = torch.minimum(ratio * score, ratio.clamp(0.8, 1.2) * score).mean()
        entropy = -(log.exp() * log).sum(1).mean()
        reward = torch.tanh(state @ a).gather(1, action)
        if (ratio - 1 - ratio.log()).mean() < 0.01:
            take_step(optimizer, 0.5 * mse(value, reward) - surrogate - 0.01 * entropy, tell)

    return Training(net, [optimizer], step)


@healthy(source="GitHub pytorch/rl issue 1187, thu-ml/tianshou issue 1242: whose gradients a TD3 step uses", steps=200)
def actor_every_second_step() -> Training:
    """Step the actor half as often as two critics, in whom its loss leaves gradients that are zeroed before use."""
    net = Net(
        lambda n, s: torch.tanh(n.actor(s)),
        actor=mlp(4, 48, 48, 2, act=nn.SiLU),
        critics=nn.ModuleList(mlp(6, 64, 64, 1, act=nn.SiLU) for _ in range(2)),
    )
    targets = copy.deepcopy(net).requires_grad_(requires_grad=False)
    optimizers = [Adam(net.critics.parameters(), 3e-3), Adam(net.actor.parameters(), 1e-3)]

    def step(i: int, tell: Tell) -> None:
        g = draw(925, i)
        state, after = torch.randn(96, 4, generator=g), torch.randn(96, 4, generator=g)
        action = 2 * torch.rand(96, 2, generator=g) - 1
        with torch.no_grad():
            noise = (0.2 * torch.randn(96, 2, generator=g)).clamp(-0.5, 0.5)
            then = torch.cat([after, (targets(after) + noise).clamp(-1, 1)], 1)
            goal = _reward(state, action) + 0.5 * torch.minimum(*(c(then) for c in targets.critics))
        now = torch.cat([state, action], 1)
        take_step(optimizers[0], mse(net.critics[0](now), goal) + mse(net.critics[1](now), goal), tell)
        if i % 2:
            take_step(optimizers[1], -net.critics[0](torch.cat([state, net(state)], 1)).mean(), tell)
            with torch.no_grad():
                for t, p in zip(targets.parameters(), net.parameters(), strict=True):
                    t.lerp_(p, 0.05)

    return Training(net, optimizers, step)


@healthy(
    source="GitHub google-research/prompt-tuning issue 151: slow, for the gradient goes through the frozen model",
    steps=200,
)
def prompt_for_a_frozen_model() -> Training:
    """Learn four vectors that stand before the input of a trained, frozen transformer, and nothing else."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.embed(x) + n.places
        h = torch.cat([n.prompt.expand(len(x), -1, -1), h], 1)
        return n.head(n.encoder(h)[:, -1])

    net = Net(
        does,
        embed=nn.Linear(4, 32),
        places=nn.Parameter(0.3 * torch.randn(6, 32)),
        prompt=nn.Parameter(0.3 * torch.randn(1, 4, 32)),
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        ),
        head=nn.Linear(32, 1),
    )
    vectors = torch.randn(8, 1, 4, 32, generator=draw(926, -1)) * 0.3
    mixes = torch.randn(8, 4, generator=draw(926, -2))

    def target(x: Tensor, mix: Tensor) -> Tensor:
        return torch.tanh(x.mean(1) @ mix * 2)[:, None]

    before = Adam(net.parameters(), 2e-3)
    for i in range(160):
        g = draw(927, i)
        x, k = torch.randn(32, 6, 4, generator=g), i % 8
        net.prompt.data = vectors[k].clone()
        before.zero_grad()
        mse(net(x), target(x, mixes[k])).backward()
        net.prompt.grad = None
        before.step()
    net.requires_grad_(requires_grad=False).zero_grad()
    net.prompt = nn.Parameter(vectors.mean(0) + 0.1 * torch.randn(1, 4, 32, generator=draw(926, -3)))
    mix = 0.5 * (mixes[0] + mixes[1])

    def batch(i: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 6, 4, generator=draw(926, i))
        return x, target(x, mix)

    return train(net, Adam([net.prompt], 2e-2), fit(batch, mse))
