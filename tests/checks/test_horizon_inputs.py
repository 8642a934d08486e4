"""Whose timesteps a model's horizon counts: of every input of the model, in its own dimension of time, or not said.

The truth is the whole Jacobian in float64, one row after the other.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from models import Model
from torch import nn

import gradwatch
from gradwatch.values.sequences import horizon_of

B, T, F = 6, 60, 4


def exact(newest, x, time):
    """Return the horizon by the whole Jacobian.

    Args:
        newest: of the tensor, rows first.
        x: the tensor.
        time: its dimension of time.

    """
    x = x.detach().clone().requires_grad_()
    y = newest(x).flatten(1)
    squares = torch.zeros(x.shape[time], dtype=torch.float64)
    for column in y.unbind(1):
        (gradient,) = torch.autograd.grad(column.sum(), x, retain_graph=True)
        squares += gradient.movedim(time, 0).flatten(1).square().sum(1)
    return horizon_of(squares.sqrt().flip(0).tolist()).timesteps


def lies_in(horizon, stats):
    low, high = stats.interval
    assert low <= horizon <= high, (horizon, stats.interval)


def built(does, **layers):
    """Return some layers and what is done with them, in float64."""
    return Model(does, **layers).double().eval()


def cell(net, x):
    """Go through (B, T, F) by hand."""
    h = x.new_zeros(len(x), 8)
    for t in range(x.shape[1]):
        h = torch.tanh(net.into(x[:, t]) + net.on(h))
    return h


def own_cell(features=F):
    return {"into": nn.Linear(features, 8), "on": nn.Linear(8, 8)}


def newest_of_five(net, x):
    return net.head(x[:, -5:].flatten(1))


def patches(net, x):
    return net.rnn(net.embed(x.unfold(-1, 16, 8)))[0][:, -1]


def normalized(net, x):
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return net.conv(nn.functional.pad(x.permute(0, 2, 1).contiguous(), (20, 0)))[..., -1]


class Encoder(nn.Module):
    """Attention before a recurrent network."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.into, self.layer, self.rnn = nn.Linear(F, 8), layer, nn.LSTM(8, 8, batch_first=True)
        self.double().eval()

    def forward(self, x):
        return self.rnn(self.layer(self.into(x)))[0][:, -1]


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def conv_rnn(stride, kernel):
    return built(
        lambda n, x: n.rnn(n.conv(x.transpose(1, 2)).relu().transpose(1, 2))[0][:, -1],
        conv=nn.Conv1d(F, 8, kernel, stride),
        rnn=nn.RNN(8, 8, batch_first=True),
    )


def spectra(n, x):
    """Go over (B, 1, F, T) with a picture's convolution and pool, and then through time."""
    h = nn.functional.max_pool2d(n.conv(x), (2, 1))
    return n.rnn(h.flatten(1, 2).transpose(1, 2))[0][:, -1]


def picture(**layers):
    return {"conv": nn.Conv2d(1, 3, 3, padding=1), "rnn": nn.GRU(3 * F // 2, 8, batch_first=True), **layers}


SHAPES = {
    "pictures before a GRU": (lambda: built(spectra, **picture()), (B, 1, F, T), 3, False),
    "features by time as a picture": (
        lambda: built(lambda n, x: spectra(n, x.unsqueeze(1)), **picture()),
        (B, F, T),
        2,
        False,
    ),
    "levels by convolutions, time by an LSTM": (
        lambda: built(
            lambda n, x: n.rnn(n.conv(x.unsqueeze(1)).squeeze(3).transpose(1, 2))[0][:, -1],
            conv=nn.Sequential(nn.Conv2d(1, 4, (1, 2), stride=(1, 2)), nn.Tanh(), nn.Conv2d(4, 4, (3, 2))),
            rnn=nn.LSTM(4, 8, batch_first=True),
        ),
        (B, T, F),
        1,
        False,
    ),
    "a graph's nodes, each convolved": (
        lambda: built(lambda n, x: n.conv(x.permute(0, 3, 1, 2))[..., -1], conv=nn.Conv2d(2, 4, (1, 9))),
        (B, 7, T, 2),
        2,
        True,
    ),
    "electrodes, folded into one": (
        lambda: built(
            lambda n, x: n.fold(n.conv(x)).squeeze(2)[..., -1],
            conv=nn.Conv2d(1, 4, (1, 9)),
            fold=nn.Conv2d(4, 4, (7, 1), groups=4),
        ),
        (B, 1, 7, T),
        3,
        True,
    ),
    "attention before an LSTM": (Encoder, (B, T, F), 1, False),
    "a convolution before an RNN": (lambda: conv_rnn(1, 21), (B, T, F), 1, False),
    "strides before an RNN": (lambda: conv_rnn(5, 5), (B, T, F), 1, False),
    "channels first": (lambda: built(lambda n, x: n.conv(x)[..., -1], conv=nn.Conv1d(F, 8, 9)), (B, F, T), 2, False),
    "a normalized convolution": (lambda: built(normalized, conv=nn.Conv1d(F, 8, 21)), (B, T, F), 1, False),
    "a convolution over a single feature": (
        lambda: built(lambda n, x: n.conv(x.permute(0, 2, 1))[..., -1], conv=nn.Conv1d(1, 8, 9)),
        (B, T, 1),
        1,
        False,
    ),
    "a loop of one's own": (lambda: built(cell, **own_cell()), (B, T, F), 1, False),
    "time first, by a loop": (
        lambda: built(lambda n, x: cell(n, x.transpose(0, 1)), **own_cell()),
        (T, B, F),
        0,
        False,
    ),
    "time first, by what is given": (
        lambda: built(lambda n, x: newest_of_five(n, x.transpose(0, 1)), head=nn.Linear(5 * F, 1)),
        (T, B, F),
        0,
        False,
    ),
    "channels first, by what is taken": (
        lambda: built(lambda n, x: newest_of_five(n, x.transpose(1, 2)), head=nn.Linear(5 * F, 1)),
        (B, F, T),
        2,
        False,
    ),
    "rows and timesteps": (lambda: built(lambda n, x: n.head(x[:, -7:]), head=nn.Linear(7, 2)), (B, T), 1, False),
    "a linear window": (lambda: built(lambda n, x: n.head(x), head=nn.Linear(T, 3)), (B, T), 1, True),
    "a linear map through time": (
        lambda: built(lambda n, x: n.head(x.transpose(1, 2)), head=nn.Linear(T, 3)),
        (B, T, F),
        1,
        True,
    ),
    "one linear map for each feature": (
        lambda: built(
            lambda n, x: torch.stack([layer(x[:, :, i]) for i, layer in enumerate(n.maps)], -1),
            maps=nn.ModuleList(nn.Linear(T, 3) for _ in range(F)),
        ),
        (B, T, F),
        1,
        True,
    ),
    "patches": (
        lambda: built(patches, embed=nn.Linear(16, 8), rnn=nn.GRU(8, 8, batch_first=True)),
        (B, T),
        1,
        False,
    ),
    "a film": (
        lambda: built(lambda n, x: newest_of_five(n, x.mean((3, 4))), head=nn.Linear(5 * F, 1)),
        (B, T, F, 3, 3),
        1,
        False,
    ),
    "a cumulative sum": (
        lambda: built(lambda n, x: n.into(x.cumsum(1))[:, -1], into=nn.Linear(F, 2)),
        (B, T, F),
        1,
        False,
    ),
    "differences, time first": (
        lambda: built(lambda n, x: n.into(x.diff(1, 0))[-1], into=nn.Linear(F, 2)),
        (T, B, F),
        0,
        False,
    ),
    "rolled, time first": (
        lambda: built(lambda n, x: n.into(x + x.roll(1, 0))[-1], into=nn.Linear(F, 2)),
        (T, B, F),
        0,
        False,
    ),
    "packed inside of the model": (
        lambda: built(
            lambda n, x: n.rnn(nn.utils.rnn.pack_padded_sequence(x, [T] * B, batch_first=True))[1][-1],
            rnn=nn.GRU(F, 8, batch_first=True),
        ),
        (B, T, F),
        1,
        False,
    ),
    "layers before a recurrent network": (
        lambda: built(
            lambda n, x: n.rnn(n.into(x.reshape(-1, F)).reshape(B, T, 8))[0][:, -1],
            into=nn.Linear(F, 8),
            rnn=nn.GRU(8, 8, batch_first=True),
        ),
        (B, T, F),
        1,
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_time_is_the_dimension_along_which_the_model_goes(name):
    build, shape, time, assumed = SHAPES[name]
    torch.manual_seed(0)
    model, x = build(), random(*shape)
    stats = gradwatch.horizon(model, x)
    assert (stats.input, stats.time, stats.time_assumed) == ("x", time, assumed)
    assert stats.length == shape[time]
    lies_in(exact(model, x, time), stats)


@pytest.mark.parametrize("steps_inside", [True, False], ids=["a convolution", "a loop"])
def test_a_flat_window_has_the_timesteps_that_the_model_makes_of_it(steps_inside):
    torch.manual_seed(0)
    if steps_inside:
        model = built(lambda n, x: n.conv(x.reshape(len(x), F, T))[..., -1], conv=nn.Conv1d(F, 8, 9))
    else:
        model = built(lambda n, x: cell(n, x.reshape(len(x), F, T).permute(0, 2, 1)), **own_cell())
    x = random(B, F * T)
    stats = gradwatch.horizon(model, x)
    assert stats.length == T
    lies_in(exact(lambda x: model(x.flatten(1)), x.reshape(B, F, T), 2), stats)


def test_a_flat_window_of_pieces_may_hold_features_or_timesteps_and_has_no_number():
    model = built(lambda n, x: n.rnn(x.reshape(len(x), T, F))[0][:, -1], rnn=nn.GRU(F, 8, batch_first=True))
    with pytest.raises(ValueError, match=r"x: it is read in 60 pieces of 4, .* cannot be told"):
        gradwatch.horizon(model, random(B, T * F))


def test_a_recurrent_network_over_nodes_is_no_evidence_of_time():
    """Graph networks of several series run over the series, with all of their timesteps as features."""
    model = built(
        lambda n, x: n.head(x.transpose(1, 2)) + n.rnn(x.transpose(1, 2).contiguous())[0],
        rnn=nn.GRU(T, 3, batch_first=True),
        head=nn.Linear(T, 3),
    )
    with pytest.raises(ValueError, match="x: a recurrent module goes along its 4 last entries, with 60 features"):
        gradwatch.horizon(model, random(B, T, F))
    stats = gradwatch.horizon(model, random(B, T, F), timesteps={"": 1})
    assert (stats.length, stats.horizon) == (T, T)


def test_evidence_against_evidence_is_said_and_a_word_decides():
    model = built(
        lambda n, x: n.conv(x)[..., -1] + n.rnn(x)[0][:, -1].mean(1, keepdim=True),
        conv=nn.Conv1d(F, 8, 9),
        rnn=nn.GRU(T, 3, batch_first=True),
    )
    x = random(B, F, T)
    with pytest.raises(
        ValueError, match="a recurrent module goes along dimension 1 and a convolution slides along dim"
    ):
        gradwatch.horizon(model, x)
    for timesteps in ({"x": 2}, {"": 2}, {"": -1}):
        stats = gradwatch.horizon(model, x, timesteps=timesteps)
        assert (stats.time, stats.length, stats.time_assumed) == (2, T, False)


def test_what_was_assumed_is_said():
    from gradwatch.values.sequences import sentences

    model = built(lambda n, x: n.head(x), head=nn.Linear(T, 3))
    (_, said), *_ = sentences((gradwatch.horizon(model, random(B, T)),))
    assert said.startswith("the model learns from at least 60 of 60 timesteps of x (time: dimension 1, assumed)")


@pytest.mark.parametrize("tail", [True, False], ids=["the newest timesteps", "a decoder's own"])
def test_of_a_forecast_of_a_few_timesteps_all_of_it_is_meant(tail):
    """The oldest of them sees further back: it stands further back itself, or is made of the same state."""

    class Forecaster(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.decoder, self.head = (
                nn.GRU(F, 8, batch_first=True),
                nn.GRU(2, 8, batch_first=True),
                nn.Linear(8, 2),
            )
            self.double()

        def forward(self, x, ahead):
            states, last = self.rnn(x)
            return self.head(states[:, -12:] if tail else self.decoder(ahead, last)[0])

    torch.manual_seed(0)
    model, x, ahead = Forecaster(), random(16, T, F), random(16, 12, 2)
    stats = gradwatch.horizon(model, (x, ahead), input="x")
    lies_in(exact(lambda x: model(x, ahead), x, 1), stats)
    newest = gradwatch.horizon(model, (x, ahead), input="x", output=lambda y: y[:, -1])
    assert stats.lag_gain[0] < 0.9 * newest.lag_gain[0] if tail else stats.lag_gain[0] > 10 * newest.lag_gain[0]


# --- several inputs ---


class Several(nn.Module):
    """Sees the newest 5 timesteps of y, and of another input as many as it is told to."""

    def __init__(self, *, weight=1.0, other=5):
        super().__init__()
        self.head, self.weight, self.other = nn.Linear(5 * F, 1), weight, other
        self.double()

    def forward(self, extra, y):
        return self.head(y[:, -5:].flatten(1)) + self.weight * extra[:, -self.other :].flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ((B, 1, 3), {}),
        ((B, 24, 2), {}),
        ((B, 24, 2), {"weight": 1e-9, "other": 24}),
        ((B, T, 2), {"weight": 1e-9, "other": 24}),
        ((B, 3), {}),
    ],
    ids=["static", "of the future", "of next to no weight", "as long, of next to no weight", "rows and features"],
)
def test_the_first_input_is_not_the_series_because_it_comes_first(extra, options):
    stats = gradwatch.horizon(Several(**options), (random(*extra), random(B, T, F)))
    assert (stats.input, stats.horizon, stats.length) == ("y", 5, T)


@pytest.mark.parametrize("loop", [False, True], ids=["a fused network", "cells"])
def test_a_state_that_is_carried_on_is_no_series(loop):
    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRUCell(F, F) if loop else nn.GRU(F, 32, batch_first=True)
            self.double()

        def forward(self, x, state):
            if not loop:
                return self.rnn(x, state)[0][:, -1]
            for step in x.unbind(1):
                state = self.rnn(step, state)
            return state

    state = random(B, F) if loop else random(1, B, 32)
    stats = gradwatch.horizon(Carrying(), (random(B, 8, F), state))
    assert (stats.input, stats.length, stats.beside) == ("x", 8, ())


def test_a_mask_is_no_series():
    model = built(lambda n, both: newest_of_five(n, both[0] * both[1]), head=nn.Linear(5 * F, 1))
    stats = gradwatch.horizon(model, ([torch.ones(B, T, 1).double(), random(B, T, F)],))
    assert (stats.input, stats.horizon) == ("x[1]", 5)
    assert stats.beside == ()


class Two(nn.Module):
    """Sees 5 timesteps of one series, and 40 of another."""

    def __init__(self):
        super().__init__()
        self.head, self.far = nn.Linear(5 * F, 1), nn.Linear(40, 1)
        self.double()

    def forward(self, batch):
        return self.head(batch["past_value"][:, -5:].flatten(1)) + self.far(batch["covariate"][:, -40:, 0])


def test_each_series_has_its_own_horizon_and_a_name_chooses_one():
    batch = {"past_value": random(B, T, F), "covariate": random(B, T, 1)}
    stats = gradwatch.horizon(Two(), batch)  # one that takes a dict is not given keywords
    assert (stats.input, stats.horizon) == ("batch['covariate']", 40)
    (other,) = stats.beside
    assert (other.input, other.horizon) == ("batch['past_value']", 5)
    for name in ("past_value", ("batch", "past_value"), "batch['past_value']"):
        assert gradwatch.horizon(Two(), batch, input=name).horizon == 5
    with pytest.raises(ValueError, match=r"input must name one of the model's inputs .*, got 'target'"):
        gradwatch.horizon(Two(), batch, input="target")


def test_a_number_names_a_positional_argument():
    stats = gradwatch.horizon(Several(other=24), (random(B, 24, 2), random(B, T, F)), input=0)
    assert (stats.input, stats.horizon) == ("extra", 24)


def test_where_inputs_disagree_about_a_need_it_must_be_said_which_matters():
    batch = {"past_value": random(B, T, F), "covariate": random(B, T, 1)}
    with pytest.raises(
        ValueError, match=r"which input needs 20 timesteps must be said with input=: .*40 of 60.*5 of 60"
    ):
        gradwatch.assert_horizon(Two(), batch, at_least=20)
    assert gradwatch.assert_horizon(Two(), batch, at_least=20, input="covariate").horizon == 40
    with pytest.raises(gradwatch.GradientHealthError, match="the last 5 of 60"):
        gradwatch.assert_horizon(Two(), batch, at_least=20, input="past_value")
    assert gradwatch.assert_horizon(Two(), batch, at_least=5).need == 5


def test_what_is_called_a_target_is_the_series():
    class Named(Two):
        def forward(self, past_target, covariate):
            return super().forward({"past_value": past_target, "covariate": covariate})

    stats = gradwatch.horizon(Named(), (random(B, T, F), random(B, T, 1)))
    assert (stats.input, stats.horizon) == ("past_target", 5)
    with pytest.raises(gradwatch.GradientHealthError, match="of past_target"):
        gradwatch.assert_horizon(Named(), (random(B, T, F), random(B, T, 1)), at_least=20)


def test_what_enters_the_recurrent_network_stands_beside_and_the_remedy_is_not_of_it():
    """The newest value is fed to every timestep, as a stand-in for the future: nothing else is seen."""

    class StandIn(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(1, 4, batch_first=True)
            self.rnn.bias_ih_l0.data[4:8] = 9.0  # it keeps everything
            self.head = nn.Linear(4, 1)
            self.double()

        def forward(self, y):
            fed = 1e-5 * y + y[:, -1:] * torch.ones_like(y)
            return self.head(self.rnn(fed)[0][:, -1])

    model, y = StandIn(), random(8, T, 1)
    stats = gradwatch.horizon(model, y)
    lies_in(exact(model, y, 1), stats)
    (entered,) = stats.beside
    assert (entered.module, entered.censored) == ("rnn", True)
    with pytest.raises(gradwatch.GradientHealthError) as caught:
        gradwatch.assert_horizon(model, y, at_least=50)
    said = " ".join(str(caught.value).split())
    assert "what enters rnn reaches 60 timesteps back" in said
    assert "gate" not in said


# --- how a batch may be made ---


class Pair(NamedTuple):
    x: torch.Tensor
    extra: torch.Tensor | None = None


@dataclasses.dataclass(slots=True)
class Record:
    x: torch.Tensor
    extra: torch.Tensor | None = None


class OfX(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5 * F, 1)
        self.double()

    def forward(self, batch):
        return newest_of_five(self, batch["x"] if isinstance(batch, dict) else batch.x)


@pytest.mark.parametrize(
    ("make", "label"),
    [
        (lambda x: (Pair(x),), "batch.x"),
        (Pair, "batch.x"),
        (Record, "batch.x"),
        (lambda x: SimpleNamespace(x=x, count=3), "batch.x"),
        (lambda x: {"x": x}, "batch['x']"),
        (lambda x: ({"x": x},), "batch['x']"),
    ],
    ids=["a named tuple", "directly", "a dataclass with slots", "an object", "a mapping", "a mapping in a tuple"],
)
def test_tensors_are_found_wherever_they_are_kept(make, label):
    x = random(B, T, F)
    stats = gradwatch.horizon(OfX(), make(x))
    assert (stats.input, stats.horizon, stats.length) == (label, 5, T)
    assert not x.requires_grad


def test_an_input_that_is_handed_on_is_not_the_output():
    class Keeping(OfX):
        def forward(self, batch):
            return {**batch, "forecast": super().forward(batch)}

    stats = gradwatch.horizon(Keeping(), ({"x": random(B, T, F)},))
    assert (stats.input, stats.horizon) == ("batch['x']", 5)


def test_a_list_of_tensors_has_one_for_each_timestep():
    model = built(lambda n, x: newest_of_five(n, torch.stack(x, 1)), head=nn.Linear(5 * F, 1))
    stats = gradwatch.horizon(model, (list(random(B, T, F).unbind(1)),))
    assert (stats.input, stats.time, stats.horizon, stats.length) == ("x", None, 5, T)


# --- words ---


class Words(nn.Module):
    """Sees the newest 3 of its words; looks positions up before them, and something else of each row."""

    def __init__(self):
        super().__init__()
        self.positions, self.words, self.kinds = nn.Embedding(T, 8), nn.Embedding(20, 8), nn.Embedding(5, 8)
        self.head = nn.Linear(8, 2)
        self.double()

    def forward(self, ids, kind):
        position = self.positions(torch.arange(ids.shape[1]))
        return self.head(self.words(ids)[:, -3:].mean(1) + position.mean(0) + self.kinds(kind))


def test_of_embeddings_those_count_that_are_indexed_by_what_the_model_was_given():
    ids, kind = torch.randint(0, 20, (B, T)), torch.zeros(B, dtype=torch.long)
    stats = gradwatch.horizon(Words(), (ids, kind))
    assert (stats.input, stats.time, stats.horizon, stats.length) == ("ids", 1, 3, T)


def test_positions_that_are_looked_up_are_no_input():
    """A model of numbers that adds the embedding of positions, and sees the newest values alone."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.into = nn.Embedding(T, 8), nn.Linear(1, 8)
            self.double()

        def forward(self, x):
            faded = x * torch.exp(-torch.arange(T - 1, -1, -1.0))
            return (self.into(faded.unsqueeze(-1)) + self.positions(torch.arange(T))).sum(1)

    x = random(B, T)
    stats = gradwatch.horizon(Positions(), x)
    assert stats.input == "x"
    lies_in(exact(Positions(), x, 1), stats)
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_horizon(Positions(), x, at_least=40)


# --- how sure it is ---


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_interval_holds_the_exact_horizon(kind, rows):
    for seed in range(10):
        torch.manual_seed(seed)
        model = built(lambda n, x: n.rnn(x)[0][:, -1], rnn=kind(F, 32, batch_first=True))
        x = torch.randn(rows, T, F).double()
        stats = gradwatch.horizon(model, x)
        lies_in(exact(model, x, 1), stats)
        assert stats.interval[1] - stats.interval[0] <= (8 if rows == 1 else 3)


@pytest.mark.parametrize("outputs", [2, 3, 5])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_of_one_row_with_few_outputs_the_interval_holds_the_exact_horizon_too(kind, outputs):
    missed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        model = built(
            lambda n, x: n.head(n.rnn(x)[0][:, -1]), rnn=kind(F, 16, batch_first=True), head=nn.Linear(16, outputs)
        )
        x = random(1, 60, F)
        stats, truth = gradwatch.horizon(model, x), exact(model, x, 1)
        low, high = stats.interval
        missed += not low <= truth <= high
        if outputs < 4:  # as many directions as outputs are all of the Jacobian
            assert stats.interval == (truth, truth)
    assert missed <= 1  # of 20


def test_of_a_single_number_there_is_nothing_to_draw():
    torch.manual_seed(0)
    model = built(lambda n, x: n.head(n.rnn(x)[0][:, -1]), rnn=nn.GRU(F, 16, batch_first=True), head=nn.Linear(16, 1))
    x = random(B, T, F)
    stats = gradwatch.horizon(model, x)
    assert stats.lag_gain_error is None
    assert stats.interval == (exact(model, x, 1),) * 2


class Slow(nn.Module):
    """Whose memory falls as a power of the lag: a crossing at a flat angle."""

    def __init__(self):
        super().__init__()
        lag = torch.arange(250, 0, -1.0)
        self.into, self.out = nn.Linear(F, 32), nn.Linear(32, 32)
        self.register_buffer("weights", lag[:, None] ** -(1.3 + 1.2 * torch.rand(32)))
        self.double()

    def forward(self, x):
        return self.out((torch.tanh(self.into(x)) * self.weights).sum(1))


def test_a_gain_that_falls_slowly_takes_more_directions_and_has_a_wider_interval():
    calls = []

    class Counting(Slow):
        def forward(self, x):
            out = super().forward(x)
            out.register_hook(calls.append)
            return out

    torch.manual_seed(0)
    model, x = Counting(), random(8, 250, F)
    stats = gradwatch.horizon(model, x)
    assert len(calls) == 3
    lies_in(exact(Slow.forward.__get__(model), x, 1), stats)
    assert stats.interval[1] - stats.interval[0] > 5


def test_what_is_not_sure_is_no_verdict():
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match="not sure enough to judge by: the model learns from somewhere between the last"
    ):
        gradwatch.assert_horizon(Slow(), random(1, 250, F), at_least=100)


def test_the_last_entries_of_what_was_put_there_tell_nothing_of_time():
    """Series with tokens of the model's own behind them, of which the last are those."""

    def tokens(net, x):
        each = torch.cat([net.along(x.mT), net.token.expand(len(x), F, 8)], 1)
        return net.out((each * each.mean(1, keepdim=True)).mT[..., -F:].flatten(1))

    net = built(
        tokens,
        along=nn.Linear(T, 8),
        token=nn.Parameter(torch.randn(F, 8)),
        out=nn.Linear(8 * F, 1),
    )
    stats = gradwatch.horizon(net, random(B, T, F))
    assert (stats.time, stats.length, stats.horizon) == (1, T, T)
