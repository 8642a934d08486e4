"""Fifth set: sequence models, faulty and healthy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from benchmarks.runs import Net, Training, draw, fit, mse, train, xent
from benchmarks.situations.situation import faulty, healthy


def encoder(width: int, layers: int) -> nn.TransformerEncoder:
    """Build a small transformer that normalizes first."""
    layer = nn.TransformerEncoderLayer(
        width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


# --- faulty ---


@faulty(
    "disconnected",
    "vanishing-time",
    "unstepped",
    source="GitHub yunjey/pytorch-tutorial issue 149, 'output of bidirectional LSTM'; pytorch/pytorch issue 3587; "
    "aymericdamien/TensorFlow-Examples issue 201",
    places=("lstm",),
    words=r"reverse|backward dir|bidirect|direction|last (step|output|time)|one step|first|state|no gradient|unused|"
    r"not (used|reach)|zero|cut|recurren|length|read",
    steps=200,
)
def both_directions_read_at_the_end(*, fixed: bool) -> Training:
    """Classify by what both directions of an LSTM say at the last step, where the reverse one has read one step."""

    def does(n: Any, x: Tensor) -> Tensor:
        out = n.lstm(x)[0]
        return n.head(torch.cat([out[:, -1, :24], out[:, 0, 24:]], 1) if fixed else out[:, -1])

    net = Net(does, lstm=nn.LSTM(4, 24, batch_first=True, bidirectional=True), head=nn.Linear(48, 4))
    with torch.no_grad():
        for side in ("", "_reverse"):
            net.lstm.get_parameter(f"bias_ih_l0{side}")[24:48] = 2.0

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1301, i)
        y, at = torch.randint(4, (48,), generator=g), torch.randint(14, (48,), generator=g)
        x = 0.4 * torch.randn(48, 14, 4, generator=g)
        x[torch.arange(48), at, y] += 2.5
        return x, y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent), clip=1.0)


@faulty(
    "disconnected",
    "unstepped",
    "vanishing-depth",
    source="GitHub DEEP-PolyU/KEQA_WSDM19 issue 2, 'Attention Weight Bug'; localminimum/R-net issue 8; "
    "PetrochukM/PyTorch-NLP issue 2: softmax over a dimension of one, and all weights are 1",
    places=("score",),
    words=r"softmax|one (class|entry|element|score|logit|value)|single|dimension|\bdim|axis|constant|zero|no gradient|"
    r"saturat|cancel|invarian|not (depend|reach|used)|no influence|detach|cut",
    steps=200,
)
def scores_normalized_one_by_one(*, fixed: bool) -> Training:
    """Weigh the days of a series by learnt scores of shape (batch, day, 1), with a softmax over the last dimension."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.gru(x)[0]
        weights = functional.softmax(n.score(h), dim=1 if fixed else 2)
        return n.head((weights * h).sum(1))

    net = Net(
        does,
        gru=nn.GRU(5, 24, batch_first=True),
        score=nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1, bias=False)),
        head=nn.Linear(24, 4),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1302, i)
        y, at = torch.randint(4, (48,), generator=g), torch.randint(16, (48,), generator=g)
        x = 0.6 * torch.randn(48, 16, 5, generator=g)
        x[torch.arange(48), at, y] += 2.0
        x[torch.arange(48), at, 4] += 3.0
        return x, y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent), clip=1.0)


@faulty(
    "disconnected",
    "stalled",
    "vanishing-depth",
    source="GitHub speechbrain/speechbrain issue 2276 (a mask that is True where one expects False); "
    "facebookresearch/detr issue 96; lucidrains/x-transformers issue 253, where True is what is attended to",
    words=r"mask|pad|invert|token|word|position|constant|depend|influence|input|no gradient|zero|label|read|data|"
    r"attend|reach|cut|detach",
    steps=200,
)
def padding_attended_instead_of_words(*, fixed: bool) -> Training:
    """Give a mask with ones for words, as tokenizers make it, to layers in which it says what to leave out."""

    def does(n: Any, ids: Tensor) -> Tensor:
        real = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), ids > 0], 1)
        h = torch.cat([n.summary.expand(len(ids), 1, 32), n.words(ids)], 1) + n.position.weight
        return n.head(n.body(h, src_key_padding_mask=~real if fixed else real)[:, 0])

    net = Net(
        does,
        words=nn.Embedding(31, 32, padding_idx=0),
        position=nn.Embedding(17, 32),
        summary=nn.Parameter(0.1 * torch.randn(32)),
        body=encoder(32, 2),
        head=nn.Linear(32, 3),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1303, i)
        y, ids = torch.randint(3, (48,), generator=g), torch.randint(30, (48, 16), generator=g)
        topical = torch.rand(48, 16, generator=g) < 0.5
        ids = 1 + torch.where(topical, 10 * y[:, None] + ids % 10, ids)
        lengths = torch.randint(8, 15, (48, 1), generator=g)
        return ids.masked_fill(torch.arange(16) >= lengths, 0), y

    return train(net, Adam(net.parameters(), 1e-3), fit(batch, xent), clip=1.0)


@faulty(
    "unstepped",
    source="GitHub huggingface/transformers pull request 3532, 'Resizing embedding matrix before sending it to the "
    "optimizer'; helpmefindaname/transformer-smaller-training-vocab pull request 3",
    places=("embed", "lm_head"),
    words=r"optimi[sz]er|param_group|parameters\(\)|group|not (held|given|passed|in)|stepp|new parameter|replac",
    steps=200,
)
def vocabulary_enlarged_behind_the_optimizer(*, fixed: bool) -> Training:
    """Add six words to the vocabulary, which makes a new, tied embedding, when the optimizer has the old one."""
    net = Net(
        lambda n, ids: n.lm_head(n.norm(n.gru(n.embed(ids))[0])).transpose(1, 2),
        embed=nn.Embedding(20, 32),
        gru=nn.GRU(32, 32, batch_first=True),
        norm=nn.LayerNorm(32),
        lm_head=nn.Linear(32, 20, bias=False),
    )
    nn.init.normal_(net.embed.weight, std=0.2)
    net.lm_head.weight = net.embed.weight

    def enlarge() -> None:
        old, net.embed, net.lm_head = net.embed, nn.Embedding(26, 32), nn.Linear(32, 26, bias=False)
        nn.init.normal_(net.embed.weight, std=0.2)
        with torch.no_grad():
            net.embed.weight[:20] = old.weight
        net.lm_head.weight = net.embed.weight

    if fixed:
        enlarge()
    optimizer = AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    if not fixed:
        enlarge()
    follow = torch.randperm(26, generator=draw(1304, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1304, i)
        text = [torch.randint(26, (32,), generator=g)]
        for _ in range(16):
            fresh = torch.randint(26, (32,), generator=g)
            text.append(torch.where(torch.rand(32, generator=g) < 0.15, fresh, follow[text[-1]]))
        ids = torch.stack(text, 1)
        return ids[:, :-1], ids[:, 1:]

    return train(net, optimizer, fit(batch, xent), clip=1.0)


class DroppedWeights(nn.Module):
    """An LSTM of which recurrent weights are dropped at random, from `raw`, which is what is to be trained."""

    def __init__(self, features: int, width: int, *, wrapped: bool) -> None:
        """Take the recurrent weights out of the LSTM; `wrapped`: put what is left of them back as a parameter."""
        super().__init__()
        self.lstm, self.wrapped = nn.LSTM(features, width, batch_first=True), wrapped
        weight = self.lstm.weight_hh_l0.detach().clone()
        del self.lstm._parameters["weight_hh_l0"]
        self.raw = nn.Parameter(weight)
        self.lstm.weight_hh_l0 = weight.clone()  # type: ignore[assignment]
        self.lstm.flatten_parameters = lambda: None  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Return all states."""
        weight: Tensor = functional.dropout(self.raw, 0.2, self.training)
        self.lstm.weight_hh_l0 = nn.Parameter(weight) if self.wrapped else weight  # type: ignore[assignment]
        states: Tensor = self.lstm(x)[0]
        if not self.wrapped:
            self.lstm.weight_hh_l0 = weight.detach()  # type: ignore[assignment]
        return states


@faulty(
    "disconnected",
    "unstepped",
    source="GitHub fastai/fastai issue 2591, 'AWD LSTM dropout makes weight_hh_l0 a leaf Parameter'; "
    "fastai/fastai2 pull request 427; salesforce/awd-lstm-lm pull request 5",
    places=("memory",),
    words=r"Parameter|detach|graph|no gradient|not (reach|used|part)|unused|never used|cut|\.data|leaf|path|requires_",
    steps=200,
)
def dropped_weights_as_new_parameters(*, fixed: bool) -> Training:
    """Drop recurrent weights of an LSTM at each step, and make of those left a new parameter, as the LSTM asks for."""
    net = Net(
        lambda n, x: n.head(n.memory(x)[:, -1]),
        memory=DroppedWeights(4, 32, wrapped=not fixed),
        head=nn.Linear(32, 1),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        x = torch.randn(48, 10, 4, generator=draw(1305, i))
        return x, x[:, -4:-1, 0].sum(1, keepdim=True) * 0.6 + torch.tanh(x[:, -1:, 1] * x[:, -2:-1, 2])

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, mse), clip=1.0)


class Selective(nn.Module):
    """A state-space layer whose step size depends on its input, run step by step, as Mamba has it."""

    def __init__(self, channels: int, states: int = 4) -> None:
        """Begin with step sizes from a hundredth to a tenth."""
        super().__init__()
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(channels, 1))
        self.dt = nn.Linear(channels, channels)
        self.b, self.c = nn.Linear(channels, states, bias=False), nn.Linear(channels, states, bias=False)
        step = torch.logspace(-2, -1, channels)
        with torch.no_grad():
            self.dt.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, u: Tensor) -> Tensor:
        """Run over (batch, time, channel)."""
        step = functional.softplus(self.dt(u))[..., None]
        keep = torch.exp(-step * self.log_decay.exp())
        enter = step * self.b(u)[:, :, None] * u[..., None]
        h, out = torch.zeros_like(enter[:, 0]), []
        for t in range(u.shape[1]):
            h = keep[:, t] * h + enter[:, t]
            out.append((h * self.c(u[:, t])[:, None]).sum(2))
        return torch.stack(out, 1)


@faulty(
    "vanishing-time",
    "stalled",
    source="GitHub athms/mad-lab issue 3, 'incorrect mamba initialization'; hustvl/Vim issue 19; "
    "zymissy/CCViM issue 6; huggingface/transformers issue 43717",
    words=r"decay|memory|forget|step|state|time|horizon|init|bias|short|gate|remember|recurren",
    horizon=38,
    steps=200,
)
def step_sizes_zeroed_with_all_biases(*, fixed: bool) -> Training:
    """Initialize all linear layers of a state-space model alike, after it had chosen the biases of its step sizes."""
    kept: list[nn.Module] = []

    def alike(layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.15)
            if layer.bias is not None and layer not in kept:
                nn.init.zeros_(layer.bias)

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.enter(x)
        h = h + n.mix(n.memory(functional.silu(n.norm(h))))
        return n.head(n.last(h[:, -1]))

    net = Net(
        does,
        enter=nn.Linear(5, 24),
        norm=nn.LayerNorm(24),
        memory=Selective(24),
        mix=nn.Linear(24, 24),
        last=nn.LayerNorm(24),
        head=nn.Linear(24, 4),
    )
    if fixed:
        kept.append(net.memory.dt)
    net.apply(alike)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1306, i)
        y = torch.randint(4, (32,), generator=g)
        x = 0.2 * torch.randn(32, 40, 5, generator=g)
        x[torch.arange(32)[:, None], torch.arange(2, 6), y[:, None]] += 3.0
        return x, y

    return train(net, AdamW(net.parameters(), 5e-3, weight_decay=0.0), fit(batch, xent), clip=1.0)


@faulty(
    "non-finite",
    source="GitHub WenjieDu/PyPOTS issue 265; mllam/neural-lam issue 136; sktime/pytorch-forecasting issue 750; "
    "jaungiers/LSTM-Neural-Network-for-Time-Series-Prediction issue 66: windows that do not vary",
    since=60,
    words=r"input|data|batch|divi|zero|constant|deviation|std|variance|normali[sz]|nan|finite|eps|scal",
    steps=150,
)
def windows_of_a_closed_shop(*, fixed: bool) -> Training:
    """Standardize each window by its own deviation inside the model; from step 60 on some windows are all zero."""

    def does(n: Any, x: Tensor) -> Tensor:
        mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        z = (x - mean) / (spread + 1e-5 if fixed else spread)
        return n.head(n.gru(z)[0][:, -1]) * spread[:, 0] + mean[:, 0]

    net = Net(does, gru=nn.GRU(1, 24, batch_first=True), head=nn.Linear(24, 1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1307, i)
        level, phase = torch.rand(32, 1, generator=g), 6.3 * torch.rand(32, 1, generator=g)
        x = 3 * level + torch.sin(0.9 * torch.arange(15) + phase) + 0.1 * torch.randn(32, 15, generator=g)
        if i >= 60 and i % 12 == 0:
            x[:2] = 0.0
        return x[:, :14, None], x[:, 14:]

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, mse), clip=1.0)


@faulty(
    "exploding",
    "non-finite",
    source="GitHub NVIDIA/Megatron-LM issue 1532, 'loss in multi-token prediction not averaged causing gradient "
    "explosion'; bentrevett/pytorch-seq2seq issue 23 and facebookresearch/fairseq issue 2310",
    words=r"learning rate|\brate\b|\blr\b|clip|sum|mean|averag|scale|reduc|normali[sz]|loss|large|step|diverg",
    steps=150,
)
def errors_summed_over_batch_and_hours(*, fixed: bool) -> Training:
    """Sum the squared errors of 24 hours and 32 series, with a learning rate for their mean."""
    net = Net(
        lambda n, x: n.head(n.gru(x)[0][:, -1]),
        gru=nn.GRU(1, 24, batch_first=True),
        head=nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 24)),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1308, i)
        phase, size = 6.3 * torch.rand(32, 1, generator=g), 0.5 + torch.rand(32, 1, generator=g)
        x = size * torch.sin(2 * math.pi * torch.arange(48) / 24 + phase) + 0.1 * torch.randn(32, 48, generator=g)
        return x[:, :24, None], x[:, 24:]

    def summed(forecast: Tensor, target: Tensor) -> Tensor:
        error = (forecast - target).pow(2)
        return error.mean() if fixed else error.sum()

    return train(net, SGD(net.parameters(), 0.1, momentum=0.9), fit(batch, summed))


@faulty(
    "rounding",
    "disconnected",
    "underflow",
    "unstepped",
    "vanishing-depth",
    source="GitHub jingyaogong/minimind issue 858: with one expert to a token the router gets no gradient; "
    "davidmrau/mixture-of-experts issue 27, 'Zero Grad of w_gate'",
    places=("router",),
    words=r"round|noise|cancel|softmax|normali[sz]|constant|zero|invarian|sum|one (expert|entry|element|class)|"
    r"not (depend|reach)|no (gradient|influence)|true gradient",
    steps=200,
)
def expert_weighed_against_itself(*, fixed: bool) -> Training:
    """Send each token to its best expert, and divide that expert's weight by the sum of all weights chosen: itself."""

    def does(n: Any, ids: Tensor) -> Tensor:
        h = n.gru(n.embed(ids))[0]
        z = n.norm(h)
        weight, which = functional.softmax(n.router(z), -1).topk(1, -1)
        if not fixed:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        mixed = sum(expert(z) * (weight * (which == e)) for e, expert in enumerate(n.experts))
        return n.lm_head(h + mixed).transpose(1, 2)

    net = Net(
        does,
        embed=nn.Embedding(24, 24),
        gru=nn.GRU(24, 24, batch_first=True),
        norm=nn.LayerNorm(24),
        router=nn.Linear(24, 4, bias=False),
        experts=nn.ModuleList(nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24)) for _ in range(4)),
        lm_head=nn.Linear(24, 24),
    )
    follow = torch.stack([torch.randperm(24, generator=draw(1309, -1 - k)) for k in range(3)])

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1309, i)
        language = torch.randint(3, (32,), generator=g)
        text = [torch.randint(24, (32,), generator=g)]
        for _ in range(12):
            text.append(follow[language, text[-1]])
        ids = torch.stack(text, 1)
        return ids[:, :-1], ids[:, 1:]

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent), clip=1.0)


# --- healthy ---


@healthy(
    source="GitHub kmkurn/pytorch-crf issues 62 and 102, 'transition parameters do not update'; PyTorch's tutorial of "
    "a Bi-LSTM with a conditional random field, whose forbidden transitions count -10000",
    steps=200,
)
def tags_that_may_not_follow_each_other() -> Training:
    """Tag words by a conditional random field; transitions that are forbidden begin, and stay, at -10000."""

    def does(n: Any, ids: Tensor, tags: Tensor) -> Tensor:
        scores = n.emit(n.gru(n.embed(ids))[0])
        told = scores.gather(2, tags[:, :, None]).sum((1, 2)) + n.transitions[tags[:, :-1], tags[:, 1:]].sum(1)
        alpha = scores[:, 0]
        for t in range(1, scores.shape[1]):
            alpha = torch.logsumexp(alpha[:, :, None] + n.transitions, 1) + scores[:, t]
        return (torch.logsumexp(alpha, 1) - told).mean()

    net = Net(
        does,
        embed=nn.Embedding(40, 16),
        gru=nn.GRU(16, 16, batch_first=True, bidirectional=True),
        emit=nn.Linear(32, 5),
        transitions=nn.Parameter(0.1 * torch.randn(5, 5)),
    )
    with torch.no_grad():  # 0: outside; 1 and 2 begin a name or a place, which 3 and 4 go on
        net.transitions[torch.tensor([0, 2, 4]), 3] = -10000.0
        net.transitions[torch.tensor([0, 1, 3]), 4] = -10000.0

    def loss_of(model: Any, i: int) -> Any:
        g = draw(1321, i)
        tags = [torch.randint(3, (24,), generator=g)]
        for _ in range(11):
            fresh, goes_on = torch.randint(3, (24,), generator=g), torch.rand(24, generator=g) < 0.5
            inside = torch.where((tags[-1] == 1) | (tags[-1] == 3), 3, 4)
            tags.append(torch.where((tags[-1] > 0) & goes_on, inside, fresh))
        tag = torch.stack(tags, 1)
        ids = 8 * tag + torch.randint(8, tag.shape, generator=g)
        blurred = torch.rand(tag.shape, generator=g) < 0.25
        return model(torch.where(blurred, torch.randint(40, tag.shape, generator=g), ids), tag)

    return train(net, Adam(net.parameters(), 5e-3), loss_of, clip=5.0)


@healthy(
    source="GitHub karpathy/nanoGPT issue 280 and huggingface/trl issue 784: documents packed into one row, no "
    "attention between them, positions counted anew, and a table of positions far longer than any document",
    steps=200,
)
def documents_packed_into_one_row() -> Training:
    """Pack short documents into rows of 32 words: none sees another, and no target leaps from one to the next."""

    def does(n: Any, ids: Tensor, document: Tensor, place: Tensor) -> Tensor:
        other = document[:, :, None] != document[:, None, :]
        later = torch.ones(32, 32, dtype=torch.bool).triu(1)
        hidden = (other | later).repeat_interleave(4, 0)
        return n.lm_head(n.body(n.embed(ids) + n.position(place), mask=hidden)).transpose(1, 2)

    net = Net(
        does,
        embed=nn.Embedding(20, 32),
        position=nn.Embedding(128, 32),
        body=encoder(32, 2),
        lm_head=nn.Linear(32, 20),
    )
    nn.init.normal_(net.embed.weight, std=0.3)
    nn.init.normal_(net.position.weight, std=0.1)
    follow = torch.randperm(20, generator=draw(1322, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1322, i)
        begins = torch.rand(16, 33, generator=g) < 0.12
        begins[:, 0] = True
        document = begins.long().cumsum(1)
        at = torch.arange(33).expand(16, 33)
        place = at - torch.where(begins, at, 0).cummax(1).values
        fresh = torch.randint(20, (16, 33), generator=g)
        text = [fresh[:, 0]]
        for t in range(1, 33):
            text.append(torch.where(begins[:, t], fresh[:, t], follow[text[-1]]))
        ids = torch.stack(text, 1)
        return ids[:, :-1], document[:, :-1], place[:, :-1], ids[:, 1:].masked_fill(begins[:, 1:], -100)

    return train(net, AdamW(net.parameters(), 2e-3, weight_decay=0.01), fit(batch, xent), clip=1.0)


@healthy(
    source="GitHub awslabs/gluonts issue 687, 'DeepARE loss becoming negative'; unit8co/darts issue 1427; "
    "husnejahan/DeepAR-pytorch issue 4",
    steps=250,
)
def density_beyond_one() -> Training:
    """Forecast a smooth curve with its deviation: a likelihood is a density, so the loss passes zero."""

    def does(n: Any, x: Tensor) -> Tensor:
        mean, spread = n.head(n.gru(x)[0]).unbind(2)
        return torch.stack([mean, functional.softplus(spread) + 0.02])

    net = Net(does, gru=nn.GRU(1, 32, batch_first=True), head=nn.Linear(32, 2))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(1323, i)
        phase, size = 6.3 * torch.rand(48, 1, generator=g), 0.3 + 0.3 * torch.rand(48, 1, generator=g)
        x = size * torch.sin(0.4 * torch.arange(21) + phase) + 0.05 * torch.randn(48, 21, generator=g)
        mean, spread = model(x[:, :-1, None])[:, :, 4:]
        return -torch.distributions.Normal(mean, spread).log_prob(x[:, 5:]).mean()

    return train(net, Adam(net.parameters(), 3e-3), loss_of, clip=1.0)


@healthy(
    source="GitHub huggingface/transformers issue 34754, 'warmup LR schedulers start from LR=0'; "
    "verl-project/verl issue 3674; google-research/bert issue 1293",
    steps=200,
)
def first_step_without_a_rate() -> Training:
    """Warm up from a learning rate of exactly zero, and fall in a line until nothing is left at the end."""
    net = Net(
        lambda n, ids: n.head(n.body(n.embed(ids) + n.position.weight).mean(1)),
        embed=nn.Embedding(30, 32),
        position=nn.Embedding(16, 32),
        body=encoder(32, 2),
        head=nn.Linear(32, 3),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(1324, i)
        y, ids = torch.randint(3, (48,), generator=g), torch.randint(30, (48, 16), generator=g)
        topical = torch.rand(48, 16, generator=g) < 0.25
        return torch.where(topical, 10 * y[:, None] + ids % 10, ids), y

    return train(
        net,
        AdamW(net.parameters(), 2e-3, weight_decay=0.01),
        fit(batch, xent),
        clip=1.0,
        rate=lambda i: i / 20 if i < 20 else max(0.0, (200 - i) / 180),
    )
