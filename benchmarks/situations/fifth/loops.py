"""Loops, losses and optimizers, as people reported them: nine faulty ones, and four healthy ones that look odd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, take_step, train, waves, xent
from benchmarks.situations.situation import faulty, healthy

# --- precision ---


class _UnderOneAutocast(Training):
    """A training of which all steps are taken within one autocast."""

    def run(self, tell: Tell) -> None:
        """Train from beginning to end."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            super().run(tell)


@faulty(
    "stalled",
    "unstepped",  # the weights move, but what is used of them does not
    source=(
        "GitHub X-GenGroup/Flow-Factory pull request 186 (one autocast around the loop serves stale casts: 'froze "
        "training (flat loss)'); NVIDIA/apex pull request 132"
    ),
    words=r"cache|cast|stale|cop(y|ies)|effect|forward|loss|learning rate|\blr\b|weights|optimizer",
    steps=150,
)
def weights_cast_once_for_all(*, fixed: bool) -> Training:
    """Put autocast around the whole loop and not around each forward: its casts of the weights are kept for ever."""
    net = Net(
        lambda n, x: n.head(n.body(x)),
        body=nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(12, 24, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
        ),
        head=mlp(384, 32, 4, act=nn.SiLU),
    )
    optimizer, task = Adam(net.parameters(), 1e-3), bumps(4301)

    def step(i: int, tell: Tell) -> None:
        x, y = task(i)
        if fixed:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = net(x)
        else:
            logits = net(x)
        take_step(optimizer, functional.cross_entropy(logits.float(), y), tell)

    return (Training if fixed else _UnderOneAutocast)(net, [optimizer], step)


class _LogCosh(torch.autograd.Function):
    """The mean logarithm of the hyperbolic cosine, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, error: Tensor, chained: bool) -> Tensor:  # noqa: FBT001 - torch gives no keywords
        """Work out the gradient at once."""
        ctx.save_for_backward(torch.tanh(error) / error.numel())
        ctx.chained = chained
        return (error.abs() + functional.softplus(-2 * error.abs()) - 0.6931).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return it, times what came from behind if that is not forgotten."""
        (slope,) = ctx.saved_tensors
        return (grads[0] * slope if ctx.chained else slope), None


@faulty(
    "unstepped",
    "underflow",  # part of the updates is below the precision of the weights
    "vanishing-depth",
    "stalled",
    source=(
        "GitHub SeanNaren/warp-ctc pull request 170 (the function ignores grad_output, so a scaled loss has unscaled "
        "gradients); ashawkey/stable-dreamfusion issue 158"
    ),
    words=r"scal|custom|backward|function|tiny|small|learning rate|\blr\b|lost|underflow|precision|rounding",
    steps=200,
)
def cost_with_a_gradient_of_its_own(*, fixed: bool) -> Training:
    """Scale a loss whose backward() ignores what comes to it: unscaling then divides its gradients by 65536."""
    net = mlp(6, 48, 48, 1, act=nn.SiLU)
    batch = waves(4302)

    def loss_of(model: Any, i: int) -> Any:
        x, y = batch(i)
        return _LogCosh.apply(model(x) - y, fixed)

    return train(net, SGD(net.parameters(), 0.1, momentum=0.9), loss_of, scaler=torch.amp.GradScaler("cpu"))


# --- rates ---


@faulty(
    "unstepped",
    "stalled",
    source=(
        "GitHub pytorch/pytorch issue 78917 (LambdaLR turns 1e-3 into 1e-6); lhoyer/MIC issue 60 and "
        "gao-hongnan/omniverse issue 82 (the lambda is a factor, not the rate)"
    ),
    words=r"learning rate|\blr\b|schedul|small|tiny|lost|precision|rounding|factor",
    steps=200,
)
def rate_multiplied_by_itself(*, fixed: bool) -> Training:
    """Return the rate itself, after a warm-up and with a slow decay, from the function that LambdaLR takes."""
    net, rate = he(mlp(16, 48, 48, 5)), 1e-3
    optimizer = AdamW(net.parameters(), rate)

    def wanted(i: int) -> float:
        return rate * min(1.0, (i + 1) / 20) * (1 + 0.005 * i) ** -0.75

    scheduler = LambdaLR(optimizer, lambda i: wanted(i) / rate if fixed else wanted(i))
    loss_of = fit(clusters(4303), xent)

    def step(i: int, tell: Tell) -> None:
        take_step(optimizer, loss_of(net, i), tell)
        scheduler.step()

    return Training(net, [optimizer], step, loss_of)


@faulty(
    "unstepped",
    "stalled",
    source=(
        "GitHub pytorch/pytorch issue 156846 (a new rate has no effect when an optimizer's state is loaded); "
        "XPixelGroup/BasicSR issue 327"
    ),
    words=r"learning rate|\blr\b|schedul|zero|small|tiny|resum|checkpoint|load|optimizer",
)
def resumed_at_the_rate_of_the_end(*, fixed: bool) -> Training:
    """Go on with new data at a new rate, and load the optimizer's state of before, in which a cosine had come to 0."""
    net = he(mlp(16, 48, 48, 5))
    before, task = AdamW(net.parameters(), 3e-3), clusters(4304)
    scheduler = CosineAnnealingLR(before, 100)
    for i in range(100):
        before.zero_grad()
        xent(net(task(i + 5000)[0]), task(i + 5000)[1]).backward()
        before.step()
        scheduler.step()
    before.zero_grad()
    optimizer = AdamW(net.parameters(), 1e-3)
    optimizer.load_state_dict(before.state_dict())
    if fixed:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
    turn = torch.linalg.qr(torch.randn(16, 16, generator=draw(4304, -2)))[0]

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = task(i)
        return xent(model(x @ turn), y)

    return train(net, optimizer, loss_of)


@faulty(
    "exploding",
    "non-finite",
    source=(
        "GitHub fastai/fastai2 pull request 194 (loss and gradients explode with ten batches accumulated); "
        "karpathy/nanoGPT issue 206; Deci-AI/super-gradients issue 1713"
    ),
    words=r"explod|learning rate|\blr\b|clip|large|grow|accumul|scale|norm|step",
    steps=120,
)
def sixteen_parts_added_up(*, fixed: bool) -> Training:
    """Accumulate sixteen small batches before each step of SGD, and do not divide their losses by sixteen."""
    net, parts, batch = mlp(6, 48, 48, 1, act=nn.SiLU), 16, waves(4305, n=16)
    optimizer = SGD(net.parameters(), 0.05, momentum=0.9)

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in range(parts):
            x, y = batch(i * parts + part)
            loss = mse(net(x), y) / (parts if fixed else 1)
            loss.backward()
            total = total + loss.detach()
        tell(total)
        optimizer.step()

    return Training(net, [optimizer], step)


# --- several losses ---


def _turned(x: Tensor) -> Tensor:
    """Return the same, with its gradient turned around."""
    same = x.view_as(x)
    same.register_hook(torch.neg)
    return same


@faulty(
    "exploding",
    "non-finite",
    source=(
        "GitHub CuthbertCai/pytorch_DANN issue 13 (a subtracted loss turns the gradient of the domain classifier as "
        "well) and pumpikano/tf-dann issue 19"
    ),
    since=40,
    words=r"explod|grow|large|negativ|sign|bound|clip|learning rate|\blr\b|norm|scale|maximi[sz]",
    steps=200,
)
def origin_subtracted_from_the_loss(*, fixed: bool) -> Training:
    """Subtract the loss of the domain classifier, by one optimizer for all: it learns to be as wrong as it can be."""
    net = Net(
        lambda n, x: (n.label(h := n.features(x)), n.origin(_turned(h) if fixed else h)),
        features=nn.Sequential(mlp(16, 48, 48, act=nn.SiLU), nn.SiLU()),
        label=mlp(48, 32, 5, act=nn.SiLU),
        origin=mlp(48, 32, 2, act=nn.SiLU),
    )
    task, shift = clusters(4306), 0.4 * torch.randn(16, generator=draw(4306, -2))

    def loss_of(model: Any, i: int) -> Tensor:
        (x, y), (other, _) = task(i), task(i + 100_000)
        labels, origin = model(torch.cat([x, other + shift]))
        hidden = 0.3 * xent(origin, torch.arange(2).repeat_interleave(len(x)))
        return xent(labels[: len(x)], y) + (hidden if fixed else -hidden)

    return train(net, SGD(net.parameters(), 0.02, momentum=0.9), loss_of)


# --- policies ---


@faulty(
    "rounding",
    "disconnected",
    "vanishing-depth",
    "stalled",
    "unstepped",
    source=(
        "GitHub RITCHIEHuang/DeepRL_Algorithms issue 13 and thu-ml/tianshou pull request 155 (ratios and advantages of "
        "different shape); PacktPublishing/Deep-Reinforcement-Learning-Hands-On issues 33 and 74"
    ),
    places=("policy",),
    words=r"shape|broadcast|cancel|zero|mean|rounding|noise|constant|no gradient|normali[sz]|loss",
    steps=150,
)
def ratios_in_a_column(*, fixed: bool) -> Training:
    """Multiply ratios (N, 1) by normalized advantages (N): each meets all others, and those have a mean of 0."""
    net = Net(
        lambda n, s: (n.policy(s), n.value(s)[:, 0]),
        policy=mlp(4, 48, 48, 5, act=nn.Tanh),
        value=mlp(4, 48, 48, 1, act=nn.Tanh),
    )
    optimizer, a = Adam(net.parameters(), 2e-3), torch.randn(4, 5, generator=draw(4307, -1))

    def step(i: int, tell: Tell) -> None:
        g = draw(4307, i)
        state = torch.randn(128, 4, generator=g)
        with torch.no_grad():
            logits, value = net(state)
            action = torch.multinomial(logits.softmax(1), 1, generator=g)
            old = logits.log_softmax(1).gather(1, action)
            reward = torch.tanh(state @ a).gather(1, action)[:, 0]
            gain = reward - value
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        for _ in range(2):
            logits, value = net(state)
            ratio = (logits.log_softmax(1).gather(1, action) - old).exp()
            ratio = ratio[:, 0] if fixed else ratio
            surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            take_step(optimizer, 0.5 * mse(value, reward) - surrogate, tell)

    return Training(net, [optimizer], step)


def _of_unequal_length(i: int) -> int:
    """Say how many transitions the rollout of a step has."""
    return 97 if i == 31 else 98 + int(torch.randint(30, (), generator=draw(4309, i)))


@faulty(
    "non-finite",
    source=(
        "GitHub DLR-RM/stable-baselines3 issues 325 and 440 and pull request 1028 ('everything turns to nan. This can "
        "take tens of hours to track down'); jolibrain/wheatley pull request 93"
    ),
    since=31,
    words=r"std|deviation|varian|nan|0 ?/ ?0|divi|one|single|batch|normali[sz]|loss|empty|mean|log",
    steps=100,
)
def single_transition_left_over(*, fixed: bool) -> Training:
    """Normalize advantages in minibatches of 32, of rollouts that end anywhere: once, a single one is left over."""
    net = Net(
        lambda n, s: (n.policy(s), n.value(s)[:, 0]),
        policy=mlp(4, 48, 48, 5, act=nn.Tanh),
        value=mlp(4, 48, 48, 1, act=nn.Tanh),
    )
    optimizer, a = Adam(net.parameters(), 1e-3), torch.randn(4, 5, generator=draw(4308, -1))

    def step(i: int, tell: Tell) -> None:
        g = draw(4308, i)
        state = torch.randn(_of_unequal_length(i), 4, generator=g)
        with torch.no_grad():
            logits, value = net(state)
            luck = -torch.rand(logits.shape, generator=g).clamp_min(1e-9).log()
            action = (logits - luck.log()).argmax(1, keepdim=True)
            old = logits.log_softmax(1).gather(1, action)[:, 0]
            reward = torch.tanh(state @ a).gather(1, action)[:, 0]
            gains = reward - value
        for few in torch.randperm(len(state), generator=g).split(32):
            gain = gains[few]
            if len(few) > 1 or not fixed:
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            logits, value = net(state[few])
            ratio = (logits.log_softmax(1).gather(1, action[few])[:, 0] - old[few]).exp()
            surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            take_step(optimizer, 0.5 * mse(value, reward[few]) - surrogate, tell)

    return Training(net, [optimizer], step)


@faulty(
    "disconnected",
    "vanishing-depth",
    "rounding",
    "unstepped",
    "stalled",
    source=(
        "GitHub DLR-RM/stable-baselines3 issue 2096 (with rsample(), 'the gradients with respect to the mean "
        "parameters of the policy network are zero'); openai/baselines issue 708"
    ),
    places=("mean",),
    words=r"sampl|reparam|detach|cancel|zero|graph|no gradient|constant|depend|rounding|never",
    steps=200,
)
def density_of_ones_own_draw(*, fixed: bool) -> Training:
    """Take the log-density of an action from rsample(): it moves along with the mean, whose two gradients cancel."""
    net = Net(
        lambda n, s: Normal(n.mean(s), n.log_std.exp().expand(len(s), 2)),
        mean=mlp(4, 48, 48, 2, act=nn.SiLU),
        log_std=nn.Parameter(torch.full((2,), -0.7)),
        value=mlp(4, 48, 48, 1, act=nn.SiLU),
    )
    optimizer = Adam(net.parameters(), 2e-3)

    def step(i: int, tell: Tell) -> None:
        state = torch.randn(256, 4, generator=draw(4310, i))
        wide = net(state)
        action = wide.sample() if fixed else wide.rsample()
        goal = torch.tanh(torch.stack([state[:, 0] + state[:, 1], state[:, 2] - state[:, 3]], 1))
        reward = -(action.detach() - goal).pow(2).sum(1)
        value = net.value(state)[:, 0]
        gain = (reward - value).detach()
        take_step(optimizer, mse(value, reward) - (wide.log_prob(action).sum(1) * gain).mean(), tell)

    return Training(net, [optimizer], step)


# --- healthy ---


@healthy(
    source="GitHub davda54/sam issue 8; skorch-dev/skorch issue 785 (two backward passes for each step)", steps=200
)
def gradient_from_a_little_uphill() -> Training:
    """Climb a twentieth, take the gradient there, and go back before the step, as SAM does."""
    net = he(
        Net(
            lambda n, x: n.head(n.body(x)),
            body=nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 24, 3, padding=1, stride=2),
                nn.ReLU(),
                nn.Flatten(),
            ),
            head=nn.Linear(384, 4),
        )
    )
    optimizer, loss_of = SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=1e-4), fit(bumps(4321), xent)
    weights = list(net.parameters())

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        loss_of(net, i).backward()
        with torch.no_grad():
            kept = [p.clone() for p in weights]
            norm = torch.stack([p.grad.norm() for p in weights]).norm()
            for p in weights:
                p.add_(p.grad, alpha=float(0.05 / (norm + 1e-12)))
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        with torch.no_grad():
            for p, q in zip(weights, kept, strict=True):
                p.copy_(q)
        tell(loss.detach())
        optimizer.step()

    return Training(net, [optimizer], step)


class _Muon(Optimizer):
    """Momentum, made nearly orthogonal by five iterations of Newton and Schulz; torch has it since 2.9 only."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        """Take matrices."""
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move them all equally far in all directions."""
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                x = x.T if len(x) > x.shape[1] else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
                p.add_(x if x.shape == p.shape else x.T, alpha=-group["lr"])


@healthy(
    source=(
        "GitHub deepspeedai/DeepSpeed pull request 7641 and unslothai/unsloth pull request 5933 (Muon for the hidden "
        "matrices, AdamW for embeddings, head and biases)"
    ),
    steps=200,
)
def orthogonal_steps_for_the_matrices() -> Training:
    """Move hidden matrices by Muon, whose steps are as large for a tiny gradient, and all else by AdamW."""

    def does(n: Any, words: Tensor) -> Tensor:
        h = n.words(words).flatten(1)
        for block in n.blocks:
            h = h + block(h)
        return n.head(n.norm(h))

    net = Net(
        does,
        words=nn.Embedding(24, 12),
        blocks=nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(3)
        ),
        norm=nn.LayerNorm(48),
        head=nn.Linear(48, 24),
    )
    table = torch.randn(4, 24, 24, generator=draw(4322, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(4322, i)
        words = torch.randint(24, (96, 4), generator=g)
        scores = sum(table[k][words[:, k]] for k in range(4))
        return xent(model(words), torch.multinomial((1.5 * scores).softmax(1), 1, generator=g)[:, 0])

    hidden = [p for p in net.blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in hidden}
    rest = [p for p in net.parameters() if id(p) not in known]
    return train(net, [_Muon(hidden, 0.01), AdamW(rest, 3e-3)], loss_of)


@healthy(
    source=(
        "GitHub brownvc/R3GAN issue 9 and labmlai/annotated_deep_learning_paper_implementations issue 161 (lazy "
        "regularization, multiplied by its interval)"
    ),
    steps=240,
)
def slope_penalized_at_every_eighth_step() -> Training:
    """Penalize the judge's slope in a step of its own, at every eighth step and eightfold, as StyleGAN2 does."""
    net = Net(
        lambda n, z: n.forger(z),
        forger=mlp(4, 48, 48, 2, act=nn.SiLU),
        judge=mlp(2, 48, 48, 1, act=lambda: nn.LeakyReLU(0.2)),
    )
    forging = Adam(net.forger.parameters(), 1e-3, betas=(0.0, 0.99))
    judging = Adam(net.judge.parameters(), 1e-3, betas=(0.0, 0.99))
    soft = functional.softplus

    def step(i: int, tell: Tell) -> None:
        g = draw(4323, i)
        angle = 3.14 * torch.rand(128, 1, generator=g)
        real = torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(128, 2, generator=g)
        fake = net(torch.randn(128, 4, generator=g))
        take_step(judging, soft(-net.judge(real)).mean() + soft(net.judge(fake.detach())).mean(), tell)
        if i % 8 == 0:
            real.requires_grad_()
            (slope,) = torch.autograd.grad(net.judge(real).sum(), real, create_graph=True)
            take_step(judging, 8 * 0.1 * slope.pow(2).sum(1).mean(), tell)
        judgement = soft(-net.judge(fake)).mean()
        take_step(forging, judgement, tell)

    return Training(net, [forging, judging], step)


@healthy(
    source="GitHub michaelrzhang/lookahead issue 5; wandb/senpai pull requests 128 and 879 (half of the way back)",
    steps=200,
)
def five_steps_ahead_and_half_of_them_back() -> Training:
    """Go back half of the way after every five steps, as Lookahead does: half of all updates are undone."""
    net = he(mlp(16, 64, 64, 5))
    optimizer, loss_of = AdamW(net.parameters(), 3e-3), fit(clusters(4324), xent)
    slow = [p.detach().clone() for p in net.parameters()]

    def step(i: int, tell: Tell) -> None:
        take_step(optimizer, loss_of(net, i), tell)
        if i % 5 == 4:
            with torch.no_grad():
                for p, q in zip(net.parameters(), slow, strict=True):
                    p.copy_(q.lerp_(p, 0.5))

    return Training(net, [optimizer], step, loss_of)
