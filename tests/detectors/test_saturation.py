"""Zeros by saturation, depth inside of one module, weights of zero, and kicks: found, placed, explained, and cured."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch import Severity, Thresholds


def train(net, data, *, steps=60, optimizer=None, lr=0.02, criterion=functional.mse_loss, **options):
    """Train; return the alerts of warning and worse, open at the end or cleared, and the losses."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=lr)
    known, losses = {}, []

    def note(report):
        known.update({a.finding.key: a for a in (*report.open, *report.cleared) if a.severity > Severity.INFO})

    with gradwatch.watch(net, optimizer, sinks=[note], on_alert=lambda _: None, **options) as watcher:
        for step in range(steps):
            x, y = data(torch.Generator().manual_seed(step))
            loss = criterion(net(x), y)
            watcher.record(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return list(known.values()), losses


class Reads(nn.Module):
    def __init__(self, kind=nn.LSTM, inputs=2, size=16, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = kind(inputs, size, batch_first=True, **options), nn.Linear(size, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def prices(generator, *, scaled=False):
    moves = torch.randn(32, 12, 2, generator=generator)
    x = moves if scaled else 30000 * (1 + 0.01 * moves.cumsum(1))
    return x, moves[:, -1, :1].tanh()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gates_that_raw_prices_saturate_are_vanishing_by_the_input_and_scaling_it_is_the_cure(kind):
    found, _ = train(Reads(kind), prices, horizon=3)

    assert [(a.finding.code, a.finding.place, a.finding.cause) for a in found] == [("GW101", "rnn", "saturated")]
    (alert,) = found
    assert alert.finding.evidence["size"] == pytest.approx(30000, rel=0.1)
    assert "standardize the input of rnn" in alert.remedy
    assert "bias" not in alert.remedy
    cured, losses = train(Reads(kind), lambda g: prices(g, scaled=True), lr=0.1, steps=150)
    assert cured == []
    assert losses[-1] < 0.5 * losses[0]


def test_a_batch_shows_it_too():
    (alert,) = gradwatch.check(Reads(), prices(torch.Generator().manual_seed(0))[0]).open
    assert (alert.finding.code, alert.finding.cause) == ("GW101", "saturated")


def standard(generator):
    x = torch.randn(32, 8, generator=generator)
    return x, x[:, :1] - 0.5 * x[:, 1:2]


class Bounded(nn.Module):
    """A layer far out, an activation, and a head."""

    def __init__(self, function, times):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.function = function
        with torch.no_grad():
            if function is functional.softsign:  # whose derivative falls as slowly as the weights grow
                self.layer.bias.add_(times)
            else:
                self.layer.weight.mul_(times)

    def forward(self, x):
        return self.head(self.function(self.layer(torch.tanh(self.first(x)))))


FUNCTIONS = {
    "hardtanh": functional.hardtanh,
    "softsign": functional.softsign,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": functional.hardsigmoid,
    "softmax": lambda x: x.softmax(-1),
    "clamp": lambda x: x.clamp(-1, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_saturated_activation_leaves_of_zero_is_vanishing_by_it(name):
    found, _ = train(Bounded(FUNCTIONS[name], 1e6), standard, lr=1e-4)

    assert {(a.finding.kind, a.finding.cause) for a in found} == {("vanishing-depth", "saturated")}
    assert {a.finding.names["at"] for a in found} == {"layer"}
    assert {a.finding.names["function"] for a in found} == {name.replace("hards", "s")}
    assert train(Bounded(FUNCTIONS[name], 0.5), standard, lr=1e-4)[0] == []


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Hardsigmoid])
def test_weights_that_are_all_positive_saturate_and_ordinary_ones_are_the_cure(activation):
    def net(init):
        torch.manual_seed(0)
        sizes = [8, 128, 128, 128]
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), activation())]
        for layer in layers[::2]:
            init(layer.weight)
        return nn.Sequential(*layers, nn.Linear(128, 1))

    (alert,), _ = train(net(lambda w: nn.init.uniform_(w, 0, 2)), standard, lr=1e-3)
    assert (alert.finding.code, alert.finding.cause) == ("GW101", "saturated")
    assert "normal" in alert.remedy  # xavier_normal_, or a normalization before it
    assert train(net(nn.init.xavier_normal_), standard, lr=1e-3)[0] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_share_at_the_ends_is_that_of_the_tensors_themselves(name):
    net, x = (
        Bounded(FUNCTIONS[name], 49.0 if name == "softsign" else 8.0),
        standard(torch.Generator().manual_seed(1))[0],
    )
    given = net.function(net.layer(torch.tanh(net.first(x)))).detach()
    if name == "softmax":
        truth = (given.amax(-1) > 0.99).float().mean()
    elif "sigmoid" in name:
        truth = ((given - 0.5).abs() > 0.49).float().mean()
    else:
        truth = (given.abs() > 0.98).float().mean()
    snapshot = gradwatch.check(net, x).snapshot
    (seen,) = [a for a in snapshot.activations if a.module == "layer"]
    assert (seen.function, seen.saturated) == (name.replace("hards", "s"), pytest.approx(float(truth), abs=1e-6))
    assert 0.0 < float(truth) < 1.0


def test_the_share_of_saturated_gates_is_that_of_the_equations():
    net, x = Reads(), 4 * prices(torch.Generator().manual_seed(0), scaled=True)[0]
    rnn, h, c, gates = net.rnn, torch.zeros(32, 16), torch.zeros(32, 16), []
    for t in range(x.shape[1]):
        z = x[:, t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0
        i, f, g, o = z.chunk(4, -1)
        gates.append(torch.cat([(s.sigmoid() - 0.5).abs() > 0.49 for s in (i, f, o)] + [g.tanh().abs() > 0.98], -1))
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    truth = float(torch.stack(gates).float().mean())
    facts = gradwatch.check(net, x).snapshot.facts
    (share,) = [f.value for f in facts if f.name == "saturated_gates"]
    assert 0.0 < truth < 1.0
    assert share == pytest.approx(truth, abs=2e-3)  # a few rows stand for the batch, where it is large


def test_a_softmax_that_is_one_hot_at_the_output_closes_the_model_for_all():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Softmax(-1))
    with torch.no_grad():
        net[2].weight.mul_(1e6)
    found, _ = train(net, lambda g: (standard(g)[0], torch.full((32, 4), 0.25)))
    (alert,) = found
    assert (alert.finding.code, alert.finding.cause, alert.finding.names["at"]) == ("GW102", "saturated", "2")
    assert "every gradient is exactly zero" in alert.message


def test_a_loss_that_is_clamped_is_told_from_a_model_that_is_cut():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def clamped(out, y):
        return (1e6 + (out - y).square().mean()).clamp(max=1e3)

    (alert,), losses = train(net, standard, criterion=clamped)
    assert (alert.finding.code, alert.finding.cause) == ("GW401", "flat_loss")
    assert set(losses) == {1000.0}
    assert "exactly 1000" in alert.cause
    cured, losses = train(net, standard, criterion=lambda out, y: 1e3 * torch.tanh((out - y).square().mean() / 1e3))
    assert cured == []
    assert losses[-1] < losses[0]


def through_depth(generator):
    x = torch.randn(32, 5, 2, generator=generator)
    return x, torch.tanh(x[:, -3:].sum(dim=(1, 2)))[:, None]


def test_the_gradient_that_fades_inside_of_a_stacked_lstm_is_found_and_fewer_layers_are_the_cure():
    found, losses = train(Reads(num_layers=8), through_depth, lr=0.1, steps=150)
    (alert,) = found
    assert (alert.finding.code, alert.finding.place, alert.finding.cause) == ("GW101", "rnn.l0", "stacked")
    assert "8 LSTM layers" in alert.cause
    assert "He" not in alert.remedy
    cured, learned = train(Reads(num_layers=2), through_depth, lr=0.1, steps=150)
    assert cured == []
    assert learned[-1] < 0.6 * losses[-1]


@pytest.mark.parametrize("name", ["rnn", "rnn.*", "rnn.l0"])
def test_a_pattern_for_a_module_holds_for_the_layers_inside_of_it(name):
    net, x = Reads(num_layers=8), through_depth(torch.Generator().manual_seed(0))[0]
    assert gradwatch.check(net, x).open
    assert not gradwatch.check(net, x, ignore=[f"GW101:{name}"]).open
    if name != "rnn.l0":
        quiet = Thresholds(layers={name: {"vanishing_ratio": 1e-30}})
        assert not gradwatch.check(net, x, thresholds=quiet).open


class Stack(nn.Module):
    """Sigmoid layers whose tensors one container holds."""

    def __init__(self, depth=14):
        super().__init__()
        torch.manual_seed(0)
        layers = {f"net/dense_{k}": nn.Linear(8, 8) for k in sorted(range(depth), key=str)}  # 0, 1, 10, 11, ..., 2
        pairs = {f"{n}/{w}": p for n, m in layers.items() for w, p in (("kernel", m.weight), ("bias", m.bias))}
        self.tensors, self.head, self.depth = nn.ParameterDict(pairs), nn.Linear(8, 1), depth

    def forward(self, x):
        for k in range(self.depth):
            weight, bias = (self.tensors[f"net/dense_{k}/{what}"] for what in ("kernel", "bias"))
            x = torch.sigmoid(functional.linear(x, weight, bias))
        return self.head(x)


def test_depth_inside_of_a_container_is_found_at_its_entries():
    ((alert,), _) = train(Stack(), standard)
    assert (alert.finding.code, alert.finding.place) == ("GW101", "tensors.net/dense_0")
    known = [int(name.rsplit("_", 1)[1]) for name in (alert.finding.names["begins"], alert.finding.names["last"])]
    assert known[0] == 0
    assert alert.finding.evidence["layers"] == known[1] + 1  # as they are applied, not as they are kept


class Gated(nn.Module):
    def __init__(self, zero):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner = nn.Linear(8, 16), nn.Linear(8, 16)
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 1)
        for name in zero:
            nn.init.zeros_(getattr(self, name).weight)

    def forward(self, x):
        stem, r = self.stem(x), torch.relu(self.inner(x))
        return self.head(stem + torch.tanh(self.second(torch.relu(self.first(r)))) * r)


def test_weights_that_are_all_zero_are_named_and_leaving_one_of_them_at_zero_is_the_cure():
    (alert,), _ = train(Gated(["first", "second"]), standard)
    assert (alert.finding.code, alert.finding.cause) == ("GW401", "zero_weights")
    assert "first and second are all exactly 0" in alert.cause
    assert "LeakyReLU" not in alert.remedy
    assert train(Gated(["second"]), standard)[0] == []


def test_a_kick_is_remembered_longer_than_its_snapshot():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def data(generator):
        step = generator.initial_seed()
        optimizer.param_groups[0]["lr"] = 3.0 if step == 1 else 1e-4
        with torch.no_grad():
            if step == 70:
                net[0].bias.fill_(-1e3)
        return standard(generator)

    found, _ = train(net, data, optimizer=optimizer, steps=160)
    causes = {a.finding.code: (a.finding.cause, a.finding.evidence.get("when")) for a in found}
    assert causes["GW601"] == ("update", 1.0)


class Block(nn.Module):
    def __init__(self, width, *, skip, normalized):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.skip = nn.LayerNorm(width) if normalized else nn.Identity(), skip

    def forward(self, x):
        return self.norm((x if self.skip else 0) + self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_a_remedy_names_nothing_that_the_network_has(skip, normalized):
    torch.manual_seed(0)
    blocks = [Block(8, skip=skip, normalized=normalized) for _ in range(3)]
    net = nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 1))
    dull = Thresholds(vanishing_ratio=1e6)  # so that all layers are found
    found = gradwatch.check(net, standard(torch.Generator().manual_seed(0))[0], thresholds=dull)
    alert = next(a for a in found.open if a.finding.code == "GW101")
    assert any(f.name == "skip_connection" for f in found.snapshot.facts) is skip
    assert ("skips" in alert.finding.evidence) is skip
    assert ("normalized" in alert.finding.evidence) is normalized
    if skip:
        assert "skip connection" not in alert.remedy
    if normalized:
        assert "normalization" not in alert.remedy
    assert ("pre-norm" in alert.remedy) is (skip and normalized)


def counting(generator):
    start = torch.randint(0, 16, (16, 1), generator=generator)
    ids = (start + torch.randint(1, 4, (16, 1), generator=generator) * torch.arange(13)[None]) % 16
    return ids[:, :-1], ids[:, 1:]


class PostNorm(nn.Module):
    def __init__(self, layers=18):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(16, 32), nn.Linear(32, 16)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for p in self.encoder.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.table(ids), mask=mask, is_causal=True))


@pytest.mark.slow
def test_what_post_norm_without_a_warm_up_needs_is_the_warm_up():
    def learn(warm):
        net = PostNorm()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)

        def data(generator):
            optimizer.param_groups[0]["lr"] = 3e-3 * min((generator.initial_seed() + 1) / warm, 1)
            return counting(generator)

        return train(
            net,
            data,
            optimizer=optimizer,
            steps=250,
            criterion=lambda out, y: functional.cross_entropy(out.flatten(0, 1), y.flatten()),
        )

    found, stuck = learn(1)
    assert 1 <= len(found) <= 4
    assert sum(a.finding.code == "GW101" for a in found) <= 1
    for alert in found:
        assert "warm the learning rate up" in alert.remedy
        assert "skip connection" not in alert.remedy
    assert learn(200)[1][-1] < 0.5 * stuck[-1]
