"""Words, sounds, tastes and graphs, as people reported them: fourteen faulty ones, and six that only look odd."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from benchmarks.runs import Batch, Net, Tell, Training, clusters, draw, fit, mlp, mse, take_step, train, xent
from benchmarks.situations.situation import faulty, healthy

# --- words ---


def _chain(seed: int, n: int, length: int, words: int, sure: float = 0.85) -> Batch:
    """Write sentences in which each word mostly says which comes next."""
    follows = torch.randperm(words, generator=draw(seed, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        text = [torch.randint(words, (n,), generator=g)]
        for _ in range(length):
            other = torch.randint(words, (n,), generator=g)
            text.append(torch.where(torch.rand(n, generator=g) < sure, follows[text[-1]], other))
        whole = torch.stack(text, 1)
        return whole[:, :-1], whole[:, 1:]

    return batch


def _pairs(seed: int, n: int = 64, words: int = 16, classes: int = 8) -> Batch:
    """Name what two words mean together."""
    table = torch.randint(classes, (words, words), generator=draw(seed, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        x = torch.randint(words, (n, 2), generator=draw(seed, i))
        return x, table[x[:, 0], x[:, 1]]

    return batch


def _next_word(model: Any, text: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of all next words."""
    return xent(model(text).flatten(0, 1), target.flatten())


class _Adapted(nn.Module):
    """A frozen linear layer, and beside it one of low rank, counted `scale` times."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        """Make it; the second factor begins at zero."""
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(requires_grad=False)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        return self.base(x) + self.scale * self.up(self.down(x))


@faulty(
    "disconnected",
    "unstepped",
    source=(
        "GitHub locuslab/open-unlearning issue 178 (the adapters of all transformer layers stay at zero, only others "
        "are trained); microsoft/LoRA issue 120; huggingface/transformers issue 26221; huggingface/peft issue 1142"
    ),
    places=("blocks",),
    words=r"checkpoint|graph|detach|no grad|never|without a gradient|requires_grad|reach|gradient|cut|connect",
    steps=150,
)
def adapters_behind_a_checkpoint(*, fixed: bool) -> Training:
    """Recompute blocks with adapters by the reentrant checkpoint, whose input, a frozen embedding, asks no gradient."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.words(x).flatten(1)
        if fixed:
            h.requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in n.blocks:
                h = checkpoint(block, h, use_reentrant=True)
        return n.head(h)

    net = Net(
        does,
        words=nn.Embedding(16, 16),
        blocks=nn.ModuleList(nn.Sequential(_Adapted(32, 32, 8, 2.0), nn.SiLU()) for _ in range(3)),
        head=nn.Linear(32, 8),
    )
    net.words.requires_grad_(requires_grad=False)
    weights = [p for p in net.parameters() if p.requires_grad]
    return train(net, AdamW(weights, 5e-3), fit(_pairs(6001), xent))


def _likelihood(model: Any, question: Tensor, answer: Tensor) -> Tensor:
    """Return the log-likelihood of each answer."""
    return model(question).log_softmax(2).gather(2, answer[:, :, None])[:, :, 0].sum(1)


@faulty(
    "stalled",
    source=(
        "GitHub YiyangZhou/POVID issue 11 (the reference is the policy itself and goes along: the loss never changes); "
        "eric-mitchell/direct-preference-optimization issue 46 and huggingface/trl issue 892 (0.693 while they agree)"
    ),
    words=(
        r"loss|same|cop(y|ies)|referenc|cancel|depend|constant|flat|plateau|target|label|shape|broadcast|"
        r"learning rate|data|signal"
    ),
    steps=180,
)
def policy_is_its_own_reference(*, fixed: bool) -> Training:
    """Prefer answers over others relative to a reference that is no copy of the policy, but the policy itself."""
    net = Net(
        lambda n, x: n.answer(n.words(x).flatten(1)).unflatten(1, (4, 12)),
        words=nn.Embedding(12, 12),
        answer=mlp(36, 64, 48, act=nn.SiLU),
    )
    reference = copy.deepcopy(net).requires_grad_(requires_grad=False) if fixed else net
    worth = torch.randn(12, 12, generator=draw(6002, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(6002, i)
        question = torch.randint(12, (64, 3), generator=g)
        a, b = torch.randint(12, (2, 64, 4), generator=g)
        better = worth[question[:, :1], a].sum(1) > worth[question[:, :1], b].sum(1)
        chosen, rejected = torch.where(better[:, None], a, b), torch.where(better[:, None], b, a)
        with torch.no_grad():
            before = _likelihood(reference, question, chosen) - _likelihood(reference, question, rejected)
        now = _likelihood(model, question, chosen) - _likelihood(model, question, rejected)
        return -functional.logsigmoid(0.3 * (now - before)).mean()

    return train(net, Adam(net.parameters(), 4e-3), loss_of)


@faulty(
    "exploding",
    "vanishing-depth",
    "stalled",
    source=(
        "GitHub pytorch/pytorch issue 3121 ('took me many hours to find out ... the values are too high': an embedding "
        "is N(0, 1)); huggingface/transformers pull request 26441 (a loss of 110 at first); Modalities pull request 456"
    ),
    words=r"large|initial|scale|saturat|explod|embedding|logit|soft|norm|huge|deviation|learning rate|\blr\b|std",
    steps=150,
)
def head_tied_to_unit_normals(*, fixed: bool) -> Training:
    """Tie the head of a language model to its embedding, which nn.Embedding draws from N(0, 1) by default."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.words(x)
        for block in n.blocks:
            h = h + block(h)
        return n.head(n.norm(h))

    net = Net(
        does,
        words=nn.Embedding(96, 128),
        blocks=nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128)) for _ in range(2)
        ),
        norm=nn.LayerNorm(128),
        head=nn.Linear(128, 96, bias=False),
    )
    if fixed:
        nn.init.normal_(net.words.weight, std=0.02)
    net.head.weight = net.words.weight
    text = _chain(6003, 16, 12, 96)
    return train(net, AdamW(net.parameters(), 4e-4), lambda m, i: _next_word(m, *text(i)))


@faulty(
    "unstepped",
    "stalled",
    source=(
        "GitHub rpryzant/causal-bert-pytorch issue 9 and aimagelab/meshed-memory-transformer issue 71 (a warm-up in "
        "steps, but scheduler.step() once in an epoch); CUNY-CL/yoyodyne issue 243; crowsonkb/k-diffusion issue 50"
    ),
    words=r"learning rate|\blr\b|schedul|warm|small|step|move|tiny|slow",
    steps=200,
)
def warm_up_counted_in_epochs(*, fixed: bool) -> Training:
    """Warm up over 800 steps, as in the transformer's paper, by a scheduler that is stepped once in 100 batches."""
    net = Net(
        lambda n, x: n.head(n.norm(n.body(n.words(x)))),
        words=nn.Embedding(24, 32),
        body=mlp(32, 64, 32, act=nn.GELU),
        norm=nn.LayerNorm(32),
        head=nn.Linear(32, 24),
    )
    optimizer, text = Adam(net.parameters(), 1.0, betas=(0.9, 0.98), eps=1e-9), _chain(6005, 32, 8, 24)
    scheduler = LambdaLR(optimizer, lambda s: 32**-0.5 * min((s + 1) ** -0.5, (s + 1) * 800**-1.5))

    def step(i: int, tell: Tell) -> None:
        take_step(optimizer, _next_word(net, *text(i)), tell)
        if fixed or i % 100 == 99:
            scheduler.step()

    return Training(net, [optimizer], step)


@faulty(
    "non-finite",
    source=(
        "GitHub pytorch/pytorch issues 41508, 24816 and 103749 (a row of which all keys are masked: NaN, and NaN "
        "gradients even where the loss leaves it out); hyunwoongko/transformer pull request 40; SASRec.pytorch issue 36"
    ),
    since=40,
    words=r"nan|mask|inf|softmax|attention|padding|finite|0 ?/ ?0|divi|row|anomal",
    steps=90,
)
def histories_padded_on_the_left(*, fixed: bool) -> Training:
    """Recommend by causal attention over histories that are padded in front; from step 40 on some are short."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.items(x) + n.places.weight
        q, k, v = n.mix(n.norm(h)).chunk(3, 2)
        see = torch.ones(8, 8).tril().bool() & (x > 0)[:, None, :]
        if fixed:
            see = see | torch.eye(8).bool()
        scores = (q @ k.transpose(1, 2) / math.sqrt(24)).masked_fill(~see, -math.inf)
        return n.head(h + scores.softmax(2) @ v)

    net = Net(
        does,
        items=nn.Embedding(25, 24, padding_idx=0),
        places=nn.Embedding(8, 24),
        norm=nn.LayerNorm(24),
        mix=nn.Linear(24, 72),
        head=mlp(24, 48, 25, act=nn.GELU),
    )
    text = _chain(6006, 48, 8, 24)

    def loss_of(model: Any, i: int) -> Tensor:
        seen, bought = (t + 1 for t in text(i))
        if i >= 40:
            start = torch.randint(-20, 6, (48, 1), generator=draw(6006, i + 100_000))
            short = torch.arange(8) < start
            seen, bought = seen.masked_fill(short, 0), bought.masked_fill(short, -100)
        return xent(model(seen).flatten(0, 1), bought.flatten())

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "non-finite",
    source=(
        "GitHub facebookresearch/pytext pull request 1698 (the smoothed loss is infinite 'if any of the logits are "
        "-inf'); sooftware/kospeech issue 37 (-inf scores, label smoothing, NaN); google-deepmind/optax issue 896"
    ),
    words=r"inf|nan|mask|smooth|log|finite|loss|overflow",
    steps=120,
)
def smoothed_over_forbidden_words(*, fixed: bool) -> Training:
    """Set the scores of words that may not follow to -inf, and smooth labels over all words, forbidden ones too."""
    net = Net(
        lambda n, x: n.head(n.body(n.words(x))),
        words=nn.Embedding(24, 24),
        body=mlp(24, 48, 48, act=nn.GELU),
        head=nn.Linear(48, 24),
    )
    text = _chain(6007, 32, 8, 24)
    forbidden = torch.eye(24).bool()

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = text(i)
        y = torch.where(x == y, (y + 1) % 24, y)
        logits = model(x).masked_fill(forbidden[x], -math.inf)
        smooth = 0.0 if fixed else 0.1
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=smooth)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "rounding",
    "disconnected",
    "stalled",
    source=(
        "GitHub hustvl/SparseInst issue 57 (a learnable bias that is the same for all a softmax compares: it 'doesn't "
        "work whatever the learned value is'); microsoft/unilm issue 510; here a bias by the query alone"
    ),
    places=("positions",),
    words=r"round|noise|cancel|zero|softmax|invarian|shift|constant|no effect|bias|broadcast|shape|dimension|loss",
    steps=180,
)
def bias_by_the_query_alone(*, fixed: bool) -> Training:
    """Add a learnt bias to the scores of attention, by a table with a number for each query, and not for each pair."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.words(x)
        scores = n.query(h) @ n.key(h).transpose(1, 2) / 5 + n.positions.weight
        scores = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -1e9)
        return n.head(n.body(scores.softmax(2) @ h))

    net = Net(
        does,
        words=nn.Embedding(12, 24),
        query=nn.Linear(24, 24),
        key=nn.Linear(24, 24),
        positions=nn.Embedding(10, 10 if fixed else 1),
        body=nn.Sequential(nn.Linear(24, 48), nn.GELU()),
        head=nn.Linear(48, 12),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randint(12, (32, 10), generator=draw(6008, i))
        return xent(model(x)[:, 3:].flatten(0, 1), x[:, :-3].flatten())

    return train(net, Adam(net.parameters(), 1e-2), loss_of)


@faulty(
    "vanishing-depth",
    "stalled",
    "exploding",
    source=(
        "GitHub pytorch/pytorch issue 55270 (nn.TransformerEncoderLayer normalizes behind the branches, by default: "
        "from 12 layers on it needs a warm-up); LiyuanLucasLiu/Transformer-Clinic issue 16; Xiong et al., 2020"
    ),
    words=r"vanish|norm|depth|deep|layer|warm|learning rate|\blr\b|loss|saturat|residual|skip|large|collapse",
    steps=120,
)
def normalized_behind_every_branch(*, fixed: bool) -> Training:
    """Stack 12 transformer layers that normalize behind their branches, and train them without a warm-up."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.words(x) + n.places.weight
        for layer in n.layers:
            h = layer(h)
        return n.head(h[:, 0])

    net = Net(
        does,
        words=nn.Embedding(16, 24),
        places=nn.Embedding(6, 24),
        layers=nn.ModuleList(
            nn.TransformerEncoderLayer(24, 2, 48, 0.0, batch_first=True, norm_first=fixed) for _ in range(12)
        ),
        head=nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8)),
    )

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randint(16, (24, 6), generator=draw(6010, i))
        return xent(model(x), x[:, 3] % 8)

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


# --- sounds ---


def _tones(seed: int, n: int = 32, length: int = 256, classes: int = 4) -> Batch:
    """Tell apart tones of four bands in noise, as a file gives them: between -1 and 1."""

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        y = torch.randint(classes, (n,), generator=g)
        pitch = 0.1 + 0.25 * (y[:, None] + 0.6 * torch.rand(n, 1, generator=g))
        tone = 0.3 * torch.sin(pitch * torch.arange(length) + 6.3 * torch.rand(n, 1, generator=g))
        return (tone + 0.05 * torch.randn(n, length, generator=g))[:, None], y

    return batch


@faulty(
    "stalled",
    "vanishing-depth",
    "underflow",
    source=(
        "GitHub lmnt-com/wavegrad issue 11 (a division by 32768 that was made for 16-bit files, on samples within -1 "
        "and 1: 'of no sound'); NVIDIA/waveglow issue 198 ('my dataset was not in int16, that was the problem')"
    ),
    words=r"input|scale|small|norm|tiny|loss|signal|standard|weak|constant|vanish|initial|data",
    steps=150,
)
def samples_divided_by_32768_twice(*, fixed: bool) -> Training:
    """Divide samples by 32768, as if they came as 16-bit numbers, but the reader has given them within -1 and 1."""
    net = Net(
        lambda n, x: n.head(n.body(x).mean(2)),
        body=nn.Sequential(nn.Conv1d(1, 16, 16, stride=4), nn.ReLU(), nn.Conv1d(16, 32, 4, stride=2), nn.ReLU()),
        head=nn.Linear(32, 4),
    )
    task = _tones(6011)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = task(i)
        return xent(model(x if fixed else x / 32768), y)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "dead-units",
    "disconnected",
    "stalled",
    source=(
        "GitHub lucidrains/vector-quantize-pytorch issues 19 and 3 (index collapse, and codes initialized by the first "
        "batch); EdoardoBotta/RQ-VAE-Recommender issue 65; google-deepmind/sonnet issue 257 (a perplexity of 1)"
    ),
    words=r"dead|code|unused|never|zero|row|collapse|constant|same|loss|index|embedding|argmin|initial|no gradient",
    steps=200,
)
def one_code_for_every_frame(*, fixed: bool) -> Training:
    """Quantize frames of log energies, none of which is near a code: all take the same, and the others never move."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        z = n.encoder(x)
        code = n.codes(torch.cdist(z.detach(), n.codes.weight.detach()).argmin(1))
        apart = mse(code, z.detach()) + 0.25 * mse(z, code.detach())
        return n.decoder(z + (code - z).detach()), apart

    net = Net(does, encoder=nn.Linear(12, 8), codes=nn.Embedding(32, 8), decoder=mlp(8, 32, 12, act=nn.SiLU))
    centres = torch.randn(12, 12, generator=draw(6013, -1))

    def frames(i: int) -> Tensor:
        g = draw(6013, i)
        return centres[torch.randint(12, (96,), generator=g)] + 0.2 * torch.randn(96, 12, generator=g) - 4.0

    with torch.no_grad():
        nn.init.uniform_(net.codes.weight, -1 / 32, 1 / 32)
        if fixed:
            net.codes.weight.copy_(net.encoder(frames(-5)[:32]))

    def loss_of(model: Any, i: int) -> Tensor:
        x = frames(i)
        made, apart = model(x)
        return mse(made, x) + apart

    return train(net, Adam(net.parameters(), 5e-3), loss_of)


# --- distillation, retrieval, tastes, graphs ---


@faulty(
    "stalled",
    "unstepped",
    source=(
        "GitHub roymiles/Simple-Recipe-Distillation issue 1 (a random projector that is never updated); Syencil/mobile-"
        "yolov5-pruning-distillation issue 75 (the converters are not optimized, 'feature loss is difficult to lower')"
    ),
    words=r"loss|noise|random|project|optimi[sz]er|never|learn|target|data|batch|learning rate|signal|regist|plateau",
    steps=180,
)
def projector_drawn_anew_each_step(*, fixed: bool) -> Training:
    """Match a teacher's features through a projection that is made inside the loss, and so is a new one each time."""
    student = mlp(16, 48, 24, act=nn.SiLU)
    if fixed:
        net = Net(lambda n, x: n.project(n.student(x)), student=student, project=nn.Linear(24, 64))
    else:
        net = Net(lambda n, x: nn.Linear(24, 64, dtype=x.dtype)(n.student(x)), student=student)
    teacher = mlp(16, 64, 64, act=nn.SiLU).requires_grad_(requires_grad=False)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(2.5)
    task = clusters(6016)

    def loss_of(model: Any, i: int) -> Tensor:
        x, _ = task(i)
        return mse(model(x), teacher(x))

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


def _gathered(x: Tensor) -> Tensor:
    """Return what all processes have, of which there is one here, as torch.distributed.all_gather does."""
    parts = [torch.empty_like(x).detach()]
    parts[0].copy_(x.detach())
    return torch.cat(parts)


@faulty(
    "disconnected",
    "unstepped",
    source=(
        "GitHub kohjingyu/fromage issue 33 and huggingface/accelerate issue 1154 (what all_gather brings has no "
        "gradient); mlfoundations/open_clip issue 616; lightonai/pylate pull request 102"
    ),
    places=("passages",),
    words=r"detach|graph|no gradient|gather|never|reach|gradient|cut|without|no_grad|connect",
    steps=150,
)
def passages_gathered_without_a_graph(*, fixed: bool) -> Training:
    """Compare one's queries with the passages of all processes, gathered by a call that cuts off their graph."""
    net = Net(
        lambda n, q, p: (n.queries(q), n.passages(p)),
        queries=mlp(12, 48, 16, act=nn.SiLU),
        passages=mlp(12, 48, 16, act=nn.SiLU),
    )
    turn = torch.linalg.qr(torch.randn(12, 12, generator=draw(6017, -1)))[0]

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(6017, i)
        p = torch.randn(48, 12, generator=g)
        queries, passages = model(torch.tanh(2 * p @ turn) + 0.1 * torch.randn(48, 12, generator=g), p)
        every = passages if fixed else _gathered(passages)
        return xent(queries @ every.T, torch.arange(48))

    return train(net, AdamW(net.parameters(), 2e-3), loss_of)


@faulty(
    "vanishing-depth",
    "stalled",
    "unstepped",
    "underflow",
    source=(
        "GitHub Snapchat/GiGL pull request 407 (the loss does not decrease: 'the initial embeddings were too small, "
        "and thus would not propagate'); xiangwang1223/neural_graph_collaborative_filtering issue 33"
    ),
    words=r"small|initial|scale|tiny|vanish|product|learning rate|\blr\b|loss|embedding|slow|weak|underflow|zero",
    steps=200,
)
def tastes_drawn_too_small(*, fixed: bool) -> Training:
    """Rank by the product of two embeddings from N(0, 0.001): what each learns is as small as the other is."""
    net = Net(
        lambda n, u, i: (n.users(u) * n.items(i)).sum(2),
        users=nn.Embedding(80, 12),
        items=nn.Embedding(60, 12),
    )
    for table in (net.users, net.items):
        nn.init.normal_(table.weight, std=0.3 if fixed else 1e-3)
    worth = torch.randn(80, 4, generator=draw(6018, -1)) @ torch.randn(4, 60, generator=draw(6018, -2))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(6018, i)
        user, pair = torch.randint(80, (256, 1), generator=g), torch.randint(60, (256, 2), generator=g)
        order = worth[user, pair].argsort(1, descending=True)
        scores = model(user, pair.gather(1, order))
        return -functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean()

    return train(net, SGD(net.parameters(), 3.0), loss_of)


@faulty(
    "dead-units",
    "stalled",
    "vanishing-depth",
    source=(
        "GitHub fani-lab/OpeNTF issue 349 (a ReLU behind the last graph convolution as well: the loss stays at 0.6931, "
        "more than 90% of the embedding is 0); mlelarge/graph_neural_net pull request 9"
    ),
    words=r"relu|dead|zero|die|negative|unit|never active|silent|activation|vanish|loss|flat",
    steps=180,
)
def edges_between_rectified_nodes(*, fixed: bool) -> Training:
    """Forecast edges by the product of two embeddings that end in a ReLU: none is less likely than one half."""

    def does(n: Any, x: Tensor) -> Tensor:
        mean = near.to(x.dtype)
        h = n.last(mean @ torch.relu(n.first(mean @ x)))
        h = h if fixed else torch.relu(h)
        return h @ h.T

    g = draw(6021, -1)
    kind = torch.arange(80) % 8
    edges = (torch.rand(80, 80, generator=g) < torch.where(kind[:, None] == kind, 0.9, 0.01)).triu(1).float()
    edges = edges + edges.T
    near = edges + torch.eye(80)
    near = near / near.sum(1, keepdim=True)
    features = torch.randn(8, 12, generator=g)[kind] + torch.randn(80, 12, generator=g)
    net = Net(does, first=nn.Linear(12, 32), last=nn.Linear(32, 16))

    def loss_of(model: Any, i: int) -> Tensor:
        x = features + 0.3 * torch.randn(80, 12, generator=draw(6021, i))
        return functional.binary_cross_entropy_with_logits(model(x), edges)

    return train(net, Adam(net.parameters(), 2e-2), loss_of)


# --- healthy ---


@healthy(
    source=(
        "GitHub huggingface/transformers issue 26221 (recomputed without reentrance, adapters learn as they should); "
        "huggingface/peft issue 1142"
    ),
    steps=180,
)
def blocks_computed_twice_a_step() -> Training:
    """Recompute blocks during the backward pass, without reentrance; adapters learn beside frozen layers."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.words(x).flatten(1)
        for block in n.blocks:
            h = h + checkpoint(block, h, use_reentrant=False)
        return n.head(h)

    net = Net(
        does,
        words=nn.Embedding(16, 16).requires_grad_(requires_grad=False),
        blocks=nn.ModuleList(nn.Sequential(_Adapted(32, 32, 8, 2.0), nn.SiLU()) for _ in range(3)),
        head=nn.Linear(32, 8),
    )
    return train(net, AdamW([p for p in net.parameters() if p.requires_grad], 5e-3), fit(_pairs(6031), xent))


@healthy(
    source=(
        "GitHub luyug/GradCache issue 25 and lightonai/pylate pull request 100 (embed all without a graph, then again "
        "in parts, each sent back with its part of the gradient)"
    ),
    steps=150,
)
def representations_first_gradients_later() -> Training:
    """Contrast a batch that is too large for one graph: embed it without one, and again in four parts for backward."""
    net = Net(
        lambda n, q, p: (n.queries(q), n.passages(p)),
        queries=mlp(12, 48, 16, act=nn.SiLU),
        passages=mlp(12, 48, 16, act=nn.SiLU),
    )
    optimizer = AdamW(net.parameters(), 2e-3)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=draw(6032, -1)))[0]

    def step(i: int, tell: Tell) -> None:
        g = draw(6032, i)
        p = torch.randn(64, 12, generator=g)
        q = torch.tanh(2 * p @ turn) + 0.1 * torch.randn(64, 12, generator=g)
        with torch.no_grad():
            cached = [part.requires_grad_() for part in net(q, p)]
        loss = xent(cached[0] @ cached[1].T, torch.arange(64))
        wanted = torch.autograd.grad(loss, cached)
        optimizer.zero_grad()
        for k in range(0, 64, 16):
            parts = net(q[k : k + 16], p[k : k + 16])
            torch.autograd.backward(parts, [w[k : k + 16] for w in wanted])
        tell(loss.detach())
        optimizer.step()

    return Training(net, [optimizer], step)


@healthy(
    source=(
        "GitHub huggingface/diffusers issue 507 and pull request 855 (textual inversion: of a whole embedding one row "
        "is learnt, all others are put back after each step); kohya-ss/sd-scripts issue 980"
    ),
    steps=150,
)
def one_new_word_is_learnt() -> Training:
    """Learn the embedding of one new word for a trained, frozen model: the gradient of all other rows is zeroed."""
    net = Net(
        lambda n, x: n.body(n.words(x).flatten(1)),
        words=nn.Embedding(17, 12),
        body=mlp(24, 96, 8, act=nn.SiLU),
    )
    known = _pairs(6033, n=256)
    before = Adam(net.parameters(), 1e-2)
    for i in range(150):
        take_step(before, fit(known, xent)(net, i + 1000), float)
    before.zero_grad()
    net.body.requires_grad_(requires_grad=False)
    optimizer, old = AdamW(net.words.parameters(), 2e-2), net.words.weight.detach().clone()

    def step(i: int, tell: Tell) -> None:
        x, y = known(i)
        new = x[:, 0] == 5
        x[:, 0] = 16
        loss = xent(net(x[new]), y[new])
        optimizer.zero_grad()
        loss.backward()
        net.words.weight.grad[:16] = 0.0
        tell(loss.detach())
        optimizer.step()
        with torch.no_grad():
            net.words.weight[:16] = old[:16]

    return Training(net, [optimizer], step)


@healthy(
    source=(
        "GitHub lucidrains/vector-quantize-pytorch issues 3 and 191, NVIDIA-NeMo/Speech pull request 15966 (quantizer "
        "dropout of SoundStream and DAC: a random number of codebooks in each step)"
    ),
    steps=200,
)
def later_codebooks_seldom_used() -> Training:
    """Quantize what the codebook before has left over, by one to four codebooks at random: later ones often rest."""

    def does(n: Any, x: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        z = n.encoder(x)
        rest, apart = z, torch.zeros(())
        for codes in n.codebooks[: int(depth)]:
            code = codes(torch.cdist(rest.detach(), codes.weight.detach()).argmin(1))
            apart = apart + mse(code, rest.detach()) + mse(rest, code.detach())
            rest = rest - code.detach()
        return n.decoder(z - rest.detach()), apart

    net = Net(
        does,
        encoder=mlp(12, 48, 8, act=nn.SiLU),
        codebooks=nn.ModuleList(nn.Embedding(16, 8) for _ in range(4)),
        decoder=mlp(8, 48, 12, act=nn.SiLU),
    )
    centres = torch.randn(20, 12, generator=draw(6034, -1))

    def sound(i: int) -> Tensor:
        g = draw(6034, i)
        return centres[torch.randint(20, (96,), generator=g)] + 0.3 * torch.randn(96, 12, generator=g)

    with torch.no_grad():
        rest = net.encoder(sound(-5))
        for codes in net.codebooks:
            codes.weight.copy_(rest[:16])
            rest = rest - codes(torch.cdist(rest, codes.weight).argmin(1))
            rest = rest.roll(16, 0)

    def loss_of(model: Any, i: int) -> Tensor:
        x = sound(i)
        made, apart = model(x, torch.randint(1, 5, (), generator=draw(6034, i + 100_000)))
        return mse(made, x) + apart

    groups = [
        {"params": net.codebooks.parameters(), "lr": 1e-2},
        {"params": [*net.encoder.parameters(), *net.decoder.parameters()]},
    ]
    return train(net, Adam(groups, 3e-3), loss_of)


@healthy(
    source=(
        "GitHub deepseek-ai/DeepSeek-V3 issue 761 and pytorch/torchtitan issue 1506 (balance without a loss: a bias of "
        "the router that no gradient moves, but a rule, after each step)"
    ),
    steps=180,
)
def experts_balanced_by_a_rule() -> Training:
    """Choose two of eight experts by scores plus a bias that is a parameter without a gradient, moved by counts."""
    counts = torch.zeros(8)

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.words(x).flatten(1)
        score = n.router(h).sigmoid()
        best = (score + n.balance).topk(2, 1).indices
        share = torch.zeros_like(score).scatter(1, best, score.gather(1, best))
        counts.copy_((share > 0).float().sum(0))
        share = share / share.sum(1, keepdim=True)
        return n.head(h + torch.einsum("te,etd->td", share, torch.stack([expert(h) for expert in n.experts])))

    net = Net(
        does,
        words=nn.Embedding(16, 16),
        router=nn.Linear(32, 8),
        balance=nn.Parameter(torch.zeros(8), requires_grad=False),
        experts=nn.ModuleList(mlp(32, 48, 32, act=nn.SiLU) for _ in range(8)),
        head=nn.Linear(32, 8),
    )
    optimizer, loss_of = AdamW([p for p in net.parameters() if p.requires_grad], 3e-3), fit(_pairs(6035), xent)

    def step(i: int, tell: Tell) -> None:
        take_step(optimizer, loss_of(net, i), tell)
        with torch.no_grad():
            net.balance.add_(0.01 * torch.sign(counts.mean() - counts))

    return Training(net, [optimizer], step)


@healthy(
    source=(
        "Graves, 'Sequence transduction with recurrent neural networks': the loss is summed over a whole lattice; "
        "GitHub NVIDIA-NeMo/Speech issue 5946 (nothing but blanks at first) and HawkAaron/RNN-Transducer issue 18"
    ),
    steps=150,
)
def letters_over_a_lattice() -> Training:
    """Transcribe by a transducer, over all ways through ten frames and three letters: a sum, so losses of hundreds."""

    def does(n: Any, sound: Tensor, letters: Tensor) -> Tensor:
        heard = n.listener(sound)
        said = n.speaker(functional.pad(letters, (1, 0)))
        return n.joint(torch.tanh(heard[:, :, None] + said[:, None])).log_softmax(3)

    net = Net(
        does,
        listener=mlp(8, 32, 24, act=nn.SiLU),
        speaker=nn.Embedding(7, 24),
        joint=nn.Linear(24, 7),
    )
    shapes = torch.randn(7, 8, generator=draw(6036, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(6036, i)
        letters = torch.randint(1, 7, (32, 3), generator=g)
        spoken = torch.zeros(32, 10, dtype=torch.long)
        at = torch.rand(32, 10, generator=g).argsort(1)[:, :3].sort(1).values
        spoken.scatter_(1, at, letters)
        sound = shapes[spoken] * (spoken > 0)[:, :, None] + 0.2 * torch.randn(32, 10, 8, generator=g)
        logp = model(sound, letters)
        blank, emit = logp[..., 0], logp[:, :, :3].gather(3, letters[:, None, :, None].expand(-1, 10, -1, 1))[..., 0]
        row = torch.cat([torch.zeros(32, 1), emit[:, 0].cumsum(1)], 1)
        for t in range(1, 10):
            stay = row + blank[:, t - 1]
            cells = [stay[:, 0]]
            for u in range(1, 4):
                cells.append(torch.logaddexp(stay[:, u], cells[-1] + emit[:, t, u - 1]))
            row = torch.stack(cells, 1)
        return -(row[:, 3] + blank[:, 9, 3]).sum()

    return train(net, Adam(net.parameters(), 5e-3), loss_of)
