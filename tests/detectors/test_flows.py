"""What a model leaves aside is told from what is cut off, and the cause of a cut is where the cut is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import Model
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import Severity


def stack(inputs=8, outputs=16):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


def mean_square(out, x):
    return (out - x.sum(1, keepdim=True) / 4).square().mean()


def said_of(model, loss=mean_square, *, steps=30, optimizer=None, draw=lambda: torch.randn(16, 8), hear=lambda _: None):
    """Train, and return of each code and place the worst severity and the last words."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=3e-3)
    found = {}

    def note(report):
        for alert in report.open:
            key = alert.finding.code, alert.finding.place
            worst = max(alert.severity, found[key][0]) if key in found else alert.severity
            found[key] = worst, alert

    with gradwatch.watch(model, optimizer, sinks=[note, hear], on_alert=lambda _: None) as watcher:
        for _ in range(steps):
            x = draw()
            value = loss(model(x), x)
            watcher.record(value)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return found


# --- what is cut off ---


class Passing(nn.Module):
    def __init__(self, take):
        super().__init__()
        self.weight, self.bias, self.take = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.zeros(16)), take

    def forward(self, x):
        return torch.relu(x @ self.take(self.weight) + self.take(self.bias))


class Beside(nn.Module):
    """A frozen layer, and a trained one beside it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, inputs) / 3), nn.Parameter(torch.randn(outputs, 4) / 3)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def argmax(m, x):
    return m.head(m.table(m.enc(x).argmax(-1)))


def towers(m, x):
    """The tower that is whole runs between the one that is cut off and the head."""
    one = m.one(x)
    other = m.other(x)
    return m.head(torch.cat([one.detach(), other], 1))


def towers_without_grad(m, x):
    with torch.no_grad():
        one = m.one(x)
    other = m.other(x)
    return m.head(torch.cat([one, other], 1))


CUTS = {
    "data": (
        lambda: Model(
            lambda m, x: m.head(m.own(m.enc(x))), enc=stack(), own=Passing(lambda w: w.data), head=nn.Linear(16, 1)
        ),
        "own",
        "inside",
        "look inside own for .data",
    ),
    "copy": (
        lambda: Model(
            lambda m, x: m.head(m.own(m.enc(x))),
            enc=stack(),
            own=Passing(lambda w: w.detach().clone()),
            head=nn.Linear(16, 1),
        ),
        "own",
        "inside",
        "a copy of its weights",
    ),
    "towers": (
        lambda: Model(towers, one=stack(), other=stack(), head=nn.Linear(32, 1)),
        "one.0",
        "cut",
        "look between one and head for detach()",
    ),
    "towers-without-grad": (
        lambda: Model(towers_without_grad, one=stack(), other=stack(), head=nn.Linear(32, 1)),
        "one.0",
        "cut",
        "look inside one for torch.no_grad()",
    ),
    "argmax": (
        lambda: Model(argmax, enc=stack(), table=nn.Embedding(16, 8), head=nn.Linear(8, 1)),
        "enc.0",
        "cut",
        "look between enc and table for detach(), .item(), .numpy(), argmax",
    ),
    "frozen-child": (
        lambda: Model(lambda m, x: m.head(m.enc(x).detach()), enc=stack(), head=Beside(16, 1)),
        "enc.0",
        "cut",
        "look between enc and head for detach()",
    ),
    "reentrant-checkpoint": (
        lambda: Model(
            lambda m, x: m.head(checkpoint(m.two, checkpoint(m.one, x, use_reentrant=True), use_reentrant=True)),
            one=stack(),
            two=stack(16),
            head=Beside(16, 1),
        ),
        "one.0",
        "checkpoint",
        "use_reentrant=False",
    ),
    "a-call-that-the-loss-does-not-use": (
        lambda: Model(None, actor=stack(), critic=nn.Linear(8, 1)),
        "actor.0",
        "outside",
        "torch.tensor()",
    ),
    "a-distribution-of-which-numbers-are-taken": (
        lambda: Model(
            lambda m, x: (torch.distributions.Categorical(logits=m.actor(x)), m.critic(x)),
            actor=stack(),
            critic=nn.Linear(8, 1),
        ),
        "actor.0",
        "outside",
        "torch.tensor()",
    ),
}
"""Each with the place, the cause, and a part of what to do."""


class TwoCalls(nn.Module):
    """Lets the loop call its parts."""

    def __init__(self, model):
        super().__init__()
        self.actor, self.critic = model.actor, model.critic


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_is_an_error_and_its_cause_is_where_it_is(name):
    torch.manual_seed(0)
    build, place, cause, remedy = CUTS[name]
    model, loss = build(), mean_square
    kept = []
    if name == "a-distribution-of-which-numbers-are-taken":

        def loss(out, x):
            policy, value = out
            chosen = policy.log_prob(policy.sample())
            kept[:] = [chosen]
            return mean_square(value, x) + torch.tensor(chosen.tolist()).mean()

    if name == "a-call-that-the-loss-does-not-use":
        model.run = None
        found = said_of_parts(model)
    else:
        found = said_of(model, loss)

    severity, alert = found["GW401", place]
    assert severity is Severity.ERROR
    assert alert.finding.cause == cause
    assert remedy in alert.remedy
    assert {key for key, (worst, _) in found.items() if worst > Severity.INFO} == {("GW401", place)}


def said_of_parts(model):
    """Train what the loop calls part by part; of one it takes numbers alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    found = {}

    def hear(report):
        found.update({(a.finding.code, a.finding.place): (a.severity, a) for a in report.open})

    with gradwatch.watch(model, optimizer, sinks=[hear], on_alert=lambda _: None):
        for _ in range(30):
            x = torch.randn(16, 8)
            bonus = torch.tensor(model.actor(x).tolist()).mean()
            optimizer.zero_grad()
            (mean_square(model.critic(x), x) + bonus).backward()
            optimizer.step()
    return found


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "build",
    [
        lambda: Model(
            lambda m, x: m.head(m.own(m.enc(x))), enc=stack(), own=Passing(lambda w: w), head=nn.Linear(16, 1)
        ),
        lambda: Model(lambda m, x: m.head(checkpoint(m.one, x, use_reentrant=False)), one=stack(), head=Beside(16, 1)),
        lambda: Model(
            lambda m, x: m.head(checkpoint(m.one, x.clone().requires_grad_(), use_reentrant=True)),
            one=stack(),
            head=Beside(16, 1),
        ),
    ],
)
def test_what_is_to_be_done_of_it_makes_it_go_away(build):
    torch.manual_seed(0)
    assert said_of(build()) == {}


# --- what is left aside ---


class Pooled(nn.Module):
    """Gives what nobody takes beside what the loss takes, as a model of a library does."""

    def __init__(self):
        super().__init__()
        self.enc, self.pool = stack(), nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    def forward(self, x):
        given = self.enc(x)
        return {"all": given, "pooled": self.pool(given)}


class Masked(nn.Module):
    """Has a vector for masks that it does not draw."""

    def __init__(self):
        super().__init__()
        self.mask, self.enc = nn.Parameter(torch.zeros(8)), stack()

    def forward(self, x):
        return self.enc(x)


class Queries(nn.Module):
    """Attention by hand; without `kept`, its keys and values are computed and left.

    If not `called`, the weights of queries and keys are applied without their modules.
    """

    def __init__(self, size=16, std=None, *, kept=True, called=True):
        super().__init__()
        self.called = called
        self.q, self.k, self.v, self.kept = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size), kept
        for layer in (self.q, self.k) if std else ():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        if self.called:
            q, k = self.q(x), self.k(x).view(x.shape)
        else:
            q, k = (functional.linear(x, layer.weight, layer.bias) for layer in (self.q, self.k))
        v = self.v(x).view(x.shape)
        if not self.kept:
            return q.roll(1, 1) * 0.5
        return (q @ k.mT / math.sqrt(x.shape[-1])).softmax(-1) @ v


class Chooser(nn.Module):
    """Weighs one key by a weight of its own, beside the layers that it holds."""

    def __init__(self, weight, *, add):
        super().__init__()
        self.enc, self.weight, self.add = stack(), nn.Parameter(weight), add

    def forward(self, x):
        h = self.enc(x)
        scores = h.sum(1, keepdim=True) + self.weight if self.add else h @ self.weight
        return scores.softmax(-1) * h


class Heading(nn.Module):
    """Puts a token before others, and lets all of them ask; what the others get is left out, if only the first counts.

    `between` comes after the others' queries.
    """

    def __init__(self, between=None):
        super().__init__()
        self.token, self.others = nn.Linear(8, 16), nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
        self.keys, self.between = nn.Linear(8, 16), between or nn.Identity()

    def forward(self, x):
        x = x[:, None] * torch.tensor([1.0, 0.5, 2.0])[:, None]
        q = torch.cat([self.token(x[:, :1]), self.between(self.others(x[:, 1:]))], 1)
        k = self.keys(x)
        return (q @ k.mT / 4).softmax(-1) @ k


def choose(m, x):
    """Weigh one candidate, as a selection of variables does with one variable."""
    weights = m.select(x).softmax(-1)
    return m.head(weights * m.enc(x))


LEFT = {
    "pooler": (
        lambda: Model(lambda m, x: m.head(m.body(x)["all"]), body=Pooled(), head=nn.Linear(16, 1)),
        "body.pool.0",
        "unused",
    ),
    "pooler-that-the-loop-keeps": (
        lambda: Model(
            lambda m, x: {"out": m.head((given := m.body(x))["all"]), **given}, body=Pooled(), head=nn.Linear(16, 1)
        ),
        "body.pool.0",
        "unused",
    ),
    "keys-and-values": (
        lambda: Model(
            lambda m, x: m.head(m.att(m.enc(x)[:, None])[:, 0]),
            enc=stack(),
            att=Queries(kept=False),
            head=nn.Linear(16, 1),
        ),
        "att.k",
        "unused",
    ),
    "mask": (lambda: Model(lambda m, x: m.head(m.body(x)), body=Masked(), head=nn.Linear(16, 1)), "body", "own"),
    "zero-input": (
        lambda: Model(
            lambda m, x: m.head(m.enc(x) + m.context(torch.zeros(len(x), 4))),
            enc=stack(),
            context=nn.Linear(4, 16, bias=False),
            head=nn.Linear(16, 1),
        ),
        "context",
        "zero_input",
    ),
    "softmax-of-one": (
        lambda: Model(choose, select=nn.Linear(8, 1), enc=stack(), head=nn.Linear(16, 1)),
        "select",
        "softmax",
    ),
    "weights-before-softmax-of-one": (
        lambda: Model(
            lambda m, x: m.head(m.body(x)), body=Chooser(torch.randn(16, 1), add=False), head=nn.Linear(16, 1)
        ),
        "body",
        "softmax",
    ),
    "zeros-added-before-softmax-of-one": (
        lambda: Model(lambda m, x: m.head(m.body(x)), body=Chooser(torch.zeros(1, 1), add=True), head=nn.Linear(16, 1)),
        "body",
        "softmax",
    ),
    "other-rows": (
        lambda: Model(lambda m, x: m.head(m.body(x)[:, 0]), body=Heading(), head=nn.Linear(16, 1)),
        "body.others.0",
        "left_out",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_nothing_takes_is_information(name):
    torch.manual_seed(0)
    build, place, cause = LEFT[name]
    model = build()

    def loss(out, x):
        return mean_square(out["out"] if isinstance(out, dict) else out, x)

    found = said_of(model, loss)

    assert {key: worst for key, (worst, _) in found.items()} == {("GW401", place): Severity.INFO}
    alert = found["GW401", place][1]
    assert alert.finding.cause == cause
    assert {p.grad is None or not p.grad.any() for p in model.get_submodule(place).parameters(recurse=False)} == {True}


def test_a_part_of_which_nothing_is_read_is_a_warning_while_the_loss_stands_still():
    """A token in front of a causal text sees nothing of it: all that it gives is the same for all."""

    class Summary(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.token, self.embed = nn.Parameter(torch.randn(16)), nn.Embedding(20, 16)
            self.body, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(16, 3)

        def forward(self, ids, at):
            x = torch.cat([self.token.expand(len(ids), 1, 16), self.embed(ids)], 1)
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.head(self.body(x, mask=mask)[:, at])

    def told(at):
        model = Summary()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
            for step in range(60):
                ids = torch.randint(20, (32, 6), generator=torch.Generator().manual_seed(step))
                loss = nn.functional.cross_entropy(model(ids, at), ids[:, 0] % 3)
                optimizer.zero_grad()
                loss.backward()
                watcher.record(loss)
                optimizer.step()
        assert bool(model.embed.weight.grad.any()) == (at != 0)
        return [(a.finding.code, a.finding.place, a.severity) for a in watcher.report.open if a.finding.code == "GW401"]

    assert told(0) == [("GW401", "embed", Severity.WARNING)]
    assert told(-1) == []


def test_much_of_a_model_that_nothing_takes_is_a_warning_while_the_loss_stands_still():
    """A critic whose loss is taken of what was written down in a rollout, and a pooler beside it."""

    class Critic(nn.Module):
        def __init__(self, layers):
            super().__init__()
            torch.manual_seed(0)
            self.policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
            self.value = nn.Sequential(*[nn.Linear(4 if not i else 8, 8) for i in range(layers)], nn.Linear(8, 1))

        def forward(self, x):
            return self.policy(x), self.value(x)

    def told(layers, *, learnable=False, steps=70):
        model = Critic(layers)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
            for step in range(steps):
                generator = torch.Generator().manual_seed(step)
                x = torch.randn(32, 4, generator=generator)
                y = (x[:, 0] > 0).long() if learnable else torch.randint(3, (32,), generator=generator)
                with torch.no_grad():
                    recorded = model(x)[1]
                loss = nn.functional.cross_entropy(model(x)[0], y) + recorded.square().mean() * 1e-3
                optimizer.zero_grad()
                loss.backward()
                watcher.record(loss)
                optimizer.step()
        return [(a.finding.code, a.finding.place, a.severity) for a in watcher.report.open if a.finding.code == "GW401"]

    assert told(2) == [("GW401", "value.0", Severity.WARNING)]
    assert told(2, learnable=True) == [("GW401", "value.0", Severity.INFO)]


def test_a_loss_that_is_the_same_whatever_the_weights_do_is_rounding():
    """The mean of what was just normalized is 0, of whatever it is made."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16, elementwise_affine=False))

    def loss_of(out, same):
        return nn.functional.softplus(out.mean(-1) if same else out[:, 0]).mean()

    def told(same):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
            for _ in range(40):
                loss = loss_of(model(torch.randn(8, 6)), same)
                optimizer.zero_grad()
                loss.backward()
                watcher.record(loss)
                optimizer.step()
        return [(a.finding.code, a.finding.place) for a in watcher.report.open if a.severity > Severity.INFO]

    exact = network().double()
    loss_of(exact(torch.randn(8, 6, dtype=torch.float64)), same=True).backward()
    assert max(p.grad.abs().max() for p in exact.parameters()) < 1e-15
    assert told(same=True) == [("GW402", "")]  # once, and not also as gradients that are small
    assert told(same=False) == []


@pytest.mark.parametrize("name", ["pooler", "keys-and-values", "mask", "zero-input", *list(LEFT)[-4:]])
def test_one_batch_with_what_nothing_takes_is_healthy(name):
    torch.manual_seed(0)
    gradwatch.assert_healthy(LEFT[name][0](), torch.randn(16, 8))


def test_what_is_put_beside_others_and_is_dead_is_not_left_out():
    torch.manual_seed(0)
    dead = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    nn.init.constant_(dead[0].bias, -100.0)
    model = Model(lambda m, x: m.head(m.body(x)).mean(1), body=Heading(dead), head=nn.Linear(16, 1))
    found = said_of(model)

    assert ("GW401", "body.others.0") in found
    assert {alert.finding.cause for (code, _), (_, alert) in found.items() if code == "GW401"} == {"dead"}
    assert {worst for (code, _), (worst, _) in found.items() if code == "GW401"} == {Severity.ERROR}


# --- a normalization of one value ---


class Skipped(nn.Module):
    """A deep branch before a normalization of one value, beside a linear layer that learns alone."""

    def __init__(self, norm):
        super().__init__()
        self.deep = nn.Sequential(stack(), stack(16), nn.Linear(16, 1))
        self.norm, self.skip = norm, nn.Linear(8, 1)

    def forward(self, x):
        return self.norm(self.deep(x)) + self.skip(x)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_what_leads_to_a_normalization_of_one_value_learns_nothing_and_that_is_one_alert(make):
    torch.manual_seed(0)
    model = Skipped(nn.LayerNorm(1))
    x = torch.randn(16, 8)
    mean_square(model.double()(x.double()), x.double()).backward()
    assert all(p.grad.abs().max() < 1e-12 for p in model.deep.parameters())
    model.zero_grad()

    found = said_of(model.float(), optimizer=make(model.parameters(), lr=1e-2))

    assert {key: worst for key, (worst, _) in found.items()} == {("GW402", "deep.0.0"): Severity.ERROR}
    alert = found["GW402", "deep.0.0"][1]
    assert "norm" in alert.cause
    assert alert.finding.evidence["layers"] == 3
    assert said_of(Skipped(nn.Identity())) == {}


def test_a_true_gradient_of_zero_is_found_whether_or_not_noise_arrives():
    torch.manual_seed(0)
    report = gradwatch.check(Skipped(nn.LayerNorm(1)), torch.randn(16, 8))

    assert [(a.finding.code, a.finding.place) for a in report.open] == [("GW402", "deep.0.0")]


# --- beside the way ---


class Reader(nn.Module):
    """Attends over tokens, with normalization after each sum, all weights but the head's N(0, std)."""

    def __init__(self, std, size=32, blocks=2, *, called=True):
        super().__init__()
        self.table, self.first = nn.Embedding(20, size), nn.LayerNorm(size)
        self.blocks = nn.ModuleList(
            nn.Sequential(Queries(size, called=called), nn.Linear(size, size)) for _ in range(blocks)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(blocks))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        self.head = nn.Linear(size, 20)

    def forward(self, tokens):
        x = self.first(self.table(tokens))
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(x))
        return self.head(x)


def tokens():
    return torch.randint(0, 20, (16, 12))


def next_token(out, x):
    return functional.cross_entropy(out.flatten(0, 1), ((x * 7 + 3) % 20).flatten())


class Decodes(nn.Module):
    """An autoencoder: most of the gradient of its code comes past the decoder, from a term of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
        widths = [2, *[20] * 12]
        self.decoder = nn.Sequential(
            *[m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Sigmoid())]
        )

    def forward(self, x):
        code = self.encoder(x)
        return self.decoder(code), code


def test_a_decoder_that_loses_it_by_its_depth_is_no_side_branch_whatever_passes_by():
    torch.manual_seed(0)
    model = Decodes()
    found = said_of(
        model,
        lambda out, x: (out[0] - x).square().mean() + out[1].square().mean(),
        steps=60,
        draw=lambda: torch.randn(32, 20),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
    )
    worst, alert = found["GW101", "decoder.0"]
    assert worst == alert.severity == Severity.WARNING
    assert "leave it" not in alert.remedy


@pytest.mark.parametrize("called", [True, False])
def test_queries_and_keys_that_begin_small_are_no_vanishing_by_depth(called):
    def read(std, optimizer=torch.optim.Adam):
        torch.manual_seed(0)
        model = Reader(std, called=called)
        return model, said_of(
            model, next_token, steps=40, draw=tokens, optimizer=optimizer(model.parameters(), lr=1e-4)
        )

    # By plain SGD, which moves the others a thousand times as far, they would stay as they are.
    assert {worst for worst, _ in read(0.01, torch.optim.SGD)[1].values()} == {Severity.WARNING}
    model, found = read(0.01)
    assert {code for code, _ in found} == {"GW101"}
    assert {worst for worst, _ in found.values()} == {Severity.INFO}
    assert {alert.finding.cause for _, alert in found.values()} == {"aside"}
    assert {place.rsplit(".", 1)[1] for _, place in found} <= {"q", "k"}
    assert all("larger weights" in alert.remedy for _, alert in found.values())

    # The share that is told is never below that which comes through, taken by autograd.
    share = found["GW101", "blocks.0.0.q"][1].finding.evidence["through"]
    x, through = model.first(model.table(tokens())).detach(), []
    for part in ("q", "all"):
        mine = x.clone().requires_grad_()
        attention = model.blocks[0][0]
        q = attention.q(mine)
        k, v = (layer(mine if part == "all" else x) for layer in (attention.k, attention.v))
        given = (q @ k.mT / math.sqrt(32)).softmax(-1) @ v
        rest = mine if part == "all" else x
        y = model.norms[0](rest + model.blocks[0][1](given))
        y = model.norms[1](y + model.blocks[1](y))
        next_token(model.head(y), tokens()).backward()
        through.append(mine.grad.norm().item())
    assert through[0] / through[1] < share < 0.2

    assert read(0.3)[1] == {}


class TwoTowers(nn.Module):
    """A deep tower of sigmoids beside a short one, both on what the same layer gives."""

    def __init__(self):
        super().__init__()
        self.low = nn.Linear(8, 16)
        self.short = nn.Linear(16, 16)
        self.deep = nn.Sequential(*(m for _ in range(9) for m in (nn.Linear(16, 16), nn.Sigmoid())))
        self.head = nn.Linear(32, 1)

    def forward(self, x):
        low = self.low(x)
        return self.head(torch.cat([self.short(low), self.deep(low)], 1))


def test_a_deep_tower_that_the_gradient_passes_by_vanishes_all_the_same():
    torch.manual_seed(0)
    found = said_of(TwoTowers(), steps=40, optimizer=None)

    assert found["GW101", "deep.0"][0] is Severity.WARNING


class Begun(nn.Module):
    """Gives a recurrent layer its initial state."""

    def __init__(self):
        super().__init__()
        self.begin, self.rnn, self.head = nn.Linear(4, 16), nn.GRU(3, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.rnn(x, self.begin(x[:, 0, :1].expand(-1, 4)).tanh()[None])[0][:, -1])


def test_what_feeds_only_the_initial_state_fades_with_the_memory_of_the_layer():
    torch.manual_seed(0)
    model = Begun()
    found = said_of(
        model,
        lambda out, x: (out - x[:, -3:].sum((1, 2))[:, None]).square().mean(),
        draw=lambda: torch.randn(16, 60, 3),
    )

    worst, alert = found["GW101", "begin"]
    assert worst is Severity.INFO
    assert alert.finding.cause == "state"
    assert "the initial state of rnn" in alert.cause


# --- what is divided by itself ---


class Weighed(nn.Module):
    """Weighs what a body gives by scores that are divided by the sum, or the norm, of so many of them."""

    def __init__(self, divide, many=1, *, aside=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.score, self.head = stack(), nn.Linear(16, 4), nn.Linear(16, 1)
        self.divide, self.many, self.aside, self.loss = divide, many, aside, 0.0

    def forward(self, x):
        h = self.body(x)
        scores = self.score(h).softmax(-1)
        self.loss = scores.mean(0).square().sum() if self.aside else 0.0
        parts = self.divide(scores.topk(self.many, -1).values)
        return self.head(sum(parts[:, k : k + 1] * h * (k + 1) for k in range(self.many)))


def by_sum(scores):
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def by_norm(scores):
    return functional.normalize(scores, dim=-1)


@pytest.mark.skipif(not hasattr(torch._C._autograd.SavedTensor, "data"), reason="torch 2.6 hides what it has saved")
@pytest.mark.parametrize("divide", [by_sum, by_norm, lambda s: functional.normalize(s, p=1, dim=-1)])
def test_what_is_divided_by_itself_changes_nothing_and_is_told(divide):
    model = Weighed(divide)
    found = said_of(model)
    x = torch.randn(16, 8, dtype=torch.float64)
    twin = Weighed(divide).double()
    gradient = torch.autograd.grad(mean_square(twin(x), x), (twin.score.weight, twin.head.weight))

    assert gradient[0].norm() < 1e-14 * gradient[1].norm()
    assert {key: worst for key, (worst, _) in found.items() if worst > Severity.INFO} == {
        ("GW402", "score"): Severity.ERROR
    }
    alert = found["GW402", "score"][1]
    assert "it is divided by itself (before head)" in alert.message
    assert "goes over one entry" in alert.cause
    assert "normaliz" not in str(alert)


@pytest.mark.parametrize("divide", [by_sum, by_norm])
def test_what_is_divided_by_more_than_itself_or_has_a_loss_of_its_own_is_not(divide):
    seen = []
    assert not {key for key in said_of(Weighed(divide, many=2), hear=seen.append) if key[0] == "GW402"}
    assert [f for r in seen for f in r.snapshot.flows or () if f.barrier is not None] == []
    for share in (1.0, 1e-3):
        own = Weighed(divide, aside=True)
        found = said_of(own, lambda out, x, own=own, share=share: mean_square(out, x) + share * own.loss)
        assert not {key for key in found if key[0] == "GW402"}


@pytest.mark.parametrize(
    "divide",
    [
        lambda s: s / (s.sum(-1, keepdim=True) + 1.0),
        lambda s: s / s.sum(-1, keepdim=True).clamp(min=1.0),
        lambda s: s / (s.sum(-1, keepdim=True) + s.detach()),
    ],
)
def test_a_quotient_to_whose_divisor_something_is_added_is_none_of_itself(divide):
    seen = []
    said_of(Weighed(divide), hear=seen.append)
    assert [f for r in seen for f in r.snapshot.flows or () if f.barrier is not None] == []


def test_where_the_first_batches_have_one_entry_and_later_ones_more_nothing_is_said():
    class Pooled(Weighed):
        count = 0

        def forward(self, x):
            self.many, self.count = 1 if self.count < 3 else 3, self.count + 1
            return super().forward(x)

    assert not {key for key in said_of(Pooled(by_sum)) if key[0] == "GW402"}


# --- what a softmax compares ---


class Biased(nn.Module):
    """Attends with a learned bias, of a number for each query, or for each pair."""

    def __init__(self, width=1, *, mask=True, spread=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 1)
        self.places, self.mask, self.spread = nn.Embedding(6, width), mask, spread

    def forward(self, x):
        h = self.body(x)
        bias = self.places.weight.expand(6, 6) if self.spread else self.places.weight
        scores = h @ h.transpose(1, 2) / 4 + bias
        if self.mask:
            scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)
        return self.head((scores.softmax(-1) @ h)[:, -1])


def of_six():
    return torch.randn(16, 6, 4)


def newest(out, x):
    return (out - x[:, 2:4].sum((1, 2))[:, None]).square().mean()


@pytest.mark.parametrize("options", [{}, {"mask": False}, {"spread": True}])
def test_what_shifts_all_that_a_softmax_compares_changes_nothing_and_is_told(options):
    found = said_of(Biased(**options), newest, draw=of_six)
    twin, x = Biased(**options).double(), of_six().double()
    gradient = torch.autograd.grad(newest(twin(x), x), (twin.places.weight, twin.body.weight))

    assert gradient[0].norm() < 1e-14 * gradient[1].norm()
    worst, alert = found["GW402", "places"]
    assert worst is Severity.ERROR
    assert "is added to all that a softmax compares alike" in alert.message
    assert "for each pair of query and key" in alert.remedy
    assert {key for key, (severity, _) in found.items() if severity > Severity.INFO} == {("GW402", "places")}


def test_a_bias_for_each_pair_is_not():
    seen = []
    assert not {key for key in said_of(Biased(6), newest, draw=of_six, hear=seen.append) if key[0] == "GW402"}
    assert [f for r in seen for f in r.snapshot.flows or () if f.barrier is not None] == []


def test_what_shifts_the_scores_and_has_another_way_to_the_loss_is_not():
    class Also(Biased):
        def forward(self, x):
            return super().forward(x) + self.places.weight.sum()

    seen = []
    assert not {key for key in said_of(Also(), newest, draw=of_six, hear=seen.append) if key[0] == "GW402"}
    assert [f for r in seen for f in r.snapshot.flows or () if f.barrier is not None] == []


def test_what_goes_through_a_function_before_it_is_compared_is_no_shift():
    class Bent(Biased):
        def forward(self, x):
            h = self.body(x)
            scores = functional.leaky_relu(h @ h.transpose(1, 2) / 4 + self.places.weight)
            return self.head((scores.softmax(-1) @ h)[:, -1])

    seen = []
    said_of(Bent(), newest, draw=of_six, hear=seen.append)
    assert [f for r in seen for f in r.snapshot.flows or () if f.barrier is not None] == []


class Valued(nn.Module):
    """A value and advantages, whose sum a softmax compares, and which is used as it is besides."""

    def __init__(self, *, aside=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.advantage, self.value = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 1)
        self.aside, self.raw = aside, None

    def forward(self, x):
        h = self.body(x).tanh()
        self.raw = self.advantage(h) + self.value(h)
        return self.raw.softmax(-1) if self.aside else (self.raw, self.raw.softmax(-1))


@pytest.mark.parametrize("aside", [False, True])
def test_what_shifts_the_scores_and_is_used_as_it_is_beside_the_softmax_is_not_without_effect(aside):
    model = Valued(aside=aside)

    def loss(_, x):
        return (model.raw - x[:, :4].sum(1, keepdim=True)).square().mean() + model.raw.softmax(-1)[:, 0].mean()

    assert not {key for key in said_of(model, loss) if key[0] == "GW402"}
    assert model.value.weight.grad.norm() > 1e-3 * model.body.weight.grad.norm()


def test_a_mask_that_puts_ordinary_numbers_among_the_scores_makes_a_shift_count():
    class Filled(Biased):
        def forward(self, x):
            h = self.body(x)
            scores = h @ h.transpose(1, 2) / 4 + self.places.weight
            scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), 0.0)
            return self.head((scores.softmax(-1) @ h)[:, -1] + scores.softmax(-1)[:, 0, :1])

    assert not {key for key in said_of(Filled(), newest, draw=of_six) if key[0] == "GW402"}


def test_scores_without_a_dimension_stop_no_probe(caplog):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(8, 1)

        def forward(self, x):
            return (self.score(x).sum() + 1).log_softmax(0)

    said_of(Single(), lambda out, x: out + 0 * x.sum(), steps=4)
    assert "a probe failed" not in caplog.text
