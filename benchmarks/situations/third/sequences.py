"""Third set: sequence models, faulty and healthy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW

from benchmarks.runs import Net, Tell, Training, draw, fit, mse, train, xent
from benchmarks.situations.situation import faulty, healthy


def encoder(width: int, layers: int) -> nn.TransformerEncoder:
    """Build a small transformer that normalizes first."""
    layer = nn.TransformerEncoderLayer(
        width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


def before(length: int) -> Tensor:
    """Return the mask that lets each step see only itself and what came before."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


# --- faulty ---


@faulty(
    "disconnected",
    "non-finite",
    "stalled",
    "unstepped",
    source="GitHub huggingface/trl issues 6668 and 1053; MakazhanAlpamys/Soup issue 532: every label is -100",
    words=r"label|mask|target|ignor|nan|finite|truncat|empty|loss|zero|no gradient",
    steps=200,
)
def answers_cut_off_with_the_prompt(*, fixed: bool) -> Training:
    """Fine-tune on answers alone, with a maximal length that ends before any answer begins."""
    longest = 28 if fixed else 20

    def does(n: Any, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        return n.lm_head(n.body(n.embed(ids) + n.position.weight[:length], mask=before(length)))

    net = Net(
        does, embed=nn.Embedding(16, 32), position=nn.Embedding(28, 32), body=encoder(32, 2), lm_head=nn.Linear(32, 16)
    )
    answer = torch.randperm(12, generator=draw(801, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        prompt = torch.randint(12, (32, 23), generator=draw(801, i))
        ids = torch.cat([prompt, torch.full((32, 1), 12), answer[prompt[:, 19:]]], 1)
        labels = ids.clone()
        labels[:, :24] = -100
        ids, labels = ids[:, :longest], labels[:, :longest]
        return functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return train(net, AdamW(net.parameters(), 3e-3, weight_decay=0.0), loss_of, clip=1.0)


@faulty(
    "stalled",
    "disconnected",
    "vanishing-time",
    source="GitHub HHTseng/video-classification issue 42; timbmg/Sentence-VAE issue 15 (view in place of transpose)",
    words="view|reshap|transpos|permut|batch|dimension|axis|axes|mix|order|label|target|input|data",
    horizon=16,
    steps=200,
)
def days_put_in_order_by_a_view(*, fixed: bool) -> Training:
    """Bring windows (batch, time, feature) into the order that an LSTM wants by view(), which only cuts anew."""

    def does(n: Any, x: Tensor) -> Tensor:
        b, t, f = x.shape
        return n.head(n.lstm(x.transpose(0, 1) if fixed else x.view(t, b, f))[0][-1])

    net = Net(does, lstm=nn.LSTM(5, 32), head=nn.Linear(32, 5))
    with torch.no_grad():
        net.lstm.bias_ih_l0[32:64] = 2.0

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(802, i)
        y, at = torch.randint(5, (32,), generator=g), torch.randint(16, (32,), generator=g)
        x = 0.3 * torch.randn(32, 16, 5, generator=g)
        x[torch.arange(32), at, y] += 2.5
        return x, y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent))


@faulty(
    "stalled",
    "vanishing-depth",
    "rounding",
    source="GitHub jsboige/CoursIA pull request 926; aiboxlab/nlp issue 97; deepset-ai/FARM issue 229",
    words="shape|broadcast|target|label|size|squeeze|constant|mean|data",
    steps=200,
)
def forecasts_against_every_target(*, fixed: bool) -> Training:
    """Subtract targets (batch,) from forecasts (batch, 1): each forecast is held against all targets of the batch."""
    net = Net(lambda n, x: n.head(n.gru(x)[0][:, -1]), gru=nn.GRU(3, 32, batch_first=True), head=nn.Linear(32, 1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(803, i)
        x = torch.randn(48, 12, 3, generator=g)
        y = x[:, -1, 0] * x[:, -2, 1] + 0.7 * x[:, -3:, 2].sum(1) + 0.2 * torch.randn(48, generator=g)
        return x, y[:, None] if fixed else y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, mse))


@faulty(
    "vanishing-time",
    "disconnected",
    "stalled",
    source="GitHub pytorch/examples issue 88, 'hidden state not updated in the decoder'; "
    "ChenRocks/fast_abs_rl issue 14",
    places=("cell",),
    words="state|carr|hand|pass|cut|one step|loop|length|detach|reset",
    horizon=14,
    steps=200,
)
def state_not_handed_on(*, fixed: bool) -> Training:
    """Walk through 14 days with a cell that is given the state of the beginning, not of the day before, every day."""

    def does(n: Any, asset: Tensor, x: Tensor) -> Tensor:
        begin = torch.tanh(n.start(asset))
        h = begin
        for t in range(x.shape[1]):
            h = n.cell(x[:, t], h if fixed else begin)
        return n.head(h)

    net = Net(does, start=nn.Linear(3, 32), cell=nn.GRUCell(5, 32), head=nn.Linear(32, 4))
    if fixed:
        with torch.no_grad():
            net.cell.bias_hh[32:64], net.cell.bias_ih[32:64] = math.log(28), 0.0

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(804, i)
        y, asset = torch.randint(4, (32,), generator=g), torch.randn(32, 3, generator=g)
        x = 0.4 * torch.randn(32, 14, 5, generator=g)
        shift = (asset[:, 0] > 0).long()
        x[torch.arange(32), 1, (y + shift) % 4] += 2.5
        return asset, x, y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent), clip=1.0)


@faulty(
    "non-finite",
    source="GitHub ypwhs/captcha_break issue 29; meijieru/crnn.pytorch issue 235; wenet-e2e/wenet pull request 2299",
    since=21,
    words=r"ctc|infinit|align|short|frame|length|target|label|loss|log\b|finite|input|batch",
    steps=150,
)
def more_letters_than_frames(*, fixed: bool) -> Training:
    """Shorten speech eightfold before the CTC loss: a word with doubled letters no longer fits into ten frames."""
    stride = 2 if fixed else 4

    def does(n: Any, x: Tensor) -> Tensor:
        h = functional.gelu(n.second(functional.gelu(n.first(x.transpose(1, 2))))).transpose(1, 2)
        return functional.log_softmax(n.letters(n.gru(h)[0]), 2)

    net = Net(
        does,
        first=nn.Conv1d(8, 24, 2, stride=2),
        second=nn.Conv1d(24, 24, stride, stride=stride),
        gru=nn.GRU(24, 24, batch_first=True, bidirectional=True),
        letters=nn.Linear(48, 6),
    )
    sounds = torch.randn(6, 8, generator=draw(805, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(805, i)
        y, many = torch.randint(1, 6, (24, 7), generator=g), torch.randint(3, 8, (24,), generator=g)
        x = 0.4 * torch.randn(24, 80, 8, generator=g)
        for k in range(7):
            x[:, 11 * k : 11 * k + 8] += sounds[y[:, k]][:, None] * (k < many)[:, None, None]
        scores = model(x)
        return functional.ctc_loss(scores.transpose(0, 1), y, torch.full((24,), scores.shape[1]), many)

    return train(net, Adam(net.parameters(), 4e-3), loss_of, clip=5.0)


@faulty(
    "non-finite",
    source="GitHub pytorch/pytorch issue 184030 (PoissonNLLLoss with log_input=False of negative values); "
    "sktime/pytorch-forecasting pull request 2290",
    words=r"log|negativ|positiv|softplus|poisson|exp|domain|loss|finite|clamp|eps",
    steps=150,
)
def counts_with_a_negative_rate(*, fixed: bool) -> Training:
    """Forecast daily counts by a Poisson loss that takes rates, from a head that may say anything."""
    net = Net(lambda n, x: n.head(n.gru(x)[0][:, -1]), gru=nn.GRU(2, 24, batch_first=True), head=nn.Linear(24, 1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(806, i)
        day = torch.randint(7, (48, 1), generator=g) + torch.arange(15)
        rate = torch.exp(0.6 + 0.4 * torch.randn(48, 1, generator=g) + 0.9 * torch.sin(2 * math.pi * day / 7))
        counts = torch.poisson(rate, generator=g)
        return torch.stack([(1 + counts).log(), torch.cos(2 * math.pi * day / 7)], 2)[:, :14], counts[:, 14:]

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return functional.poisson_nll_loss(out, target, log_input=fixed)

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, loss))


@faulty(
    "disconnected",
    "rounding",
    "stalled",
    "unstepped",
    "underflow",
    source="GitHub huggingface/transformers issues 35352 and 35909: the pad token is the eos token, "
    "and the first of them counts as the end",
    words="constant|equal|same|cancel|zero|depend|influence|round|mask|padd|label|target|loss|cut",
    steps=150,
)
def reward_read_at_the_first_end(*, fixed: bool) -> Training:
    """Compare two answers to a question by scores that are read where the question ends, the same for both."""

    def does(n: Any, ids: Tensor) -> Tensor:
        h = n.body(n.embed(ids) + n.position.weight, mask=before(24))
        step = torch.arange(24)
        end = (step * (ids != 0)).argmax(1) if fixed else (ids == 0).int().argmax(1) - 1
        return n.score(h[torch.arange(len(ids)), end])

    net = Net(
        does, embed=nn.Embedding(20, 32), position=nn.Embedding(24, 32), body=encoder(32, 2), score=nn.Linear(32, 1)
    )
    worth = torch.randn(20, generator=draw(807, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(807, i)
        question = torch.randint(1, 20, (16, 10), generator=g)
        question[:, -1] = 0  # a turn ends with the token that pads, too
        answers = torch.randint(1, 20, (2, 16, 14), generator=g)
        answers[torch.arange(14) >= torch.randint(7, 13, (2, 16, 1), generator=g)] = 0
        value = (worth[answers] * (answers != 0)).sum(2) / (answers != 0).sum(2).sqrt()
        better = value.argmax(0)[None, :, None].expand(1, 16, 14)
        chosen, other = answers.gather(0, better)[0], answers.gather(0, 1 - better)[0]
        scores = model(torch.cat([torch.cat([question, a], 1) for a in (chosen, other)]))
        return -functional.logsigmoid(scores[:16] - scores[16:]).mean()

    return train(net, Adam(net.parameters(), 2e-3), loss_of, clip=1.0)


@faulty(
    "exploding",
    "non-finite",
    "stalled",
    source="GitHub VGraphRNN/VGRNN issue 4; jongwook/onsets-and-frames issue 24; awslabs/graphstorm issue 1366",
    words=r"clip|learning rate|\blr\b|smaller|lower|step|scale",
    steps=150,
)
def clipped_after_the_step(*, fixed: bool) -> Training:
    """Forecast 24 hours by SGD, the squared errors of all hours summed, and clip gradients, but behind the step."""
    net = Net(lambda n, x: n.head(n.rnn(x)[0])[..., 0], rnn=nn.LSTM(3, 32, batch_first=True), head=nn.Linear(32, 1))
    optimizer = SGD(net.parameters(), 0.08)

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(32, 26, 3, generator=draw(808, i))
        y = 0.5 + x[:, 2:, 0] + 0.7 * x[:, 1:-1, 1] + 0.5 * x[:, :-2, 2]
        return (model(x)[:, 2:] - y).pow(2).sum(1).mean()

    def step(i: int, tell: Tell) -> None:
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        tell(loss.detach())
        if fixed:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if not fixed:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)

    return Training(net, [optimizer], step, loss_of)


@faulty(
    "disconnected",
    source="GitHub pyg-team/pytorch_geometric pull request 9996; KimMeen/Time-LLM issue 143; "
    "edreisMD/ConVIRT-pytorch issue 7 (frozen by no_grad, and all before it with it)",
    places=("project",),
    words=r"no_grad|detach|requires_grad|cut|graph",
    steps=200,
)
def patches_for_a_frozen_reader(*, fixed: bool) -> Training:
    """Project patches of a series for a frozen language model that runs under no_grad; the projection is to learn."""

    def does(n: Any, x: Tensor) -> Tensor:
        patches = n.project(x.unflatten(1, (8, 4)))
        if fixed:
            return n.head(n.reader(patches + n.reader_position).flatten(1))
        with torch.no_grad():
            h = n.reader(patches + n.reader_position)
        return n.head(h.flatten(1))

    net = Net(does, project=nn.Linear(4, 32), reader=encoder(32, 2), head=nn.Linear(256, 1))
    net.reader_position = nn.Parameter(0.3 * torch.randn(8, 32), requires_grad=False)
    net.reader.requires_grad_(False)

    def batch(i: int) -> tuple[Tensor, ...]:
        x = torch.randn(48, 32, generator=draw(809, i)).cumsum(1)
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        return x, torch.tanh(2 * (x[:, -1:] - x[:, -4:-3])) + x[:, -8:-7]

    return train(net, Adam([p for p in net.parameters() if p.requires_grad], 3e-3), fit(batch, mse))


@faulty(
    "disconnected",
    "unstepped",
    source="GitHub bentrevett/pytorch-seq2seq issue 29 (it has to be hidden[-1]); "
    "Stack Overflow, 'order of layers in hidden states in PyTorch GRU return'",
    places=("gru",),
    words=r"unused|used|no gradient|not reach|layer|path|loss|h_n|output",
    steps=150,
)
def state_of_the_first_layer(*, fixed: bool) -> Training:
    """Classify gestures by h_n[0] of two stacked layers, which is what the first one ends with."""
    net = Net(
        lambda n, x: n.head(n.gru(x)[1][-1 if fixed else 0]),
        gru=nn.GRU(3, 24, 2, batch_first=True),
        head=nn.Linear(24, 4),
    )
    time = torch.arange(24)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(810, i)
        y, phase = torch.randint(4, (48,), generator=g), 2.0 * torch.rand(48, 1, generator=g)
        x = 0.4 * torch.randn(48, 24, 3, generator=g)
        angle = time * (0.3 + 0.5 * (y // 2))[:, None] + phase
        x[:, :, 0] += torch.sin(angle)
        x[:, :, 1] += torch.cos(angle) * (2.0 * (y % 2) - 1)[:, None]
        return x, y

    return train(net, Adam(net.parameters(), 2.5e-3), fit(batch, xent), clip=1.0)


@faulty(
    "disconnected",
    "stalled",
    "vanishing-time",
    "rounding",
    source="GitHub rasbt/MachineLearning-QandAI-book issue 18; athms/learning-from-brains issue 3; "
    "mlfoundations/open_clip issue 549",
    words=r"mask|causal|position|token|depend|influence|constant|zero|input|no gradient|label|read|data|loss",
    steps=200,
)
def summary_token_before_a_causal_text(*, fixed: bool) -> Training:
    """Put the summary token first, as for BERT, under a causal mask: it sees nothing but itself."""

    def does(n: Any, ids: Tensor) -> Tensor:
        words, summary = n.embed(ids), n.summary.expand(len(ids), 1, 32)
        h = torch.cat([words, summary] if fixed else [summary, words], 1) + n.position.weight
        return n.head(n.body(h, mask=before(17))[:, -1 if fixed else 0])

    net = Net(
        does,
        embed=nn.Embedding(30, 32),
        position=nn.Embedding(17, 32),
        summary=nn.Parameter(0.1 * torch.randn(32)),
        body=encoder(32, 2),
        head=nn.Linear(32, 3),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(811, i)
        y, ids = torch.randint(3, (48,), generator=g), torch.randint(30, (48, 16), generator=g)
        topical = torch.rand(48, 16, generator=g) < 0.4
        return torch.where(topical, 10 * y[:, None] + ids % 10, ids), y

    return train(net, Adam(net.parameters(), 1e-3), fit(batch, xent), clip=1.0)


@faulty(
    "non-finite",
    "underflow",
    source="PyTorch forums 1765, 'Adam+Half Precision = NaNs?': 1e-8 is zero in half precision",
    words=r"eps|half|float16|fp16|precision|bfloat16|underflow|scal|divi",
    steps=150,
)
def halves_for_adam(*, fixed: bool) -> Training:
    """Train a model that was turned to half precision as a whole by Adam with its usual epsilon of 1e-8."""
    net = Net(
        lambda n, ids: n.head(n.gru(n.embed(ids))[0][:, -1]),
        embed=nn.Embedding(60, 16),
        gru=nn.GRU(16, 24, batch_first=True),
        head=nn.Linear(24, 2),
    )
    if not fixed:
        net.half()
    liking = torch.randn(60, generator=draw(812, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        ids = torch.randint(60, (32, 8), generator=draw(812, i))
        return ids, (liking[ids].sum(1) > 0).long()

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent))


# --- healthy ---


@healthy(
    source="GitHub google-research/bert issue 746 and huggingface/transformers issue 3983: a plateau, then it learns",
    steps=250,
)
def words_hidden_at_random() -> Training:
    """Guess the few words that were hidden, with a decoder that shares the embedding: most positions have no loss."""

    def does(n: Any, ids: Tensor) -> Tensor:
        return n.decoder(n.body(n.embed(ids) + n.position.weight))

    net = Net(
        does,
        embed=nn.Embedding(25, 32),
        position=nn.Embedding(16, 32),
        body=encoder(32, 2),
        decoder=nn.Linear(32, 25),
    )
    nn.init.normal_(net.embed.weight, std=0.2)
    net.decoder.weight = net.embed.weight
    follow = torch.randperm(24, generator=draw(821, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(821, i)
        words = [torch.randint(24, (48,), generator=g)]
        for _ in range(15):
            words.append(follow[words[-1]])
        ids = torch.stack(words, 1)
        hidden = torch.rand(48, 16, generator=g) < 0.15
        labels = ids.masked_fill(~hidden, -100)
        return functional.cross_entropy(model(ids.masked_fill(hidden, 24)).flatten(0, 1), labels.flatten())

    return train(net, Adam(net.parameters(), 3e-3), loss_of, rate=lambda i: min(1.0, (i + 1) / 20), clip=1.0)


@healthy(
    source="GitHub wildwasser/sneaker issue 51; practice of daily returns: an R2 of some percent is all that there is",
    steps=250,
)
def return_of_tomorrow() -> Training:
    """Forecast standardized returns of which nine tenths are noise with heavy tails: the loss hardly falls."""
    net = Net(lambda n, x: n.head(n.gru(x)[0][:, -1]), gru=nn.GRU(4, 24, batch_first=True), head=nn.Linear(24, 1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(822, i)
        x = torch.randn(256, 10, 4, generator=g)
        heavy = torch.randn(256, generator=g) / (torch.randn(6, 256, generator=g).pow(2).mean(0)).sqrt()
        y = 0.35 * x[:, -1, 0] - 0.25 * x[:, -2, 1] + 0.75 * heavy
        return x, y[:, None]

    return train(net, AdamW(net.parameters(), 2e-3, weight_decay=0.01), fit(batch, mse), clip=3.0)


@healthy(source="GitHub liyaguang/DCRNN issue 38: the training loss keeps growing by scheduled sampling", steps=250)
def truth_withdrawn_step_by_step() -> Training:
    """Forecast twelve steps, fed with the truth ever more seldom: the loss rises while the task grows harder."""

    def does(n: Any, past: Tensor, future: Tensor, forced: Tensor) -> Tensor:
        _, h = n.encoder(past)
        h, x, out = h[0], past[:, -1], []
        for t in range(future.shape[1]):
            h = n.decoder(x, h)
            y = x + n.head(h)
            out.append(y)
            x = torch.where(forced[:, t, None] > 0, future[:, t], y)
        return torch.stack(out, 1)

    net = Net(does, encoder=nn.GRU(1, 32, batch_first=True), decoder=nn.GRUCell(1, 32), head=nn.Linear(32, 1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(823, i)
        speed, phase = 0.3 + 0.3 * torch.rand(32, 1, generator=g), 6.3 * torch.rand(32, 1, generator=g)
        x = torch.sin(speed * torch.arange(28) + phase) + 0.1 * torch.randn(32, 28, generator=g).cumsum(1)
        x = x[:, :, None]
        forced = (torch.rand(32, 12, generator=g) < 1 / (1 + math.exp((i - 110) / 20))).float()
        return mse(model(x[:, :16], x[:, 16:], forced), x[:, 16:])

    return train(net, Adam(net.parameters(), 4e-3), loss_of, clip=1.0)


class Rotating(nn.Module):
    """A diagonal state-space model with complex states, computed as a convolution, as S4D has it."""

    def __init__(self, channels: int, states: int = 8) -> None:
        """Begin with modes of all frequencies, and steps from a hundredth to a tenth."""
        super().__init__()
        self.log_step = nn.Parameter(torch.linspace(math.log(0.005), math.log(0.1), channels))
        self.log_decay = nn.Parameter(torch.full((channels, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).repeat(channels, 1))
        self.c = nn.Parameter(torch.randn(channels, states, dtype=torch.cfloat))

    def forward(self, u: Tensor) -> Tensor:
        """Convolve each channel of (batch, time, channel) with its kernel."""
        length, step = u.shape[1], self.log_step.exp()[:, None]
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        c = self.c * (torch.exp(step * a) - 1) / a
        kernel = 2 * (c[:, :, None] * torch.exp((step * a)[:, :, None] * torch.arange(length))).sum(1).real
        k, x = torch.fft.rfft(kernel, 2 * length), torch.fft.rfft(u.transpose(1, 2), 2 * length)
        return torch.fft.irfft(k * x, 2 * length)[:, :, :length].transpose(1, 2)


@healthy(source="GitHub state-spaces/s4 issues 120 and 50: complex states, smaller rate for the kernel", steps=200)
def tone_through_complex_states() -> Training:
    """Tell which two tones follow each other by two state-space layers whose readout is complex, in two groups."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.enter(x)
        for norm, memory, mix in zip(n.norms, n.memories, n.mixes, strict=True):
            h = h + mix(functional.gelu(memory(norm(h))))
        return n.head(h.mean(1))

    net = Net(
        does,
        enter=nn.Linear(1, 16),
        norms=nn.ModuleList(nn.LayerNorm(16) for _ in range(2)),
        memories=nn.ModuleList(Rotating(16) for _ in range(2)),
        mixes=nn.ModuleList(nn.Linear(16, 16) for _ in range(2)),
        head=nn.Linear(16, 4),
    )
    time = torch.arange(64)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(824, i)
        y, phase = torch.randint(4, (32,), generator=g), 6.3 * torch.rand(2, 32, 1, generator=g)
        first, second = (0.25 + 0.45 * (y // 2))[:, None], (0.25 + 0.45 * (y % 2))[:, None]
        x = torch.where(time < 32, torch.sin(first * time + phase[0]), torch.sin(second * time + phase[1]))
        return (x + 0.3 * torch.randn(32, 64, generator=g))[:, :, None], y

    kernel = list(net.memories.parameters())
    rest = [p for k, p in net.named_parameters() if not k.startswith("memories")]
    optimizer = AdamW(
        [{"params": rest, "weight_decay": 0.01}, {"params": kernel, "lr": 2e-3, "weight_decay": 0.0}], 6e-3
    )
    return train(net, optimizer, fit(batch, xent))


@healthy(
    source="GitHub kimiyoung/transformer-xl issues 13 and 8: the memory of the segment before has no gradient",
    steps=250,
)
def segments_with_a_memory() -> Training:
    """Model a text in segments of twelve words; attention reaches into the segment before, which is detached."""
    gap = torch.arange(12)[:, None] + 12 - torch.arange(24)

    def does(n: Any, ids: Tensor, old: Tensor) -> Tensor:
        h = n.embed(ids)
        both = n.norm(torch.cat([old, h], 1))
        mask = n.distance(gap.clamp(min=0)).permute(2, 0, 1).masked_fill(gap < 0, -math.inf).repeat(len(ids), 1, 1)
        h = h + n.attend(both[:, 12:], both, both, attn_mask=mask, need_weights=False)[0]
        return n.out(h + n.feed(h))

    net = Net(
        does,
        embed=nn.Embedding(12, 32),
        norm=nn.LayerNorm(32),
        attend=nn.MultiheadAttention(32, 4, batch_first=True),
        distance=nn.Embedding(24, 4),
        feed=nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        out=nn.Linear(32, 12),
    )
    held: list[Tensor] = [torch.zeros(24, 12, 32), torch.randint(12, (24, 4), generator=draw(825, -1))]
    shift = torch.randint(12, (12,), generator=draw(825, -2))

    def loss_of(model: Any, i: int) -> Tensor:
        g, (old, text) = draw(825, i), held
        for _ in range(12):
            fresh = torch.randint(12, (24,), generator=g)
            told = (text[:, -4] + shift[text[:, -1]]) % 12
            text = torch.cat([text, torch.where(torch.rand(24, generator=g) < 0.05, fresh, told)[:, None]], 1)
        ids, target = text[:, 3:-1], text[:, 4:]
        loss = xent(model(ids, old).transpose(1, 2), target)
        held[:] = model.embed(ids).detach(), text[:, -4:]
        return loss

    return train(net, Adam(net.parameters(), 5e-3), loss_of, clip=1.0)


@healthy(
    source="practice of models of characters, as karpathy/char-rnn: long windows, but what counts is near",
    horizon=3,
    steps=150,
)
def next_letter_of_a_long_text() -> Training:
    """Predict each next letter of windows of 100 from the two before it; what is older need not have a gradient."""
    net = Net(
        lambda n, ids: n.out(n.drop(n.rnn(n.embed(ids))[0])).transpose(1, 2),
        embed=nn.Embedding(12, 16),
        rnn=nn.GRU(16, 48, batch_first=True),
        drop=nn.Dropout(0.1),
        out=nn.Linear(48, 12),
    )
    follow = torch.randint(12, (12, 12), generator=draw(826, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(826, i)
        text = [torch.randint(12, (16,), generator=g) for _ in range(2)]
        for _ in range(99):
            fresh = torch.randint(12, (16,), generator=g)
            told = follow[text[-1], text[-2]]
            text.append(torch.where(torch.rand(16, generator=g) < 0.15, fresh, told))
        ids = torch.stack(text, 1)
        return ids[:, :-1], ids[:, 1:]

    return train(net, Adam(net.parameters(), 8e-3), fit(batch, xent), clip=1.0)
