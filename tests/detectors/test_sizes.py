"""Inputs in which next to nothing is, and scores that are worse than none, in real trainings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch import Severity

CLASSES = 48


def said_of(model, draw, loss_of, *, steps=40, rate=1e-3, told=True, hear=lambda _: None):
    """Train; return by code the worst alert that was open."""
    found = {}

    def note(report):
        for alert in report.open:
            known = found.get(alert.finding.code)
            if known is None or alert.severity > known.severity:
                found[alert.finding.code] = alert

    optimizer = torch.optim.Adam(model.parameters(), rate)
    with gradwatch.watch(model, optimizer, sinks=[note, hear], on_alert=lambda _: None) as watcher:
        for _ in range(steps):
            x, y = draw()
            loss = loss_of(model(x), y)
            if told:
                watcher.record(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found


# --- what comes in ---


def signals(scale):
    """Draw two classes that differ by where they are, in a unit that nobody should measure them in."""

    def draw():
        y = torch.randint(2, (64,))
        return scale * (torch.randn(64, 8) + 2 * (y[:, None] - 0.5)), y

    return draw


def network(*, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32, bias=bias), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def test_an_input_of_next_to_nothing_is_told():
    alert = said_of(network(), signals(1e-6), functional.cross_entropy)["GW106"]
    assert (alert.severity, alert.finding.place) == (Severity.WARNING, "0")
    assert alert.finding.evidence["size"] == pytest.approx(1e-6 * math.sqrt(2), rel=0.1)
    assert alert.remedy.startswith("standardize the input of 0, feature by feature")


def test_units_that_are_silent_because_all_samples_look_alike_are_no_finding_of_their_own():
    found = said_of(network(), signals(1e-6), functional.cross_entropy, steps=80)
    assert "GW106" in found
    assert "GW601" not in found


def test_without_a_loss_it_is_information():
    assert said_of(network(), signals(1e-6), functional.cross_entropy, told=False)["GW106"].severity == Severity.INFO


@pytest.mark.parametrize("scale", [1.0, 0.01])  # prices standardized, and daily returns as they are
def test_an_input_of_ordinary_size_is_not(scale):
    assert "GW106" not in said_of(network(), signals(scale), functional.cross_entropy)


def test_an_input_that_is_exactly_zero_is_another_matter():
    assert "GW106" not in said_of(network(), signals(0.0), functional.cross_entropy)


def test_what_is_faint_because_a_layer_before_it_has_made_it_so_is_another_matter():
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-6), model[0].bias.zero_()
    assert "GW106" not in said_of(model, signals(1.0), functional.cross_entropy)


def test_what_a_normalization_takes_may_be_of_any_size():
    found = said_of(nn.Sequential(nn.LayerNorm(8, eps=1e-30), *network()), signals(1e-6), functional.cross_entropy)
    assert "GW106" not in found


def test_what_is_faint_behind_a_product_is_none_of_what_the_model_is_given():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.gate, self.last = nn.Linear(8, 16), nn.Parameter(torch.full((16,), 1e-4)), nn.Linear(16, 2)

        def forward(self, x):
            h = self.first(x)
            for _ in range(9):  # farther away than a layer is looked for
                h = h * 1.01
            return self.last(h * self.gate)

    assert "GW106" not in said_of(Gated(), signals(1.0), lambda out, y: functional.cross_entropy(0 * out, y) + 0.0)


def test_a_first_layer_without_a_bias_or_before_a_normalization_may_give_the_same_whatever_the_size_is():
    for model in (network(bias=False), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-30), *network())):
        assert "GW106" not in said_of(model, signals(1e-6), functional.cross_entropy)


def test_a_small_input_beside_the_data_is_not_told():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.small, self.body = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            return self.small(1e-6 * x) + self.body(x)

    def noise():  # so that the loss does not come down
        return torch.randn(64, 8), torch.randint(2, (64,))

    assert "GW106" not in said_of(Beside(), noise, functional.cross_entropy)


def test_an_input_that_is_given_by_its_name_is_told_too():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, *self.rest = network()
            self.rest = nn.Sequential(*self.rest)

        def forward(self, x):
            return self.rest(self.first(input=x))

    assert "GW106" in said_of(Named(), signals(1e-6), functional.cross_entropy)


def test_a_faint_input_of_which_a_model_learns_is_not_told():
    model, sizes = network(), []
    with torch.no_grad():
        model[0].weight.mul_(1e6)

    def hear(report):
        sizes.extend(f.value for f in report.snapshot.facts or () if (f.place, f.name) == ("0", "input_size"))

    found = said_of(model, signals(1e-6), functional.cross_entropy, steps=80, rate=1e-2, hear=hear)
    assert max(sizes) < 1e-5
    assert "GW106" not in found


# --- what comes out ---


class Tied(nn.Module):
    """A language model of one word, whose scores are products with its embedding."""

    def __init__(self, std):
        super().__init__()
        torch.manual_seed(1)
        self.words, self.norm, self.head = (
            nn.Embedding(CLASSES, 64),
            nn.LayerNorm(64),
            nn.Linear(64, CLASSES, bias=False),
        )
        nn.init.normal_(self.words.weight, std=std)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.norm(self.words(x)))


def words():
    x = torch.randint(CLASSES, (64,))
    return x, (x * 7 + 1) % CLASSES


@pytest.mark.parametrize(
    "loss_of",
    [
        functional.cross_entropy,
        lambda s, y: functional.cross_entropy(s, y, weight=torch.linspace(0.1, 5, CLASSES)),
        lambda s, y: functional.cross_entropy(s.T[None], y[None]),  # one dimension of places, as in segmentation
        lambda s, y: functional.nll_loss(s.log_softmax(-1), y) / 1,
    ],
)
def test_scores_that_are_worse_than_a_guess_are_told(loss_of):
    alert = said_of(Tied(1.0), words, loss_of)["GW209"]
    assert (alert.severity, alert.finding.place, alert.finding.kind) == (Severity.WARNING, "head", "exploding")
    assert alert.finding.evidence["chance"] == pytest.approx(math.log(CLASSES))
    assert f"equal scores for all classes have {math.log(CLASSES):.3g}" in alert.message


@pytest.mark.parametrize(
    ("std", "loss_of"),
    [
        (0.02, functional.cross_entropy),
        (1.0, lambda s, y: functional.cross_entropy(s, y, reduction="sum")),  # of which nobody knows the number
        (1.0, lambda s, y: functional.cross_entropy(s, y) + 0 * s.sum()),
    ],
)
def test_what_is_no_worse_or_not_known_is_not(std, loss_of):
    assert "GW209" not in said_of(Tied(std), words, loss_of)


@pytest.mark.parametrize("case", ["with another", "less than one", "added up"])
def test_a_loss_that_is_another_number_than_the_cross_entropy_is_not(case):
    torch.manual_seed(3)
    model, said = nn.Linear(CLASSES, CLASSES), set()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with gradwatch.watch(model, optimizer, on_alert=lambda a: said.add(a.finding.code)) as watcher:
        watcher._losses.raw = case == "added up"
        for _ in range(30):
            x, y = words()
            loss = functional.cross_entropy(model(functional.one_hot(x, CLASSES).float()), y)
            optimizer.zero_grad()
            parts = {"with another": [loss, loss * 9], "less than one": [loss / 0.1], "added up": [loss] * 8}[case]
            for part in parts:
                watcher.record(part)
            sum(parts).backward()
            optimizer.step()
    assert "GW209" not in said


def test_a_model_that_is_sure_and_wrong_for_a_few_steps_is_left_to_learn():
    """As a pretrained one is on new labels."""
    torch.manual_seed(2)
    model = nn.Linear(CLASSES, CLASSES)
    with torch.no_grad():
        model.weight.copy_(20 * torch.eye(CLASSES))

    def draw():
        x, y = words()
        return functional.one_hot(x, CLASSES).float(), y

    assert "GW209" not in said_of(model, draw, functional.cross_entropy, rate=1.0)


# --- what is said to help ---


def of_batch(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("model", "draw", "code", "action"),
    [
        (network, signals(1e-6), "GW106", "standardize"),
        (lambda: Tied(1.0), words, "GW209", "initialize"),
    ],
)
def test_what_the_alert_says_to_do_is_tried_and_helps(model, draw, code, action):
    torch.manual_seed(4)
    cures = gradwatch.cure(model(), draw(), loss=of_batch, data=[draw() for _ in range(8)])
    tried = {c.remedy.action: c for c in cures.cures if c.alert.finding.code == code}
    assert tried[action].helped, str(cures)
