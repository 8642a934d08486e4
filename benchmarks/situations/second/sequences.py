"""Held out: sequence models, faulty and healthy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import SGD, Adam, AdamW

from benchmarks.runs import Batch, Causal, Net, Training, draw, fit, mse, train, xent
from benchmarks.situations.situation import faulty, healthy


def marked(seed: int, length: int, at: int, n: int = 32, kinds: int = 4, noise: float = 0.5) -> Batch:
    """Tell of which kind a mark was that stood at one step among noise; the last channel asks at the end."""

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(seed, i)
        y = torch.randint(kinds, (n,), generator=g)
        x = noise * torch.randn(n, length, kinds + 1, generator=g)
        x[torch.arange(n), at, y] += 2.0
        x[:, -1, -1] += 2.0
        return x, y

    return batch


class Decaying(nn.Module):
    """A diagonal linear recurrence with one learnt decay a channel."""

    def __init__(self, width: int, decay: Tensor) -> None:
        """Begin with these decays."""
        super().__init__()
        self.inp, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.decay = nn.Parameter(torch.logit(decay))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the states say at each step."""
        a, u = torch.sigmoid(self.decay), self.inp(x)
        h, states = torch.zeros_like(u[:, 0]), []
        for t in range(u.shape[1]):
            h = a * h + u[:, t]
            states.append(h)
        return self.out(functional.gelu(torch.stack(states, 1)))


def lasting(width: int, longest: float) -> Tensor:
    """Return decays that last between 1 step and the longest."""
    return torch.exp(-1 / torch.logspace(0, math.log10(longest), width))


# --- faulty ---


@faulty(
    "vanishing-time",
    source="GitHub jrz97619761/test-model-thing issue 3, 'decays collapse to a ~1-symbol half-life'",
    places=("memory",),
    words="decay|gate|bias|initial|eigenvalue|skip|attention|slow|memory|forget",
    horizon=24,
    steps=200,
)
def bracket_to_be_closed(*, fixed: bool) -> Training:
    """Name the bracket that was opened 24 bytes ago, where all decays of a linear recurrence begin at sigmoid(0)."""
    net = Net(
        lambda n, ids: n.head(n.memory(n.embed(ids))[:, -1]),
        embed=nn.Embedding(24, 32),
        memory=Decaying(32, lasting(32, 100) if fixed else torch.full((32,), 0.5)),
        head=nn.Linear(32, 4),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(701, i)
        y = torch.randint(4, (48,), generator=g)
        ids = torch.randint(5, 24, (48, 24), generator=g)
        ids[:, 0], ids[:, -1] = y, 4
        return ids, y

    return train(net, Adam(net.parameters(), 4e-3), fit(batch, xent))


@faulty(
    "vanishing-time",
    "disconnected",
    source="GitHub yunjey/pytorch-tutorial issue 149 and pytorch/pytorch issue 3587",
    places=("lstm",),
    horizon=39,
    words="revers|backward|direction|bidirection|state|gate|bias|skip|attention|first step|last step",
)
def topic_of_a_review(*, fixed: bool) -> Training:
    """Name the topic that a review begins with from `out[:, -1]`, where the reverse half has read one word."""

    def does(n: Any, ids: Tensor) -> Tensor:
        out, (h, _) = n.lstm(n.embed(ids))
        return n.fc(torch.cat([h[0], h[1]], 1) if fixed else out[:, -1])

    net = Net(
        does,
        embed=nn.Embedding(40, 16),
        lstm=nn.LSTM(16, 24, batch_first=True, bidirectional=True),
        fc=nn.Linear(48, 4),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(702, i)
        y = torch.randint(4, (32,), generator=g)
        ids = torch.randint(4, 40, (32, 40), generator=g)
        ids[:, 1] = y
        return ids, y

    return train(net, Adam(net.parameters(), 4e-3), fit(batch, xent))


@faulty(
    "vanishing-time",
    "disconnected",
    "stalled",
    source="GitHub Exorust/TorchLeet issue 5; pytorch/pytorch issue 59159; IBM/TabFormer pull request 14",
    words="batch|dimension|transpos|axis|axes",
    horizon=16,
)
def windows_of_six_sensors(*, fixed: bool) -> Training:
    """Give windows (batch, time, width) to an nn.TransformerEncoder as it is by default; read its last step."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=fixed)
    net = Net(
        lambda n, x: n.head(n.encoder(n.project(x) + n.position)[:, -1]),
        project=nn.Linear(6, 32),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        head=nn.Linear(32, 6),
    )
    net.position = nn.Parameter(0.1 * torch.randn(1, 16, 32))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(703, i)
        y, at = torch.randint(6, (32,), generator=g), torch.randint(10, (32,), generator=g)
        x = 0.3 * torch.randn(32, 16, 6, generator=g)
        x[torch.arange(32), at, y] += 2.5
        return x, y

    return train(net, Adam(net.parameters(), 1e-3), fit(batch, xent))


@faulty(
    "vanishing-time",
    "disconnected",
    "stalled",
    source="GitHub Stable-Baselines-Team/stable-baselines3-contrib pull request 53; glample/Arnold issue 7; "
    "keras-rl/keras-rl issue 41",
    places=("cell", "observe"),
    words="detach|no_grad|cut|sequence|window|unroll|truncat|stored|carr|state|one step",
    horizon=14,
    steps=250,
)
def corridor_from_a_replay_buffer(*, fixed: bool) -> Training:
    """Learn Q values in a T-maze from single transitions with the recurrent state that acting had stored for each."""
    length, n, width = 14, 32, 32
    net = Net(
        lambda m, seen, h: m.cell(torch.tanh(m.observe(seen)), h),
        observe=nn.Linear(4, 16),
        cell=nn.GRUCell(16, width),
        value=nn.Linear(width, 2),
    )
    with torch.no_grad():
        if fixed:
            net.cell.bias_hh[width : 2 * width] = math.log(length)

    def unroll(m: Any, seen: Tensor) -> Tensor:
        h, states = torch.zeros(n, width), []
        for t in range(length):
            states.append(h)
            h = m(seen[:, t], h)
        return torch.stack([*states, h], 1)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(704, i)
        sign = torch.randint(2, (n,), generator=g)
        seen = 0.7 * torch.randn(n, length, 4, generator=g)
        seen[:, 0, 0], seen[:, 1:, 0], seen[:, :, 1], seen[:, -1, 1] = sign * 2.0 - 1, 0.0, 0.0, 1.0
        with torch.no_grad():
            states = unroll(model, seen)
            q = model.value(states[:, 1:])
        action = torch.where(
            torch.rand(n, length, generator=g) < 0.3, torch.randint(2, (n, length), generator=g), q.argmax(2)
        )
        reward = torch.where(action[:, -1] == sign, 1.0, -1.0)
        goal = torch.cat([0.9 * q[:, 1:].max(2).values, reward[:, None]], 1)
        if fixed:
            mine = model.value(unroll(model, seen)[:, 1:])
            return mse(mine.gather(2, action[..., None])[..., 0], goal)
        b, t = torch.randint(n, (256,), generator=g), torch.randint(length, (256,), generator=g)
        mine = model.value(model(seen[b, t], states[b, t]))
        return mse(mine.gather(1, action[b, t][:, None])[:, 0], goal[b, t])

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "disconnected",
    "unstepped",
    "rounding",
    source="GitHub DEEP-PolyU/KEQA_WSDM19 issue 2; PetrochukM/PyTorch-NLP issue 2; "
    "catalyst-team/catalyst pull request 285",
    places=("score",),
    words="softmax|constant|dim|saturat|does not depend|no influence|zero",
    steps=200,
)
def weights_of_vibrations(*, fixed: bool) -> Training:
    """Pool a GRU's states by learnt weights, from a softmax over the dimension that has one entry."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.gru(x)[0]
        weights = torch.softmax(n.score(h), 1 if fixed else -1)
        return n.head((weights * h).sum(1))

    net = Net(
        does,
        gru=nn.GRU(3, 24, batch_first=True),
        score=nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1)),
        head=nn.Linear(24, 4),
    )
    time = torch.arange(40)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(705, i)
        y, at = torch.randint(4, (32,), generator=g), torch.randint(30, (32, 1), generator=g)
        x = 0.5 * torch.randn(32, 40, 3, generator=g)
        burst = (time >= at) & (time < at + 10)
        x[:, :, 0] += 2 * burst * torch.sin(time * (0.4 + 0.5 * y[:, None]))
        x[:, :, 1] += 1.5 * burst
        return x, y

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent))


@faulty(
    "disconnected",
    "stalled",
    "vanishing-depth",
    source="GitHub lucidrains/halonet-pytorch issue 4, 'the attention mask should be reversed'; "
    "InseeFrLab/torchTextClassifiers pull request 92",
    places=("embed", "lstm", "score", "head"),
    words="mask|padd|softmax|zero|satur|constant",
)
def sentences_padded_to_24(*, fixed: bool) -> Training:
    """Fill the scores of the words, in place of those of the padding, with -1e9 before a softmax over an LSTM."""

    def does(n: Any, ids: Tensor) -> Tensor:
        real = ids != 0
        packed = pack_padded_sequence(n.embed(ids), real.sum(1), batch_first=True, enforce_sorted=False)
        h = pad_packed_sequence(n.lstm(packed)[0], batch_first=True, total_length=24)[0]
        scores = n.score(h)[..., 0].masked_fill(~real if fixed else real, -1e9)
        return n.head((torch.softmax(scores, 1)[..., None] * h).sum(1))

    net = Net(
        does,
        embed=nn.Embedding(30, 16, padding_idx=0),
        lstm=nn.LSTM(16, 24, batch_first=True),
        score=nn.Linear(24, 1),
        head=nn.Linear(24, 3),
    )
    liking = torch.randn(30, generator=draw(706, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(706, i)
        ids = torch.randint(1, 30, (32, 24), generator=g)
        ids[torch.arange(24) >= torch.randint(5, 20, (32, 1), generator=g)] = 0
        mood = (liking[ids] * (ids != 0)).sum(1) / (ids != 0).sum(1).sqrt()
        return ids, (mood > -0.4).long() + (mood > 0.4).long()

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent))


@faulty(
    "disconnected",
    "vanishing-depth",
    "vanishing-time",
    "dead-units",
    "stalled",
    source="ai.stackexchange.com 40022; "
    "machinelearningmastery.com, 'how to scale data for LSTM networks': raw features",
    places=("lstm",),
    words="saturat|scale|normal|standard|input|gate",
)
def temperatures_with_a_timestamp(*, fixed: bool) -> Training:
    """Forecast the temperature in three hours by an LSTM whose second feature is the time in seconds since 1970."""
    net = Net(lambda n, x: n.head(n.lstm(x)[0][:, -1]), lstm=nn.LSTM(3, 32, batch_first=True), head=nn.Linear(32, 1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(707, i)
        begin = 1.7e9 + 3600 * torch.randint(8760, (32, 1), generator=g)
        seconds = begin + 3600 * torch.arange(27)
        phase = 2 * math.pi * (begin % 86400) / 86400 + 2 * math.pi * torch.arange(27) / 24
        level = 0.7 * torch.randn(32, 1, generator=g)
        warmth = level + torch.sin(phase) + 0.1 * torch.randn(32, 27, generator=g)
        when = [torch.sin(phase), torch.cos(phase)] if fixed else [seconds, seconds % 86400]
        return torch.stack([warmth, *when], 2)[:, :24], warmth[:, -1:]

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, mse))


class Polynomial(nn.Module):
    """Eight numbers that summarize the past of each channel, as HiPPO has them."""

    def __init__(self, channels: int, dt: float, *, bilinear: bool) -> None:
        """Discretize by the bilinear rule or by Euler's."""
        super().__init__()
        k = torch.arange(8.0)
        root = (2 * k + 1).sqrt()
        a = -(torch.tril(root[:, None] * root, -1) + torch.diag(k + 1))
        eye = torch.eye(8)
        if bilinear:
            left = torch.linalg.inv(eye - dt / 2 * a)
            ad, bd = left @ (eye + dt / 2 * a), left @ (dt * root)
        else:
            ad, bd = eye + dt * a, dt * root
        self.register_buffer("ad", ad)
        self.b = nn.Parameter(bd.repeat(channels, 1))
        self.c = nn.Parameter(torch.randn(channels, 8) / 8**0.5)

    def forward(self, u: Tensor) -> Tensor:
        """Return a reading of each channel's numbers at each step."""
        x, out = torch.zeros(len(u), *self.b.shape), []
        for t in range(u.shape[1]):
            x = x @ self.ad.T + u[:, t, :, None] * self.b
            out.append((x * self.c).sum(2))
        return torch.stack(out, 1)


@faulty(
    "exploding",
    "non-finite",
    "stalled",
    source="GitHub srush/annotated-s4 issue 58 (midpoint instead of Euler); "
    "El3ssar/ResDAG issue 155 (unguarded radius)",
    words="scale|norm|clip|spectral|eigenvalue|radius|weight|initial|step|stab|smaller|input|grow",
)
def vibration_through_a_polynomial_memory(*, fixed: bool) -> Training:
    """Discretize a state-space model by Euler's method with a step of 0.3, too long for its fastest mode."""
    net = Net(
        lambda n, x: n.head(n.mix(n.memory(n.inp(x))[:, -1])),
        inp=nn.Linear(2, 12),
        memory=Polynomial(12, 0.3, bilinear=fixed),
        mix=nn.Sequential(nn.Linear(12, 16), nn.SiLU()),
        head=nn.Linear(16, 1),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        x = torch.randn(32, 48, 2, generator=draw(708, i))
        return x, x[:, -5:, 0].sum(1, keepdim=True) / 2

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, mse))


@faulty(
    "unstepped",
    "stalled",
    source="pytorch/examples word_language_model: clip 0.25 belongs to lr 20; here with a usual lr of 0.001",
    words="clip|learning rate|lr|step",
    steps=200,
)
def small_language_model(*, fixed: bool) -> Training:
    """Train a language model by SGD with the clip norm of 0.25 that a tutorial has, but not with its rate of 20."""
    net = Net(
        lambda n, ids: n.decoder(n.lstm(n.encoder(ids))[0]),
        encoder=nn.Embedding(20, 24),
        lstm=nn.LSTM(24, 32, batch_first=True),
        decoder=nn.Linear(32, 20),
    )
    follow = torch.randint(20, (20, 2), generator=draw(709, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(709, i)
        words = [torch.randint(20, (32,), generator=g)]
        for _ in range(20):
            words.append(follow[words[-1], (torch.rand(32, generator=g) < 0.2).long()])
        ids = torch.stack(words, 1)
        logits, target = model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        return functional.cross_entropy(logits, target, reduction="sum") / 32

    return train(net, SGD(net.parameters(), 4.0 if fixed else 0.001), loss_of, clip=0.25)


class MinimalCell(nn.Module):
    """The minimal gated unit of Zhou et al. (2016): its gate is how much is written, not how much is kept."""

    def __init__(self, features: int, width: int, bias: float) -> None:
        """Give the gate this bias."""
        super().__init__()
        self.forget, self.candidate = nn.Linear(features + width, width), nn.Linear(features + width, width)
        nn.init.constant_(self.forget.bias, bias)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the next state."""
        f = torch.sigmoid(self.forget(torch.cat([x, h], 1)))
        return (1 - f) * h + f * torch.tanh(self.candidate(torch.cat([x, f * h], 1)))


@faulty(
    "vanishing-time",
    source="GitHub keras-team/keras issue 1322 and pytorch/pytorch issue 750 (set the forget bias to 1 or 2), "
    "applied to a unit whose gate means the opposite",
    places=("cell",),
    words="gate|bias|skip|attention|initial|forget|memory",
    horizon=25,
    steps=200,
)
def keyword_by_a_minimal_unit(*, fixed: bool) -> Training:
    """Give a unit of one gate the forget bias of 2 that LSTMs should have."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 32)
        for t in range(x.shape[1]):
            h = n.cell(x[:, t], h)
        return n.head(h)

    net = Net(does, cell=MinimalCell(5, 32, -math.log(40) if fixed else 2.0), head=nn.Linear(32, 4))
    return train(net, Adam(net.parameters(), 5e-3), fit(marked(710, 25, 0), xent), clip=1.0)


@faulty(
    "unstepped",
    source="GitHub namisan/mt-dnn pull request 37 and pytorch/pytorch issue 1402: groups for weight decay by name; "
    "ikostrikov/pytorch-meta-optimizer issue 11, 'LSTM weights not optimised'",
    places=("rnn",),
    words="optimizer|group|param",
)
def decay_for_weights_only(*, fixed: bool) -> Training:
    """Sort parameters into groups by whether they end in '.weight' or '.bias', which those of an LSTM do not."""
    net = Net(
        lambda n, x: n.head(n.rnn(n.embed(x))[0][:, -1]),
        embed=nn.Linear(4, 16),
        rnn=nn.LSTM(16, 32, batch_first=True),
        head=nn.Linear(32, 1),
    )
    named = list(net.named_parameters())
    decay = [p for k, p in named if (".weight" in k if fixed else k.endswith(".weight"))]
    no_decay = [p for k, p in named if (".bias" in k if fixed else k.endswith(".bias"))]
    optimizer = AdamW([{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}], 4e-3)

    def batch(i: int) -> tuple[Tensor, ...]:
        x = torch.randn(32, 20, 4, generator=draw(711, i))
        return x, x[:, -1:, 0] * x[:, -2:-1, 1] + x[:, -3:-2, 2]

    return train(net, optimizer, fit(batch, mse))


class Gated(nn.Module):
    """A dilated causal convolution with a gate, as in WaveNet."""

    def __init__(self, channels: int, dilation: int, *, skip: bool) -> None:
        """Make it, with a residual connection or without."""
        super().__init__()
        self.filter, self.gate = (Causal(channels, channels, 2, dilation=dilation) for _ in range(2))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated convolution, added to the input if there is a residual connection."""
        z = torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))
        return x + z if self.skip else z


@faulty(
    "vanishing-depth",
    "stalled",
    source="GitHub ibab/tensorflow-wavenet issues 136 and 65: loss stuck at that of a constant; "
    "there after other causes, here a stack written without its residual connections",
    places=("first", "stack"),
    words="residual|skip|initial|norm|activation|shallow",
    steps=150,
)
def vowels_by_gated_convolutions(*, fixed: bool) -> Training:
    """Tell vowels by their two formants with twelve gated convolutions that have no residual connections."""
    net = Net(
        lambda n, x: n.head(n.stack(n.first(x.transpose(1, 2)))[:, :, -1]),
        first=nn.Conv1d(1, 16, 1),
        stack=nn.Sequential(*(Gated(16, 2 ** (k % 6), skip=fixed) for k in range(12))),
        head=nn.Linear(16, 4),
    )
    time = torch.arange(48)

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(712, i)
        y = torch.randint(4, (16,), generator=g)
        phase = 6.3 * torch.rand(2, 16, 1, generator=g)
        low, high = (0.3 + 0.25 * (y // 2))[:, None], (1.2 + 0.7 * (y % 2))[:, None]
        x = torch.sin(low * time + phase[0]) + torch.sin(high * time + phase[1])
        return (x + 0.2 * torch.randn(16, 48, generator=g))[:, :, None], y

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, xent))


# --- healthy ---


@healthy(
    source="GitHub tensorflow/addons pull request 1811: an echo state layer whose recurrence is never trained",
    steps=200,
)
def reservoir_with_a_readout() -> Training:
    """Train only the readout of a random recurrence, which is frozen and runs under no_grad on purpose."""

    def does(n: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            states = n.reservoir(x)[0][:, 20:]
        return n.readout(states)

    net = Net(does, reservoir=nn.RNN(1, 64, batch_first=True), readout=nn.Linear(64, 1))
    net.reservoir.requires_grad_(False)
    w = net.reservoir.weight_hh_l0
    w.normal_().mul_(0.9 / torch.linalg.eigvals(w).abs().max())

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(721, i)
        t = torch.arange(81) * 0.3 + 6 * torch.rand(16, 1, generator=g)
        x = torch.sin(t) + 0.5 * torch.sin(2.3 * t + 1)
        return x[:, :80, None], x[:, 21:, None]

    return train(net, Adam(net.readout.parameters(), 1e-2), fit(batch, mse))


@healthy(source="GitHub pytorch/tutorials issue 501: the decoder is fed topi.squeeze().detach()", steps=250)
def decoder_fed_its_own_words() -> Training:
    """Decode by attention over an encoder, and feed each step with the word of the step before, by argmax, detached."""

    def does(n: Any, ids: Tensor) -> Tensor:
        memory, state = n.encoder(n.words(ids) + n.places.weight)
        h, word, out = state[0], torch.full((len(ids),), 10), []
        for t in range(5):
            h = n.cell(n.targets(word) + n.places.weight[t], h)
            weights = torch.softmax((memory @ n.query(h)[..., None])[..., 0], 1)
            logits = n.out(torch.cat([h, (weights[..., None] * memory).sum(1)], 1))
            word = logits.topk(1).indices.squeeze(1).detach()
            out.append(logits)
        return torch.stack(out, 2)

    net = Net(
        does,
        words=nn.Embedding(10, 32),
        places=nn.Embedding(5, 32),
        encoder=nn.GRU(32, 32, batch_first=True),
        targets=nn.Embedding(11, 32),
        cell=nn.GRUCell(32, 32),
        query=nn.Linear(32, 32),
        out=nn.Linear(64, 10),
    )
    translation = torch.randperm(10, generator=draw(722, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        ids = torch.randint(10, (48, 5), generator=draw(722, i))
        return ids, translation[ids]

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent), clip=1.0)


@healthy(
    source="PyTorch forums, 'Implementing truncated backpropagation through time', for streams", horizon=3, steps=250
)
def ticks_as_they_stream_in() -> Training:
    """Update after every six ticks of 16 streams, with the state carried over and detached; the need is three ticks."""
    net = Net(lambda n, x, h: n.cell(x, h), cell=nn.GRUCell(2, 32), head=nn.Linear(32, 1))
    held = [torch.zeros(16, 32), torch.zeros(16, 2, 2)]

    def loss_of(model: Any, i: int) -> Tensor:
        h, past = held
        x = torch.randn(16, 6, 2, generator=draw(723, i))
        series = torch.cat([past, x], 1)
        total = torch.zeros(())
        for t in range(6):
            h = model(x[:, t], h)
            want = series[:, t + 2, :1] - 0.5 * series[:, t + 1, 1:] + 0.7 * series[:, t, :1]
            total = total + mse(model.head(h), want) / 6
        held[:] = h.detach(), x[:, -2:]
        return total

    return train(net, Adam(net.parameters(), 6e-3), loss_of)


@healthy(source="practice of sound event detection: attention pooling over a whole recording", horizon=120, steps=120)
def recording_with_one_event() -> Training:
    """Find a short event anywhere in 120 frames with a stock GRU and attention over all of its states."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.gru(x)[0]
        return n.head((torch.softmax(n.score(h), 1) * h).sum(1))

    net = Net(
        does,
        gru=nn.GRU(5, 24, batch_first=True),
        score=nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1)),
        head=nn.Linear(24, 4),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(724, i)
        y, at = torch.randint(4, (16,), generator=g), torch.randint(115, (16,), generator=g)
        x = 0.4 * torch.randn(16, 120, 5, generator=g)
        for k in range(5):
            x[torch.arange(16), at + k, y] += 2.0
            x[torch.arange(16), at + k, 4] += 2.0
        return x, y

    return train(net, Adam(net.parameters(), 8e-3), fit(batch, xent), clip=1.0)


@healthy(
    source="GitHub cyprienruffino/CTCModel issue 12: nothing but blanks at first, a plateau, then it learns", steps=200
)
def letters_without_alignment() -> Training:
    """Transcribe frames by a strided convolution and a bidirectional GRU under the CTC loss."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = torch.relu(n.conv(x.transpose(1, 2))).transpose(1, 2)
        return functional.log_softmax(n.letters(n.gru(h)[0]), 2)

    net = Net(
        does,
        conv=nn.Conv1d(8, 24, 4, stride=4),
        gru=nn.GRU(24, 24, batch_first=True, bidirectional=True),
        letters=nn.Linear(48, 6),
    )
    sounds = torch.randn(6, 8, generator=draw(725, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(725, i)
        y = torch.randint(1, 6, (24, 5), generator=g)
        x = 0.5 * torch.randn(24, 80, 8, generator=g)
        for k in range(5):
            x[:, 16 * k : 16 * k + 10] += sounds[y[:, k]][:, None]
        lengths = torch.full((24,), 20), torch.full((24,), 5)
        return functional.ctc_loss(model(x).transpose(0, 1), y, *lengths)

    return train(net, Adam(net.parameters(), 5e-3), loss_of, clip=5.0)


@healthy(
    source="GitHub Atcold/NYU-DLSP20 pull request 19: padded before the sequence, read at its last step", horizon=6
)
def sentences_padded_in_front() -> Training:
    """Read the newest state of short sentences that stand behind much padding: most steps hold nothing."""
    net = Net(
        lambda n, ids: n.head(n.gru(n.embed(ids))[0][:, -1]),
        embed=nn.Embedding(30, 16, padding_idx=0),
        gru=nn.GRU(16, 32, batch_first=True),
        head=nn.Linear(32, 2),
    )
    liking = torch.randn(30, generator=draw(726, -1))

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(726, i)
        ids = torch.randint(1, 30, (32, 60), generator=g)
        ids[torch.arange(60) < 60 - torch.randint(6, 16, (32, 1), generator=g)] = 0
        return ids, (liking[ids[:, -6:]].sum(1) > 0).long()

    return train(net, Adam(net.parameters(), 5e-3), fit(batch, xent))


@healthy(source="GitHub bentrevett/pytorch-pos-tagging issue 8; nn.Embedding.from_pretrained, which freezes by default")
def tagger_with_given_vectors() -> Training:
    """Tag each word with two packed bidirectional layers, dropout between them, over frozen word vectors."""

    def does(n: Any, ids: Tensor) -> Tensor:
        lengths = (ids != 0).sum(1)
        packed = pack_padded_sequence(n.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        return n.tag(pad_packed_sequence(n.lstm(packed)[0], batch_first=True, total_length=14)[0]).transpose(1, 2)

    net = Net(
        does,
        embed=nn.Embedding.from_pretrained(torch.randn(40, 16), padding_idx=0),
        lstm=nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True, dropout=0.3),
        tag=nn.Linear(48, 5),
    )
    word = torch.randint(5, (40,), generator=draw(727, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(727, i)
        ids = torch.randint(1, 40, (32, 14), generator=g)
        ids[torch.arange(14) >= torch.randint(3, 15, (32, 1), generator=g)] = 0
        following = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
        tags = torch.where(following % 4 == 1, (word[ids] + 1) % 5, word[ids]).masked_fill(ids == 0, -100)
        return functional.cross_entropy(model(ids), tags, ignore_index=-100)

    return train(net, Adam([p for p in net.parameters() if p.requires_grad], 5e-3), loss_of)


@healthy(
    source="GitHub microsoft/torchscale issue 79 and state-spaces/mamba issue 197: slow decays on purpose",
    horizon=200,
    steps=120,
)
def regime_two_hundred_bars_ago() -> Training:
    """Tell the regime of the first 30 of 200 bars by a linear recurrence that has some decays slow enough."""

    def does(n: Any, x: Tensor) -> Tensor:
        h = n.inp(x)
        return n.head((h + n.memory(h))[:, -1])

    net = Net(
        does,
        inp=nn.Linear(3, 24),
        memory=Decaying(24, lasting(24, 1000)),
        head=nn.Linear(24, 2),
    )

    def batch(i: int) -> tuple[Tensor, ...]:
        g = draw(728, i)
        y = torch.randint(2, (32,), generator=g)
        x = torch.randn(32, 200, 3, generator=g)
        x[:, :30, 0] += 1.2 * (2.0 * y - 1)[:, None]
        return x, y

    return train(net, Adam(net.parameters(), 3e-3), fit(batch, xent), clip=1.0)
