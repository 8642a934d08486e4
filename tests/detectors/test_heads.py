"""What a loss makes of scores: squashed once more (GW104), or each held against each target (GW802)."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional

import gradwatch
from gradwatch import Severity

CLASSES = 5


def network(*last):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, CLASSES), *last)


def trained(loss_of, *last, steps=25, told=True):
    model = network(*last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
        for _ in range(steps):
            x, y = torch.randn(8, 4, generator=generator), torch.randint(CLASSES, (8,), generator=generator)
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if told:
                watcher.record(loss)
            optimizer.step()
    return watcher.report


def hot(y):
    return functional.one_hot(y, CLASSES).float()


def masked(scores, y):
    return functional.cross_entropy(scores.softmax(-1)[y > 0], y[y > 0])


def in_pieces(scores, y):
    rows = scores.softmax(-1).reshape(2, 4, CLASSES).transpose(1, 2)
    return functional.cross_entropy(rows, y.reshape(2, 4))


TWICE = {
    "softmax": (functional.cross_entropy, (nn.Softmax(-1),), "3", "softmax", math.log(math.e + CLASSES - 1) - 1),
    "functional": (
        lambda s, y: functional.cross_entropy(s.softmax(-1), y),
        (),
        "2",
        "softmax",
        math.log(math.e + CLASSES - 1) - 1,
    ),
    "smoothed": (
        lambda s, y: 3 * functional.cross_entropy(s.softmax(-1), y, label_smoothing=0.1) + s.square().mean(),
        (),
        "2",
        "softmax",
        math.log(math.e + CLASSES - 1) - 1,
    ),
    "masked": (masked, (), "2", "softmax", math.log(math.e + CLASSES - 1) - 1),
    "channels": (in_pieces, (), "2", "softmax", math.log(math.e + CLASSES - 1) - 1),
    "sigmoid, softmax": (functional.cross_entropy, (nn.Sigmoid(),), "3", "sigmoid", math.log(math.e + CLASSES - 1) - 1),
    "policy": (
        lambda s, y: -Categorical(logits=s.softmax(-1)).log_prob(y).mean(),
        (),
        "2",
        "softmax",
        math.log(math.e + CLASSES - 1) - 1,
    ),
    "sigmoid": (
        lambda s, y: functional.binary_cross_entropy_with_logits(s, hot(y)),
        (nn.Sigmoid(),),
        "3",
        "sigmoid",
        math.log1p(math.exp(-1)),
    ),
}
ONCE = {
    "cross_entropy": (functional.cross_entropy, ()),
    "nll of log_softmax": (functional.nll_loss, (nn.LogSoftmax(-1),)),
    "nll of the logarithm": (lambda p, y: functional.nll_loss((p + 1e-8).log(), y), (nn.Softmax(-1),)),
    "logarithm twice": (functional.cross_entropy, (nn.LogSoftmax(-1),)),
    "binary": (lambda p, y: functional.binary_cross_entropy(p, hot(y)), (nn.Sigmoid(),)),
    "logits": (lambda s, y: functional.binary_cross_entropy_with_logits(s, hot(y)), ()),
    "policy": (lambda s, y: -Categorical(probs=s.softmax(-1)).log_prob(y).mean(), ()),
    "scaled": (lambda s, y: functional.cross_entropy(20 * s.sigmoid(), y), ()),
    "bounded": (functional.cross_entropy, (nn.Tanh(),)),
    "squares": (lambda p, y: functional.mse_loss(p, hot(y)), (nn.Softmax(-1),)),
}


@pytest.mark.parametrize("case", TWICE)
def test_scores_that_are_squashed_twice_are_told(case):
    loss_of, last, place, by, floor = TWICE[case]
    (alert,) = [a for a in trained(loss_of, *last).open if a.finding.code == "GW104"]
    assert (alert.severity, alert.finding.place, alert.began) == (Severity.WARNING, place, 1)
    assert f"of what a {by}, after {place}, has made already" in alert.message
    assert f"cannot fall below {floor:.2g}" in alert.message
    assert alert.remedy.startswith(f"give the loss the scores themselves, without the {by}")


def test_log_probabilities_that_are_probabilities_are_told():
    (alert,) = [a for a in trained(functional.nll_loss, nn.Softmax(-1)).open if a.finding.code == "GW104"]
    assert alert.message == (
        "the loss takes log-probabilities, and gets the probabilities that a softmax, after 3, has made"
    )


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda p, y: p.logsumexp((0, 1)),
        lambda p, y: p[0, 0].log_softmax(0) + p.mean(),
        lambda p, y: -(p.logsumexp(1) - 1).mean(),  # a smooth maximum of what lies between 0 and 1
    ],
)
def test_other_sums_of_exponentials_are_none(loss_of):
    report = trained(loss_of, nn.Sigmoid(), steps=4)
    assert not [a for a in report.open if a.finding.code == "GW104" and a.finding.names["into"] != "softmax"]


@pytest.mark.parametrize("case", ONCE)
def test_scores_that_are_squashed_once_are_not(case):
    loss_of, last = ONCE[case]
    assert not [a for a in trained(loss_of, *last).open if a.finding.code == "GW104"]


def test_a_loss_that_nobody_tells_is_not_looked_at():
    assert not trained(functional.cross_entropy, nn.Softmax(-1), told=False).open


@pytest.mark.parametrize("into", ["softmax", "sigmoid"])
def test_no_scores_between_0_and_1_get_below_what_is_said(into):
    """The lowest loss is at a corner; drawn points, and the corner itself."""
    generator = torch.Generator().manual_seed(0)
    p = torch.cat([torch.rand(2000, CLASSES, generator=generator, dtype=torch.float64), torch.eye(CLASSES).double()])
    if into == "softmax":
        losses = functional.cross_entropy(p, torch.zeros(len(p), dtype=torch.long), reduction="none")
        assert losses.min().item() == pytest.approx(math.log(math.e + CLASSES - 1) - 1)
    else:
        losses = functional.binary_cross_entropy_with_logits(p, torch.ones_like(p), reduction="none")
        assert losses.min().item() == pytest.approx(math.log1p(math.exp(-1)))


def test_a_check_tells_too():
    batch, y = torch.randn(8, 4), torch.arange(8) % CLASSES

    def found(*last):
        report = gradwatch.check(network(*last), batch, loss=lambda out: functional.cross_entropy(out, y))
        return [(a.finding.code, a.finding.place) for a in report.open if a.severity > Severity.INFO]

    assert found(nn.Softmax(-1)) == [("GW104", "3")]
    assert found() == []


def test_of_losses_that_take_turns_the_one_is_told_until_it_is_gone():
    model = network(nn.Softmax(-1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cleared = []
    with gradwatch.watch(model, optimizer, sinks=[lambda r: cleared.extend(r.cleared)], on_alert=lambda _: None) as w:
        for step in range(120):
            x, y = torch.randn(8, 4), torch.randint(CLASSES, (8,))
            out = model(x) if step < 30 else model[:-1](x)
            optimizer.zero_grad()
            loss = functional.cross_entropy(out, y)
            loss.backward()
            w.record(loss)
            optimizer.step()
    assert [a.finding.code for a in cleared if a.finding.code == "GW104"] == ["GW104"]
    assert not [a for a in w.report.open if a.finding.code == "GW104"]


# --- each forecast against each target ---

ROWS = 12


def regression(loss_of, steps=25):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(1)
    with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
        for _ in range(steps):
            x = torch.randn(ROWS, 4, generator=generator)
            loss = loss_of(model(x), x[:, 0])
            optimizer.zero_grad()
            loss.backward()
            watcher.record(loss)
            optimizer.step()
    return model, [a for a in watcher.report.open if a.finding.code == "GW802"]


CROSSED = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "smooth": functional.smooth_l1_loss,
    "huber": functional.huber_loss,
    "by hand": lambda out, y: (y - out).square().mean(),
    "by hand, absolute": lambda out, y: (out - y).abs().sum() / ROWS,
    "targets as a column": lambda out, y: (out.squeeze(-1) - y[:, None]).pow(2).mean(),
    "a share": lambda out, y: ((out - y) / (y.abs() + 1)).abs().mean(),
    "three dimensions": lambda out, y: functional.mse_loss(out[..., None], y[:, None]),
    "within a sum": lambda out, y: functional.mse_loss(out, y) + 0.1 * out.square().mean(),
}
STRAIGHT = {
    "mse": lambda out, y: functional.mse_loss(out.squeeze(-1), y),
    "column": lambda out, y: functional.mse_loss(out, y[:, None]),
    "pairs of outputs": lambda out, y: (out - out.T - (y[:, None] - y)).square().mean(),
    "energy distance": lambda out, y: (out - y).abs().mean() - 0.5 * (out - out.T).abs().mean(),
    "nearest of the targets": lambda out, y: (out - y).abs().amin(1).mean(),
    "kernel": lambda out, y: (-(out - y).square()).exp().mean(),
    "quantiles": lambda out, y: (out - torch.tensor([0.1, 0.5, 0.9])).abs().mean() + (out[:, 0] - y).abs().mean(),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", CROSSED)
def test_forecasts_against_every_target_are_told_and_learn_the_mean(case):
    model, alerts = regression(CROSSED[case])
    (alert,) = alerts
    assert (alert.severity, alert.finding.place, alert.began) == (Severity.WARNING, "", 1)
    assert f"each of {ROWS} forecasts against each of {ROWS} targets" in alert.message
    # The truth: no order of the targets makes a difference to the gradient.
    x, y = torch.randn(ROWS, 4, dtype=torch.float64), torch.randn(ROWS, dtype=torch.float64)
    model.double()
    gradients = []
    for target in (y, y.flip(0)):
        model.zero_grad()
        CROSSED[case](model(x), target).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", STRAIGHT)
def test_forecasts_against_their_own_targets_are_not(case):
    assert regression(STRAIGHT[case])[1] == []
