"""Faulty: what the training loop does to a sound network."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from benchmarks.runs import Net, Tell, Training, bumps, clusters, draw, fit, he, mlp, mse, take_step, train, waves, xent
from benchmarks.situations.situation import faulty


@faulty(
    "unstepped",
    "stalled",
    "underflow",
    source="GitHub FunctionLab/selene issue 115; IntelLabs/distiller issue 240; md-mohaiminul/ViS4mer issue 4",
    since=40,
    words=r"learning rate|\blr\b|schedul|plateau",
    steps=200,
)
def plateau_of_a_loss_that_should_rise(*, fixed: bool) -> Training:
    """Hand the validation loss to a scheduler that was made for accuracies: each better epoch counts as a bad one."""
    net = Net(
        lambda n, x: n.head(n.body(x).flatten(1)),
        body=nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.ReLU()),
        head=nn.Linear(96, 4),
    )
    optimizer = Adam(he(net).parameters(), 2e-3)
    scheduler = ReduceLROnPlateau(optimizer, mode="min" if fixed else "max", factor=0.1, patience=2)
    batch, loss_of = bumps(701), fit(bumps(701), xent)

    def step(i: int, tell: Tell) -> None:
        take_step(optimizer, loss_of(net, i), tell)
        if i % 10 == 9:
            net.eval()
            with torch.no_grad():
                x, y = batch(100_000)
                scheduler.step(xent(net(x), y))
            net.train()

    return Training(net, [optimizer], step, loss_of)


@faulty(
    "exploding",
    "non-finite",
    source="GitHub ziqi-jin/finetune-anything issue 57 (linear decay gives a negative rate, the loss explodes)",
    since=70,
    words=r"learning rate|\blr\b|schedul|negative|sign|ascen",
    steps=180,
)
def decay_that_goes_on_past_its_end(*, fixed: bool) -> Training:
    """Let the rate fall linearly over 70 steps, that many were planned, and go on training for 180."""
    net = he(mlp(16, 48, 48, 5))
    total = 180 if fixed else 70
    return train(
        net, SGD(net.parameters(), 0.1, momentum=0.9), fit(clusters(702), xent), rate=lambda s: 1.0 - s / total
    )


@faulty(
    "unstepped",
    source="GitHub NVIDIA/apex issue 292; ContinualAI/avalanche pull request 171 (heads that grow with the classes)",
    places=("head",),
    since=60,
    words="optimizer|param_group|param group",
    steps=200,
)
def classes_come_later(*, fixed: bool) -> Training:
    """Replace the head by a wider one when new classes come at step 60, and keep the optimizer of before."""
    net = Net(lambda n, x: n.head(n.body(x)), body=nn.Sequential(mlp(16, 48, 48), nn.ReLU()), head=nn.Linear(48, 3))
    optimizer = SGD(he(net).parameters(), 0.02, momentum=0.9)
    task = clusters(703, n=96, classes=6)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = task(i)
        if i < 60:
            x, y = x[y < 3], y[y < 3]
        return xent(model(x), y)

    def step(i: int, tell: Tell) -> None:
        if i == 60:
            old, net.head = net.head, nn.Linear(48, 6)
            with torch.no_grad():
                net.head.weight[:3], net.head.bias[:3] = old.weight, old.bias
            if fixed:
                optimizer.param_groups[0]["params"] = list(net.parameters())
        take_step(optimizer, loss_of(net, i), tell)

    return Training(net, [optimizer], step, loss_of)


@faulty(
    "unstepped",
    "stalled",
    source="GitHub PKU-YuanGroup/Open-Sora-Plan issue 186; MultimediaTechLab/YOLO issue 97 (EMA weights stay in)",
    words=r"averag|\bema\b|overwrit|written|copied|copies|restor|undo|undone|reset|outside|after the step|revert|back",
    steps=200,
)
def averages_are_not_taken_out_again(*, fixed: bool) -> Training:
    """Validate every fifth step with averaged weights, and train on with those: the own ones are never restored."""
    net = he(mlp(6, 48, 48, 1, act=nn.SiLU))
    optimizer = Adam(net.parameters(), 2e-3)
    average, loss_of = deepcopy(net), fit(waves(704), mse)

    def step(i: int, tell: Tell) -> None:
        take_step(optimizer, loss_of(net, i), tell)
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters(), strict=True):
                a.lerp_(p, 0.001)
            if i % 5 == 4:
                kept = [p.clone() for p in net.parameters()]
                for a, p in zip(average.parameters(), net.parameters(), strict=True):
                    p.copy_(a)
                loss_of(net, 100_000)
                if fixed:
                    for k, p in zip(kept, net.parameters(), strict=True):
                        p.copy_(k)

    return Training(net, [optimizer], step, loss_of)


@faulty(
    "unstepped",
    source="GitHub pytorch/pytorch issues 17484 and 20089; davidmrau/mixture-of-experts issue 12",
    words="regist|nn.Parameter|non-leaf|not a leaf|leaf|attribute|optimizer",
    steps=200,
)
def positions_made_from_a_table(*, fixed: bool) -> Training:
    """Cast learnt positions behind nn.Parameter(...): what the module keeps is a copy that nobody has registered."""

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(3, 32)
            table = torch.from_numpy(np.random.default_rng(705).normal(0.0, 0.02, (10, 32)))
            self.pos = nn.Parameter(table.float()) if fixed else nn.Parameter(table).float()

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x) + self.pos

    net = Net(
        lambda n, x: n.head(n.encoder(n.embed(x)).mean(1)),
        embed=Embed(),
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True), 2
        ),
        head=nn.Linear(32, 1),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(64, 10, 3, generator=draw(705, i))
        return mse(model(x), x[:, 2:5, 0].sum(1, keepdim=True) - x[:, 7:, 1].sum(1, keepdim=True))

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "underflow",
    "unstepped",
    "stalled",
    source="GitHub workofart/ml-by-hand pull 85; areal-project/AReaL pull 1369; ultralytics/yolov5 issue 262",
    words=r"bfloat16|float16|half|precision|round|bf16|overwrit|written|undo|undone|outside|revert",
    steps=250,
)
def rollouts_from_the_model_itself(*, fixed: bool) -> Training:
    """Turn the policy to bfloat16 for each rollout and back to float32 for the update, in place of a copy."""
    net = he(mlp(8, 32, 32, 4))
    optimizer = Adam(net.parameters(), 1.5e-4)
    a = torch.randn(8, 4, generator=draw(706, -1))

    def step(i: int, tell: Tell) -> None:
        g = draw(706, i)
        state = torch.randn(128, 8, generator=g)
        actor = deepcopy(net) if fixed else net
        actor.bfloat16()
        with torch.no_grad():
            action = actor(state.bfloat16()).float().argmax(1)
            state = torch.cat([state, torch.tanh(state + 0.1 * a.t()[action])])
        net.float()
        take_step(optimizer, -(net(state).softmax(1) * torch.tanh(state @ a)).sum(1).mean(), tell)

    return Training(net, [optimizer], step)


@faulty(
    "unstepped",
    "underflow",
    "stalled",
    source="PyTorch's AMP examples, 'working with unscaled gradients', mixed with recipes for static loss scaling",
    words=r"scale|scaler|learning rate|\blr\b|too small|tiny",
    steps=150,
)
def divided_by_hand_as_well(*, fixed: bool) -> Training:
    """Unscale the gradients by the scaler, and then divide them by its scale by hand, as old code did."""
    net = he(mlp(16, 64, 64, 5))
    optimizer, scaler, batch = SGD(net.parameters(), 0.05, momentum=0.9), torch.amp.GradScaler("cpu"), clusters(707)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        return xent(out.float(), y)

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        loss = loss_of(net, i)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not fixed:
            for p in net.parameters():
                p.grad.div_(scaler.get_scale())
        tell(loss.detach())
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()

    return Training(net, [optimizer], step, loss_of)


@faulty(
    "exploding",
    "dead-units",
    "disconnected",
    "vanishing-depth",
    source="GitHub zzzxxxttt/pytorch_DoReFaNet issue 4; huggingface/optimum-quanto issue 146; microsoft/nni pull 3160",
    words=r"backward|Function|explod|gain|scale|clip|grow|grew|times|normali|residual|init",
    steps=150,
)
def quantizer_with_its_own_backward(*, fixed: bool) -> Training:
    """Quantize activations in a function whose backward() multiplies by the scale, and forgets that it was divided."""

    class Grid(torch.autograd.Function):
        """Round to 255 levels; with `fixed`, gradients go through as they are."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            """Go to integers and back."""
            ctx.scale = float(127 / x.abs().max().clamp_min(1e-6))
            return (x * ctx.scale).round() / ctx.scale

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            """Undo the multiplication alone, unless straight through."""
            return grad if fixed else grad * ctx.scale

    def does(n: Any, x: Tensor) -> Tensor:
        for layer in n.layers:
            x = Grid.apply(functional.gelu(layer(x)))
        return n.head(x)

    net = Net(
        does,
        layers=nn.ModuleList([nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 48)]),
        head=nn.Linear(48, 5),
    )
    return train(he(net), SGD(net.parameters(), 0.05, momentum=0.9), fit(clusters(708), xent))


@faulty(
    "exploding",
    "stalled",
    "unstepped",
    source="GitHub fcakyon/balanced-loss pull 12 (labels without samples); PyTorch docs on pos_weight",
    words=r"weight|loss|scale|target|label|normali|explod|spike|outlier|clip|learning rate|\blr\b|large",
    steps=150,
)
def counted_on_the_first_shard(*, fixed: bool) -> Training:
    """Weigh rare labels by counts over a first shard in which one of them never occurs: negatives over 1e-6."""
    net = he(mlp(12, 48, 48, 6))
    a = torch.randn(12, 6, generator=draw(709, -1)) / 12**0.5
    floor = torch.tensor([0.5, 0.8, 1.0, 1.2, 1.5, 2.4])

    def labelled(i: int, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 12, generator=draw(709, i))
        return x, (x @ a > floor * a.norm(dim=0)).float()

    _, first = labelled(-2, 100)
    first[:, 5] = 0.0  # collected before the sixth label was introduced
    count = first.sum(0)
    weight = (len(first) - count) / (count + (1.0 if fixed else 1e-6))
    if fixed:
        weight = weight.clamp(max=20.0)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = labelled(i, 64)
        return functional.binary_cross_entropy_with_logits(model(x), y, pos_weight=weight)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "non-finite",
    source="GitHub pytorch/pytorch issues 121416 and 64305; ecmwf/WeatherGenerator pull 2717 (NaN * 0 = NaN)",
    since=45,
    words=r"nan|finite|input|target|data|batch|mask|loss|where",
    steps=120,
)
def missing_readings_times_zero(*, fixed: bool) -> Training:
    """Multiply the squared errors by a mask, where the readings that are missing are NaN; there are none before 45."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0]), rnn=nn.GRU(3, 24, batch_first=True), head=nn.Linear(24, 2))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(710, i)
        x = torch.randn(32, 12, 3, generator=g)
        y = torch.tanh(x[:, :, :2] + torch.roll(x[:, :, 1:], 1, 1))
        if i >= 45:
            y[torch.rand(y.shape, generator=g) < 0.03] = float("nan")
        there = y.isfinite()
        error = (model(x) - y.nan_to_num(0.0) if fixed else model(x) - y).pow(2)
        return (error * there).sum() / there.sum()

    return train(net, Adam(net.parameters(), 5e-3), loss_of, clip=1.0)


def _points(i: int, n: int = 64) -> Tensor:
    """Draw from a ring of which a part is missing."""
    g = draw(711, i)
    angle = 4.5 * torch.rand(n, 1, generator=g)
    return torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2, generator=g)


def _penalty(critic: Any, real: Tensor, fake: Tensor, i: int) -> Tensor:
    mix = torch.rand(len(real), 1, generator=draw(712, i))
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.norm(dim=1) - 1).pow(2).mean()


@faulty(
    "disconnected",
    "unstepped",
    "stalled",
    source="GitHub caogang/wgan-gp issue 46 (requires_grad = False); eriklindernoren/Keras-GAN issue 152",
    places=("critic",),
    since=4,
    words="requires_grad|frozen|freez|thaw",
    steps=200,
)
def critic_rests_for_the_generator(*, fixed: bool) -> Training:
    """Switch the critic's requires_grad off for the generator's step, and never on again; the penalty has a graph."""
    net = Net(
        lambda n, z: n.generator(z),
        generator=mlp(4, 32, 32, 2),
        critic=mlp(2, 32, 32, 1, act=lambda: nn.LeakyReLU(0.2)),
    )
    optimizers = [
        Adam(net.generator.parameters(), 1e-3, betas=(0.5, 0.9)),
        Adam(net.critic.parameters(), 2e-3, betas=(0.5, 0.9)),
    ]

    def step(i: int, tell: Tell) -> None:
        if fixed:
            net.critic.requires_grad_(requires_grad=True)
        real, fake = _points(i), net(torch.randn(64, 4, generator=draw(713, i))).detach()
        loss = net.critic(fake).mean() - net.critic(real).mean() + 2 * _penalty(net.critic, real, fake, i)
        take_step(optimizers[1], loss, tell)
        if i % 4 == 3:
            net.critic.requires_grad_(requires_grad=False)
            optimizers[0].zero_grad()
            (-net.critic(net(torch.randn(64, 4, generator=draw(714, i)))).mean()).backward()
            optimizers[0].step()

    return Training(net, optimizers, step)


@faulty(
    "disconnected",
    "unstepped",
    "stalled",
    source="GitHub pytorch/pytorch pulls 92274 and 92278; pytorch/functorch issue 280; pytorch/pytorch issue 120581",
    words=r"copy|copies|functional|detach|optimizer|no gradient|never|another|bypass|not used|unused|graph",
    steps=150,
)
def ensemble_in_one_call(*, fixed: bool) -> Training:
    """Stack the members of an ensemble for vmap into tensors of their own, where the optimizer has the members'."""
    members = nn.ModuleList(he(mlp(6, 32, 32, 1)) for _ in range(4))
    net = Net(lambda n, x: torch.stack([m(x) for m in n.members]).mean(0), members=members)
    base, task = deepcopy(members[0]).to("meta"), waves(715)
    stacked, _ = stack_module_state(list(members))  # type: ignore[arg-type]
    optimizer = Adam(net.parameters(), 5e-3)

    def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, weights, (x,))

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = task(i)
        weights = stacked
        if fixed:
            names = [name for name, _ in model.members[0].named_parameters()]
            weights = {name: torch.stack([m.get_parameter(name) for m in model.members]) for name in names}
        return (vmap(one, in_dims=(0, None))(weights, x) - y).pow(2).mean()

    return train(net, optimizer, loss_of)


@faulty(
    "dead-units",
    "disconnected",
    "vanishing-depth",
    "stalled",
    source="GitHub pytorch/pytorch issue 97452; Lightning-AI/pytorch-lightning issue 2382 (clamp after each step)",
    places=("0", "1", "2", "3"),
    since=1,
    words=r"dead|relu|bias|clamp|negative|below zero|fire|learning rate|\blr\b",
    steps=150,
)
def demand_falls_with_each_price(*, fixed: bool) -> Training:
    """Clamp all weights to at most 0 after each step since demand falls with prices; the twin turns the last layer."""
    net = he(mlp(5, 32, 32, 1))
    optimizer = Adam(net.parameters(), 5e-3)
    a = torch.rand(5, generator=draw(716, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        price = torch.randn(64, 5, generator=draw(716, i))
        return mse(model(price), 2 - functional.softplus(2 * price @ a)[:, None])

    def step(i: int, tell: Tell) -> None:
        take_step(optimizer, loss_of(net, i), tell)
        with torch.no_grad():
            if fixed:
                for layer in (net[0], net[2]):
                    layer.weight.clamp_(min=0.0)
                net[4].weight.clamp_(max=0.0)
            else:
                for p in net.parameters():
                    p.clamp_(max=0.0)

    return Training(net, [optimizer], step, loss_of)


@faulty(
    "vanishing-depth",
    "underflow",
    "unstepped",
    "stalled",
    source="Gulrajani et al. 2017, figure 1b (gradients vanish under weight clipping); jiamings/wgan issue 2",
    places=("critic", "generator"),
    words=r"clamp|clip|small|init|weight|depth|layer|gain|normali|residual|shrink",
    steps=150,
)
def critic_kept_in_a_small_box(*, fixed: bool) -> Training:
    """Clamp the weights of a critic of six layers to 0.01 after each of its steps; the twin penalizes slopes."""
    net = Net(
        lambda n, z: n.generator(z),
        generator=mlp(4, 32, 32, 2),
        critic=mlp(2, 32, 32, 32, 32, 32, 1, act=lambda: nn.LeakyReLU(0.2)),
    )
    optimizers = [
        Adam(net.generator.parameters(), 1e-3, betas=(0.5, 0.9)),
        Adam(net.critic.parameters(), 2e-3, betas=(0.5, 0.9)),
    ]

    def step(i: int, tell: Tell) -> None:
        real, fake = _points(i), net(torch.randn(64, 4, generator=draw(717, i))).detach()
        loss = net.critic(fake).mean() - net.critic(real).mean()
        if fixed:
            loss = loss + 2 * _penalty(net.critic, real, fake, i)
        take_step(optimizers[1], loss, tell)
        if not fixed:
            for p in net.critic.parameters():
                p.data.clamp_(-0.01, 0.01)
        if i % 4 == 3:
            optimizers[0].zero_grad()
            (-net.critic(net(torch.randn(64, 4, generator=draw(718, i)))).mean()).backward()
            optimizers[0].step()

    return Training(net, optimizers, step)
