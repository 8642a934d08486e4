"""`horizon` and `assert_horizon`: a model's gain by lag, against float64 Jacobians and closed forms.

They work for any model, and leave nothing behind.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from truth import cotangent

import gradwatch
from gradwatch.timesteps.model_pass import model_gain
from gradwatch.timesteps.output import time_in

pytestmark = pytest.mark.usefixtures("one_direction")


def truth(function, x):
    """Return the gain by lag from the Jacobian of `function`.

    It maps (B, T, F) to the newest output of each row, (B, ...), or to a scalar.
    """
    jacobian = torch.autograd.functional.jacobian(function, x)
    shape = jacobian.shape[: -x.dim()]
    rows = len(x)
    v = cotangent(shape, math.prod(shape) // rows if shape else 1)
    gradient = (v.reshape(-1, 1) * jacobian.reshape(max(v.numel(), 1), -1)).sum(0).reshape(x.shape)
    return gradient.flatten(2).square().sum(2).mean(0).sqrt().flip(0).tolist()


def exactly(found, expected, rel=1e-10):
    assert found.lag_gain == pytest.approx(expected, rel=rel, abs=1e-300)
    assert found.length == len(expected)
    assert (found.module, found.part) == ("", "model")


class Recurrent(nn.Module):
    """A recurrent network and a head on its last or on all of its timesteps."""

    def __init__(self, kind=nn.LSTM, *, every=False, **options):
        super().__init__()
        self.memory = kind(3, 5, **options)
        self.head, self.every = nn.Linear(5 * (1 + options.get("bidirectional", False)), 2), every
        self.double()

    def forward(self, x):
        y = self.memory(x)[0]
        return self.head(y if self.every else y[:, -1] if self.memory.batch_first else y[-1])


class Skipping(Recurrent):
    """A skip connection from the input, past the recurrent network."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__(kind, batch_first=True, **options)
        self.past = nn.Linear(3, 2).double()

    def forward(self, x):
        return super().forward(x) + self.past(x).mean(1)


class Attention(nn.Module):
    """Attention pooling over the outputs of an LSTM."""

    def __init__(self, hidden=5):
        super().__init__()
        self.memory, self.score, self.head = (
            nn.LSTM(3, hidden, batch_first=True),
            nn.Linear(hidden, 1),
            nn.Linear(hidden, 2),
        )

    def forward(self, x):
        y = self.memory(x)[0]
        return self.head((self.score(y).softmax(1) * y).sum(1))


class Convolutions(nn.Module):
    """A causal temporal convolution network, (B, T, F) in and (B, T, 2) out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(a, b, 3, dilation=d) for a, b, d in ((3, 4, 1), (4, 4, 2), (4, 2, 4)))

    def forward(self, x):
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = torch.tanh(layer(nn.functional.pad(x, (2 * layer.dilation[0], 0))))
        return x.transpose(1, 2)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.into, self.encoder, self.head = (
            nn.Linear(3, 8),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        return self.head(self.encoder(self.into(x)).mean(1))


# --- against the Jacobian ---


@pytest.mark.parametrize("every", [False, True], ids=["many to one", "many to many"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_gain_of_a_recurrent_model_is_that_of_its_jacobian(kind, batch_first, every):
    model, x = Recurrent(kind, every=every, batch_first=batch_first), torch.randn(4, 9, 3).double()

    def newest(x):
        out = model(x if batch_first else x.transpose(0, 1))
        return (out if batch_first else out.transpose(0, 1))[:, -1] if every else out

    found = gradwatch.horizon(model, x if batch_first else x.transpose(0, 1).contiguous())
    exactly(found, truth(newest, x))
    assert found.rows == 4
    assert found.note is None


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2, "bidirectional": True}, {"num_layers": 3, "dropout": 0.0}],
    ids=["both directions", "layers"],
)
def test_the_gain_of_deeper_networks_too(options):
    model, x = Recurrent(nn.LSTM, batch_first=True, **options), torch.randn(3, 7, 3).double()
    exactly(gradwatch.horizon(model, x), truth(model, x))


def test_it_estimates_the_frobenius_norm_of_the_jacobian_over_the_root_of_its_width():
    model, rows = Recurrent(nn.RNN, batch_first=True), 2000
    x = torch.randn(1, 8, 3).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0], x)[:, 0]  # (2, T, F)
    expected = (jacobian.square().sum((0, 2)) / 2).sqrt().flip(0)
    found = gradwatch.horizon(model, x.expand(rows, -1, -1))
    assert found.lag_gain == pytest.approx(expected.tolist(), rel=0.05)


def test_an_lstm_with_only_a_forget_bias_forgets_at_the_rate_of_the_logistic_function():
    """With W_hh = 0 and no input, d c_T / d x_t is proportional to sigma(b)^lag."""
    for bias in (-1.0, 1.0, 3.0):
        memory = nn.LSTM(3, 4, batch_first=True).double()
        with torch.no_grad():
            memory.weight_hh_l0.zero_()
            memory.bias_ih_l0.zero_()
            memory.bias_hh_l0.zero_()
            memory.bias_ih_l0[4:8] = bias
        found = gradwatch.horizon(memory, torch.zeros(32, 30, 3).double(), output=lambda out: out[1][1])
        rate = 1 / (1 + math.exp(-bias))
        assert found.decay_rate == pytest.approx(rate, rel=1e-9)
        expected = min(math.floor(math.log(1e-3) / math.log(rate)) + 1, 30)
        assert (found.horizon, found.censored) == (expected, expected == 30)


def test_attention_pooling_has_a_long_horizon_where_its_lstm_alone_has_a_short_one():
    model, x = Attention(16), torch.randn(8, 250, 3)
    found, alone = gradwatch.horizon(model, x), gradwatch.horizon(model.memory, x)
    assert (found.horizon, found.censored) == (250, True)
    assert alone.horizon < 20
    assert not alone.censored
    double = Attention().double()
    exactly(gradwatch.horizon(double, x[:2, :12].double()), truth(double, x[:2, :12].double()))


def test_a_skip_connection_from_the_input_counts():
    model, x = Skipping(), torch.randn(3, 60, 3).double()
    found = gradwatch.horizon(model, x)
    exactly(gradwatch.horizon(model, x[:, :12]), truth(model, x[:, :12]))
    assert found.censored
    assert not gradwatch.horizon(Recurrent(batch_first=True), x).censored


def test_a_skip_connection_counts_too_where_the_recurrent_network_gets_a_view_of_the_input():
    class TimeFirst(Skipping):
        def forward(self, x):
            return self.head(self.memory(x.transpose(0, 1))[0][-1]) + self.past(x).mean(1)

    model, x = TimeFirst(), torch.randn(3, 12, 3).double()
    model.memory.batch_first = False
    found = gradwatch.horizon(model, x)
    exactly(found, truth(model, x))
    assert found.censored


def test_an_input_that_is_repeated_in_time_is_not_a_part_of_what_it_repeats():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.GRU(3, 5, batch_first=True)

        def forward(self, code):
            return self.memory(code.unsqueeze(1).expand(-1, 20, -1))[0][:, -1]

    model, code = Decoder().double(), torch.randn(2, 3).double()
    repeated = code.unsqueeze(1).repeat(1, 20, 1)
    exactly(gradwatch.horizon(model, code), truth(lambda x: model.memory(x)[0][:, -1], repeated))


def test_the_gain_of_convolutions_reaches_exactly_as_far_as_their_field_of_view():
    model, x = Convolutions().double(), torch.randn(3, 40, 3).double()
    found = gradwatch.horizon(model, x)
    exactly(found, truth(lambda x: model(x)[:, -1], x))
    assert [lag for lag, gain in enumerate(found.lag_gain) if gain] == list(range(15))
    assert found.horizon <= 15
    assert not found.censored


def test_of_an_output_with_fewer_timesteps_the_newest_counts():
    model, x = (
        nn.Sequential(Convolutions(), nn.Unflatten(1, (20, 2)), nn.Flatten(2)).double(),
        torch.randn(3, 40, 3).double(),
    )
    found = gradwatch.horizon(model, x)
    assert found.note is None
    exactly(found, truth(lambda x: model(x)[:, -1], x))
    assert found.horizon < 20


def test_a_transformer_sees_everything():
    model, x = Transformer().double(), torch.randn(3, 20, 3).double()
    found = gradwatch.horizon(model, x)
    exactly(found, truth(model, x))
    assert (found.horizon, found.censored) == (20, True)


def test_a_scalar_output_is_one_number_of_all_rows():
    class Loss(Recurrent):
        def forward(self, x):
            return super().forward(x).square().mean()

    model, x = Loss(batch_first=True), torch.randn(4, 9, 3).double()
    exactly(gradwatch.horizon(model, x), truth(model, x))


# --- which module, which timesteps ---


class Words(nn.Module):
    def __init__(self, body=None):
        super().__init__()
        self.table, self.body = nn.Embedding(20, 3, padding_idx=0), body

    def forward(self, ids):
        return self.body(self.table(ids))


def test_words_enter_a_recurrent_network_as_what_their_embedding_gives():
    model, ids = Words(Recurrent(nn.GRU, batch_first=True)).double(), torch.randint(1, 20, (4, 9))
    exactly(gradwatch.horizon(model, ids), truth(model.body, model.table(ids).detach()))


@pytest.mark.parametrize("frozen", [False, True])
def test_without_a_sequence_module_the_first_embedding_is_the_input(frozen):
    model, ids = Words(Convolutions()).double(), torch.randint(1, 20, (4, 30))
    model.table.requires_grad_(not frozen)
    gain = model_gain(model, (ids,), {})
    assert gain.place == "table"
    exactly(gain.stats(), truth(lambda x: model.body(x)[:, -1], model.table(ids).detach()))


def test_a_module_that_is_named_has_its_own_dimension_of_time():
    model, x = (
        nn.Sequential(nn.Linear(3, 3), Convolutions(), nn.Flatten(0, 1), nn.Unflatten(0, (4, 30))).double(),
        torch.randn(4, 30, 3).double(),
    )
    gain = model_gain(model, (x,), {}, timesteps={"1": 1})
    assert gain.place == "1"
    found = gain.stats()
    exactly(found, truth(lambda x: model(x).view(4, 30, 2)[:, -1], x))
    (beside,) = found.beside
    assert beside.module == "1"
    assert beside.lag_gain == pytest.approx(truth(lambda x: model[1](x)[:, -1], model[0](x).detach()), rel=1e-10)
    inner = model[1].layers[0]
    assert inner.in_channels == 3
    negative, positive = (gradwatch.horizon(model, x, timesteps={"1.layers.0": time}).beside[0] for time in (-1, 2))
    assert negative.lag_gain == positive.lag_gain
    assert positive.length == 32  # padded on the left


def test_the_models_own_input_can_be_named():
    model, x = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 2)).double(), torch.randn(5, 24).double()
    found = gradwatch.horizon(model, x, timesteps={"": 1})
    exactly(found, truth(lambda x: model(x.squeeze(-1)), x.unsqueeze(-1)))
    lstm = Skipping()
    series = torch.randn(3, 9, 3).double()
    exactly(gradwatch.horizon(lstm, series, timesteps={"": 1}), truth(lstm, series))


def test_what_is_named_may_take_words_and_have_its_embedding_inside():
    model, ids = nn.Sequential(Words(Convolutions()), nn.Flatten(0, 1)).double(), torch.randint(1, 20, (4, 30))
    gain = model_gain(model, (ids,), {}, timesteps={"0": 1}, output=lambda out: out.view(4, 30, 2))
    assert gain.place == "0.table"
    exactly(gain.stats(), truth(lambda x: model[0].body(x)[:, -1], model[0].table(ids).detach()))
    assert model_gain(model, (ids,), {}, timesteps={"": 1}).place == "0.table"


def test_the_first_sequence_module_that_runs_counts_and_not_the_first_that_is_there():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.GRU(4, 2, batch_first=True), nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            return self.second(self.first(x)[0])[0][:, -1]

    model, x = Two().double(), torch.randn(3, 9, 3).double()
    gain = model_gain(model, (x,), {})
    assert gain.place == "first"
    exactly(gain.stats(), truth(model, x))


def test_a_recurrent_network_that_runs_without_gradients_is_not_the_first():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.memory = nn.GRU(3, 3, batch_first=True), nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            with torch.no_grad():
                x = self.frozen(x)[0]
            return self.memory(x)[0][:, -1]

    model, x = Features().double(), torch.randn(3, 9, 3).double()
    gain = model_gain(model, (x,), {})
    assert gain.place == "memory"
    exactly(gain.stats(), truth(lambda x: model.memory(x)[0][:, -1], model.frozen(x)[0].detach()))


class Loop(nn.Module):
    """A cell that is called once a timestep."""

    def __init__(self, kind, *, listed=False):
        super().__init__()
        self.cell, self.head, self.listed = kind(3, 5), nn.Linear(5, 2), listed

    def forward(self, x):
        state, outputs = None, []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            outputs.append(self.head(state[0] if isinstance(state, tuple) else state))
        return outputs if self.listed else torch.stack(outputs, 1)


@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "as a list"])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_the_calls_of_a_cell_are_the_timesteps(kind, listed):
    model, x = Loop(kind, listed=listed).double(), torch.randn(4, 9, 3).double()
    found = gradwatch.horizon(model, x)
    exactly(found, truth(lambda x: model(x)[-1] if listed else model(x)[:, -1], x))


def test_a_loop_and_a_fused_network_agree_even_past_a_skip_connection():
    class Both(nn.Module):
        def __init__(self, *, fused):
            super().__init__()
            self.fused, self.past = fused, nn.Linear(3, 5)
            self.memory = nn.GRU(3, 5, batch_first=True) if fused else nn.GRUCell(3, 5)

        def forward(self, x):
            if self.fused:
                return self.memory(x)[0][:, -1] + self.past(x).mean(1)
            h = None
            for step in x.unbind(1):
                h = self.memory(step, h)
            return h + self.past(x).mean(1)

    fused, loop = Both(fused=True).double(), Both(fused=False).double()
    with torch.no_grad():
        for name, value in loop.named_parameters():
            value.copy_(
                dict(fused.named_parameters())[name if name in dict(fused.named_parameters()) else f"{name}_l0"]
            )
    x = torch.randn(3, 9, 3).double()
    exactly(gradwatch.horizon(loop, x), list(gradwatch.horizon(fused, x).lag_gain))


def test_a_hand_written_cell_that_is_named_has_its_calls_as_timesteps():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.on = nn.Linear(3, 5), nn.Linear(5, 5)

        def forward(self, x, h):
            return torch.tanh(self.into(x) + self.on(h))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = Cell()

        def forward(self, x):
            h = x.new_zeros(len(x), 5)
            for step in x.unbind(1):
                h = self.cell(h=h, x=step)
            return h

    model, x = Net().double(), torch.randn(4, 9, 3).double()
    exactly(gradwatch.horizon(model, x, timesteps={"cell": None}), truth(model, x))


class Stepwise(nn.Module):
    """A fused network called once a timestep, or once for several, with its state carried on, detached or not."""

    def __init__(self, steps, *, detached=False):
        super().__init__()
        self.memory, self.steps, self.detached = nn.LSTM(3, 5, batch_first=True), steps, detached

    def forward(self, x):
        state = None
        for chunk in x.split(self.steps, 1):
            y, state = self.memory(chunk, state)
            if self.detached:
                state = tuple(s.detach() for s in state)
        return y[:, -1]


@pytest.mark.parametrize("steps", [1, 4])
def test_calls_that_carry_the_state_on_are_one_sequence(steps):
    model, x = Stepwise(steps).double(), torch.randn(4, 12, 3).double()
    exactly(gradwatch.horizon(model, x), truth(model, x))


def test_the_horizon_ends_where_the_state_is_detached():
    model, x = Stepwise(4, detached=True).double(), torch.randn(4, 12, 3).double()
    found = gradwatch.horizon(model, x)
    exactly(found, truth(model, x))
    assert found.lag_gain[4:] == (0.0,) * 8
    assert (found.horizon, found.censored) == (4, False)


def test_two_inputs_have_a_horizon_each():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.GRU(3, 5, batch_first=True)

        def forward(self, a, b):
            return self.memory(a)[0][:, -1] - self.memory(b)[0][:, -1]

    model, a, b = Siamese().double(), torch.randn(4, 9, 3).double(), torch.randn(4, 6, 3).double()
    found = gradwatch.horizon(model, (a, b))
    exactly(found, truth(lambda a: model(a, b), a))
    (other,) = found.beside
    assert (found.input, other.input) == ("a", "b")
    assert other.lag_gain == pytest.approx(truth(lambda b: model(a, b), b), rel=1e-10)


def test_an_input_that_is_edited_after_it_has_entered_counts_as_it_entered():
    class Summing(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    class Editing(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.sum = nn.Linear(3, 3), Summing()

        def forward(self, x):
            x = self.into(x)
            y = self.sum(x)
            x.zero_()
            return y[:, -1] + x.mean(1)

    model, x = Editing().double(), torch.randn(4, 9, 3).double()
    found = gradwatch.horizon(model, x, timesteps={"sum": 1})
    exactly(found, truth(lambda x: model.into(x).sum(1), x))
    assert found.beside[0].lag_gain == pytest.approx(truth(lambda x: x.sum(1), x), rel=1e-10)


def test_of_a_named_module_that_is_used_again_in_depth_the_first_call_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Conv1d(3, 3, 3, padding="same")

        def forward(self, x):
            return self.block(torch.tanh(self.block(x)))[..., -1]

    model, x = Twice().double(), torch.randn(4, 9, 3).double()
    exactly(
        gradwatch.horizon(model, x.transpose(1, 2), timesteps={"block": 2}),
        truth(lambda x: model(x.transpose(1, 2)), x),
    )


# --- lengths ---


def ragged(lengths):
    return [torch.randn(n, 3).double() for n in lengths]


def by_row(function, rows, v):
    """Return the gain by lag of rows that know nothing of each other, each from its own end."""
    squares = torch.zeros(len(rows), max(map(len, rows))).double()
    for number, row in enumerate(rows):
        jacobian = torch.autograd.functional.jacobian(lambda x: function(x.unsqueeze(0))[0], row)
        squares[number, : len(row)] = torch.einsum("o,otf->tf", v[number], jacobian).square().sum(1).flip(0)
    counts = torch.tensor([sum(len(row) > lag for row in rows) for lag in range(squares.shape[1])])
    return (squares.sum(0) / counts).sqrt().tolist()


class Packing(nn.Module):
    """Packs its padded input; gives the last hidden state, all outputs padded again, or all outputs packed."""

    def __init__(self, gives, *, kind=nn.GRU, batch_first=True, enforce_sorted=False):
        super().__init__()
        self.memory, self.head = kind(3, 5, batch_first=batch_first), nn.Linear(5, 2)
        self.gives, self.enforce_sorted = gives, enforce_sorted

    def forward(self, x, lengths):
        packed = pack_padded_sequence(
            x, lengths, batch_first=self.memory.batch_first, enforce_sorted=self.enforce_sorted
        )
        y, h = self.memory(packed)
        if self.gives == "state":
            return self.head(h[-1])
        if self.gives == "packed":
            return y._replace(data=self.head(y.data))
        total = x.shape[int(self.memory.batch_first)] if self.gives == "total" else None
        return self.head(pad_packed_sequence(y, batch_first=self.memory.batch_first, total_length=total)[0])


@pytest.mark.parametrize("gives", ["state", "padded", "total", "packed"])
@pytest.mark.parametrize(
    ("lengths", "enforce_sorted"), [((9, 7, 4, 2), True), ((4, 9, 2, 7), False)], ids=["sorted", "unsorted"]
)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
def test_packed_rows_are_aligned_at_their_own_ends(batch_first, lengths, enforce_sorted, gives):
    model, rows = Packing(gives, batch_first=batch_first, enforce_sorted=enforce_sorted).double(), ragged(lengths)
    x = pad_sequence(rows, batch_first=True)
    if gives == "total":
        x = nn.functional.pad(x, (0, 0, 0, 3))
    found = gradwatch.horizon(model, (x if batch_first else x.transpose(0, 1).contiguous(), torch.tensor(lengths)))
    v = cotangent((4, 2), 2)
    if gives == "packed":  # its rows are in the order of their lengths
        rows = sorted(rows, key=len, reverse=True)
    model.memory.batch_first = True
    exactly(found, by_row(lambda x: model.head(model.memory(x)[0][:, -1]), rows, v))
    assert found.rows == 4


def test_a_packed_batch_may_be_the_models_own_input():
    memory, rows = nn.LSTM(3, 2).double(), ragged((5, 9, 3))
    packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    before = packed.data.clone()
    found = gradwatch.horizon(memory, packed)
    exactly(
        found,
        by_row(lambda x: memory(x.transpose(0, 1))[0][-1], sorted(rows, key=len, reverse=True), cotangent((3, 2), 2)),
    )
    assert torch.equal(packed.data, before)
    assert not packed.data.requires_grad


@pytest.mark.parametrize("every", [False, True], ids=["the last of each row", "all outputs"])
def test_padding_that_nothing_depends_on_counts_for_nothing(every):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.GRU(3, 2, batch_first=True)

        def forward(self, x, lengths):
            y = self.memory(x)[0]
            return y if every else y[torch.arange(len(x)), lengths - 1]

    model, rows = Padded().double(), ragged((4, 9, 2, 7))
    found = gradwatch.horizon(model, (pad_sequence(rows, batch_first=True), torch.tensor([4, 9, 2, 7])))
    exactly(found, by_row(lambda x: model.memory(x)[0][:, -1], rows, cotangent((4, 2), 2)))


def test_padding_that_the_output_does_depend_on_counts():
    model, rows = Recurrent(nn.GRU, batch_first=True), ragged((4, 9, 2, 7))
    x = pad_sequence(rows, batch_first=True)
    exactly(gradwatch.horizon(model, x), truth(model, x))


def test_an_input_of_zeros_is_no_padding():
    model, x = Recurrent(nn.GRU, every=True, batch_first=True), torch.zeros(3, 9, 3).double()
    exactly(gradwatch.horizon(model, x), truth(lambda x: model(x)[:, -1], x))


def test_zeros_at_the_end_of_every_row_are_no_padding_to_the_longest():
    model, x = Recurrent(nn.GRU, every=True, batch_first=True), torch.randn(3, 9, 3).double()
    x[0, 5:] = x[1:, 7:] = 0
    exactly(gradwatch.horizon(model, x), truth(lambda x: model(x)[:, -1], x))


def test_a_loop_over_rows_that_end_one_after_the_other_is_aligned_too():
    class Shrinking(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, 2)

        def forward(self, x, sizes):
            h, ended = x.new_zeros(len(x), 2), []
            for step, size in enumerate(sizes):
                ended.append(h[size:])
                h = self.cell(x[:size, step], h[:size])
            return torch.cat([h, *ended[::-1]])

    model, rows = Shrinking().double(), ragged((9, 7, 4, 2))
    found = gradwatch.horizon(model, (pad_sequence(rows, batch_first=True), [4, 4, 3, 3, 2, 2, 2, 1, 1]))

    def alone(x):
        h = None
        for step in x.unbind(1):
            h = model.cell(step, h)
        return h

    exactly(found, by_row(alone, rows, cotangent((4, 2), 2)))


def test_a_single_sequence_without_rows_is_fine():
    memory, x = nn.LSTM(3, 2).double(), torch.randn(9, 3).double()
    exactly(gradwatch.horizon(memory, x), truth(lambda x: memory(x[0])[0][-1:], x.unsqueeze(0)))


# --- batches and outputs ---


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor
    count: int = 3


class Named(NamedTuple):
    ids: torch.Tensor
    logits: torch.Tensor


class ModelOutput(OrderedDict):
    """As Hugging Face's: an OrderedDict whose entries are attributes too."""

    def __init__(self, loss, logits):
        super().__init__(loss=loss, logits=logits, hidden_states=(logits,), ids=torch.arange(3))
        self.logits = logits


OUTPUTS = {
    "tuple": lambda logits: (torch.arange(3), logits, None),
    "named tuple": lambda logits: Named(torch.arange(3), logits),
    "dictionary": lambda logits: {"loss": logits.mean(), "deep": [{"logits": logits}]},
    "dataclass": lambda logits: Output(logits.mean(), logits),
    "Hugging Face": lambda logits: ModelOutput(logits.mean(), logits),
    "a detached one before": lambda logits: (logits.detach(), logits),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_first_floating_point_tensor_of_an_output_is_meant_and_a_scalar_only_where_there_is_no_other(kind):
    class Model(Recurrent):
        def forward(self, *, labels=None, series):
            assert labels is not None
            return OUTPUTS[kind](super().forward(series))

    model, x = Model(batch_first=True), torch.randn(4, 9, 3).double()
    exactly(
        gradwatch.horizon(model, UserDict(series=x, labels=torch.arange(4))),
        truth(lambda x: Recurrent.forward(model, x), x),
    )


def test_a_batch_may_be_nested_and_stays_what_it_is():
    class Model(Recurrent):
        def forward(self, batch):
            assert type(batch) is OrderedDict
            assert type(batch["pair"]) is Named
            assert type(batch["extra"]) is Output
            batch["pair"].logits.mul_(2)
            batch["pair"].ids.zero_()
            batch["extra"].logits.zero_()
            return super().forward(batch["pair"].logits)

    model, x = Model(batch_first=True), torch.randn(4, 9, 3).double()
    batch = OrderedDict(pair=Named(torch.arange(3), x.clone()), extra=Output(None, torch.ones(2, 2)))
    found = gradwatch.horizon(model, (batch,))
    exactly(found, truth(lambda x: Recurrent.forward(model, 2 * x), x))
    assert found.input == "batch['pair'].logits"
    assert torch.equal(batch["pair"].logits, x)
    assert torch.equal(batch["pair"].ids, torch.arange(3))
    assert torch.equal(batch["extra"].logits, torch.ones(2, 2))


def test_arguments_by_keyword_count_in_the_order_in_which_they_are_declared():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.GRU(3, 5, batch_first=True)

        def forward(self, x):
            return self.memory(hx=torch.ones(1, len(x), 5, dtype=x.dtype), input=x)[0][:, -1]

    model, x = Model().double(), torch.randn(4, 9, 3).double()
    exactly(gradwatch.horizon(model, {"x": x}), truth(model, x))


def test_output_chooses_and_of_what_has_timesteps_the_newest_counts():
    model, x = Recurrent(batch_first=True, every=True), torch.randn(4, 9, 3).double()
    exactly(gradwatch.horizon(model, x, output=lambda out: out[..., :1]), truth(lambda x: model(x)[:, -1, :1], x))
    middle = gradwatch.horizon(model, x, output=lambda out: out[:, 4])
    exactly(middle, truth(lambda x: model(x)[:, 4], x))
    assert middle.lag_gain[:4] == (0.0,) * 4


def test_time_is_found_in_an_output_that_is_laid_out_the_other_way():
    class Swapping(Recurrent):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    model, x = Swapping(every=True), torch.randn(4, 9, 3).double()
    exactly(gradwatch.horizon(model, x), truth(lambda x: model(x)[:, -1], x))


@pytest.mark.parametrize(
    ("shape", "steps", "rows", "likely", "time"),
    [
        ((4, 9, 2), 9, 4, 1, 1),
        ((4, 9, 2), 9, 4, 0, 1),
        ((9, 4, 2), 9, 4, 1, 0),
        ((4, 2, 9), 9, 4, 2, 2),
        ((4, 9), 9, 4, 1, 1),
        ((9, 2), 9, 4, 0, None),
        ((2, 9, 5), 9, 4, 1, None),
        ((9,), 9, 4, 0, None),
        ((4, 8, 2), 9, 4, 1, None),
        ((), 9, 4, 1, None),
        ((9, 2), 9, None, 0, 0),
        ((2, 9), 9, None, 0, None),
    ],
)
def test_the_dimension_of_time_stands_beside_the_one_of_the_rows(shape, steps, rows, likely, time):
    assert time_in(torch.Size(shape), {steps}, rows, likely) == time


def test_complex_outputs_count_as_pairs_of_numbers():
    class Complex(Recurrent):
        def forward(self, x):
            return torch.complex(*super().forward(x).unbind(-1))

    model, x = Complex(batch_first=True), torch.randn(4, 9, 3).double()
    exactly(gradwatch.horizon(model, x), truth(lambda x: torch.view_as_real(model(x)), x))


# --- formats, modes, surroundings ---


def test_narrow_formats_are_measured_in_double_precision():
    model, x = Recurrent(nn.LSTM, batch_first=True), torch.randn(8, 80, 3).double()
    exact = gradwatch.horizon(model, x)
    single, half = gradwatch.horizon(model.float(), x.float()), gradwatch.horizon(model.bfloat16(), x.bfloat16())
    assert single.lag_gain == pytest.approx(exact.lag_gain, rel=1e-4)
    assert single.lag_gain[-1] < 1e-20  # its square is zero in float32
    assert half.horizon == pytest.approx(exact.horizon, abs=1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_both_modes_are_fine_in_single_precision(kind, training):
    model, x = Recurrent(kind, batch_first=True), torch.randn(8, 30, 3)
    exact = gradwatch.horizon(model, x.double())
    assert gradwatch.horizon(model.float().train(training), x).lag_gain == pytest.approx(exact.lag_gain, rel=1e-4)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(without):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = Words(nn.Identity())
            self.body = Recurrent(batch_first=True).float()

        def forward(self, ids, x):
            return self.body(self.words(ids) + x)

    model = Both()
    with without():
        ids, x = torch.randint(1, 20, (4, 9)), torch.randn(4, 9, 3)
        found = gradwatch.horizon(model, (ids, x))
        assert not torch.is_grad_enabled()
    assert found == gradwatch.horizon(model, (ids.clone(), x.clone()))
    assert found.lag_gain[0] > 0


def test_frozen_models_have_a_horizon_too():
    model, x = Recurrent(batch_first=True), torch.randn(4, 9, 3).double()
    expected = truth(model, x)
    exactly(gradwatch.horizon(model.requires_grad_(False), x), expected)


def test_the_callers_autocast_applies():
    model, x = Recurrent(nn.LSTM, batch_first=True).float(), torch.randn(8, 30, 3)
    full = gradwatch.horizon(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gradwatch.horizon(model, x)
    assert narrow.lag_gain != full.lag_gain
    assert narrow.horizon == pytest.approx(full.horizon, abs=1)


def test_checkpointing_is_fine_and_the_reentrant_kind_says_why_it_is_not():
    class Checked(nn.Module):
        def __init__(self, *, reentrant):
            super().__init__()
            self.words, self.memory, self.reentrant = Words(nn.Identity()), nn.GRU(3, 5, batch_first=True), reentrant
            self.words.requires_grad_(False)

        def forward(self, ids):
            return torch.utils.checkpoint.checkpoint(
                lambda i: self.memory(self.words(i))[0][:, -1], ids, use_reentrant=self.reentrant
            )

    model, ids = Checked(reentrant=False).double(), torch.randint(1, 20, (4, 9))
    exactly(gradwatch.horizon(model, ids), truth(lambda x: model.memory(x)[0][:, -1], model.words(ids)))

    class Series(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.GRU(3, 5, batch_first=True)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda x: self.memory(x)[0][:, -1], x, use_reentrant=True)

    with pytest.raises(RuntimeError, match="reentrant activation checkpointing allows no derivative by an input"):
        gradwatch.horizon(Series(), torch.randn(4, 9, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_compiled_runs_as_it_was_written():
    class Net(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.body = wrap(Loop(nn.GRUCell).double())  # compiled code calls no hooks of a cell

        def forward(self, x):
            return self.body(x)

    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model, x = (
        torch.compile(Net(lambda m: torch.compile(m, backend=backend)), backend=backend),
        torch.randn(4, 9, 3).double(),
    )
    try:
        model(x)
        before = len(compiled)
        gain = model_gain(model, (x,), {})
        assert len(compiled) == before > 0
    finally:  # or the tests that follow are of a process that compiles
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    assert gain.place == "body.cell"
    exactly(gain.stats(), truth(lambda x: model._orig_mod.body._orig_mod(x)[:, -1], x))


def test_what_wraps_a_model_for_several_processes_is_taken_off():
    model, x = Recurrent(batch_first=True), torch.randn(4, 9, 3).double()
    wrapped = nn.DataParallel(model)
    exactly(gradwatch.horizon(wrapped, x), truth(model, x))
    assert model_gain(wrapped, (x,), {}).place == "memory"


# --- clear errors ---


def test_what_cannot_be_measured_says_why():
    model, x = Recurrent(batch_first=True), torch.randn(4, 9, 3).double()
    for wrong, kind, text in (
        ({"model": lambda x: x}, TypeError, r"model must be a torch\.nn\.Module, got function"),
        (
            {"output": "logits"},
            TypeError,
            "output must be a function from what the model returned to a tensor, or None, got 'logits'",
        ),
        (
            {"output": lambda out: out.argmax(-1)},
            ValueError,
            r"output must give a floating-point tensor .* got a tensor of shape \(4,\) without a graph",
        ),
        (
            {"output": lambda _: 3},
            ValueError,
            "output must give a floating-point tensor that depends on the model's input, got int",
        ),
        (
            {"timesteps": {"encoder": 1}},
            ValueError,
            r"timesteps must name modules of the model or its inputs \(x\), and none is called 'encoder'",
        ),
        ({"timesteps": {"memory": "1"}}, TypeError, 'timesteps must be "auto" or a mapping from names'),
        ({"timesteps": True}, TypeError, 'timesteps must be "auto" or a mapping from names'),
        (
            {"timesteps": {"head": 4}},
            ValueError,
            r"timesteps of head must be a dimension of its input of shape \(4, 2\), got 4",
        ),
        ({"timesteps": {"": None}}, ValueError, "timesteps of the model's own input must be a dimension"),
        (
            {"model": nn.Linear(3, 3), "batch": torch.ones(3)},
            ValueError,
            "no sequence was found: no recurrent module ran",
        ),
        ({"model": nn.LazyLinear(3)}, ValueError, "lazy modules get them when a batch has gone through once"),
    ):
        given = {"model": model, "batch": x, **wrong}
        if wrong.get("timesteps") == {"head": 4}:
            given["model"], given["batch"] = nn.Sequential(OrderedDict(head=nn.Linear(2, 2))), torch.ones(4, 2)
        with pytest.raises(kind, match=text):
            gradwatch.horizon(given.pop("model"), given.pop("batch"), **given)


def test_an_output_without_a_graph_is_refused():
    class Cut(Recurrent):
        def forward(self, x):
            return {"classes": super().forward(x).argmax(-1)}

    with pytest.raises(
        ValueError, match="output must hold a floating-point tensor that depends on its input, got dict"
    ):
        gradwatch.horizon(Cut(batch_first=True), torch.randn(4, 9, 3).double())


def test_an_output_that_does_not_depend_on_the_sequence_has_no_horizon_and_a_note():
    class Other(Recurrent):
        def forward(self, x, static):
            super().forward(x)
            return self.head(static)

    for x in (torch.randn(4, 9, 3), torch.zeros(4, 9, 3)):
        found = gradwatch.horizon(Other(batch_first=True), (x.double(), torch.randn(4, 5).double()))
        assert (found.horizon, found.censored, found.lag_gain) == (0, False, (0.0,) * 9)
        assert found.note == "the output does not depend on what enters memory"


def test_a_named_module_that_does_not_run_is_said():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x)

    found = gradwatch.horizon(Idle(), torch.randn(4, 9, 3), timesteps={"encoder": 1})
    assert found.note == "none of the modules that timesteps names ran with gradients: encoder"
    assert found.horizon == 1


def test_a_gain_that_is_not_finite_has_no_horizon_and_never_passes():
    model, x = Recurrent(batch_first=True), torch.full((4, 9, 3), torch.nan).double()
    found = gradwatch.horizon(model, x)
    assert (found.horizon, found.censored) == (None, None)
    with pytest.raises(gradwatch.GradientHealthError, match="not finite"):
        gradwatch.assert_horizon(model, x, at_least=5)


@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "FSDPModule"])
def test_what_is_spread_over_processes_is_refused(kind, monkeypatch):
    import torch.distributed.fsdp

    class Sharded(Recurrent):
        pass

    monkeypatch.setattr(torch.distributed.fsdp, kind, Sharded)
    with pytest.raises(
        RuntimeError, match=r"cannot be run by one process alone: its parameters are spread over several \(FSDP\)"
    ):
        gradwatch.horizon(nn.Sequential(Sharded(batch_first=True)), torch.randn(4, 9, 3).double())


# --- assert_horizon ---


def remembering(need):
    """An LSTM whose forget gates are open for as long as is needed: it passes."""
    model = Recurrent(batch_first=True)
    with torch.no_grad():
        model.memory.bias_ih_l0[5:10] = math.log(need)
    return model


def test_a_model_that_reaches_far_enough_passes_and_gives_what_was_measured():
    x = torch.randn(32, 60, 3).double()
    stats = gradwatch.assert_horizon(remembering(50), x, at_least=50)
    assert stats.need == 50
    assert stats.horizon >= 50
    short = Recurrent(batch_first=True)
    _, high = gradwatch.horizon(short, x).interval
    assert gradwatch.assert_horizon(short, x, at_least=high).horizon <= high < 50
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_horizon(short, x, at_least=high + 1)


def test_a_model_that_forgets_fails_with_horizon_definition_cause_and_remedy():
    model, x = Recurrent(batch_first=True), torch.randn(32, 60, 3).double()
    found = gradwatch.horizon(model, x)
    with pytest.raises(gradwatch.GradientHealthError) as caught:
        gradwatch.assert_horizon(model, x, at_least=200)
    said = " ".join(str(caught.value).split())
    assert (
        f"learns from the last {found.horizon} ({found.interval[0]} to {found.interval[1]}) of 60 timesteps"
        f" of x (time: dimension 1) (the gain shrinks to {found.decay_rate:.2f} of itself a step"
    ) in said
    assert "the need is 200" in said
    assert "0.001 of its maximum" in said
    assert "set the forget-gate bias of memory to 5.3 (the log of 200)" in said
    assert "forget gates keep" in said
    assert isinstance(caught.value, AssertionError)


def test_sequences_that_are_too_short_to_judge_are_no_verdict():
    with pytest.raises(ValueError, match=r"the sequences have 30 timesteps of .*, the need is 200"):
        gradwatch.assert_horizon(remembering(200), torch.randn(4, 30, 3).double(), at_least=200)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        (0, ValueError, "at_least must be at least 1, got 0"),
        (True, TypeError, "at_least must be a whole number of timesteps, got True"),
        (2.5, TypeError, "at_least must be a whole number of timesteps, got 2.5"),
    ],
)
def test_a_need_that_is_none_is_refused(given, kind, text):
    with pytest.raises(kind, match=text):
        gradwatch.assert_horizon(Recurrent(batch_first=True), torch.randn(4, 9, 3).double(), at_least=given)


class Writes(Recurrent):
    """A recurrent network that writes to its input."""

    def __init__(self, where):
        super().__init__(batch_first=True)
        self.where = where

    def forward(self, x):
        if self.where == "a piece":
            x, *_ = x.split(3, dim=2)
            x += 1
        else:
            squared = x * x
            x /= 2
            x = squared + x
        return super().forward(x)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("a piece", r"writes to a piece of it that split, chunk or unbind gave.*\(x = x \+ 1 in place of x \+= 1\)"),
        ("all of it", "writes to its input, or to what it made of that.*give gradwatch.horizon the module after that"),
    ],
)
def test_a_model_that_writes_to_its_input_is_refused_with_the_reason(where, reason):
    model, x = Writes(where), torch.randn(2, 20, 3, dtype=torch.float64)
    before = x.clone()
    with pytest.raises(RuntimeError, match=reason):
        gradwatch.horizon(model, x)
    assert torch.equal(x, before)
    gradwatch.horizon(model.memory, x, output=lambda y: y[0][:, -1])  # as it says
