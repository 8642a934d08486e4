"""A recurrent module that takes the rows of the batch for timesteps, and those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import Severity

ROWS, STEPS = 20, 6


class Net(nn.Module):
    def __init__(self, read, *, batch_first, kind=nn.LSTM):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head, self.read = kind(3, 8, batch_first=batch_first), nn.Linear(8, 4), read

    def forward(self, x):
        return self.head(self.read(self.rnn(x)[0]))


def found(model, x, target, steps=15):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_alert=lambda _: None) as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, -2), target).backward()
            optimizer.step()
    return [a for a in watcher.report.open if a.finding.code == "GW307" or a.severity > Severity.INFO]


def last(out):
    return out[:, -1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_module_that_runs_over_the_batch_is_told(kind):
    x, target = torch.randn(ROWS, STEPS, 3), torch.randint(4, (ROWS,))
    (alert,) = found(Net(last, batch_first=False, kind=kind), x, target)

    assert (alert.finding.code, alert.finding.place, alert.severity) == ("GW307", "rnn", Severity.WARNING)
    assert alert.message.startswith(
        "rnn runs over the batch: the model's output has a row for each of its 20 timesteps"
    )
    assert alert.remedy == "set batch_first=True in rnn, or transpose (not view) what goes into it"
    assert found(Net(last, batch_first=True, kind=kind), x, target) == []


@pytest.mark.parametrize(
    ("read", "batch_first", "shape", "targets"),
    [
        (lambda out: out[-1], False, (STEPS, ROWS, 3), ROWS),
        (lambda out: out, False, (STEPS, ROWS, 3), STEPS * ROWS),
        (lambda out: out, True, (ROWS, STEPS, 3), STEPS * ROWS),
        (lambda out: out.mean(0), False, (STEPS, ROWS, 3), ROWS),
        (lambda out: out[:, 0], False, (STEPS, 1, 3), STEPS),
        (last, True, (ROWS, ROWS, 3), ROWS),
    ],
)
def test_other_orders_are_left_alone(read, batch_first, shape, targets):
    assert found(Net(read, batch_first=batch_first), torch.randn(shape), torch.randint(4, (targets,))) == []


def test_no_horizon_is_told_of_it():
    x = torch.randn(ROWS, STEPS, 3)

    with pytest.raises(ValueError, match="rnn runs over the batch: the output of shape"):
        gradwatch.assert_horizon(Net(last, batch_first=False), x, at_least=3)
    assert gradwatch.horizon(Net(last, batch_first=True), x).length == STEPS


class Attending(nn.Module):
    """A transformer's encoder that takes (timesteps, rows, features), or with `batch_first` rows first."""

    def __init__(self, read, *, batch_first):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.into, self.encoder = nn.Linear(3, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.read = nn.Linear(8, 4), read

    def forward(self, x):
        return self.head(self.read(self.encoder(self.into(x))))


def test_attention_that_runs_over_the_batch_is_told_where_a_need_is_declared():
    x, target = torch.randn(ROWS, STEPS, 3), torch.randint(4, (ROWS,))

    def alerts(model, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with gradwatch.watch(model, optimizer, horizon=STEPS, on_alert=lambda _: None, **options) as watcher:
            for _ in range(25):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
        return [(a.finding.code, a.finding.place) for a in watcher.report.open if a.severity > Severity.INFO]

    assert alerts(Attending(last, batch_first=False)) == [("GW307", "encoder.layers.0.self_attn")]
    assert alerts(Attending(last, batch_first=True)) == []
    assert alerts(Attending(last, batch_first=False), timesteps={"x": 1}) == []  # series beside each other: it is meant


@pytest.mark.parametrize("read", [lambda out: out[-1], lambda out: out, lambda out: out.mean(0)])
def test_attention_over_the_first_dimension_is_right_where_that_is_time(read):
    stats = gradwatch.horizon(Attending(read, batch_first=False).eval(), torch.randn(STEPS, ROWS, 3))
    assert (stats.time, stats.length) == (0, STEPS)


def test_one_pass_refuses_attention_over_the_batch():
    model, x = Attending(last, batch_first=False).eval(), torch.randn(ROWS, STEPS, 3)
    with pytest.raises(ValueError, match=r"encoder.layers.0.self_attn runs over the batch: .* 20 timesteps and none"):
        gradwatch.horizon(model, x)
    assert gradwatch.horizon(model, x, timesteps={"x": 1}).length == STEPS
