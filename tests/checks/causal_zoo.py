"""Models that look ahead and models that do not: each is built by a function, and comes with its batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

ROWS, STEPS, FEATURES, WIDTH = 3, 24, 4, 8


class Apply(nn.Module):
    """A function of its input, between two layers that work on each timestep alone."""

    def __init__(self, function):
        super().__init__()
        self.before, self.after, self.function = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 2), function

    def forward(self, x):
        return self.after(torch.tanh(self.function(torch.tanh(self.before(x)))))


class First(nn.Module):
    """A recurrent module, of which the outputs are taken."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size * (2 if recurrent.bidirectional else 1), 1)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


class Channels(nn.Module):
    """Layers that take (rows, channels, timesteps), for what is (rows, timesteps, features)."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


class CausalConv(nn.Module):
    def __init__(self, inputs, outputs, kernel, dilation=1):
        super().__init__()
        self.pad = (kernel - 1) * dilation
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation)

    def forward(self, x):
        return self.conv(functional.pad(x, (self.pad, 0)))


class Chomped(nn.Module):
    """The other way: padding on both sides, and the end cut off."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel - 1)
        self.cut = kernel - 1

    def forward(self, x):
        return self.conv(x)[..., : -self.cut]


class Attention(nn.Module):
    def __init__(self, mask, kind="multihead"):
        super().__init__()
        self.mask, self.kind = mask, kind
        self.inward = nn.Linear(FEATURES, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.outward = nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = self.inward(x)
        mask = self.mask(h.shape[1]).to(h) if self.mask else None
        if self.kind == "multihead":
            h = self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        elif self.kind == "sdpa":
            h = functional.scaled_dot_product_attention(h, h, h, is_causal=self.mask is not None)
        else:
            scores = h @ h.transpose(1, 2) / WIDTH**0.5
            h = torch.softmax(scores if mask is None else scores + mask, -1) @ h
        return self.outward(h)


def square(steps):
    return torch.full((steps, steps), float("-inf")).triu(1)


def large(steps):
    return torch.full((steps, steps), -1e9).triu(1)


def weak(steps):  # leaves e^-5 of what lies ahead
    return torch.full((steps, steps), -5.0).triu(1)


def late(steps):  # off by one
    return torch.full((steps, steps), float("-inf")).triu(2)


class Transformer(nn.Module):
    def __init__(self, *, mask):
        super().__init__()
        self.inward, self.outward, self.mask = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 1), mask
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        mask = square(x.shape[1]).to(x) if self.mask else None
        return self.outward(self.layers(self.inward(x), mask=mask))


class Words(nn.Module):
    def __init__(self, inner, *, onehot=False):
        super().__init__()
        self.embedding, self.inner, self.onehot = nn.Embedding(20, FEATURES), inner, onehot
        self.wide = nn.Linear(20, FEATURES)

    def forward(self, tokens):
        x = self.wide(functional.one_hot(tokens, 20).to(self.wide.weight)) if self.onehot else self.embedding(tokens)
        return self.inner(x)


class Packed(nn.Module):
    """Rows of other lengths; gives what it packs, padded again."""

    def __init__(self, *, bidirectional):
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, WIDTH, batch_first=True, bidirectional=bidirectional)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class FFT(nn.Module):
    """A long convolution by FFT; padded to twice its length, or going around."""

    def __init__(self, *, padded):
        super().__init__()
        self.inward, self.kernel, self.padded = (
            nn.Linear(FEATURES, WIDTH),
            nn.Parameter(torch.randn(STEPS, WIDTH)),
            padded,
        )

    def forward(self, x):
        h = self.inward(x)
        n = h.shape[1] * (2 if self.padded else 1)
        product = torch.fft.rfft(h, n, dim=1) * torch.fft.rfft(self.kernel, n, dim=0)
        return torch.fft.irfft(product, n, dim=1)[:, : h.shape[1]]


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(FEATURES, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        state, found = x.new_zeros(len(x), WIDTH), []
        for step in x.unbind(1):
            state = self.cell(step, state)
            found.append(self.head(state))
        return torch.stack(found, 1)


class Listed(Loop):
    def forward(self, x):
        return list(super().forward(x).unbind(1))


class TimeFirst(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.gru = nn.GRU(FEATURES, WIDTH, **options)

    def forward(self, x):
        return {"states": self.gru(x)[0]}


class Dilated(nn.Module):
    """WaveNet: dilated causal convolutions with gates, and skip connections."""

    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(FEATURES, WIDTH)
        self.layers = nn.ModuleList(CausalConv(WIDTH, 2 * WIDTH, 2, 2**i) for i in range(3))

    def forward(self, x):
        h = self.inward(x).transpose(1, 2)
        skip = 0
        for layer in self.layers:
            gate, value = layer(h).chunk(2, 1)
            h = h + torch.sigmoid(gate) * torch.tanh(value)
            skip = skip + h
        return skip.transpose(1, 2)


class Mixer(nn.Module):
    """A linear layer along time."""

    def __init__(self, *, masked):
        super().__init__()
        self.mix, self.masked = nn.Linear(STEPS, STEPS), masked

    def forward(self, x):
        weight = self.mix.weight.tril() if self.masked else self.mix.weight
        return functional.linear(x.transpose(1, 2), weight, self.mix.bias).transpose(1, 2)


class MeanPart(nn.Module):
    """The mean up to now, which one may know."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(x).unsqueeze(-1)


class Sign(nn.Module):
    """What has no gradient: the sign of the next change."""

    def __init__(self, ahead):
        super().__init__()
        self.ahead, self.head = ahead, nn.Linear(FEATURES, 1)

    def forward(self, x):
        change = torch.sign(x.roll(-self.ahead, 1) - x) if self.ahead else torch.sign(x - x.roll(1, 1) * 0)
        return self.head(change)


class Rank(nn.Module):
    """The rank of a value in the whole window."""

    def forward(self, x):
        return x.argsort(1).argsort(1).to(x) / x.shape[1]


class Reversed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(FEATURES, WIDTH, batch_first=True), nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.head(self.gru(x.flip(1))[0]).flip(1)


class Decided(nn.Module):
    """Gives whole numbers: what to do at each timestep."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).argmax(-1)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(FEATURES)

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 1))

    def forward(self, x):
        return self.inner(x)


def series():
    return torch.randn(ROWS, STEPS, FEATURES)


def padded():
    lengths = torch.tensor([STEPS, 15, 9])
    x = series()
    for row, length in enumerate(lengths):
        x[row, length:] = 0
    return x, lengths


def tokens():
    return torch.randint(20, (ROWS, STEPS))


CAUSAL = {
    "lstm": (lambda: First(nn.LSTM(FEATURES, WIDTH, 2, batch_first=True)), series),
    "gru": (lambda: First(nn.GRU(FEATURES, WIDTH, batch_first=True)), series),
    "rnn": (lambda: First(nn.RNN(FEATURES, WIDTH, batch_first=True)), series),
    "time first": (TimeFirst, lambda: torch.randn(STEPS, ROWS, FEATURES)),
    "cell in a loop": (Loop, series),
    "list of timesteps": (Listed, series),
    "causal convolution": (
        lambda: Channels(CausalConv(FEATURES, WIDTH, 3), nn.ReLU(), CausalConv(WIDTH, 1, 3)),
        series,
    ),
    "chomped convolution": (lambda: Channels(Chomped(FEATURES, WIDTH, 3)), series),
    "wavenet": (Dilated, series),
    "convolution by fft": (lambda: FFT(padded=True), series),
    "masked attention": (lambda: Attention(square), series),
    "mask of -1e9": (lambda: Attention(large, "by hand"), series),
    "scaled_dot_product_attention": (lambda: Attention(square, "sdpa"), series),
    "transformer": (lambda: Transformer(mask=True), series),
    "each timestep alone": (lambda: nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)), series),
    "cumulative mean": (MeanPart, series),
    "cumulative maximum": (lambda: Apply(lambda h: h.cummax(1).values), series),
    "layer norm over features": (lambda: Residual(nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(4, 4))), series),
    "batch norm in evaluation": (lambda: Channels(nn.Conv1d(FEATURES, WIDTH, 1), nn.BatchNorm1d(WIDTH)), series),
    "embedded tokens": (lambda: Words(First(nn.GRU(FEATURES, WIDTH, batch_first=True))), tokens),
    "one-hot tokens": (lambda: Words(First(nn.GRU(FEATURES, WIDTH, batch_first=True)), onehot=True), tokens),
    "packed rows": (lambda: Packed(bidirectional=False), padded),
    "lagged": (lambda: Apply(lambda h: functional.pad(h, (0, 0, 1, 0))[:, :-1]), series),
    "masked mixer": (lambda: Mixer(masked=True), series),
    "decisions": (lambda: Decided(Apply(lambda h: h.cumsum(1))), series),
    "dropout": (Dropout, series),
}

LEAKING = {
    "bidirectional lstm": (lambda: First(nn.LSTM(FEATURES, WIDTH, batch_first=True, bidirectional=True)), series),
    "bidirectional gru, time first": (
        lambda: TimeFirst(bidirectional=True),
        lambda: torch.randn(STEPS, ROWS, FEATURES),
    ),
    "bidirectional, packed rows": (lambda: Packed(bidirectional=True), padded),
    "centred convolution": (lambda: Channels(nn.Conv1d(FEATURES, WIDTH, 3, padding=1)), series),
    "same padding": (lambda: Channels(nn.Conv1d(FEATURES, WIDTH, 5, padding="same", dilation=2)), series),
    "one centred among causal ones": (
        lambda: Channels(
            CausalConv(FEATURES, WIDTH, 3), nn.Conv1d(WIDTH, WIDTH, 3, padding=1), CausalConv(WIDTH, 1, 3)
        ),
        series,
    ),
    "attention without a mask": (lambda: Attention(None), series),
    "attention by hand": (lambda: Attention(None, "by hand"), series),
    "weak mask": (lambda: Attention(weak, "by hand"), series),
    "mask off by one": (lambda: Attention(late), series),
    "transformer without a mask": (lambda: Transformer(mask=False), series),
    "normalization over the window": (
        lambda: Apply(lambda h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True)),
        series,
    ),
    "instance norm": (lambda: Channels(nn.InstanceNorm1d(FEATURES)), series),
    "group norm": (lambda: Channels(nn.GroupNorm(2, FEATURES)), series),
    "layer norm over time": (lambda: Channels(nn.LayerNorm(STEPS)), series),
    "batch norm without statistics": (lambda: Channels(nn.BatchNorm1d(FEATURES, track_running_stats=False)), series),
    "reversed": (Reversed, series),
    "mean given back": (lambda: Apply(lambda h: h + h.mean(1, keepdim=True)), series),
    "maximum given back": (lambda: Apply(lambda h: h / h.abs().amax(1, keepdim=True)), series),
    "cumsum the wrong way": (lambda: Apply(lambda h: h.flip(1).cumsum(1).flip(1)), series),
    "next value": (lambda: Apply(lambda h: h.roll(-1, 1)), series),
    "last value": (lambda: Apply(lambda h: h + 0.01 * h[:, -1:]), series),
    "interpolation": (
        lambda: Channels(nn.AvgPool1d(4), nn.Upsample(scale_factor=4, mode="linear")),
        series,
    ),
    "circular fft": (lambda: FFT(padded=False), series),
    "mixer": (lambda: Mixer(masked=False), series),
    "sign of the next change": (lambda: Sign(1), series),
    "rank in the window": (Rank, series),
    "embedded tokens, both ways": (
        lambda: Words(First(nn.GRU(FEATURES, WIDTH, batch_first=True, bidirectional=True))),
        tokens,
    ),
    "one-hot tokens, both ways": (
        lambda: Words(First(nn.GRU(FEATURES, WIDTH, batch_first=True, bidirectional=True)), onehot=True),
        tokens,
    ),
    "squeeze and excitation": (
        lambda: Apply(
            lambda h: h * torch.sigmoid(functional.adaptive_avg_pool1d(h.transpose(1, 2), 1)).transpose(1, 2)
        ),
        series,
    ),
    "chunks": (
        lambda: Apply(
            lambda h: (
                h.unflatten(1, (6, 4)).cumsum(2).flatten(1, 2) + h.unflatten(1, (6, 4)).mean(2).repeat_interleave(4, 1)
            )
        ),
        series,
    ),
}
