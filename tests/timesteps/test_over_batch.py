"""A recurrent module that takes the rows of the batch for timesteps, and those that do not."""

from __future__ import annotations

import warnings

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


# --- rows that are mixed up ---


class Mixed(nn.Module):
    """An LSTM of two layers that reads its input, or whose final states are read, by view() where a transposition is
    meant."""

    def __init__(self, at):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head, self.at = nn.LSTM(3, 8, 2), nn.Linear(16, 4), at

    def forward(self, x):
        rows, steps, features = x.shape
        states = self.rnn(x.view(steps, rows, features) if self.at == "input" else x.transpose(0, 1))[1][0]
        return self.head(states.view(rows, -1) if self.at == "states" else states.transpose(0, 1).reshape(rows, -1))


def shares(model, x):
    """Return by how much of the gradient of each row's output goes to other rows, by the whole Jacobian in float64."""
    model = model.double()
    jacobian = torch.autograd.functional.jacobian(model, x.double())  # rows, outputs, rows, steps, features
    squares = jacobian.square().sum((1, 3, 4))
    return 1 - squares.diagonal() / squares.sum(1)


@pytest.mark.parametrize("at", ["", "states", "input"])
def test_rows_that_a_view_mixes_up_are_told_where_a_need_is_declared(at):
    x, target = torch.randn(32, 6, 3), torch.randint(4, (32,))
    assert (shares(Mixed(at), x).mean() > 0.4) == bool(at)

    def told(**options):
        model = Mixed(at)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with gradwatch.watch(model, optimizer, on_alert=lambda _: None, **options) as watcher:
            for _ in range(25):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), target)
                loss.backward()
                watcher.record(loss)
                optimizer.step()
        return [a for a in watcher.report.open if a.severity > Severity.INFO]

    alerts = told(horizon=4)
    assert [(a.finding.code, a.finding.place) for a in alerts] == ([("GW307", "")] if at else [])
    assert told() == []
    if at == "states":
        assert alerts[0].message.startswith("the model mixes the rows of a batch up: the data of a row moves")
        assert alerts[0].remedy.startswith("transpose or permute in place of view")


def test_a_horizon_is_asserted_of_no_model_that_mixes_rows():
    x = torch.randn(32, 6, 3)
    with pytest.raises(gradwatch.GradientHealthError, match="mixes the rows of a batch up"):
        gradwatch.assert_horizon(Mixed("states"), x, at_least=3)
    with pytest.raises(gradwatch.GradientHealthError, match="mixes the rows of a batch up"):
        gradwatch.assert_horizon(Mixed("input"), x, at_least=3)
    with pytest.raises(ValueError, match=r"has a row for each of its 12 timesteps .* transpose \(not view\)"):
        gradwatch.assert_horizon(Mixed("input"), x[:12], at_least=3)
    assert gradwatch.assert_horizon(Mixed(""), x, at_least=3).mixes_rows == 0
    assert gradwatch.horizon(Mixed("states"), x[:20]).mixes_rows is None  # too few to leave one out


def test_batch_normalization_in_training_mode_mixes_rows_and_is_meant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Flatten(), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 4))
    x = torch.randn(32, 6, 3)
    assert gradwatch.horizon(model, x).mixes_rows is None
    assert gradwatch.horizon(model.eval(), x).mixes_rows == 0


def test_a_row_that_is_left_out_does_not_change_the_horizon():
    """The last of 32 rows is left out: what is told is the horizon of the other 31, as their whole Jacobian has it."""
    x = torch.randn(32, 6, 3)
    model = Mixed("").double()
    jacobian = torch.autograd.functional.jacobian(model, x[:31].double())
    gain = torch.stack([jacobian[i, :, i].square().sum((0, 2)) for i in range(31)]).mean(0).sqrt().flip(0)
    stats = gradwatch.horizon(model, x.double())
    assert stats.rows == 31
    told = torch.tensor(stats.lag_gain, dtype=torch.float64) * 2  # over the root of 4 outputs
    torch.testing.assert_close(told, gain, rtol=0.35, atol=0)


@pytest.mark.parametrize("order", ["longest first", "any"])
def test_packed_rows_of_any_order_are_not_mixed(order):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(3, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.rnn(x)[1][-1])

    lengths = torch.arange(3, 35) if order == "any" else torch.arange(34, 2, -1)
    rows = nn.utils.rnn.pack_padded_sequence(torch.randn(34, 32, 3), lengths, enforce_sorted=False)
    stats = gradwatch.horizon(Packed(), rows)
    assert stats.mixes_rows is None
    assert not stats.misread
    padded = torch.randn(32, 34, 3)

    class Within(Packed):
        def forward(self, x):
            return super().forward(
                nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            )

    assert gradwatch.horizon(Within(), padded).mixes_rows in (None, 0.0)


def test_rows_that_are_meant_to_know_of_each_other_are_not_asked_about_where_time_is_named():
    class Assets(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.attention = nn.GRU(3, 8, batch_first=True), nn.MultiheadAttention(8, 1, batch_first=True)

        def forward(self, x):
            states = self.rnn(x)[0][:, -1].unsqueeze(0)
            return self.attention(states, states, states)[0].squeeze(0)

    x = torch.randn(32, 6, 3)
    assert gradwatch.horizon(Assets(), x).mixes_rows > 0.3
    assert gradwatch.assert_horizon(Assets(), x, at_least=3, timesteps={"x": 1}).mixes_rows is None
    assert gradwatch.horizon(nn.Sequential(Assets(), nn.Linear(8, 32)), x).mixes_rows is None  # which are the rows?


# --- a recurrence of which one timestep is read ---


class Both(nn.Module):
    def __init__(self, read, kind, options):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = kind(3, 8, batch_first=True, **options), nn.LazyLinear(4)
        self.read = read

    def forward(self, x):
        return self.head(self.read(*self.rnn(x)))


def newest(out, _state):
    return out[:, -1]


def oldest(out, _state):
    return out[:, 0]


def states(_out, state):
    h = state[0] if isinstance(state, tuple) else state
    return torch.cat([h[-2], h[-1]], 1)


def read_one(read, kind, options, steps=STEPS):
    model = Both(read, kind, options)
    x, target = torch.randn(ROWS, steps, 3), torch.randint(4, (ROWS,))
    model(x)
    told = [a for a in found(model, x, target, 25) if a.finding.code == "GW308"]
    truth = model.double()
    truth.zero_grad()
    nn.functional.cross_entropy(truth(x.double()), target).backward()
    return told, [name for name, p in truth.named_parameters() if "weight_hh" in name and not p.grad.any()]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    ("read", "options", "weights"),
    [
        (newest, {"bidirectional": True}, "weight_hh_l0_reverse"),
        (newest, {"bidirectional": True, "num_layers": 2}, "weight_hh_l1_reverse"),
        (oldest, {}, "weight_hh_l0"),
        (oldest, {"bidirectional": True}, "weight_hh_l0"),
    ],
)
def test_a_recurrence_of_which_one_timestep_is_read_is_told(kind, read, options, weights):
    (alert,), without = read_one(read, kind, options)

    assert without == [f"rnn.{weights}"]
    assert (alert.finding.place, alert.severity) == ("rnn", Severity.WARNING)
    both, way = "bidirectional" in options, "reverse" if "reverse" in weights else "forward"
    reverse = f"the {way} direction of " * both
    assert alert.message.startswith(
        f"one of 6 timesteps is read by {reverse}rnn: its recurrent weights (rnn.{weights})"
    )
    assert ("torch.cat([h_n[-2], h_n[-1]], 1)" in alert.remedy) is both
    assert ("which the reverse direction reads first" in alert.cause) is ("reverse" in weights)


@pytest.mark.parametrize(
    ("read", "options", "steps"),
    [
        (states, {"bidirectional": True}, STEPS),
        (newest, {}, STEPS),
        (newest, {"bidirectional": True}, 1),
        (newest, {"bidirectional": True, "bias": False}, STEPS),  # where the state may be 0 for another reason
    ],
)
def test_one_that_reads_more_or_has_no_more_is_not(read, options, steps):
    assert read_one(read, nn.GRU, options, steps)[0] == []


def test_where_two_directions_share_their_input_weights_nothing_fails():
    model = Both(newest, nn.GRU, {"bidirectional": True})
    model.rnn.weight_ih_l0_reverse = model.rnn.weight_ih_l0
    x, target = torch.randn(ROWS, STEPS, 3), torch.randint(4, (ROWS,))
    model(x)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found(model, x, target, 25)
    assert [str(w.message) for w in warned] == []
