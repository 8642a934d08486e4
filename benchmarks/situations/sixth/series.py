"""Series, policies, generators, physics and hand-written optimizers, as people reported them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

from benchmarks.runs import Net, Tell, Training, clusters, draw, fit, mlp, mse, take_step, train, waves, xent
from benchmarks.situations.situation import faulty, healthy

soft = functional.softplus

# --- series ---


def _partial(scores: Tensor, times: Tensor, seen: Tensor) -> Tensor:
    """Return minus the partial likelihood of Cox, a mean over the patients whose end was seen."""
    order = times.argsort(descending=True)
    ranked = scores[order]
    return -((ranked - ranked.logcumsumexp(0)) * seen[order]).sum() / seen.sum().clamp_min(1)


@faulty(
    "rounding",
    "disconnected",
    "stalled",
    "vanishing-depth",
    source=(
        "GitHub Novartis/torchsurv issue 35 (the loss is 0 whenever the batch has one patient, and a GPU holds no "
        "more); havakv/pycox issue 124 (small batches: 'there is no loss')"
    ),
    words=r"zero|0\b|no gradient|batch|cancel|constant|depend|loss|rounding|noise|one|single|sum|graph|never|cut",
    steps=120,
)
def patients_compared_with_nobody(*, fixed: bool) -> Training:
    """Accumulate a Cox likelihood patient by patient: each is the only one at risk, and so as likely as can be."""
    net = mlp(8, 32, 32, 1, act=nn.SELU)
    optimizer, a = Adam(net.parameters(), 3e-3), torch.randn(8, generator=draw(6101, -1)) / 2

    def step(i: int, tell: Tell) -> None:
        g = draw(6101, i)
        x = torch.randn(20, 8, generator=g)
        times = -torch.rand(20, generator=g).clamp_min(1e-6).log() * torch.exp(-2 * x @ a)
        seen = (torch.rand(20, generator=g) < 0.8).float()
        optimizer.zero_grad()
        if fixed:
            total = _partial(net(x)[:, 0], times, seen)
            total.backward()  # type: ignore[no-untyped-call]
        else:
            total = torch.zeros(())
            for k in range(20):
                loss = _partial(net(x[k : k + 1])[:, 0], times[k : k + 1], seen[k : k + 1]) / 20
                loss.backward()  # type: ignore[no-untyped-call]
                total = total + loss.detach()
        tell(total.detach())
        optimizer.step()

    return Training(net, [optimizer], step)


@faulty(
    "disconnected",
    "vanishing-depth",
    "unstepped",
    source=(
        "GitHub WenjieDu/SAITS issues 7 and 32 (is the loss one of the estimate, or of the series that it was filled "
        "into?); the two are the same only where values were hidden on purpose"
    ),
    places=("second",),
    words=r"zero|mask|copied|depend|no gradient|graph|loss|detach|never|contribut|multipl|cut|where|constant",
    steps=150,
)
def estimate_compared_after_filling_it_in(*, fixed: bool) -> Training:
    """Estimate missing readings twice, and compare the second with what was seen, once that was copied over it."""
    net = Net(
        lambda n, x: n.first(x),
        first=Net(lambda n, x: n.head(n.rnn(x)[0]), rnn=nn.GRU(6, 24, batch_first=True), head=nn.Linear(24, 3)),
        second=Net(
            lambda n, x: n.head(n.rnn(x)[0]),
            rnn=nn.GRU(6, 16, batch_first=True, bidirectional=True),
            head=nn.Linear(32, 3),
        ),
    )

    def loss_of(model: Any, i: int) -> Any:
        g = draw(6102, i)
        phase = 6.28 * torch.rand(32, 1, 3, generator=g)
        x = torch.sin(phase + torch.arange(16)[None, :, None] * torch.tensor([0.4, 0.7, 1.0]))
        x = x + 0.1 * torch.randn(x.shape, generator=g)
        seen = (torch.rand(x.shape, generator=g) < 0.6).float()
        one = model.first(torch.cat([x * seen, seen], 2))
        filled = seen * x + (1 - seen) * one
        two = model.second(torch.cat([filled, seen], 2))
        if not fixed:
            two = seen * x + (1 - seen) * two
        return sum((seen * (estimate - x)).abs().sum() / seen.sum() for estimate in (one, two))

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "vanishing-time",
    "disconnected",
    "underflow",
    source=(
        "GitHub open-spaced-repetition/srs-benchmark pull request 327 (gaps in seconds escape the scaling made for "
        "gaps in days); RNN-Decay as in Rubanova et al., 'Latent ODEs for irregularly-sampled time series'"
    ),
    words=r"forget|decay|memor|old|time|state|vanish|gate|scale|far|recurren|zero|unit",
    horizon=8,
    steps=200,
)
def gaps_between_visits_in_seconds(*, fixed: bool) -> Training:
    """Let a state decay between the visits of a patient by exp(-rate * gap), with gaps in seconds, not in hours."""

    def does(n: Any, x: Tensor) -> Any:
        gaps, readings = x[:, :, 0], x[:, :, 1:]
        state = torch.zeros(len(x), 24)
        for k in range(x.shape[1]):
            state = state * torch.exp(-soft(n.rate) * gaps[:, k : k + 1])
            state = n.cell(readings[:, k], state)
        return n.head(state)

    net = Net(does, rate=nn.Parameter(torch.full((24,), -2.0)), cell=nn.GRUCell(3, 24), head=nn.Linear(24, 2))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(6103, i)
        x = torch.randn(64, 8, 4, generator=g)
        y = torch.randint(2, (64,), generator=g)
        x[:, :, 0] = (0.2 + 0.8 * torch.rand(64, 8, generator=g)) * (1 if fixed else 3600)
        x[:, 0, 1] = 2.0 * (2 * y - 1)
        x[:, :, 3] = (torch.arange(8) == 0).float()
        return x, y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent))


@faulty(
    "vanishing-time",
    "stalled",
    source=(
        "GitHub bentrevett/pytorch-sentiment-analysis issue 86 (without packing, the last state is one of the "
        "padding); pmixer/SASRec.pytorch issue 24 (padded on the right, all outputs are the same); "
        "sachinruk/deepschool.io issue 8"
    ),
    words=r"pad|pack|length|old|time|forget|memor|vanish|far|recurren|state|horizon|steps",
    horizon=60,
    steps=200,
)
def short_series_padded_behind(*, fixed: bool) -> Training:
    """Classify series of 4 to 12 readings by the state after 60 steps: all others are zeros that stand behind."""

    def does(n: Any, x: Tensor, lengths: Tensor) -> Any:
        states = n.rnn(x)[0]
        return n.head(states[torch.arange(len(x)), lengths - 1] if fixed else states[:, -1])

    net = Net(does, rnn=nn.GRU(2, 24, batch_first=True), head=nn.Linear(24, 4))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(6104, i)
        lengths = torch.randint(4, 13, (48,), generator=g)
        y = torch.randint(4, (48,), generator=g)
        slope = torch.stack([y % 2 * 2.0 - 1, y // 2 * 2.0 - 1], 1)
        x = 0.6 * slope[:, None] + 0.7 * torch.randn(48, 60, 2, generator=g)
        return x * (torch.arange(60) < lengths[:, None])[:, :, None], lengths, y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent))


@faulty(
    "vanishing-depth",
    "disconnected",
    "vanishing-time",
    "underflow",
    "rounding",
    source=(
        "practice: a bias by age on scores, as ALiBi has by position, with ages in a unit for which its slope is far "
        "too steep; THUwangcy/ReChorus issue 57 and meta-recsys/generative-recommenders issue 348 (units of intervals)"
    ),
    places=("query", "key"),
    words=r"softmax|satur|one.hot|squash|scale|score|temperature|vanish|normali[sz]|large|zero|small|attention|sharp",
    steps=200,
)
def attention_biased_by_minutes_of_age(*, fixed: bool) -> Training:
    """Subtract the age of a reading in minutes, not in days, from its score: only the newest is ever attended to."""

    def does(n: Any, ages: Tensor, x: Tensor) -> Any:
        query, keys, values = n.query(x[:, -1:]), n.key(x), n.value(x)
        scores = (query @ keys.transpose(1, 2)) / 4 - (ages[:, None] / 1440 if fixed else ages[:, None])
        return n.head((scores.softmax(2) @ values)[:, 0])

    net = Net(
        does, query=nn.Linear(8, 16), key=nn.Linear(8, 16), value=nn.Linear(8, 16), head=mlp(16, 24, 1, act=nn.SiLU)
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(6105, i)
        x = torch.randn(64, 10, 8, generator=g)
        ages = (30 + 200 * torch.rand(64, 10, generator=g)).cumsum(1).flip(1)
        ages = ages - ages[:, -1:]
        at = torch.randint(9, (64,), generator=g)
        x[:, :, 0] = 0.0
        x[torch.arange(64), at, 0] = 3.0
        return ages, x, x[torch.arange(64), at, 1:2]

    return train(net, Adam(net.parameters(), 1e-2), fit(batch, mse))


# --- physics ---


@faulty(
    "exploding",
    "non-finite",
    source=(
        "GitHub patrick-kidger/NeuralCDE issue 2 (the equation 'blows up', for weeks called an underflow in dt); "
        "rtqichen/torchdiffeq issues 27 and 58 (a running loss of -19738, then of -6e13)"
    ),
    words=r"explod|grow|large|scale|clip|learning rate|\blr\b|norm|step|residual|init|overflow|nan|infin",
    steps=120,
)
def dynamics_integrated_over_a_day(*, fixed: bool) -> Training:
    """Integrate a learned equation in 30 steps over a day that counts 24, and not over one that counts 1."""
    length = (1.0 if fixed else 24.0) / 30

    def does(n: Any, z: Tensor) -> Any:
        path = []
        for _ in range(30):
            z = z + length * n.rate(z)
            path.append(z)
        return torch.stack(path, 1)

    net = Net(does, rate=mlp(2, 32, 32, 2, act=nn.SiLU))

    def batch(i: int) -> tuple[Tensor, ...]:
        z = torch.randn(32, 2, generator=draw(6106, i))
        t = (torch.arange(30) + 1)[None, :] / 30
        turn, fade = 3 * t, torch.exp(-t)
        first, other = z[:, :1], z[:, 1:]
        return z, torch.stack(
            [fade * (turn.cos() * first - turn.sin() * other), fade * (turn.sin() * first + turn.cos() * other)], 2
        )

    return train(net, SGD(net.parameters(), 0.05, momentum=0.9), fit(batch, mse))


# --- several tasks ---


@faulty(
    "exploding",
    "stalled",
    "non-finite",
    source=(
        "GitHub rotmanfinhub/deep-macrofin issue 35 (learnable weights need a term that keeps them from 0); "
        "aharley/simple_bev issue 13 (the weights, and then the loss, are negative); Kendall et al. 2018"
    ),
    since=120,
    words=r"explod|grow|negativ|large|bound|sign|weigh|clip|diverg|learning rate|\blr\b|maximi[sz]|scale|norm",
    steps=240,
)
def weights_of_losses_learned_for_free(*, fixed: bool) -> Training:
    """Learn the weights of two losses by the sum of their products: they fall below zero, and errors pay off."""
    net = Net(
        lambda n, x: (n.demand(h := n.trunk(x)), n.price(h)),
        trunk=nn.Sequential(mlp(6, 48, 48, act=nn.SiLU), nn.SiLU()),
        demand=nn.Linear(48, 1),
        price=nn.Linear(48, 1),
        weights=nn.Parameter(torch.zeros(2) if fixed else torch.ones(2)),
    )
    task = waves(6107)

    def loss_of(model: Any, i: int) -> Any:
        x, y = task(i)
        demand, price = model(x)
        losses = torch.stack([mse(demand, y), mse(price, x[:, :1] + x[:, 1:2] * x[:, 2:3])])
        if fixed:
            return (torch.exp(-model.weights) * losses + model.weights).sum()
        return (model.weights * losses).sum()

    return train(net, Adam(net.parameters(), 1e-2), loss_of)


# --- policies ---


@faulty(
    "non-finite",
    source=(
        "GitHub philtabor/Actor-Critic-Methods-Paper-To-Code issue 7 and cpnota/autonomous-learning-library issue 139 "
        "(the logarithm of 1 - a^2, where a has been scaled to the bounds of the action)"
    ),
    since=8,
    words=r"log|nan|negativ|domain|clamp|eps|root|invalid|finite|undefined|scale",
    steps=200,
)
def density_of_a_scaled_action(*, fixed: bool) -> Training:
    """Scale a squashed action to within -2 and 2, and take the logarithm of 1 - a^2 of that one for its density."""
    net = Net(
        lambda n, s: Normal(n.mean(s), n.log_std(s).clamp(-4, 1).exp(), validate_args=False),
        mean=mlp(4, 48, 48, 1, act=nn.ReLU),
        log_std=mlp(4, 24, 1, act=nn.ReLU),
        critic=mlp(5, 48, 48, 1, act=nn.ReLU),
    )
    with torch.no_grad():
        net.mean[-1].weight.mul_(0.1)
        net.log_std[-1].bias.fill_(-2.5)
    acting = Adam([*net.mean.parameters(), *net.log_std.parameters()], 2e-3)
    judging = Adam(net.critic.parameters(), 3e-3)

    def act(state: Tensor) -> tuple[Tensor, Tensor]:
        wide = net(state)
        raw = wide.rsample()
        squashed = torch.tanh(raw)
        action = 2 * squashed
        slope = 1 - (squashed if fixed else action).pow(2) + 1e-6
        return action, wide.log_prob(raw) - slope.log()

    def step(i: int, tell: Tell) -> None:
        g = draw(6109, i)
        state = torch.randn(96, 4, generator=g)
        action, log = act(state)
        with torch.no_grad():
            then = 0.7 * state + 0.7 * torch.randn(96, 4, generator=g)
            next_action, next_log = act(then)
            reward = -(action - 1.6 * torch.tanh(state[:, :1] + state[:, 1:2])).pow(2)
            goal = reward + 0.5 * (net.critic(torch.cat([then, next_action], 1)) - 0.02 * next_log)
        take_step(judging, mse(net.critic(torch.cat([state, action.detach()], 1)), goal), tell)
        take_step(acting, (0.02 * log - net.critic(torch.cat([state, action], 1))).mean(), tell)

    return Training(net, [judging, acting], step)


@faulty(
    "dead-units",
    "disconnected",
    "vanishing-depth",
    "unstepped",
    source=(
        "GitHub sweetice/Deep-reinforcement-learning-with-pytorch issue 36 (a logarithm of a deviation need not go "
        "through a ReLU)"
    ),
    places=("log_std",),
    since=30,
    words=r"dead|die|relu|zero|negativ|never|bias|no gradient|leaky|satur|learning rate|\blr\b|init",
    steps=240,
)
def deviation_that_may_not_shrink(*, fixed: bool) -> Training:
    """Put a ReLU behind the logarithm of a policy's deviation, which should sink below 0: soon it is 0 everywhere."""
    net = Net(
        lambda n, s: Normal(n.mean(s), n.log_std(s).clamp(-4, 2).exp()),
        mean=mlp(4, 48, 48, 2, act=nn.SiLU),
        log_std=nn.Sequential(nn.Linear(4, 24), nn.SiLU(), nn.Linear(24, 2), nn.Identity() if fixed else nn.ReLU()),
        critic=mlp(6, 64, 64, 1, act=nn.SiLU),
    )
    acting = Adam([*net.mean.parameters(), *net.log_std.parameters()], 3e-3)
    judging = Adam(net.critic.parameters(), 3e-3)

    def step(i: int, tell: Tell) -> None:
        state = torch.randn(128, 4, generator=draw(6110, i))
        wide = net(state)
        action = wide.rsample()
        goal = torch.tanh(torch.stack([state[:, 0] + state[:, 1], state[:, 2] - state[:, 3]], 1))
        reward = -(action.detach() - goal).pow(2).sum(1, keepdim=True)
        take_step(judging, mse(net.critic(torch.cat([state, action.detach()], 1)), reward), tell)
        value = net.critic(torch.cat([state, action], 1))[:, 0]
        take_step(acting, (0.05 * wide.log_prob(action).sum(1) - value).mean(), tell)

    return Training(net, [judging, acting], step)


@faulty(
    "unstepped",
    "stalled",
    source=(
        "practice: soft_update(local, target, tau) with its two networks the other way round; "
        "GitHub reinshift/MADDPG_Multi_UAV_Roundup issue 10 ('the actor and critic networks were updated instead of "
        "the target networks', it is feared) and ageron/handson-ml2 issue 89 (a copy averaged with itself)"
    ),
    words=r"undo|undone|restor|overwrit|revert|back|not move|stand|still|optimizer|learning rate|\blr\b|copied|loss",
    steps=150,
)
def soft_update_the_wrong_way_round(*, fixed: bool) -> Training:
    """Move the network that learns towards its slow copy, by 99.5 percent after each step, in place of the converse."""
    online = mlp(4, 48, 48, 3)
    slow = copy.deepcopy(online).requires_grad_(requires_grad=False)
    optimizer = Adam(online.parameters(), 2e-3)

    def step(i: int, tell: Tell) -> None:
        g = draw(6112, i)
        state, act = torch.randn(64, 4, generator=g), torch.randint(3, (64, 1), generator=g)
        then = 0.7 * state + 0.7 * torch.randn(64, 4, generator=g)
        reward = 2 * (act[:, 0] - 1) * torch.tanh(2 * state[:, 0]) + state[:, 1]
        goal = reward + 0.5 * slow(then).max(1).values
        take_step(optimizer, mse(online(state).gather(1, act)[:, 0], goal), tell)
        with torch.no_grad():
            for p, q in zip(online.parameters(), slow.parameters(), strict=True):
                if fixed:
                    q.copy_(0.005 * p + 0.995 * q)
                else:
                    p.copy_(0.005 * p + 0.995 * q)

    return Training(online, [optimizer], step)


# --- generators ---


@faulty(
    "exploding",
    source=(
        "GitHub torchgan/torchgan pull request 42 (the clipping of the critic's weights was missing); "
        "mickypaganini/GAN_tutorial issue 2; igul222/improved_wgan_training issue 79"
    ),
    since=5,
    words=r"explod|grow|large|bound|negativ|clip|diverg|penalt|Lipschitz|learning rate|\blr\b|scale|norm|maximi[sz]",
    steps=150,
)
def critic_that_nothing_holds_back(*, fixed: bool) -> Training:
    """Train a Wasserstein critic without clipping or a penalty on its slope, five steps to one of the generator."""
    net = Net(
        lambda n, z: n.forger(z),
        forger=mlp(4, 48, 48, 4, act=nn.ReLU),
        critic=mlp(4, 64, 64, 64, 1, act=lambda: nn.LeakyReLU(0.2)),
    )
    forging = Adam(net.forger.parameters(), 1e-3, betas=(0.5, 0.9))
    judging = Adam(net.critic.parameters(), 1e-3, betas=(0.5, 0.9))

    def step(i: int, tell: Tell) -> None:
        for k in range(5):
            g = draw(6115, 5 * i + k)
            real = 2 + torch.randn(64, 4, generator=g)
            fake = net(torch.randn(64, 4, generator=g)).detach()
            loss = net.critic(fake).mean() - net.critic(real).mean()
            if fixed:
                between = torch.lerp(real, fake, torch.rand(64, 1, generator=g)).requires_grad_()
                (slope,) = torch.autograd.grad(net.critic(between).sum(), between, create_graph=True)
                loss = loss + 10 * (slope.norm(dim=1) - 1).pow(2).mean()
            take_step(judging, loss, tell)
        take_step(forging, -net.critic(net(torch.randn(64, 4, generator=draw(6116, i)))).mean(), tell)

    return Training(net, [judging, forging], step)


@faulty(
    "unstepped",
    source=(
        "GitHub line/open-universe issue 5 (the parameters of one discriminator are listed twice, 'the parameters of "
        "the mpd are never optimized'); zhaoyuzhi/deepfillv2 pull request 3"
    ),
    places=("periods",),
    words=r"optimizer|param|not (in|move|step)|never|group|add|still|stand|miss|updat",
    steps=150,
)
def one_judge_listed_twice(*, fixed: bool) -> Training:
    """Enhance a noisy voice under two judges, and give their optimizer the first one twice, and the second never."""
    net = Net(
        lambda n, noisy: n.voice(noisy),
        voice=mlp(16, 48, 48, 16, act=nn.SiLU),
        levels=mlp(16, 32, 1, act=lambda: nn.LeakyReLU(0.2)),
        periods=nn.Sequential(
            nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 12, 4, 4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(48, 1)
        ),
    )
    voicing = Adam(net.voice.parameters(), 2e-3, betas=(0.5, 0.99))
    judges = nn.ModuleList([net.levels, net.periods if fixed else net.levels])
    judging = Adam(judges.parameters(), 1e-3, betas=(0.5, 0.99))

    def step(i: int, tell: Tell) -> None:
        g = draw(6117, i)
        phase, pace = 6.28 * torch.rand(64, 1, generator=g), 0.6 + 0.4 * torch.rand(64, 1, generator=g)
        real = torch.sin(phase + torch.arange(16) * pace)
        fake = net(real + 0.4 * torch.randn(64, 16, generator=g))
        both = (net.levels, net.periods)
        judged = torch.stack([soft(-judge(real)).mean() + soft(judge(fake.detach())).mean() for judge in both])
        take_step(judging, judged.sum(), tell)
        pleasing = torch.stack([soft(-judge(fake)).mean() for judge in both])
        take_step(voicing, 10 * (fake - real).abs().mean() + pleasing.sum(), tell)

    return Training(net, [judging, voicing], step)


@faulty(
    "stalled",
    "vanishing-depth",
    "disconnected",
    source=(
        "GitHub zdebruine/MMVAE pull request 19 (the divergence is a sum, the error a mean: 'KL Loss easily drop to 0 "
        "at few epoch'); AppliedDataSciencePartners/WorldModels issue 12; podgorskiy/VAE issue 1 ('the same blurry')"
    ),
    words=r"loss|stall|plateau|collaps|weight|scale|constant|ignor|not (come|go|fall|learn)|data|target|mean|vanish",
    steps=200,
)
def divergence_summed_and_errors_averaged(*, fixed: bool) -> Training:
    """Sum the divergence of a code over 8 numbers, and average the errors over 48: a code that says nothing is best."""
    net = Net(
        lambda n, x: n.encoder(x).chunk(2, 1), encoder=mlp(48, 48, 16, act=nn.SiLU), decoder=mlp(8, 48, 48, act=nn.SiLU)
    )

    def loss_of(model: Any, i: int) -> Any:
        g = draw(6118, i)
        phase, pace = 6.28 * torch.rand(64, 1, generator=g), 0.1 + 0.2 * torch.rand(64, 1, generator=g)
        x = 1.4 * torch.sin(phase + pace * torch.arange(48))
        mean, log = model(x)
        code = mean + (0.5 * log).exp() * torch.randn(mean.shape, generator=g)
        errors = (model.decoder(code) - x).pow(2)
        divergence = 0.5 * (mean.pow(2) + log.exp() - 1 - log).sum(1).mean()
        return (errors.sum(1).mean() + divergence) / 48 if fixed else errors.mean() + divergence

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


# --- numbers of few bits ---


class _Steps(torch.autograd.Function):
    """Round to multiples of a step from -7 to 7 of them, with the gradients of learned step size quantization."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, size: Tensor) -> Tensor:
        """Round."""
        ctx.save_for_backward(weight / size)
        return (weight / size).round().clamp(-7, 7) * size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Let the gradient through where nothing was cut off."""
        (ratio,) = ctx.saved_tensors
        inside = ratio.abs() <= 7
        slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(-7, 7))
        return grad * inside, (grad * slope).sum() / math.sqrt(7 * grad.numel())


class _FourBits(nn.Linear):
    """A linear layer whose weights are rounded on the way."""

    def __init__(self, a: int, b: int, *, measured: bool) -> None:
        """Begin with a step of one, or one that was measured at the weights."""
        super().__init__(a, b)
        start = 2 * self.weight.detach().abs().mean() / math.sqrt(7) if measured else torch.ones(())
        self.size = nn.Parameter(start)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Round, and multiply."""
        rounded = _Steps.apply(self.weight, self.size)  # type: ignore[no-untyped-call]
        return functional.linear(input, rounded, self.bias)


@faulty(
    "vanishing-depth",
    "disconnected",
    "dead-units",
    "stalled",
    "underflow",
    source=(
        "GitHub microsoft/nni pull request 3503 (scales that begin at 1.0); zhutmost/lsq-net issue 1 (from scratch it "
        "does not train); megvii-research/Sparsebit pull request 72 (a scale that nobody initialized)"
    ),
    words=r"zero|round|quanti|scale|step|dead|vanish|no gradient|small|init|weight|constant|loss|depend|cut",
    steps=150,
)
def step_of_one_for_small_weights(*, fixed: bool) -> Training:
    """Round weights of a fifth to multiples of a learned step that begins at 1: they are all rounded to 0."""
    net = nn.Sequential(
        nn.Linear(16, 48),
        nn.ReLU(),
        _FourBits(48, 48, measured=fixed),
        nn.ReLU(),
        _FourBits(48, 48, measured=fixed),
        nn.ReLU(),
        nn.Linear(48, 5),
    )
    return train(net, Adam(net.parameters(), 2e-3), fit(clusters(6119), xent))


# --- healthy ---


@healthy(
    source=(
        "GitHub flyyufelix/C51-DDQN-Keras issue 1 and michaelnny/deep_rl_zoo issue 3 (does it learn? a cross-entropy "
        "with a distribution has a high floor, and most atoms get next to nothing)"
    ),
    steps=200,
)
def returns_spread_over_51_atoms() -> Training:
    """Learn the distribution of returns on 51 atoms from a frozen copy: the loss ends far above zero."""
    online = mlp(4, 64, 64, 3 * 51)
    target = copy.deepcopy(online).requires_grad_(requires_grad=False)
    net = Net(lambda n, s: n.online(s).view(-1, 3, 51), online=online, target=target)
    atoms = torch.linspace(-10, 10, 51)

    def loss_of(model: Any, i: int) -> Any:
        if i % 25 == 0:
            model.target.load_state_dict(model.online.state_dict())
        g = draw(6131, i)
        rows = torch.arange(96)
        state, act = torch.randn(96, 4, generator=g), torch.randint(3, (96,), generator=g)
        then = 0.7 * state + 0.7 * torch.randn(96, 4, generator=g)
        reward = (act - 1) * torch.tanh(2 * state[:, 0])
        with torch.no_grad():
            chances = model.target(then).view(-1, 3, 51).softmax(2)
            chances = chances[rows, (chances @ atoms).argmax(1)]
            at = ((reward[:, None] + 0.7 * atoms).clamp(-10, 10) + 10) / 0.4
            low = at.floor().clamp(0, 49)
            goal = torch.zeros(96, 51)
            goal.scatter_add_(1, low.long(), chances * (low + 1 - at))
            goal.scatter_add_(1, low.long() + 1, chances * (at - low))
        return -(goal * model(state)[rows, act].log_softmax(1)).sum(1).mean()

    return train(net, Adam(online.parameters(), 2e-3), loss_of)


class _Adjoint(torch.autograd.Function):
    """Integrate without a graph; on the way back, pull the adjoint and all gradients along the stored path."""

    @staticmethod
    def forward(ctx: Any, rate: nn.Module, z: Tensor, *weights: Tensor) -> Tensor:
        """Take 20 steps of Euler."""
        ctx.rate, ctx.weights, path = rate, weights, [z]
        with torch.no_grad():
            for _ in range(20):
                path.append(path[-1] + rate(path[-1]) / 20)
        ctx.path = path
        return path[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Go back along the path."""
        sums = [torch.zeros_like(w) for w in ctx.weights]
        for z in reversed(ctx.path[:-1]):
            with torch.enable_grad():
                z = z.detach().requires_grad_()  # noqa: PLW2901
                moved = ctx.rate(z) / 20
            pulled, *parts = torch.autograd.grad(moved, (z, *ctx.weights), grad)
            grad = grad + pulled
            for total, part in zip(sums, parts, strict=True):
                total.add_(part)
        return None, grad, *sums


@healthy(
    source=(
        "GitHub rtqichen/torchdiffeq issues 33, 47 and 119 (the adjoint method: no graph on the way there, and "
        "gradients that a function of its own returns)"
    ),
    steps=120,
)
def gradients_by_the_adjoint_method() -> Training:
    """Integrate a learned equation under no_grad, and get the gradients of its weights from a backward of its own."""
    net = Net(
        lambda n, x: n.head(_Adjoint.apply(n.rate, n.inp(x), *n.rate.parameters())),  # type: ignore[no-untyped-call]
        inp=nn.Linear(6, 16),
        rate=mlp(16, 32, 16, act=nn.Tanh),
        head=nn.Linear(16, 1),
    )
    return train(net, Adam(net.parameters(), 5e-3), fit(waves(6132), mse))


class _WithoutSchedule(Optimizer):
    """Gradient descent whose weights are a tenth what runs ahead, and nine tenths its average of all steps."""

    def __init__(self, params: Any, lr: float) -> None:
        """Take weights."""
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move what runs ahead, and then all else."""
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                state = self.state[p]
                ahead = state.setdefault("ahead", p.clone())
                ahead.sub_(p.grad, alpha=group["lr"] * min(1, group["steps"] / 10))
                average = state.setdefault("average", p.clone()).lerp_(ahead, 1 / group["steps"])
                p.copy_(torch.lerp(ahead, average, 0.9))


@healthy(
    source=(
        "GitHub facebookresearch/schedule_free issues 15 and 66 (gradients are taken between the weights that run "
        "and their average, and evaluation is done at the average)"
    ),
    steps=200,
)
def weights_between_run_and_average() -> Training:
    """Train without a schedule: the model's weights lie between those that run ahead and the average of all so far."""
    net = mlp(16, 64, 64, 5)
    return train(net, _WithoutSchedule(net.parameters(), 0.4), fit(clusters(6133), xent))


@healthy(
    source=(
        "GitHub havakv/pycox issues 125 and 129 (discrete hazards: who has left counts no longer, and late intervals "
        "see hardly any end)"
    ),
    steps=200,
)
def most_patients_leave_the_study() -> Training:
    """Learn the hazards of 15 intervals from patients of whom most leave early, and hardly any is left at the end."""
    net, a = mlp(8, 48, 48, 15, act=nn.SiLU), torch.randn(8, generator=draw(6134, -1)) / 2

    def loss_of(model: Any, i: int) -> Any:
        g = draw(6134, i)
        x = torch.randn(128, 8, generator=g)
        ends = -torch.rand(128, generator=g).clamp_min(1e-6).log() * torch.exp(3.3 - 2 * x @ a)
        leaves = -torch.rand(128, generator=g).clamp_min(1e-6).log() * 4
        at = torch.minimum(ends, leaves).clamp_max(14.9).floor()[:, None]
        here = (torch.arange(15) == at) & (ends < leaves)[:, None]
        bits = functional.binary_cross_entropy_with_logits(model(x), here.float(), reduction="none")
        return (bits * (torch.arange(15) <= at)).sum(1).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@healthy(
    source=(
        "GitHub ray-project/ray pull request 49680, chandar-lab/RLHive pull request 306 and danijar/dreamer issue 24 "
        "(burn-in: the first steps of a sequence only warm the state up)"
    ),
    steps=200,
)
def steps_that_only_warm_the_state() -> Training:
    """Run a recurrent network over 16 steps under no_grad to warm its state up, and learn values from the 12 after."""

    def does(n: Any, x: Tensor) -> Any:
        with torch.no_grad():
            state = n.rnn(x[:, :16])[1]
        return n.head(n.rnn(x[:, 16:], state)[0])

    net = Net(does, rnn=nn.GRU(3, 32, batch_first=True), head=nn.Linear(32, 1))

    def batch(i: int) -> tuple[Tensor, ...]:
        x = torch.randn(32, 28, 3, generator=draw(6135, i))
        value = torch.zeros(32)
        values = []
        for k in range(28):
            value = 0.7 * value + 0.7 * x[:, k, 0] + 0.2 * x[:, k, 1]
            values.append(value)
        return x, torch.stack(values, 1)[:, 16:, None]

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, mse))


@healthy(
    source=(
        "GitHub deepchem/deepchem pull request 4722 and probml/rebayes issue 17 (a Kalman filter whose noise is "
        "learned by gradients; its likelihood is a density, and may pass zero)"
    ),
    steps=150,
)
def filter_that_learns_its_noise() -> Training:
    """Fit a Kalman filter of a level that reverts, by the likelihood of 40 readings of small numbers: five numbers."""

    class _Filter(nn.Module):
        """A level that reverts to a mean, seen through noise."""

        def __init__(self) -> None:
            """Begin with noise of one."""
            super().__init__()
            self.keep, self.mean = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
            self.moves, self.noise = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
            self.start = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            """Return minus the likelihood per reading."""
            level, spread = self.mean.expand(len(x)), self.start.exp()
            total = torch.zeros(())
            for k in range(x.shape[1]):
                error, wide = x[:, k] - level, spread + self.noise.exp()
                total = total + 0.5 * (error.pow(2) / wide + wide.log() + math.log(6.283)).mean()
                gain, keep = spread / wide, torch.sigmoid(self.keep)
                level = self.mean + keep * (level + gain * error - self.mean)
                spread = keep.pow(2) * (1 - gain) * spread + self.moves.exp()
            return total / x.shape[1]

    net = _Filter()

    def loss_of(model: Any, i: int) -> Any:
        g = draw(6136, i)
        moves, noise = 0.2 * torch.randn(32, 40, generator=g), 0.1 * torch.randn(32, 40, generator=g)
        level, seen = 0.4 * torch.randn(32, generator=g), []
        for k in range(40):
            seen.append(0.5 + level + noise[:, k])
            level = 0.9 * level + moves[:, k]
        return model(torch.stack(seen, 1))

    return train(net, Adam(net.parameters(), 0.05), loss_of)
