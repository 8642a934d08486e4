"""Gradients that are zero by construction are no faults, and faults that look the same are found.

The names of their modules say nothing.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import Severity

STEPS = 60
LITTLE = 1e-5
"""Share of the largest gradient below which one is rounding noise."""


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.02)


def adam(net):
    return torch.optim.Adam(net.parameters(), lr=0.01)


def train(build, *, optimizer=sgd, told=True, none=True, wait=0, until=lambda serious: False):
    """Train, and return what is serious (codes and places), and the parameters that at some step got next to nothing.

    `until` tells from what is serious whether the rest of the training would add nothing.
    """
    torch.manual_seed(0)
    net = build()
    stepped = optimizer(net)  # the frozen too
    rate = stepped.param_groups[0]["lr"]
    names, parameters = zip(*net.named_parameters(), strict=True)
    serious, silent = set(), set()

    def note(alert):
        if alert.finding.severity is not Severity.INFO:
            serious.add((alert.finding.code, alert.finding.place))

    with gradwatch.watch(net, stepped, on_alert=note) as watcher:
        for step in range(STEPS):
            stepped.param_groups[0]["lr"] = rate if step >= wait else 0.0
            stepped.zero_grad(set_to_none=none)
            loss = net(torch.randn(16, 8), step)
            if told:
                watcher.record(loss)
            loss.backward()
            norms = [0.0 if p.grad is None else p.grad.norm().item() for p in parameters]
            least = LITTLE * max(norms)
            silent |= {name for name, norm in zip(names, norms, strict=True) if norm <= least}
            stepped.step()
            if until(serious):
                break
    return serious, silent


class Net(nn.Module):
    """Learns a sum, or as its subclasses will."""

    def loss(self, out: Tensor, x: Tensor) -> Tensor:
        return nn.functional.mse_loss(out, x.sum(1, keepdim=True) / 4)

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.loss(self.c(self.b(torch.relu(self.a(x)))), x)


class Chain(Net):
    """Two linear layers, with `m` between them."""

    def __init__(self, m):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), m, nn.Linear(16, 1)

    def forward(self, x, step):
        return self.loss(self.c(torch.relu(self.b(self.a(x)))), x)


# --- a bias in front of a normalization ---


class Image(Net):
    def __init__(self, m):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 8, 3, padding=1), m, nn.Linear(8, 1)

    def forward(self, x, step):
        return self.loss(self.c(torch.relu(self.b(self.a(x.view(16, 2, 2, 2)))).mean((2, 3))), x)


class Spread(nn.Module):
    """Normalizes what it takes as 4 channels of 4."""

    def __init__(self, m):
        super().__init__()
        self.m1 = m

    def forward(self, x):
        return self.m1(x.view(16, 4, 4)).flatten(1)


# --- attention ---


class Attention(Net):
    """Torch's, over the 4 pairs of numbers of each row."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 1)

    def forward(self, x, step):
        h = self.a(x.view(16, -1, 2))
        return self.loss(self.c((h + self.b(h, h, h)[0]).mean(1)), x)


class OwnAttention(Net):
    """The same by hand, over as many tokens as are asked for."""

    def __init__(self, tokens=4):
        super().__init__()
        self.n = tokens
        self.a, self.b, self.c = (
            nn.Linear(8 // tokens, 8),
            nn.ModuleList(nn.Linear(8, 8) for _ in range(3)),
            nn.Linear(8, 1),
        )

    def forward(self, x, step):
        h = self.a(x.view(16, self.n, -1))
        m1, m2, m3 = (m(h) for m in self.b)
        return self.loss(self.c((h + (m1 @ m2.mT / 8**0.5).softmax(-1) @ m3).mean(1)), x)


# --- factors and branches that begin at zero ---


class Factors(nn.Module):
    """A frozen matrix, and a product of two small ones beside it, of which one begins at zero."""

    def __init__(self, *, frozen=False):
        super().__init__()
        self.w0 = nn.Parameter(torch.randn(16, 16) / 4, requires_grad=False)
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(16, 2) / 4),
            nn.Parameter(torch.zeros(2, 16), requires_grad=not frozen),
        )

    def forward(self, x):
        return x @ self.w0 + x @ self.w1 @ self.w2


class Branches(Net):
    """Residual blocks; `make` gives a branch."""

    def __init__(self, make, blocks=3):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.ModuleList(make() for _ in range(blocks)), nn.Linear(16, 1)

    def forward(self, x, step):
        h = self.a(x)
        for m in self.b:
            h = h + m(h)
        return self.loss(self.c(torch.relu(h)), x)


class Gate(nn.Module):
    """A branch before one number, which is learned or stays."""

    def __init__(self, value=0.0, *, learned=True):
        super().__init__()
        self.m1, self.m2 = nn.Linear(16, 16), nn.Linear(16, 16)
        if learned:
            self.g = nn.Parameter(torch.tensor(value))
        else:
            self.register_buffer("g", torch.tensor(value))

    def forward(self, x):
        return self.g * self.m2(torch.relu(self.m1(x)))


def last_at_zero(*layers, frozen=False):
    """Return a branch whose last layer gives zero at first."""
    for p in layers[-1].parameters():
        nn.init.zeros_(p)
        p.requires_grad_(not frozen)
    return nn.Sequential(*layers)


def normalized():
    return last_at_zero(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))


def fixup():
    first, last = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    nn.init.normal_(first.weight, std=0.2)
    nn.init.zeros_(last.weight)
    return nn.Sequential(Shift(), first, Shift(), nn.ReLU(), Shift(), last, Scale(), Shift())


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.p


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.p


# --- what stands aside ---


class Aside(Net):
    """A layer `b` beside the others, used as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1), how
        if how == "frozen":
            self.b.requires_grad_(requires_grad=False)

    def forward(self, x, step):
        h = torch.relu(self.a(x))
        if self.how == "frozen":
            h = torch.relu(self.b(h))
        elif self.how == "every-5th" and step % 5 == 0:
            h = h + self.b(h)
        elif self.how == "dropped":
            self.b(h)
        elif self.how == "no-grad":
            with torch.no_grad():
                out = self.b(h)
            h = h + out
        elif self.how == "times-zero":
            h = h + 0.0 * self.b(h)
        return self.loss(self.c(h), x)


class Encoded(Net):
    """An encoder whose output is multiplied by 0.0, and maybe a table of zeros elsewhere that is not trained."""

    def __init__(self, *, beside=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 1)
        if beside:
            self.w0 = nn.Parameter(torch.zeros(8, 8), requires_grad=False)

    def forward(self, x, step):
        return self.loss(self.c(0.0 * self.b(torch.relu(self.a(x))) + x), x)


class Experts(Net):
    """Rows go to the expert of the sign of their sum; `idle` tells at which steps all of them go to the first."""

    def __init__(self, idle=lambda step: False, *, empty=False, weight=1.0):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(8, 16),
            nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)),
            nn.Linear(16, 1),
        )
        self.idle, self.empty, self.weight = idle, empty, weight

    def forward(self, x, step):
        h = torch.relu(self.a(x))
        to = torch.zeros(16, dtype=torch.long) if self.idle(step) else (x.sum(1) > 0).long()
        out = torch.zeros_like(h)
        for i, m in enumerate(self.b):
            rows = (to == i).nonzero()[:, 0]
            if self.empty or len(rows):
                out = out.index_add(0, rows, m(h[rows]) * (self.weight if i else 1.0))
        return self.loss(self.c(out), x)


class Table(Net):
    """Looks up rows of a table, of which most are never asked for, or only the one that is not trained."""

    def __init__(self, *, sparse=False, padding=None):
        super().__init__()
        self.a, self.c, self.padding = nn.Embedding(50, 8, sparse=sparse, padding_idx=padding), nn.Linear(8, 1), padding

    def forward(self, x, step):
        index = (x[:, :2].abs() * 2).long() + step % 7
        return self.loss(
            self.c(self.a(index if self.padding is None else torch.full_like(index, self.padding)).sum(1) + x), x
        )


class Tower(Net):
    """A head after a ReLU, which gives zero for a whole batch in `quiet` of `period` steps."""

    def __init__(self, quiet, period=7):
        super().__init__()
        self.a, self.b, self.c, self.quiet, self.period = (
            nn.Linear(8, 16),
            nn.Linear(16, 4),
            nn.Linear(4, 1),
            quiet,
            period,
        )
        nn.init.uniform_(self.b.weight, 0.0, 0.2)

    def forward(self, x, step):
        h = torch.relu(self.b(torch.relu(self.a(x)) - (100.0 if step % self.period < self.quiet else 0.0)))
        return self.loss(self.c(h), x)


HEALTHY = {
    "bias-before-BatchNorm1d": (lambda: Chain(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))), "b.0.bias"),
    "bias-before-BatchNorm2d": (lambda: Image(nn.BatchNorm2d(8)), "a.bias"),
    "bias-before-InstanceNorm1d": (lambda: Chain(nn.Sequential(nn.Linear(16, 16), Spread(nn.InstanceNorm1d(4)))), ""),
    "bias-before-InstanceNorm2d": (lambda: Image(nn.InstanceNorm2d(8)), "a.bias"),
    "bias-before-GroupNorm": (lambda: Image(nn.GroupNorm(8, 8)), "a.bias"),
    "bias-before-LayerNorm": (lambda: Chain(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))), ""),
    "shift-before-LayerNorm": (lambda: Chain(nn.Sequential(Shift(), nn.LayerNorm(16))), "b.0.p"),
    "key-bias-of-torch": (Attention, ""),
    "key-bias-by-hand": (OwnAttention, "b.1.bias"),
    "factor-before-a-factor-of-zero": (lambda: Chain(Factors()), "b.w1"),
    "last-BatchNorm-at-zero": (lambda: Branches(normalized), "b.0.0.weight"),
    "last-Linear-at-zero": (
        lambda: Branches(lambda: last_at_zero(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))),
        "b.0.0.weight",
    ),
    "gate-at-zero": (lambda: Branches(Gate), "b.0.m1.weight"),
    "fixup": (lambda: Branches(fixup), "b.0.1.weight"),
    "attention-over-one-token": (lambda: OwnAttention(1), "b.0.weight"),
    "run-and-dropped": (lambda: Aside("dropped"), "b.weight"),
    "frozen": (lambda: Aside("frozen"), "b.weight"),
    "unused": (lambda: Aside("unused"), "b.weight"),
    "used-every-5th-step": (lambda: Aside("every-5th"), "b.weight"),
    "expert-idle-now-and-then": (lambda: Experts(lambda step: step % 3 == 0), "b.1.0.weight"),
    "expert-idle-for-30-steps": (lambda: Experts(lambda step: 25 <= step < 55), "b.1.0.weight"),
    "expert-idle-for-the-first-30-steps": (lambda: Experts(lambda step: step < 30), "b.1.0.weight"),
    "expert-without-rows-now-and-then": (lambda: Experts(lambda step: step % 3 == 0, empty=True), "b.1.0.weight"),
    "expert-without-rows-for-30-steps": (lambda: Experts(lambda step: 25 <= step < 55, empty=True), "b.1.0.weight"),
    "expert-without-rows-for-the-first-30-steps": (lambda: Experts(lambda step: step < 30, empty=True), "b.1.0.weight"),
    "rows-not-looked-up": (Table, ""),
    "rows-not-looked-up-sparse": (functools.partial(Table, sparse=True), ""),
    "head-quiet-now-and-then": (lambda: Tower(2), "b.weight"),
    "head-quiet-at-every-probe": (lambda: Tower(3, 10), "b.weight"),
}
"""Each with a parameter that gets nothing, or rounding noise, at some steps.

Where it is a part of one that gets nothing, there is none to name.
"""

FAULTY = {
    "normalization-of-one-value": (
        lambda: Chain(nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (16, 1)), nn.LayerNorm(1), nn.Flatten())),
        {"a"},
    ),
    "factor-before-a-frozen-factor-of-zero": (lambda: Chain(Factors(frozen=True)), {"b"}),
    "last-Linear-frozen-at-zero": (
        lambda: Branches(lambda: last_at_zero(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), frozen=True)),
        {"b.0.0"},
    ),
    "gate-of-constant-zero": (lambda: Branches(lambda: Gate(learned=False)), {"b.0.m1"}),
    "one-of-three-gates-of-constant-zero": (
        lambda: Branches(iter([Gate(1.0), Gate(learned=False), Gate(1.0)]).__next__),
        {"b.1.m1"},
    ),
    "run-without-grad": (lambda: Aside("no-grad"), {"b"}),
    "run-and-multiplied-by-zero": (lambda: Aside("times-zero"), {"b"}),
    "encoder-multiplied-by-zero": (Encoded, {"a"}),
    "encoder-multiplied-by-zero-beside-a-frozen-zero": (functools.partial(Encoded, beside=True), {"a"}),
    "expert-multiplied-by-zero": (lambda: Experts(weight=0.0), {"b.1.0"}),
    "only-the-padding-looked-up": (lambda: Table(padding=0), {"a"}),
    "head-quiet-always": (lambda: Tower(7), {"a", "b"}),
}
"""Each with the places one of which must be named."""


@pytest.mark.parametrize(
    ("optimizer", "told"), [(sgd, True), (sgd, False), (adam, True), pytest.param(adam, False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", HEALTHY)
def test_a_zero_by_construction_is_no_fault(name, optimizer, told):
    build, part = HEALTHY[name]
    if name.endswith("sparse"):
        optimizer = sgd  # Adam refuses sparse gradients

    serious, silent = train(build, optimizer=optimizer, told=told)

    assert serious == set()
    assert not part or part in silent


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("wait", [30, STEPS])
@pytest.mark.parametrize("name", ["factor-before-a-factor-of-zero", "last-BatchNorm-at-zero", "last-Linear-at-zero"])
def test_a_branch_may_stay_at_zero_while_the_learning_rate_does(name, told, wait):
    # That the learning rate is 0 is said of the whole model, and is true.
    assert train(HEALTHY[name][0], told=told, wait=wait)[0] <= {("GW903", "")}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "unused",
        "expert-idle-now-and-then",
        "expert-idle-for-the-first-30-steps",
        "expert-idle-for-30-steps",
        "used-every-5th-step",
    ],
)
def test_a_zero_that_stands_for_no_gradient_is_no_fault(name, told):
    assert train(HEALTHY[name][0], told=told, none=False)[0] == set()


@pytest.mark.parametrize(
    ("optimizer", "told"), [(sgd, True), (sgd, False), pytest.param(adam, True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", FAULTY)
def test_what_looks_the_same_and_is_a_fault_is_found(name, optimizer, told):
    build, places = FAULTY[name]

    def named(serious):
        return places & {place for code, place in serious if code in ("GW401", "GW402", "GW601")}

    assert named(train(build, optimizer=optimizer, told=told, until=named)[0])


@pytest.mark.parametrize("sparse", [False, True])
def test_most_rows_of_the_table_are_not_looked_up(sparse):
    net = Table(sparse=sparse)
    net(torch.randn(16, 8), 0).backward()

    assert (net.a.weight.grad.to_dense() == 0).all(1).sum() > 30


def test_the_bias_of_the_keys_of_torchs_attention_gets_only_noise():
    net = Attention()
    net(torch.randn(16, 8), 0).backward()
    queries, keys, values = net.b.in_proj_bias.grad.chunk(3)

    assert keys.norm() < LITTLE * min(queries.norm(), values.norm())
