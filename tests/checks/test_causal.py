"""Whether a model looks ahead: those that do are told from those that do not, and the place is what was built."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

import gradwatch
from tests.checks.causal_zoo import (
    CAUSAL,
    FEATURES,
    LEAKING,
    ROWS,
    STEPS,
    WIDTH,
    Apply,
    Attention,
    CausalConv,
    Channels,
    Decided,
    Dropout,
    First,
    Transformer,
    series,
    square,
)

PLACES = {
    "bidirectional lstm": ("recurrent", None),
    "bidirectional, packed rows": ("lstm", None),
    "one centred among causal ones": ("layers.1", None),
    "mask off by one": ("attention", None),
    "transformer without a mask": ("layers.layers.0.self_attn", None),
    "instance norm": ("layers.0", None),
    "layer norm over time": ("layers.0", None),
    "batch norm without statistics": ("layers.0", None),
    "reversed": ("", "gru"),
    "mean given back": ("", "after"),
    "interpolation": ("layers.1", None),
    "embedded tokens, both ways": ("inner.recurrent", None),
}
PAIRS = {  # output, input: the farthest pair there is
    "bidirectional lstm": (0, STEPS - 1),
    "centred convolution": (0, 1),
    "same padding": (0, 4),
    "mask off by one": (0, 1),
    "next value": (0, 1),
    "last value": (0, STEPS - 1),
    "chunks": (0, 3),
    "circular fft": (0, STEPS - 1),
}


def built(zoo, name, seed=0):
    build, batch = zoo[name]
    torch.manual_seed(seed)
    return build(), batch()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_is_not_accused(name):
    found = gradwatch.assert_causal(*built(CAUSAL, name))
    assert found.causal
    assert found.leak is None
    assert found.timesteps == STEPS


@pytest.mark.parametrize("name", LEAKING)
def test_a_model_that_looks_ahead_is_found(name):
    with pytest.raises(gradwatch.GradientHealthError, match="looks ahead"):
        gradwatch.assert_causal(*built(LEAKING, name))


@pytest.mark.parametrize("name", PLACES)
def test_the_first_module_whose_own_output_leaks_is_named(name):
    leak = gradwatch.causal(*built(LEAKING, name)).leak
    assert (leak.module, leak.before) == PLACES[name]


@pytest.mark.parametrize("name", PAIRS)
def test_the_pair_that_lies_farthest_apart_is_named_and_has_a_derivative(name):
    model, batch = built(LEAKING, name)
    leak = gradwatch.causal(model, batch).leak
    assert (leak.output, leak.at) == PAIRS[name]
    exact, x = copy.deepcopy(model).double().eval(), batch.double().requires_grad_()
    (gradient,) = torch.autograd.grad(exact(x)[:, leak.output].sum(), x)
    after = gradient[:, leak.at + 1 :].abs().amax() if leak.at + 1 < STEPS else 0
    assert gradient[:, leak.at].abs().amax() > 1e-9 > after
    assert leak.gradient > 0


def test_the_error_has_pair_place_cause_and_remedy():
    with pytest.raises(gradwatch.GradientHealthError) as error:
        gradwatch.assert_causal(*built(LEAKING, "one centred among causal ones"))
    text = " ".join(str(error.value).split())
    assert "the output at timestep 0 depends on timestep 1 of x, 1 timestep ahead" in text
    assert "layers.1 (Conv1d) is centred" in text
    assert "nn.functional.pad(x, (2, 0))" in text


def test_the_remedy_of_a_centred_convolution_is_one():
    torch.manual_seed(0)
    model, batch = Channels(nn.Conv1d(FEATURES, WIDTH, 3, padding=2, dilation=2)), series()
    assert "pad(x, (4, 0))" in gradwatch.causal(model, batch).leak.remedy
    model.layers = nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(FEATURES, WIDTH, 3, dilation=2))
    assert gradwatch.causal(model, batch).causal


def test_rounding_is_told_from_a_leak_by_its_precision():
    model, batch = built(CAUSAL, "convolution by fft")
    found = gradwatch.causal(model, batch)
    assert 0 < found.rounding < 1e-4
    assert gradwatch.causal(model.double(), batch.double()).causal


class Faint(nn.Module):
    """A leak as small as rounding errors are."""

    def __init__(self, size):
        super().__init__()
        self.size, self.head = size, nn.Linear(FEATURES, 2)

    def forward(self, x):
        return self.head(x) + self.size * x.sum((1, 2), keepdim=True)


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-7])
def test_a_leak_as_small_as_rounding_is_one(size):
    torch.manual_seed(0)
    assert not gradwatch.causal(Faint(size), series()).causal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_formats(dtype):
    for zoo, wanted in ((CAUSAL, True), (LEAKING, False)):
        for name in (
            ("causal convolution", "masked attention") if wanted else ("centred convolution", "mean given back")
        ):
            model, batch = built(zoo, name)
            assert gradwatch.causal(model.to(dtype), batch.to(dtype)).causal is wanted, name


class OnlyFloat32(nn.Module):
    """A model that computes in float32 whatever it is given, by FFT."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.kept = inner, torch.eye(FEATURES)

    def forward(self, x):
        return self.inner(x @ self.kept)


def test_what_does_not_run_in_float64_and_may_be_rounding_is_an_error_and_what_is_large_a_leak():
    with pytest.raises(RuntimeError, match="does not run in float64"):
        gradwatch.causal(OnlyFloat32(built(CAUSAL, "convolution by fft")[0]), series())
    assert not gradwatch.causal(OnlyFloat32(built(LEAKING, "circular fft")[0]), series()).causal
    assert gradwatch.causal(OnlyFloat32(built(CAUSAL, "gru")[0]), series()).causal


# --- modes ---


def test_batch_norm_looks_ahead_in_training_and_not_in_evaluation():
    model, batch = built(CAUSAL, "batch norm in evaluation")
    assert gradwatch.causal(model, batch).causal
    found = gradwatch.causal(model, batch, training=True)
    assert (found.leak.module, found.leak.kind) == ("layers.1", "BatchNorm1d")
    assert "averages over the timesteps of the batch" in found.leak.cause
    assert model.training
    assert int(model.layers[1].num_batches_tracked) == 0


class OfEachStep(nn.Module):
    """BatchNorm over the rows of each timestep alone."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x):
        return torch.stack([self.norm(step) for step in x.unbind(1)], 1)


def test_batch_norm_over_the_batch_is_none_over_time():
    torch.manual_seed(0)
    assert gradwatch.causal(OfEachStep(), series(), training=True).causal


def test_dropout_is_drawn_alike_in_training():
    torch.manual_seed(0)
    assert gradwatch.causal(Dropout(), series(), training=True).causal


def test_the_mode_of_the_model_does_not_matter_and_all_is_left_as_it_was():
    model, batch = built(LEAKING, "bidirectional gru, time first")
    model.train()
    before, state, data = copy.deepcopy(model.state_dict()), torch.get_rng_state(), batch.clone()
    gradwatch.causal(model, batch)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch, data)
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    assert all(p.dtype is torch.float32 and p.grad is None for p in model.parameters())
    assert model(batch)["states"].dtype is torch.float32


# --- outputs ---


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES, 2)

    def forward(self, x):
        return self.head(x.mean(1))


def test_an_output_without_timesteps_is_an_error():
    with pytest.raises(ValueError, match=r"the output has no dimension of time: the model gave \(3, 2\)"):
        gradwatch.causal(Pooled(), series())


def test_output_chooses():
    model = First(nn.LSTM(FEATURES, WIDTH, batch_first=True, bidirectional=True))
    assert not gradwatch.causal(model.recurrent, series()).causal
    forward_half = lambda given: given[0][..., :WIDTH]
    assert gradwatch.causal(model.recurrent, series(), output=forward_half).causal
    with pytest.raises(TypeError, match="output must give a tensor, got str"):
        gradwatch.causal(model, series(), output=lambda _: "x")


class Two(nn.Module):
    """A loss beside what it is of, and the input handed on."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(FEATURES, WIDTH, batch_first=True, bidirectional=True)

    def forward(self, x):
        states = self.gru(x)[0]
        return {"loss": states.mean(), "x": x, "states": states}


def test_a_loss_and_an_input_that_is_handed_on_are_not_meant():
    assert not gradwatch.causal(Two(), series()).causal


def test_decisions_that_look_ahead():
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        found.append(gradwatch.causal(Decided(Apply(lambda h: h - h.mean(1, keepdim=True))), series()))
    assert sum(not one.causal for one in found) >= 5  # of one that never decides otherwise nothing can be told
    assert all("what inner computes looks ahead" in str(one) for one in found if one.causal)


class Valid(nn.Module):
    """A convolution without padding: the last output belongs to the last input."""

    def __init__(self, cut=0, kernel=3):
        super().__init__()
        self.conv, self.cut = nn.Conv1d(FEATURES, 1, kernel, padding=cut), cut

    def forward(self, x):
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return y[:, : -2 * self.cut] if self.cut else y


def test_fewer_outputs_than_inputs_must_be_told_apart_by_offset():
    with pytest.raises(ValueError, match="offset=2 says that the last of both belong together"):
        gradwatch.causal(Valid(), series())
    assert gradwatch.causal(Valid(), series(), offset=2).causal
    assert gradwatch.causal(Valid(), series(), offset=1).leak.ahead == 2
    assert gradwatch.causal(Valid(), series(), offset=0).leak.ahead == 2
    both = Apply(lambda h: h + h.mean(1, keepdim=True))
    shortened = nn.Sequential(both, Channels(nn.Conv1d(2, 2, 3)))
    assert not gradwatch.causal(shortened, series()).causal  # more than that could explain


def test_offset():
    ahead = Apply(lambda h: h.roll(-2, 1))
    torch.manual_seed(0)
    batch = series()
    assert gradwatch.causal(ahead, batch).leak.ahead == 2
    assert gradwatch.causal(ahead, batch, offset=1).leak.ahead == 2
    same, late = Apply(lambda h: h), Apply(lambda h: functional.pad(h, (0, 0, 1, 0))[:, :-1])
    assert gradwatch.causal(same, batch).causal
    assert gradwatch.causal(same, batch, offset=-1).leak.ahead == 0
    assert gradwatch.causal(late, batch, offset=-1).causal
    with pytest.raises(TypeError, match="offset must be a whole number"):
        gradwatch.causal(same, batch, offset=1.5)
    with pytest.raises(ValueError, match="none of the output has one more than 23 ahead"):
        gradwatch.causal(same, batch, offset=23)


# --- inputs ---


class Covariates(nn.Module):
    """Sees a series up to now, and a calendar to its end."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(FEATURES, WIDTH, batch_first=True)
        self.calendar = nn.GRU(2, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(3 * WIDTH, 1)

    def forward(self, series, known):
        return self.head(torch.cat([self.gru(series)[0], self.calendar(known)[0]], -1))


def test_an_input_that_may_be_known_ahead_is_left_out_by_naming_the_other():
    torch.manual_seed(0)
    model, batch = Covariates(), {"series": series(), "known": torch.randn(ROWS, STEPS, 2)}
    found = gradwatch.causal(model, batch)
    assert found.inputs == ("series", "known")
    assert (found.leak.input, found.leak.module) == ("known", "calendar")
    assert gradwatch.causal(model, batch, input="series").causal
    assert not gradwatch.causal(model, batch, input=1).causal
    with pytest.raises(ValueError, match=r"input must name one of .*'series', 'known'"):
        gradwatch.causal(model, batch, input="prices")


def test_an_encoder_of_another_length_is_not_looked_at_and_that_is_said():
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True)
    batch = {"src": torch.randn(ROWS, 17, WIDTH), "tgt": torch.randn(ROWS, 9, WIDTH), "tgt_mask": square(9)}
    found = gradwatch.causal(model, batch)
    assert found.causal
    assert found.inputs == ("tgt",)
    assert "Not looked at, for its other number of timesteps: src (17)" in str(found)
    assert "Left as it is, for it has all timesteps by all timesteps, as a mask: tgt_mask" in str(found)
    del batch["tgt_mask"]
    assert gradwatch.causal(model, batch).leak.input == "tgt"


class WithTargets(nn.Module):
    """Takes targets too, and makes a loss of them."""

    def __init__(self):
        super().__init__()
        self.inner = Channels(nn.Conv1d(FEATURES, 1, 3, padding=1), nn.AdaptiveAvgPool1d(8))

    def forward(self, x, targets):
        y = self.inner(x)
        return {"prediction": y, "loss": (y - targets).square().mean()}


def test_targets_of_which_only_a_loss_is_made_are_no_input():
    torch.manual_seed(0)
    model, batch = WithTargets(), {"x": series(), "targets": torch.randn(ROWS, 8, 1)}
    with pytest.raises(ValueError, match="the output does not depend on targets, which has as many timesteps"):
        gradwatch.causal(model, batch)  # nothing that it depends on lies in the time of the output
    model.inner = Channels(nn.Conv1d(FEATURES, 1, 3, padding=1))
    found = gradwatch.causal(model, {"x": series(), "targets": torch.randn(ROWS, STEPS, 1)})
    assert found.inputs == ("x",)
    assert not found.causal
    assert "The output does not depend on targets" in str(found)


class OnPacked(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, WIDTH, **options)

    def forward(self, packed):
        return self.lstm(packed)[0]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(bidirectional):
    torch.manual_seed(0)
    packed = pack_padded_sequence(series(), torch.tensor([9, STEPS, 15]), batch_first=True, enforce_sorted=False)
    found = gradwatch.causal(OnPacked(bidirectional=bidirectional), packed)
    assert found.causal is not bidirectional
    assert found.timesteps == STEPS


def test_timesteps_says_which_dimension_is_time():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(FEATURES, WIDTH)), torch.randn(STEPS, FEATURES)
    assert gradwatch.causal(model, batch, timesteps={"": 0}).causal
    mean = Apply(lambda h: h - h.mean(0, keepdim=True))
    assert not gradwatch.causal(mean, batch, timesteps={"": 0}).causal


class Uncertain(nn.Module):
    """Draws from a random state of its own that nobody can put back."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES, 1)

    def forward(self, x):
        import secrets

        return self.head(x) + secrets.randbelow(1 << 20) / (1 << 20)


def test_a_model_that_gives_something_else_each_time_is_an_error():
    with pytest.raises(ValueError, match="two passes of the model on the same batch differ"):
        gradwatch.causal(Uncertain(), series())


class Straight(nn.Module):
    """A gradient without a value: a straight-through estimator of the next timestep."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES, 1)

    def forward(self, x):
        y = self.head(x)
        return y + (y.roll(-1, 1) - y.roll(-1, 1).detach())


def test_a_gradient_without_a_value_is_no_leak_and_is_told():
    torch.manual_seed(0)
    found = gradwatch.causal(Straight(), series())
    assert found.causal
    assert "A gradient goes to later timesteps" in str(found)


class Picky(nn.Module):
    """Refuses values that are none of its data."""

    def __init__(self, inner, known, *, order=False):
        super().__init__()
        self.inner, self.known, self.order = inner, known, order

    def forward(self, x):
        if not (torch.isin(x, self.known).all() and (not self.order or torch.equal(x, self.known))):
            raise ValueError("such a price there was never")
        return self.inner(x.log())


def test_values_that_a_model_refuses_are_left_out():
    torch.manual_seed(0)
    prices = series().exp()
    sound, leaking = First(nn.GRU(FEATURES, WIDTH, batch_first=True)), Channels(nn.Conv1d(FEATURES, 1, 3, padding=1))
    assert gradwatch.causal(Picky(sound, prices), prices).causal
    assert not gradwatch.causal(Picky(leaking, prices), prices).causal
    with pytest.raises(RuntimeError, match="the model cannot be run with another future: such a price there was never"):
        gradwatch.causal(Picky(sound, prices, order=True), prices)


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(FEATURES, WIDTH, batch_first=True)

    def forward(self, x, state):
        return self.gru(x, state)[0]


def test_an_initial_state_has_no_timesteps():
    torch.manual_seed(0)
    found = gradwatch.causal(WithState(), (series(), torch.randn(1, ROWS, WIDTH)))
    assert (found.inputs, found.notes) == (("x",), ())


class InChunks(nn.Module):
    """Works through its tokens in chunks, as state-space models do."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, tokens):
        h = self.embedding(tokens).reshape(len(tokens), -1, 4, WIDTH)
        return self.head(h.cumsum(2).flatten(1, 2))


def test_tokens_in_chunks_are_no_flat_window():
    torch.manual_seed(0)
    found = gradwatch.causal(InChunks(), torch.randint(20, (ROWS, STEPS)))
    assert (found.inputs, found.timesteps, found.causal) == (("tokens",), STEPS, True)


class Warm(nn.Module):
    """Knows nothing at first, and edits what it was given."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(FEATURES, WIDTH, batch_first=True)

    def forward(self, x):
        x.mul_(2)
        states = self.gru(x)[0]
        return torch.cat([torch.full_like(states[:, :3], torch.nan), states[:, 3:]], 1)


def test_nan_is_nan_and_a_batch_that_the_model_edits_stays_as_it_was():
    torch.manual_seed(0)
    batch = series()
    before = batch.clone()
    assert gradwatch.causal(Warm(), batch).causal
    assert torch.equal(batch, before)


class Surge(nn.Module):
    """Looks ahead only where something is larger than all that its data has."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES, 1)

    def forward(self, x):
        return self.head(x) + functional.relu(x.amax(1, keepdim=True) - 6).sum(-1, keepdim=True)


def test_what_only_larger_values_would_show_is_found():
    torch.manual_seed(0)
    assert not gradwatch.causal(Surge(), series().clamp(-3, 3)).causal


def test_tokens_that_are_all_the_same_are_changed_too():
    model, _ = built(LEAKING, "embedded tokens, both ways")
    assert not gradwatch.causal(model, torch.full((ROWS, STEPS), 7)).causal


class Masked(nn.Module):
    """Takes a mask of what is there, and how much of it that is."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES, 1)

    def forward(self, x, there):
        return self.head(x) * there.float().mean(1)[:, None, None]


def test_a_mask_that_is_the_same_everywhere_is_changed_too():
    torch.manual_seed(0)
    leak = gradwatch.causal(Masked(), (series(), torch.ones(ROWS, STEPS, dtype=torch.bool))).leak
    assert leak.input == "there"


class InFloat32(nn.Module):
    """Casts to float32 within, whatever it is given, as state-space models do for their FFT."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        h = self.inner.inward(x).float()
        n = h.shape[1] * (2 if self.inner.padded else 1)
        product = torch.fft.rfft(h, n, dim=1) * torch.fft.rfft(self.inner.kernel.float(), n, dim=0)
        return torch.fft.irfft(product, n, dim=1)[:, : h.shape[1]].to(x.dtype)


def test_rounding_within_a_model_that_casts_to_float32_is_no_leak():
    assert gradwatch.causal(InFloat32(built(CAUSAL, "convolution by fft")[0]), series()).causal
    assert not gradwatch.causal(InFloat32(built(LEAKING, "circular fft")[0]), series()).causal


class Heads(nn.Module):
    """A mean that is causal, and a width that is not."""

    def __init__(self, *, distribution):
        super().__init__()
        self.mean, self.width, self.distribution = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 1), distribution

    def forward(self, x):
        mean, width = self.mean(x), functional.softplus(self.width(x - x.mean(1, keepdim=True)))
        return torch.distributions.Normal(mean, width) if self.distribution else (mean, width)


@pytest.mark.parametrize("distribution", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_all_heads_are_looked_at(distribution, frozen):
    torch.manual_seed(0)
    model = Heads(distribution=distribution).requires_grad_(not frozen)
    assert gradwatch.causal(model, series()).leak.before == "width"
    first = lambda given: given.loc if distribution else given[0]
    assert gradwatch.causal(model, series(), output=first).causal


def test_a_leak_of_one_timestep_is_found_by_its_derivative():
    torch.manual_seed(0)
    one = Apply(lambda h: torch.cat([h[:, :14], h[:, 15:16], h[:, 15:]], 1))
    leak = gradwatch.causal(one, torch.randn(ROWS, 60, FEATURES)).leak
    assert (leak.output, leak.at) == (14, 15)


def test_states_beside_the_outputs_are_none_even_with_as_many_rows_as_timesteps():
    torch.manual_seed(0)
    assert gradwatch.causal(nn.LSTM(FEATURES, WIDTH, batch_first=True), torch.randn(STEPS, STEPS, FEATURES)).causal


def test_inference_mode_around_it():
    torch.manual_seed(0)
    model = First(nn.GRU(FEATURES, WIDTH, batch_first=True))
    with torch.inference_mode():
        assert gradwatch.causal(model, series()).causal


def test_what_was_assumed_and_what_was_left_out_is_said():
    class Rated(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(FEATURES, 1)

        def forward(self, x, rate):
            return self.head(x) + rate[None, :, None]

    said = str(gradwatch.causal(Rated(), (series(), torch.randn(STEPS))))
    assert "Dimension 1 of x was taken for time, as nothing tells" in said
    assert "Not looked at, for it has no rows: rate" in said


def test_long_sequences_are_looked_at_in_places():
    torch.manual_seed(0)
    found = gradwatch.causal(Channels(CausalConv(FEATURES, 1, 3)), torch.randn(2, 250, FEATURES))
    assert len(found.positions) == 16
    assert {0, 248} <= set(found.positions)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        gradwatch.causal(lambda x: x, series())
    with pytest.raises(ValueError, match="no input with a dimension of time"):
        gradwatch.causal(nn.Linear(FEATURES, 1), torch.randn(FEATURES))
    with pytest.raises(ValueError, match="the batch has 1 timestep, and none"):
        gradwatch.causal(nn.GRU(FEATURES, WIDTH, batch_first=True), torch.randn(ROWS, 1, FEATURES), timesteps={"": 1})


# --- drawn networks ---


@st.composite
def networks(draw):
    """Layers that do not look ahead, with or without one that does; returns them, and the number of that one."""
    causal = {
        "conv": lambda: CausalConv(WIDTH, WIDTH, draw(st.integers(1, 4)), draw(st.integers(1, 3))),
        "pointwise": lambda: nn.Conv1d(WIDTH, WIDTH, 1),
        "tanh": nn.Tanh,
        "norm": lambda: nn.BatchNorm1d(WIDTH).eval(),
    }
    ahead = {
        "centred": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
        "same": lambda: nn.Conv1d(WIDTH, WIDTH, draw(st.sampled_from([3, 5])), padding="same"),
        "group": lambda: nn.GroupNorm(2, WIDTH),
        "instance": lambda: nn.InstanceNorm1d(WIDTH),
        "pool": lambda: nn.MaxPool1d(3, 1, 1),
    }
    layers = [causal[kind]() for kind in draw(st.lists(st.sampled_from(sorted(causal)), min_size=1, max_size=4))]
    at = None
    if draw(st.booleans()):
        at = draw(st.integers(0, len(layers)))
        layers.insert(at, ahead[draw(st.sampled_from(sorted(ahead)))]())
    return layers, at


@settings(max_examples=40, deadline=None)
@given(networks(), st.integers(0, 2**16))
def test_drawn_networks_are_told_apart(drawn, seed):
    layers, at = drawn
    torch.manual_seed(seed)
    model = Channels(nn.Conv1d(FEATURES, WIDTH, 1), *layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    found = gradwatch.causal(model, series())
    assert found.causal is (at is None)
    if at is not None:
        assert found.leak.module == f"layers.{at + 1}"


def test_transformers_of_every_mask():
    for masked in (True, False):
        torch.manual_seed(0)
        assert gradwatch.causal(Transformer(mask=masked), series(), training=True).causal is masked
        assert gradwatch.causal(Attention(square if masked else None, "sdpa"), series()).causal is masked


def test_a_lightning_module_through_its_training_step():
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self, *, ahead):
            super().__init__()
            self.net = First(nn.GRU(FEATURES, WIDTH, batch_first=True, bidirectional=ahead))

        def training_step(self, batch, _):
            return (self.net(batch["x"]) - batch["y"]).square().mean()

    torch.manual_seed(0)
    batch = {"x": series(), "y": torch.randn(ROWS, STEPS, 1)}
    assert gradwatch.causal(Module(ahead=False), batch).causal
    found = gradwatch.causal(Module(ahead=True), batch)
    assert found.leak.module == "recurrent"
    assert "Of the training step only the First that it calls was looked at" in str(found)

    class Forward(Module):
        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            x, y = batch
            return (self(x) - y).square().mean()

    assert gradwatch.causal(Forward(ahead=False), (batch["x"], batch["y"])).causal
    assert not gradwatch.causal(Forward(ahead=True), (batch["x"], batch["y"])).causal
