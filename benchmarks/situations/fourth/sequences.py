"""Fourth set: sequence models and models of several parts, faulty and healthy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from benchmarks.runs import Net, Tell, Training, draw, fit, mlp, mse, train, xent
from benchmarks.situations.situation import faulty, healthy


def before(length: int) -> Tensor:
    """Return the mask that lets each step see only itself and what came before."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


# --- faulty ---


@faulty(
    "exploding",
    "stalled",
    "underflow",
    source="GitHub unit8co/darts issue 2517 (MapeLoss over zeros); tidymodels/yardstick issue 271; "
    "keras-team/keras pull request 15604 (an epsilon in the denominator)",
    words=r"zero|divi|eps|percent|mape|denominator|scale|normal|target|clip|loss|large|small|outlier|data",
    steps=150,
)
def percentages_of_days_without_sales(*, fixed: bool) -> Training:
    """Forecast a week of sales by the mean absolute percentage error plus 1e-8, in shops that close on some days."""
    net = Net(lambda n, x: n.head(n.gru(x)[0][:, -1]), gru=nn.GRU(2, 32, batch_first=True), head=nn.Linear(32, 7))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(901, i)
        day = torch.randint(7, (32, 1), generator=g) + torch.arange(21)
        level = 2 + 2 * torch.rand(32, 1, generator=g)
        sales = level * (1.2 + torch.sin(2 * math.pi * day / 7)) + 0.2 * torch.rand(32, 21, generator=g)
        sales = sales * (day % 7 != 6)
        return torch.stack([torch.log1p(sales), torch.cos(2 * math.pi * day / 7)], 2)[:, :14], sales[:, 14:]

    def loss(forecast: Tensor, target: Tensor) -> Tensor:
        error = (forecast - target).abs()
        return error.sum() / target.sum() if fixed else (error / (target + 1e-8)).mean()

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, loss))


@faulty(
    "non-finite",
    source="GitHub csteinmetz1/auraloss issue 25, 'SDR loss sensitive to nan'; yxlu-0102/MP-SENet issue 33",
    since=40,
    words=r"zero|divi|eps|log|silen|energy|norm|target|loss|data|input|batch|domain|finite",
    steps=150,
)
def voices_that_fall_silent(*, fixed: bool) -> Training:
    """Separate two voices by the scale-invariant distortion, which is 0 / 0 where one of them says nothing."""

    def does(n: Any, x: Tensor) -> Tensor:
        frames = torch.relu(n.encoder(x[:, None]))
        masks = torch.sigmoid(n.masks(n.separator(frames.transpose(1, 2))[0])).unflatten(2, (2, 24)).permute(2, 0, 3, 1)
        return torch.stack([n.decoder(frames * mask)[:, 0] for mask in masks], 1)

    net = Net(
        does,
        encoder=nn.Conv1d(1, 24, 8, stride=4),
        separator=nn.GRU(24, 24, batch_first=True, bidirectional=True),
        masks=nn.Linear(48, 48),
        decoder=nn.ConvTranspose1d(24, 1, 8, stride=4),
    )
    time = torch.arange(96)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(902, i)
        pitch = torch.tensor([0.15, 0.9]) + torch.tensor([0.1, 0.4]) * torch.rand(16, 2, generator=g)
        voices = torch.sin(pitch[:, :, None] * time + 6.3 * torch.rand(16, 2, 1, generator=g))
        if i >= 40:
            voices[:, 1] *= (torch.rand(16, 1, generator=g) > 0.1).float()
        said = model(voices.sum(1) + 0.05 * torch.randn(16, 96, generator=g))
        if fixed:
            speaks = voices.abs().sum(2) > 0
            said, voices = said[speaks], voices[speaks]
        share = (said * voices).sum(-1, keepdim=True) / voices.pow(2).sum(-1, keepdim=True)
        true, rest = (share * voices).pow(2).sum(-1), (said - share * voices).pow(2).sum(-1)
        return -10 * torch.log10(true / rest + 1e-8).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of, clip=5.0)


@faulty(
    "disconnected",
    "unstepped",
    "stalled",
    source="GitHub facebookresearch/fairseq issue 408 (gradients of the encoder are None); "
    "huggingface/transformers issue 4293; kingnobro/IconShop issue 4",
    places=("encoder", "source"),
    words=r"unused|used|not reach|no gradient|no path|path|detach|cut|graph|connect|loss|forward",
    steps=200,
)
def decoder_that_reads_itself(*, fixed: bool) -> Training:
    """Translate words by a transformer whose decoder is given its own input in the place of what was encoded."""
    stock: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}

    def does(n: Any, ids: Tensor, shifted: Tensor) -> Tensor:
        code = n.encoder(n.source(ids) + n.position.weight)
        words = n.target(shifted) + n.position.weight
        memory = code if fixed else words
        return n.out(n.decoder(words, memory, tgt_mask=before(8), memory_mask=before(8))).transpose(1, 2)

    net = Net(
        does,
        source=nn.Embedding(10, 32),
        target=nn.Embedding(11, 32),
        position=nn.Embedding(8, 32),
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, **stock), 1, norm=nn.LayerNorm(32), enable_nested_tensor=False
        ),
        decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, **stock), 1, norm=nn.LayerNorm(32)),
        out=nn.Linear(32, 10),
    )
    word, follow = torch.randperm(10, generator=draw(903, -1)), torch.randperm(10, generator=draw(903, -2))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(903, i)
        ids = [torch.randint(10, (48,), generator=g)]
        for _ in range(7):
            fresh = torch.randint(10, (48,), generator=g)
            ids.append(torch.where(torch.rand(48, generator=g) < 0.5, fresh, follow[ids[-1]]))
        text = torch.stack(ids, 1)
        goal = word[text]
        return text, torch.cat([torch.full((48, 1), 10), goal[:, :-1]], 1), goal

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, xent), clip=1.0)


@faulty(
    "unstepped",
    "exploding",
    "stalled",
    source="GitHub wiseodd/controlled-text-generation issue 27; Hsintien-Ng/idinvert_pytorch-reproduced issue 1; "
    "pytorch/pytorch issue 47175 (zero_grad is easily forgotten)",
    places=("encoder",),
    words=r"zero_grad|zeroed|accumul|zero",
    steps=200,
)
def decoder_is_zeroed_twice(*, fixed: bool) -> Training:
    """Forecast by an encoder and a decoder with an optimizer each, and zero the decoder's gradients twice."""

    def does(n: Any, past: Tensor) -> Tensor:
        h = n.encoder(past)[1][0]
        out = []
        for _ in range(8):
            h = n.decoder(n.head(h), h)
            out.append(n.head(h))
        return torch.cat(out, 1)

    net = Net(does, encoder=nn.GRU(1, 24, batch_first=True), decoder=nn.GRUCell(1, 24), head=nn.Linear(24, 1))
    first = Adam(net.encoder.parameters(), 5e-3)
    second = Adam([*net.decoder.parameters(), *net.head.parameters()], 5e-3)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(904, i)
        speed, phase = 0.2 + 0.5 * torch.rand(32, 1, generator=g), 6.3 * torch.rand(32, 1, generator=g)
        x = torch.sin(speed * torch.arange(24) + phase) + 0.05 * torch.randn(32, 24, generator=g)
        return mse(model(x[:, :16, None]), x[:, 16:])

    def step(i: int, tell: Tell) -> None:
        (first if fixed else second).zero_grad()
        second.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        tell(loss.detach())
        first.step()
        second.step()

    return Training(net, [first, second], step, loss_of)


@faulty(
    "unstepped",
    "exploding",
    "stalled",
    "underflow",
    "dead-units",
    source="GitHub drawbridge/keras-mmoe issue 17; yuanwei1989/landmark-detection issue 2; "
    "AlliedToasters/dfencoder issue 4 (losses of different scales)",
    words=r"clip|scale|norm|unit|target|weigh|balanc|standard|learning rate|\blr\b|large|small|step|update",
    steps=200,
)
def revenue_in_euros_beside_churn(*, fixed: bool) -> Training:
    """Forecast revenue in euros and who will leave by one trunk, and clip the gradient of both losses to 1."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = n.trunk(x)[0][:, -1]
        return n.revenue(h)[:, 0], n.churn(h)[:, 0]

    net = Net(
        does,
        trunk=nn.GRU(4, 32, batch_first=True),
        revenue=mlp(32, 24, 1, act=nn.SiLU),
        churn=mlp(32, 24, 1, act=nn.SiLU),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(905, i)
        x = torch.randn(48, 8, 4, generator=g)
        worth = x[:, -1, 0] + 0.7 * x[:, -2, 1] + 0.1 * torch.randn(48, generator=g)
        leaves = (1.5 * x[:, -1, 2] + x[:, -2, 3] + 0.3 * torch.randn(48, generator=g) > 0).float()
        revenue, churn = model(x)
        goal = worth if fixed else 40_000 + 15_000 * worth
        return mse(revenue, goal) + functional.binary_cross_entropy_with_logits(churn, leaves)

    return train(net, SGD(net.parameters(), 0.03, momentum=0.9), loss_of, clip=1.0)


@faulty(
    "vanishing-time",
    "stalled",
    source="GitHub tensorflow/tensorflow issues 35724 (one paper does not scale) and 11650 (dropout of the memory: it "
    "'won't remember'); stanfordnlp/mac-network issue 28",
    places=("cell",),
    words=r"dropout|drop|state|forget|memory|gate|bias|skip|attention|mask|carr",
    horizon=26,
    steps=200,
)
def memory_dropped_at_every_hour(*, fixed: bool) -> Training:
    """Drop other halves of both states of an LSTM cell after each of 26 hours, without the scale that dropout has."""

    def does(n: Any, x: Tensor) -> Tensor:
        h, c = torch.zeros(len(x), 32), torch.zeros(len(x), 32)
        for t in range(x.shape[1]):
            h, c = n.cell(x[:, t], (h, c))
            if not fixed:
                h, c = h * torch.bernoulli(torch.full_like(h, 0.5)), c * torch.bernoulli(torch.full_like(c, 0.5))
        return n.head(functional.dropout(h) if fixed else h)

    net = Net(does, cell=nn.LSTMCell(5, 32), head=nn.Linear(32, 4))
    with torch.no_grad():
        net.cell.bias_hh[32:64], net.cell.bias_ih[32:64] = math.log(40), 0.0

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(906, i)
        y = torch.randint(4, (32,), generator=g)
        x = 0.3 * torch.randn(32, 26, 5, generator=g)
        x[torch.arange(32), 1, y] += 2.5
        x[:, 1, 4] += 2.5
        return x, y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent), clip=1.0)


@faulty(
    "disconnected",
    "stalled",
    "rounding",
    "unstepped",
    "vanishing-depth",
    source="Cross Validated 565956 (one output under the categorical cross-entropy: 'a totally useless model'); "
    "Stack Overflow 53628622, loss and its inputs for binary classification in PyTorch",
    words=r"softmax|one|single|constant|class|zero|loss|depend|logit|output|bce|cancel|target",
    steps=150,
)
def up_or_down_by_one_class(*, fixed: bool) -> Training:
    """Forecast whether a price goes up by one output under cross_entropy: softmax over one number is always 1."""
    net = Net(lambda n, x: n.head(n.lstm(x)[0][:, -1]), lstm=nn.LSTM(3, 24, batch_first=True), head=nn.Linear(24, 1))
    loss = functional.binary_cross_entropy_with_logits if fixed else functional.cross_entropy

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(907, i)
        x = torch.randn(48, 12, 3, generator=g)
        drift = x[:, -1, 0] - x[:, -2, 0] + x[:, -3:, 1].sum(1) + 0.4 * torch.randn(48, generator=g)
        return x, (drift > 0).float()[:, None]

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, loss))


@faulty(
    "exploding",
    source="GitHub jihunchoi/recurrent-batch-normalization-pytorch issue 5 (torch's own initialization cured it); "
    "carlthome/tensorflow-convlstm-cell issue 33; speechbrain/speechbrain issue 104",
    places=("rnn",),
    words=r"init|orthogonal|scale|weight|clip|norm|spectral|satur|recurren|smaller|lower",
    horizon=4,
    steps=150,
)
def every_weight_from_a_unit_normal(*, fixed: bool) -> Training:
    """Initialize a recurrent network by a loop over all parameters that draws each from N(0, 1)."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0]), rnn=nn.GRU(2, 64, batch_first=True), head=nn.Linear(64, 1))
    for weight in net.parameters():
        if not fixed:
            nn.init.normal_(weight)

    def batch(i: int) -> tuple[Tensor, ...]:
        x = torch.randn(24, 40, 2, generator=draw(908, i))
        total = torch.stack([x[:, t : t + 4, 0].mean(1) * x[:, t + 3, 1] for t in range(37)], 1)
        return x, functional.pad(total, (3, 0))[:, :, None]

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, mse))


@faulty(
    "vanishing-depth",
    "disconnected",
    "stalled",
    "exploding",
    source="GitHub ericjang/gumbel-softmax issue 2 (a temperature close to 0); EleutherAI/DALLE-mtf issue 2; "
    "pytorch/pytorch pull request 184582",
    places=("encoder", "code"),
    since=30,
    words=r"temperature|tau|softmax|satur|anneal|gumbel|one-hot|zero|scale|logit|discrete|round",
    steps=220,
)
def temperature_without_a_floor(*, fixed: bool) -> Training:
    """Put gestures into discrete codes by gumbel_softmax, whose temperature falls by a tenth with each step."""
    at = [0]

    def does(n: Any, x: Tensor) -> Tensor:
        tau = max(2 * 0.9 ** at[0], 0.5 if fixed else 1e-9)
        h = n.encoder(x)[1][0]
        codes = functional.gumbel_softmax(n.code(h).unflatten(1, (4, 8)), tau=tau)
        return n.decoder(codes.flatten(1)).unflatten(1, (16, 2))

    net = Net(
        does,
        encoder=nn.GRU(2, 32, batch_first=True),
        code=nn.Linear(32, 32),
        decoder=mlp(32, 48, 32, act=nn.SiLU),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        at[0] = i
        g = draw(909, i)
        phase, turn = 6.3 * torch.rand(48, 1, generator=g), torch.randint(2, (48, 1), generator=g) * 2 - 1
        angle = turn * 0.4 * torch.arange(16) + phase
        x = torch.stack([torch.sin(angle), torch.cos(angle)], 2) + 0.05 * torch.randn(48, 16, 2, generator=g)
        return mse(model(x), x)

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


# --- healthy ---


@healthy(
    source="GitHub haitongli/knowledge-distillation-pytorch issue 25; lightly-ai/lightly-train pull request 434",
    steps=200,
)
def student_beside_its_frozen_teacher() -> Training:
    """Distil a trained, frozen recurrent teacher into a smaller student that is part of the same module."""
    teacher = Net(
        lambda n, ids: n.out(n.gru(n.embed(ids))[0][:, -1]),
        embed=nn.Embedding(20, 24),
        gru=nn.GRU(24, 40, batch_first=True),
        out=nn.Linear(40, 4),
    )
    weight = torch.randn(20, 4, generator=draw(921, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        ids = torch.randint(20, (48, 8), generator=draw(921, i))
        return ids, weight[ids].sum(1).argmax(1)

    train_teacher = train(teacher, Adam(teacher.parameters(), 5e-3), fit(batch, xent))
    for i in range(120):
        train_teacher.step(10_000 + i, lambda _: None)
    teacher.requires_grad_(requires_grad=False).eval()
    teacher.zero_grad()
    net = Net(
        lambda n, ids: n.out(n.gru(n.embed(ids))[0][:, -1]),
        teacher=teacher,
        embed=nn.Embedding(20, 16),
        gru=nn.GRU(16, 24, batch_first=True),
        out=nn.Linear(24, 4),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        ids, y = batch(i)
        logits = model(ids)
        with torch.no_grad():
            told = functional.softmax(model.teacher(ids) / 2, 1)
        return 0.5 * xent(logits, y) + 2 * functional.kl_div(
            functional.log_softmax(logits / 2, 1), told, reduction="batchmean"
        )

    return train(net, Adam([p for p in net.parameters() if p.requires_grad], 4e-3), loss_of)


@healthy(
    source="GitHub openai/CLIP issue 46 and huggingface/transformers issue 13430: a learned scale, clamped after steps",
    steps=200,
)
def queries_find_their_products() -> Training:
    """Train two towers against each other's batch, with a learned scale that is held below 16 after each step."""

    def does(n: Any, query: Tensor, product: Tensor) -> Tensor:
        q = functional.normalize(n.project(n.query(query)[1][0]), dim=1)
        return n.log_scale.exp() * q @ functional.normalize(n.product(product), dim=1).T

    net = Net(
        does,
        query=nn.GRU(8, 32, batch_first=True),
        project=nn.Linear(32, 16),
        product=mlp(6, 32, 16, act=nn.GELU, norm=nn.LayerNorm),
        log_scale=nn.Parameter(torch.tensor(math.log(1 / 0.07))),
    )
    mix = torch.randn(8, 6, generator=draw(922, -1)) / 3

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(922, i)
        meaning = torch.randn(48, 1, 8, generator=g)
        query = meaning + 0.5 * torch.randn(48, 6, 8, generator=g)
        logits, same = model(query, meaning[:, 0] @ mix + 0.1 * torch.randn(48, 6, generator=g)), torch.arange(48)
        return (xent(logits, same) + xent(logits.T, same)) / 2

    optimizer = AdamW(net.parameters(), 3e-3, weight_decay=0.01)

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        tell(loss.detach())
        optimizer.step()
        with torch.no_grad():
            net.log_scale.clamp_(max=math.log(16))

    return Training(net, [optimizer], step, loss_of)


@healthy(
    source="GitHub fkodom/yet-another-retnet issue 24: fixed decays, one a head, some of them fast on purpose",
    horizon=8,
    steps=200,
)
def retention_with_fixed_decays() -> Training:
    """Predict words by retention whose four heads forget at fixed rates; the fastest sees two steps."""
    gamma = torch.tensor([0.5, 0.8, 0.94, 0.98])
    gap = torch.arange(32)[:, None] - torch.arange(32)
    decay = (gamma[:, None, None] ** gap.clamp(min=0)) * (gap >= 0)

    def does(n: Any, ids: Tensor) -> Tensor:
        h = n.embed(ids)
        q, k, v = n.qkv(n.norm(h)).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        held = (q @ k.transpose(2, 3) / math.sqrt(8) * decay) @ v
        held = n.group(held.transpose(1, 2).flatten(0, 1).flatten(1)).unflatten(0, ids.shape)
        h = h + n.mix(held)
        return n.out(h + n.feed(h)).transpose(1, 2)

    net = Net(
        does,
        embed=nn.Embedding(12, 32),
        norm=nn.LayerNorm(32),
        qkv=nn.Linear(32, 96),
        group=nn.GroupNorm(4, 32),
        mix=nn.Linear(32, 32),
        feed=nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        out=nn.Linear(32, 12),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(923, i)
        ids = torch.randint(4, 12, (32, 32), generator=g)
        topic = torch.randint(4, (32, 4), generator=g).repeat_interleave(8, 1)
        ids[:, ::8] = topic[:, ::8]
        told = 4 + 2 * topic + ids % 2
        ids = torch.where(torch.arange(32) % 8 > 0, torch.where(torch.rand(32, 32, generator=g) < 0.4, told, ids), ids)
        return ids, torch.where(torch.arange(32) % 8 == 7, topic, told)

    return train(net, Adam(net.parameters(), 4e-3), fit(batch, xent))


@healthy(
    source="GitHub ikostrikov/pytorch-a2c-ppo-acktr-gail issue 206 and vwxyzjn/cleanrl issue 506: reset at each end",
    horizon=4,
    steps=200,
)
def state_reset_where_an_episode_ends() -> Training:
    """Learn values from rollouts of 24 steps that hold several episodes: no gradient passes from one to another."""

    def does(n: Any, x: Tensor, ends: Tensor) -> Tensor:
        h, out = torch.zeros(len(x), 32), []
        for t in range(x.shape[1]):
            h = n.cell(torch.tanh(n.observe(x[:, t])), h * (1 - ends[:, t, None]))
            out.append(n.value(h))
        return torch.cat(out, 1)

    net = Net(does, observe=nn.Linear(5, 24), cell=nn.GRUCell(24, 32), value=nn.Linear(32, 1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(924, i)
        x, ends = torch.randn(32, 24, 5, generator=g), (torch.rand(32, 24, generator=g) < 0.15).float()
        sign, signs = torch.zeros(32), []
        for t in range(24):
            fresh = (ends[:, t] > 0) | (t == 0)
            sign = torch.where(fresh, x[:, t, 0].sign(), sign)
            signs.append(sign)
        return x, ends, torch.stack(signs, 1) * (1 + 0.5 * x[:, :, 1]) + 0.5 * x[:, :, 2]

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, mse), clip=1.0)
