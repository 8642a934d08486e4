"""Sequence modules that are seen by what they do: which they are, and their gradients through time."""

from __future__ import annotations

import contextlib
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from truth import bits

import gradwatch
from gradwatch.sinks.tensorboard.scalars import scalars
from gradwatch.timesteps.mixing import Seen
from gradwatch.timesteps.structure import Structure
from gradwatch.values.sequences import SequenceStats, sentences, shortest

B, T, F, H = 4, 24, 3, 8


# --- modules of somebody's own ---


class Peephole(nn.Module):
    """A cell of an LSTM whose gates see its memory (Gers and Schmidhuber, 2000)."""

    def __init__(self, inputs):
        super().__init__()
        self.of, self.on = nn.Linear(inputs, 4 * H), nn.Linear(H, 4 * H)
        self.peep = nn.Parameter(0.1 * torch.randn(3, H))

    def forward(self, x, state):
        h, c = state
        i, f, g, o = (self.of(x) + self.on(h)).chunk(4, -1)
        c = (f + self.peep[0] * c).sigmoid() * c + (i + self.peep[1] * c).sigmoid() * g.tanh()
        return (o + self.peep[2] * c).sigmoid() * c.tanh(), c


class NormalizedLstm(nn.Module):
    """A cell of an LSTM with layer normalization (Ba, Kiros and Hinton, 2016)."""

    def __init__(self, inputs):
        super().__init__()
        self.of, self.on = nn.Linear(inputs, 4 * H), nn.Linear(H, 4 * H)
        self.norm, self.last = nn.LayerNorm(4 * H), nn.LayerNorm(H)

    def forward(self, x, state):
        h, c = state
        i, f, g, o = self.norm(self.of(x) + self.on(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.last(c).tanh(), c


class NormalizedGru(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.of, self.on, self.norm = nn.Linear(inputs, 3 * H), nn.Linear(H, 3 * H), nn.LayerNorm(3 * H)

    def forward(self, x, h):
        r, z, n = self.norm(self.of(x)).chunk(3, -1)
        r2, z2, n2 = self.on(h).chunk(3, -1)
        z = (z + z2).sigmoid()
        return (1 - z) * (n + (r + r2).sigmoid() * n2).tanh() + z * h


class Inside(nn.Module):
    """A cell that calls modules of its own, each of them once a timestep too."""

    def __init__(self, inputs):
        super().__init__()
        self.gate = NormalizedGru(inputs)

    def forward(self, x, h):
        return 0.5 * h + 0.5 * self.gate(x, h)


class Loop(nn.Module):
    """Calls a cell once a timestep; `between` is done with the state."""

    def __init__(self, cell, *, pair=False, between=None):
        super().__init__()
        self.cell, self.pair, self.between = cell, pair, between or nn.Identity()

    def forward(self, x):
        h = x.new_zeros(len(x), H)
        state, given = ((h, h) if self.pair else h), []
        for now in x.unbind(1):
            state = self.cell(now, state)
            given.append(state[0] if self.pair else state)
            state = state if self.pair else self.between(state)
        return torch.stack(given, 1)


class OwnLayer(nn.Module):
    """A recurrent layer without a module for its cell."""

    def __init__(self, inputs):
        super().__init__()
        self.of, self.on = nn.Linear(inputs, H), nn.Linear(H, H)

    def forward(self, x):
        h, given = x.new_zeros(len(x), H), []
        for t in range(x.shape[1]):
            h = (self.of(x[:, t]) + self.on(h)).tanh()
            given.append(h)
        return torch.stack(given, 1)


class Written(OwnLayer):
    """The same, with its outputs written one after the other, behind the state that it begins with."""

    def forward(self, x):
        states = x.new_zeros(len(x), x.shape[1] + 1, H)
        for t in range(x.shape[1]):
            states[:, t + 1] = (self.of(x[:, t]) + self.on(states[:, t].clone())).tanh()
        return states[:, 1:].unflatten(-1, (2, H // 2)).transpose(1, 2), states[:, -1]


class Sru(nn.Module):
    """A simple recurrent unit (Lei et al., 2018)."""

    def __init__(self, inputs):
        super().__init__()
        self.of = nn.Linear(inputs, 3 * H)

    def forward(self, x):
        z, f, r = self.of(x).chunk(3, -1)
        c, given = torch.zeros_like(z[:, 0]), []
        for t in range(x.shape[1]):
            c = f[:, t].sigmoid() * c + (1 - f[:, t].sigmoid()) * z[:, t]
            given.append(r[:, t].sigmoid() * c.tanh())
        return torch.stack(given, 1)


class Qrnn(nn.Module):
    """A quasi-recurrent network (Bradbury et al., 2017)."""

    def __init__(self, inputs):
        super().__init__()
        self.window = nn.Conv1d(inputs, 3 * H, 2)

    def forward(self, x):
        z, f, o = self.window(functional.pad(x.mT, (1, 0))).mT.chunk(3, -1)
        h, given = torch.zeros_like(z[:, 0]), []
        for t in range(x.shape[1]):
            h = f[:, t].sigmoid() * h + (1 - f[:, t].sigmoid()) * z[:, t].tanh()
            given.append(o[:, t].sigmoid() * h)
        return torch.stack(given, 1)


class MinGru(nn.Module):
    """By a scan over logarithms (Feng et al., 2024)."""

    def __init__(self, inputs):
        super().__init__()
        self.of = nn.Linear(inputs, 2 * H)

    def forward(self, x):
        z, h = self.of(x).chunk(2, -1)
        kept = -functional.softplus(z).cumsum(1)
        return (kept + (functional.softplus(h).log() - functional.softplus(-z) - kept).logcumsumexp(1)).exp()


class LongConvolution(nn.Module):
    """With a kernel as long as the sequence, through its spectrum."""

    def __init__(self, inputs):
        super().__init__()
        self.kernel = nn.Parameter(0.1 * torch.randn(T, inputs))

    def forward(self, x):
        spectra = (torch.fft.rfft(v, n=2 * T, dim=-2) for v in (x, self.kernel))
        return torch.fft.irfft(math.prod(spectra, start=1), n=2 * T, dim=1)[:, :T]


class HalvingScan(nn.Module):
    """A cumulative sum by halves of halves, as parallel scans are done."""

    def __init__(self, inputs):
        super().__init__()
        self.of = nn.Linear(inputs, H)

    def forward(self, x):
        return self.scan(self.of(x))

    def scan(self, x):
        if x.shape[1] < 2:
            return x
        odd = self.scan(x[:, :-1:2] + x[:, 1::2])
        even = torch.cat([x[:, :1], odd[:, : (x.shape[1] - 1) // 2] + x[:, 2::2]], 1)
        both = torch.stack([even[:, : odd.shape[1]], odd], 2).flatten(1, 2)
        return torch.cat([both, even[:, odd.shape[1] :]], 1)


class Doubled(torch.autograd.Function):
    """Adds up along time, in a way that nobody can look into."""

    @staticmethod
    def forward(_ctx, x):
        return x.cumsum(1)

    @staticmethod
    def backward(_ctx, gradient):
        return gradient.flip(1).cumsum(1).flip(1)


class Fused(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.of = nn.Linear(inputs, 2 * H)

    def forward(self, x):
        return Doubled.apply(self.of(x).unflatten(-1, (H, 2))).sum(-1)


class Attention(nn.Module):
    def __init__(self, inputs, *, linear=False):
        super().__init__()
        self.of, self.linear = nn.Linear(inputs, 3 * H), linear

    def forward(self, x):
        q, k, v = self.of(x).chunk(3, -1)
        if self.linear:
            return q.softmax(-1) @ (k.softmax(1).mT @ v)
        return (q @ k.mT).softmax(-1) @ v


class Feedforward(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(inputs, 2 * H), nn.LayerNorm(2 * H), nn.Linear(2 * H, inputs)

    def forward(self, x):
        return x + self.down(self.norm(self.up(x)).relu())


class Channels(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.mT).mT


class ByKeyword(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.into, self.inner = nn.Linear(F, F), inner

    def forward(self, x):
        return self.inner(x=self.into(x))


class Newest(nn.Module):
    """A module, and a readout of its newest output."""

    def __init__(self, body, *, time=1):
        super().__init__()
        self.body, self.head, self.time = body, nn.LazyLinear(2), time

    def forward(self, x):
        given = self.body(x)
        return self.head((given[0] if isinstance(given, tuple) else given).select(self.time, -1))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(H, 2, 2 * H, dropout=0.1, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class SelfAttention(nn.Module):
    """Of torch's own, fed with the data: query, key and value are one tensor."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(F, 1, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def behind(make):
    return lambda: nn.Sequential(nn.Linear(F, H), make(H))


CELLS = {"body": "loop", "body.cell": "cell"}
SEEN = {
    "peephole lstm": (lambda: Loop(Peephole(F), pair=True), CELLS),
    "normalized lstm": (lambda: Loop(NormalizedLstm(F), pair=True), CELLS),
    "normalized gru": (lambda: Loop(NormalizedGru(F)), CELLS),
    "a cell in a cell": (lambda: Loop(Inside(F)), CELLS),
    "a state that is changed between": (
        lambda: Loop(NormalizedGru(F), between=nn.Sequential(nn.Dropout(0.2), nn.Tanh())),
        CELLS,
    ),
    "cells behind a layer": (behind(lambda n: Loop(NormalizedGru(n))), {"body.1": "loop", "body.1.cell": "cell"}),
    "a layer of one's own": (lambda: OwnLayer(F), {"body": "loop"}),
    "outputs that are written": (lambda: Written(F), {"body": "loop"}),
    "by keyword": (lambda: ByKeyword(Attention(F)), {"body.inner": "attention"}),
    "sru": (behind(Sru), {"body.1": "loop"}),
    "qrnn": (behind(Qrnn), {"body.1": "loop", "body.1.window": "convolution"}),
    "mingru": (lambda: MinGru(F), {"body": "scan"}),
    "long convolution": (behind(LongConvolution), {"body.1": "scan"}),
    "parallel scan": (behind(HalvingScan), {"body.1": "scan"}),
    "a kernel of one's own": (behind(Fused), {"body.1": "scan"}),
    "attention": (behind(Attention), {"body.1": "attention"}),
    "linear attention": (behind(lambda n: Attention(n, linear=True)), {"body.1": "attention"}),
    "torch's attention": (SelfAttention, {"body.attention": "attention"}),
    "encoder": (
        behind(lambda _: encoder(batch_first=True)),
        {"body.1.layers.0.self_attn": "attention", "body.1.layers.1.self_attn": "attention"},
    ),
    "convolutions": (
        lambda: Channels(nn.Conv1d(F, H, 3, padding=1), nn.ReLU(), nn.Conv1d(H, H, 3, padding=4, dilation=4)),
        {"body.layers.0": "convolution", "body.layers.2": "convolution"},
    ),
}


class Grouped(nn.Module):
    """A product with weights that are expanded to the batch: it sums over features."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(F, F))

    def forward(self, x):
        return torch.bmm(x, self.weight.expand(len(x), F, F))


class Interleaved(nn.Module):
    """Turns pairs of features, as rotary positions do."""

    def forward(self, x):
        return torch.stack([x[..., ::2] * 2, x[..., 1::2]], -1).flatten(-2)


class ByColumn(nn.Module):
    """A network for each feature."""

    def __init__(self, features):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(1, 1) for _ in range(features))

    def forward(self, x):
        return torch.cat([net(x[..., i : i + 1]) for i, net in enumerate(self.each)], -1)


class ByChannel(nn.Module):
    """A linear layer along time for each feature (DLinear's individual ones): it mixes, but feeds nothing back."""

    def __init__(self, features):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(1, 1) for _ in range(features))

    def forward(self, x):
        return torch.stack([net(x[..., i].unsqueeze(-1)).squeeze(-1) for i, net in enumerate(self.each)], -1)


class Hyper(nn.Module):
    """Multiplies features with a matrix of their own for each row."""

    def __init__(self, features):
        super().__init__()
        self.weights = nn.Linear(features, features * features)

    def forward(self, x):
        return torch.bmm(x, self.weights(x.mean(1)).view(len(x), x.shape[-1], -1))


class Depths(nn.Module):
    """Mixes what eight layers give."""

    def __init__(self, features):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(features, features) for _ in range(8))
        self.share = nn.Parameter(torch.randn(8))

    def forward(self, x):
        given = []
        for layer in self.each:
            x = layer(x).tanh()
            given.append(x)
        return (torch.stack(given) * self.share.view(-1, 1, 1, 1)).sum(0)


class Quantiles(nn.Module):
    def forward(self, x):
        return x.exp().cumsum(-1)


class ByRow(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, x):
        return torch.stack([self.linear(row) for row in x])


class HalvedOnce(nn.Module):
    """Leaves every second timestep out, and gives the others twice."""

    def forward(self, x):
        return (2 * x[:, ::2]).repeat_interleave(2, 1)


class Pictures(nn.Module):
    """Adds up along the rows of a picture, within a network for sequences."""

    def forward(self, x):
        return x.unflatten(-1, (3, 4)).cumsum(1)


class OnPictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Pictures()

    def forward(self, x):
        return self.inner(x.unflatten(1, (4, 6))).flatten(1, 2).flatten(-2)


W = 12
UNSEEN = {
    "halved once": lambda: nn.Sequential(nn.Linear(F, W), HalvedOnce()),
    "pictures": lambda: nn.Sequential(nn.Linear(F, W), OnPictures()),
    "interleaved": lambda: nn.Sequential(nn.Linear(F, W), Interleaved()),
    "by column": lambda: nn.Sequential(nn.Linear(F, W), ByColumn(W)),
    "by channel": lambda: nn.Sequential(nn.Linear(F, W), ByChannel(W)),
    "a network that makes weights": lambda: nn.Sequential(nn.Linear(F, W), Hyper(W)),
    "depths": lambda: nn.Sequential(nn.Linear(F, W), Depths(W)),
    "quantiles": lambda: nn.Sequential(nn.Linear(F, W), Quantiles()),
    "rows": lambda: nn.Sequential(nn.Linear(F, W), ByRow(W)),
    "weights for each row": lambda: nn.Sequential(nn.Linear(F, F), Grouped()),
    "feedforward": lambda: nn.Sequential(nn.Linear(F, H), Feedforward(H), nn.LayerNorm(H)),
    "windows of one": lambda: Channels(nn.Conv1d(F, H, 1), nn.BatchNorm1d(H)),
    "torch's recurrent": lambda: nn.LSTM(F, H, batch_first=True),
    "in steps of several": lambda: Channels(nn.Conv1d(F, H, 4, stride=4)),
}


def build(make, **options):
    torch.manual_seed(0)
    model = Newest(make(), **options)
    model(torch.randn(B, T, F))
    return model


def watching(model, optimizer, reports):
    return gradwatch.watch(
        model, optimizer, sinks=[reports.append], probe_every_n_steps=1, every_n_steps=1, on_alert=lambda _: None
    )


def trained(model, x, *, watched, steps=4):
    """Train; return what a watcher saw last, and every bit of what came of it."""
    torch.manual_seed(1)
    optimizer, reports, losses = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), [], []
    watcher = watching(model, optimizer, reports) if watched else None
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        last = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
    if watcher is not None:
        watcher.close()
    seen = reports[-1].snapshot.sequences if reports else None
    return seen or (), bits(
        {"losses": losses, "weights": model.state_dict(), "gradients": last, "random": torch.get_rng_state()}
    )


def seen_at_rest(model, x):
    """Return what a watcher sees of a model whose weights stay as they are."""
    optimizer, reports = torch.optim.SGD(model.parameters(), lr=0.0), []
    with watching(model, optimizer, reports):
        for _ in range(4):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return reports[-1].snapshot.sequences or ()


@pytest.mark.parametrize("name", SEEN)
def test_what_mixes_timesteps_is_seen_and_training_is_the_same_to_the_bit(name):
    make, expected = SEEN[name]
    x = torch.randn(B, T, F)
    _, alone = trained(build(make), x, watched=False)
    seen, watched = trained(build(make), x, watched=True)
    assert watched == alone
    assert {s.module: s.mixing for s in seen if s.mixing} == expected
    lengths = {s.length for s in seen if s.mixing}
    assert lengths <= ({T, T + 1} if name == "qrnn" else {T})


@pytest.mark.parametrize("name", UNSEEN)
def test_what_mixes_none_or_gives_them_not_back_is_not(name):
    for rows in (B, 8):  # as many as there are depths
        seen, _ = trained(build(UNSEEN[name]), torch.randn(rows, T, F), watched=True)
        assert [s.module for s in seen if s.mixing] == []


# --- the gradients ---


def by_autograd(model, x, name):
    """Return what arrives at the inputs and the outputs of a module, call by call, by hooks of torch's own."""
    inputs, hidden, cells = [], [], []

    def keep(tensor, where):
        at = len(where)
        where.append(None)
        tensor.register_hook(lambda g: where.__setitem__(at, g))

    def before(_module, args):
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        keep(x, inputs)
        return (x, *args[1:])

    def after(_module, _args, given):
        for tensor, where in zip(given if isinstance(given, tuple) else (given,), (hidden, cells), strict=False):
            keep(tensor, where)

    module = model.get_submodule(name)
    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    model(x).square().mean().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return [[0.0 if g is None else float(g.norm()) for g in found] for found in (inputs, hidden, cells)]


@pytest.mark.parametrize("cell", [Peephole, NormalizedLstm, NormalizedGru, Inside])
@pytest.mark.parametrize("behind_a_layer", [True, False])
def test_an_own_cell_has_the_total_gradients_of_its_states(cell, behind_a_layer):
    pair = cell in (Peephole, NormalizedLstm)
    into, width = (nn.Linear(F, H), H) if behind_a_layer else (nn.Identity(), F)
    model = build(lambda: nn.Sequential(into, Loop(cell(width), pair=pair))).double()
    x = torch.randn(B, T, F, dtype=torch.float64)
    inputs, hidden, cells = by_autograd(model, x, "body.1.cell")
    (_, whole, part) = seen_at_rest(model, x)
    assert (whole.module, part.module, part.length) == ("body.1.cell", "body.1.cell", T)
    assert part.grad_hidden == pytest.approx(hidden, rel=1e-10)
    if pair:
        assert part.grad_cell == pytest.approx(cells, rel=1e-10)
    if behind_a_layer:
        assert whole.grad_input == pytest.approx(inputs, rel=1e-10)
    else:  # of the data nobody asked for one
        assert whole.grad_input is None
        assert "timesteps=" in whole.note


@pytest.mark.parametrize("name", ["sru", "qrnn", "parallel scan", "a kernel of one's own", "attention", "encoder"])
def test_others_have_the_gradient_of_their_input(name):
    make, expected = SEEN[name]
    model, x = build(make).double().eval(), torch.randn(B, T, F, dtype=torch.float64)
    place = next(iter(expected))
    kept = []
    handle = model.get_submodule(place).register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    (gradient,) = torch.autograd.grad(model(x).square().mean(), kept)
    handle.remove()
    (stats,) = (s for s in seen_at_rest(model, x) if s.module == place)
    assert stats.grad_input == pytest.approx(gradient.norm(dim=(0, 2)).tolist(), rel=1e-10)
    inside = "inside of one call" in (stats.note or "")
    assert inside == (stats.mixing in ("loop", "scan"))


def test_attention_on_the_data_that_is_named_trains_the_same():
    """Query, key and value are one tensor there, which torch's own attention asks."""

    def bits_of(timesteps):
        torch.manual_seed(0)
        model, x = build(SelfAttention), torch.randn(B, T, F)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watcher = timesteps and gradwatch.watch(
            model, optimizer, probe_every_n_steps=1, every_n_steps=1, timesteps=timesteps, on_alert=lambda _: None
        )
        for _ in range(4):
            model(x).square().mean().backward()
            optimizer.step()
        if watcher:
            watcher.close()
        return bits(model.state_dict())

    assert bits_of({"body.attention": 1}) == bits_of(None)


@pytest.mark.parametrize("time_first", [False, True])
def test_an_own_loop_goes_along_its_own_dimension_also_where_the_batch_is_as_long(time_first):
    class Along(nn.Module):
        def __init__(self):
            super().__init__()
            self.of, self.on = nn.Linear(H, H), nn.Linear(H, H)

        def forward(self, x):
            h, given, dim = x.new_zeros(T, H), [], int(not time_first)
            for t in range(T):
                h = (self.of(x.select(dim, t)) + self.on(h)).tanh()
                given.append(h)
            return torch.stack(given, dim)

    torch.manual_seed(0)
    model = Newest(nn.Sequential(nn.Linear(F, H), Along()), time=int(not time_first))
    x = torch.randn(T, T, F)
    model(x)
    kept = []
    handle = model.body[1].register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    (gradient,) = torch.autograd.grad(model(x).square().mean(), kept)
    handle.remove()
    (stats,) = seen_at_rest(model, x)
    other = (1, 2) if time_first else (0, 2)
    assert stats.grad_input == pytest.approx(gradient.norm(dim=other).tolist(), rel=1e-4)


def test_a_cell_that_runs_over_two_sequences_shows_the_last():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = NormalizedGru(F)

        def along(self, x):
            h, given = x.new_zeros(len(x), H), []
            for now in x.unbind(1):
                h = self.cell(now, h)
                given.append(h)
            return torch.stack(given, 1)

        def forward(self, x):
            return torch.cat([self.along(x), self.along(x.flip(1)).flip(1)], -1)

    seen = seen_at_rest(build(Both), torch.randn(B, T, F))
    whole, part = (s for s in seen if s.module == "body.cell")
    assert (whole.length, part.length) == (T, T)
    assert "it ran over 2 sequences" in whole.note


def test_a_mask_may_come_first():
    class Masked(OwnLayer):
        def forward(self, mask, x):
            return super().forward(x) * mask.unsqueeze(-1)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.inner = nn.Linear(F, H), Masked(H)

        def forward(self, x):
            return self.inner(x[..., 0] > -9, self.into(x))

    (stats,) = (s for s in seen_at_rest(build(Outer), torch.randn(B, T, F)) if s.module == "body.inner")
    assert (stats.mixing, len(stats.grad_input)) == ("loop", T)


def test_two_optimizers_that_both_probe_each_step_see_them():
    model, x, reports = build(SEEN["sru"][0]), torch.randn(B, T, F), []
    both = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (model.body, model.head)]
    with watching(model, both, reports):
        for _ in range(5):
            model(x).square().mean().backward()
            for optimizer in both:
                optimizer.step()
    assert {s.mixing for r in reports for s in r.snapshot.sequences or ()} == {"loop"}


def test_a_pass_that_an_exception_ended_keeps_nothing_alive():
    class Failing(nn.Module):
        fails = False

        def forward(self, x):
            if self.fails:
                raise MemoryError
            return x

    model = build(lambda: nn.Sequential(nn.Linear(F, H), Attention(H), Failing()))
    optimizer, alive, x = torch.optim.SGD(model.parameters(), lr=0.0), [], torch.randn(B, T, F)
    model.body[1].register_forward_hook(lambda _m, _a, out: alive.append(weakref.ref(out)))
    with watching(model, optimizer, []):
        for step in range(3):
            if step == 1:  # the first that is looked at
                model.body[2].fails = True
                with contextlib.suppress(MemoryError):
                    model(x)
                model.body[2].fails = False
            model(x).square().mean().backward()
            assert all(tensor() is None for tensor in alive)
            optimizer.step()


# --- what is no business of its own: it changes what it is given, or asks whether that has a gradient ---


class Quiet(OwnLayer):
    def forward(self, x):
        return super().forward(self.prepared(x))


class InPlace(Quiet):
    def prepared(self, x):
        self.step = getattr(self, "step", 0) + 1
        if self.step > 3:
            x[:, :3] = 0
        return x


class Numpy(Quiet):
    def prepared(self, x):
        return x * float((x.numpy() != 0).mean())


class Front(Quiet):
    def prepared(self, x):
        e = x.exp()
        e += 1e-6
        return e.log()


class Running(Quiet):
    def __init__(self, inputs):
        super().__init__(inputs)
        self.register_buffer("mean", torch.zeros(inputs))

    def prepared(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean((0, 1)))
        return x - self.mean


class Asking(Quiet):
    def prepared(self, x):
        return x if x.requires_grad else 2 * x


class Heads(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.of, self.on = nn.Parameter(0.1 * torch.randn(5, inputs, H)), nn.Parameter(0.1 * torch.randn(H, H))

    def forward(self, x):
        h, given = x.new_zeros(5, len(x), H), []
        for t in range(x.shape[1]):
            h = (x[:, t] @ self.of + h @ self.on).tanh()
            given.append(h.mean(0))
        return torch.stack(given, 1)


@pytest.mark.parametrize("kind", [InPlace, Numpy, Front, Running, Asking, Heads])
def test_what_is_only_seen_is_never_given_a_leaf(kind):
    x = torch.randn(B, T, F)
    _, alone = trained(build(lambda: kind(F)), x.clone(), watched=False, steps=8)
    _, watched = trained(build(lambda: kind(F)), x.clone(), watched=True, steps=8)
    assert watched == alone


def test_time_first_is_found():
    torch.manual_seed(0)
    model = Newest(nn.Sequential(nn.Linear(F, H), encoder(batch_first=False)), time=0)
    x = torch.randn(T, B, F)
    model(x)
    seen, _ = trained(model, x, watched=True)
    assert {s.length for s in seen} == {T}


# --- how it is told apart ---


def look(model, *args):
    """Return what is seen of one call of a model."""
    structure = Structure()
    chosen = structure.arm(dict(model.named_modules()))
    handles = [
        h
        for m in chosen.values()
        for h in (
            m.register_forward_pre_hook(lambda *_: structure.entered(1)),
            m.register_forward_hook(structure.left, with_kwargs=True),
        )
    ]
    structure.entered(1)  # of the model
    model(*args)
    for handle in handles:
        handle.remove()
    structure.settle()
    return structure.seen


class Repeats(nn.Module):
    """Calls one module again and again, which is depth, or the steps of a solver, and no time."""

    def __init__(self, inner, call):
        super().__init__()
        self.into, self.inner, self.call = nn.Linear(F, H), inner, call

    def forward(self, x):
        y = self.into(x)
        for step in range(6):
            y = self.call(self.inner, y, step)
        return y


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.given, self.table = nn.Linear(H, H), torch.randn(B, H), nn.Parameter(torch.randn(6, H))
        self.pair = torch.randn(2, B, H)
        self.made = nn.Linear(H, H)(self.pair)

    def forward(self, a, b):
        y, other = (b, a) if b.dim() > 1 and b.grad_fn is not None else (a, b)
        return self.linear(y).tanh() + other.sum()


@pytest.mark.parametrize(
    "call",
    [
        lambda f, y, _: f(y, y.new_zeros(())),
        lambda f, y, step: y + 0.1 * f(torch.tensor(float(step)), y),
        lambda f, y, _: f(f.given, y),
        lambda f, y, _: f(2 * f.given, y),
        lambda f, y, step: f(torch.full((B, 1), float(step)), y),
        lambda f, y, _: f(f.pair[0], y),
        lambda f, y, _: f(f.made[0], y),
        lambda f, y, step: f(f.table[step].expand(B, H), y),
        lambda f, y, step: y + 0.1 * f(y, torch.tensor(float(step))),
    ],
    ids=[
        "shared layers",
        "a solver, time first",
        "the same again",
        "made again",
        "a column of times",
        "the same piece",
        "the same entry",
        "an embedding of the layer",
        "a solver, state first",
    ],
)
def test_a_module_that_is_repeated_without_anything_new_is_no_cell(call):
    assert look(Repeats(Slope(), call), torch.randn(B, F)) == {}


def test_where_the_batch_is_as_long_as_the_sequence_only_what_the_module_says_tells():
    x = torch.randn(T, T, F)
    assert look(nn.Sequential(nn.Linear(F, H), Attention(H)), x) == {}
    for first in (True, False):
        seen = look(nn.Sequential(nn.Linear(F, H), encoder(batch_first=first)), x)
        assert {one.time for one in seen.values()} == {int(first)}


def test_attention_that_is_shared_by_all_layers_is_seen_once():
    model = Repeats(Attention(H), lambda f, y, _: y + f(y))
    assert look(model, torch.randn(B, T, F)) == {"inner": Seen(1, "attention", T)}


def test_of_many_modules_some_are_chosen_that_lie_evenly():
    model = nn.Sequential(nn.Linear(F, H), *(Attention(H) for _ in range(40)))
    assert len(look(model, torch.randn(1, T, F))) == 16
    seen = look(model, torch.randn(1, 1024, F))
    assert [int(name) for name in seen] == [1, 14, 27, 40]
    assert len(look(model, torch.randn(1, 5000, F))) == 1


def test_a_graph_is_let_go_of_with_the_call():
    model, structure = nn.Sequential(nn.Linear(F, H), Attention(H)), Structure()
    structure.arm(dict(model.named_modules()))
    x = torch.randn(B, T, F)
    structure.entered(1)
    structure.entered(1)
    middle = model[0](x)
    out = model[1](middle)
    structure.left(model[1], (middle,), {}, out)
    assert structure._passed
    structure.left(model, (x,), {}, out)
    assert not structure._passed


def test_it_is_quiet_about_what_nobody_asked_for():
    note = SequenceStats("encoder", mixing="scan", length=T, note="its states lie inside of one call")
    asked = SequenceStats("other", mixing="scan", need=10, note="it was not called")
    assert [said for _, said in sentences((note, asked))] == [
        "other: how far back it learns is not measured: it was not called"
    ]
    assert shortest((note,)) is None


def test_tensorboard_draws_recurrences_and_not_each_layer_of_attention():
    def drawn(name):
        make, _ = SEEN[name]
        reports, model = [], build(make)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with watching(model, optimizer, reports):
            for _ in range(3):
                model(torch.randn(B, T, F)).square().mean().backward()
                optimizer.step()
        return {tag.split("/")[1] for tag in scalars(reports[-1]) if tag.startswith("gradwatch_time_grad")}

    assert drawn("encoder") == set()
    assert drawn("cells behind a layer") == {"body.1", "body.1.cell"}
