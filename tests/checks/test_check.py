"""`check` and `assert_healthy`: right numbers, right verdicts at initialization, and a model that is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import random
from collections import OrderedDict, deque
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch import GradientHealthError, Severity, Thresholds


def mlp(activation, layers, width=32, into=16, out=4):
    sizes = [into, *[width] * (layers - 1), out]
    return nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), activation())))[:-1]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def norms(report):
    return {p.name: n for p, n in zip(report.snapshot.model.parameters, report.snapshot.norm, strict=True)}


def kinds(report):
    return {(a.finding.kind, a.finding.place) for a in report.open if a.severity >= Severity.WARNING}


# --- the numbers ---


def test_the_norms_are_those_of_float64_autograd():
    model, x, y = mlp(nn.Tanh, 5), torch.randn(8, 16), torch.randn(8, 4)
    report = gradwatch.check(model, x, loss=lambda out: functional.mse_loss(out, y))
    double = copy.deepcopy(model).double()
    functional.mse_loss(double(x.double()), y.double()).backward()
    assert norms(report) == pytest.approx(
        {name: p.grad.norm().item() for name, p in double.named_parameters()}, rel=1e-5
    )


def test_a_vanished_gradient_has_its_true_norm_and_not_zero():
    model, x = mlp(nn.Sigmoid, 24), torch.randn(8, 16)
    report = gradwatch.check(model, x, loss=lambda out: out.pow(2).mean())
    double = copy.deepcopy(model).double()
    double(x.double()).pow(2).mean().backward()
    truth = {name: p.grad.norm().item() for name, p in double.named_parameters()}
    assert 0 < truth["0.weight"] < 1e-18
    assert norms(report) == pytest.approx(truth, rel=1e-4, abs=0)


def test_the_default_loss_is_a_fixed_projection_that_reaches_every_output():
    model, x = nn.Linear(16, 4), torch.randn(8, 16)
    report = gradwatch.check(model, x)
    weights = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    (truth,) = torch.autograd.grad((model(x) * weights).sum(), model.weight)
    assert norms(report)["weight"] == pytest.approx(truth.double().norm().item(), rel=1e-6)


def test_the_same_model_and_batch_give_the_same_report_whatever_was_drawn_between():
    model, x = nn.Sequential(mlp(nn.ReLU, 3), nn.Dropout(0.0)), torch.randn(8, 16)
    first = gradwatch.check(model, x)
    torch.manual_seed(99)
    assert gradwatch.check(model, x).snapshot.norm == first.snapshot.norm


# --- what is ill ---


def test_a_deep_sigmoid_network_fails_with_layers_numbers_cause_and_remedy():
    model, x = mlp(nn.Sigmoid, 24), torch.randn(8, 16)
    with pytest.raises(GradientHealthError) as caught:
        gradwatch.assert_healthy(model, x, loss=lambda out: out.pow(2).mean())
    double = copy.deepcopy(model).double()
    double(x.double()).pow(2).mean().backward()
    truth = torch.stack([p.grad.norm() for p in double[0].parameters()]).norm().item()
    assert 1e-22 < truth < 1e-18
    said = " ".join(str(caught.value).split())
    assert "GW101 vanishing-depth (warning) 0 " in said
    assert "are too small: gain" in said
    assert "try: ReLU in place of the sigmoids, with torch.nn.init.kaiming_normal_ on the weights of" in said
    table = str(caught.value).partition("The 10 layers of 24 with the smallest gradients")[2].splitlines()
    rows = [line.split() for line in table if " Linear " in line]
    assert [row[0] for row in rows] == [str(2 * i) for i in range(10)]  # the ten nearest to the input
    assert float(rows[0][2]) == pytest.approx(truth, rel=0.01)
    assert "14 more layers" in str(caught.value)
    assert isinstance(caught.value, AssertionError)
    assert [a.finding.place for a in caught.value.alerts] == ["0"]


def test_a_detached_encoder_fails_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = mlp(nn.ReLU, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.decoder(self.encoder(x).detach())

    report = gradwatch.check(Model(), torch.randn(8, 16))
    assert kinds(report) == {("disconnected", "encoder.0")}
    (alert,) = report.open
    assert "encoder.0 to encoder.2 (2 layers) run in the forward pass and have had no gradient" in alert.message
    assert "the gradient comes back to decoder and ends there" in alert.cause
    assert "detach()" in alert.remedy
    assert norms(report)["encoder.0.weight"] is None
    with pytest.raises(GradientHealthError, match=r"disconnected.*encoder\.0"):
        gradwatch.assert_healthy(Model(), torch.randn(8, 16))


def test_nan_fails_and_names_the_layer_nearest_to_the_loss():
    model = mlp(nn.ReLU, 4)
    report = gradwatch.check(model, torch.randn(8, 16), loss=lambda out: (out - out).sqrt().sum())
    assert kinds(report) == {("non-finite", "6")}
    with pytest.raises(GradientHealthError, match="NaN or infinite"):
        gradwatch.assert_healthy(model, torch.randn(8, 16) * torch.nan)


def test_a_dead_relu_network_fails():
    model = mlp(nn.ReLU, 4)
    with torch.no_grad():
        model[4].bias.fill_(-100)
    report = gradwatch.check(model, torch.randn(8, 16))
    assert norms(report)["0.weight"] == norms(report)["4.weight"] == 0
    assert kinds(report) == {("disconnected", "0")}


def test_a_gradient_that_is_zero_from_end_to_end_fails():
    model = nn.Sequential(mlp(nn.ReLU, 3), nn.ReLU())
    with torch.no_grad():
        model[0][4].bias.fill_(-100)
    report = gradwatch.check(model, torch.randn(8, 16))
    assert set(norms(report).values()) == {0.0}
    with pytest.raises(GradientHealthError, match="exactly zero"):
        gradwatch.assert_healthy(model, torch.randn(8, 16))


@pytest.mark.parametrize("times", [2.0, 3.0, 5.0])
@pytest.mark.parametrize("loss", [None, lambda out: functional.mse_loss(out, torch.ones(8, 4))])
def test_weights_too_large_in_each_of_many_layers_fail_in_one_batch(times, loss):
    model, x = mlp(nn.ReLU, 12, width=64), torch.randn(8, 16)
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    gradwatch.assert_healthy(model, x, loss=loss)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(times)
    with pytest.raises(GradientHealthError, match=r"GW206 exploding \(warning\)") as caught:
        gradwatch.assert_healthy(model, x, loss=loss)
    (alert,) = caught.value.alerts
    assert alert.cause.startswith("the weights of ")
    assert "torch.nn.init.kaiming_normal_" in alert.remedy


class Begins(nn.Module):
    def __init__(self, init):
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 32, batch_first=True, nonlinearity="relu"), nn.Linear(32, 1)
        init(self.rnn.weight_hh_l0)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def expanding(weight, radius=1.5):
    with torch.no_grad():
        weight.normal_()
        weight.mul_(radius / torch.linalg.eigvals(weight).abs().max())


def test_a_recurrent_network_that_begins_exploded_fails_in_one_batch():
    x = torch.randn(32, 100, 4)
    loss = lambda out: functional.mse_loss(out, x[:, -1, :1])
    sick, wild, sound = (Begins(init) for init in (expanding, lambda w: expanding(w, 2.0), nn.init.orthogonal_))
    (alert, *_) = gradwatch.check(sick, x, loss=loss).open
    assert (alert.finding.code, alert.finding.place, alert.severity) == ("GW207", "rnn", Severity.WARNING)
    assert alert.cause.startswith("the spectral radius of W_hh is 1.5")
    assert kinds(gradwatch.check(wild, x)) == {("exploding", "rnn")}
    gradwatch.assert_healthy(sound, x, loss=loss)
    identity = gradwatch.assert_healthy(Begins(nn.init.eye_), x, loss=loss)  # with clipping it trains
    assert all(alert.severity is Severity.INFO for alert in identity.open)


# --- what is sound ---


def test_a_model_that_ends_in_a_normalization_passes_where_a_plain_sum_would_read_zero():
    model, x = nn.Sequential(mlp(nn.ReLU, 4), nn.LayerNorm(4)), torch.randn(8, 16)
    plain = norms(gradwatch.check(model, x, loss=torch.Tensor.sum))
    assert (
        plain["0.0.weight"] < 1e-4
    )  # rounding errors around an exact zero: the sum of what LayerNorm gives is constant
    assert norms(gradwatch.assert_healthy(model, x))["0.0.weight"] > 1e-1


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.base.requires_grad_(False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class ZeroGain(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.branches = nn.ModuleList(mlp(nn.ReLU, 2, into=16, out=16) for _ in range(3))
        self.gain = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        x = self.stem(x)
        for branch, gain in zip(self.branches, self.gain, strict=True):
            x = x + gain * branch(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(into, out, 3, stride, 1),
            nn.BatchNorm2d(out),
        )  # a bias before a normalization: its gradient is 0
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Identity() if into == out else nn.Conv2d(into, out, 1, stride)

    def forward(self, x):
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + self.skip(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.memory, self.head = kind(8, 16, 2, batch_first=True), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.memory(x)[0][:, -1])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(50, 16), mlp(nn.ReLU, 3)

    def forward(self, x):
        return self.body(self.table(x).mean(1))


def frozen():
    model = mlp(nn.ReLU, 4)
    model[:3].requires_grad_(False)
    return model


def resnet():
    blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), Block(16, 32, 2))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def transformer(*, norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


HEALTHY = {
    "lora": (Lora, (8, 16)),
    "zero gain": (ZeroGain, (8, 16)),
    "frozen": (frozen, (8, 16)),
    "bias before a normalization": (
        lambda: nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)),
        (8, 16),
    ),
    "resnet": (resnet, (4, 3, 16, 16)),
    "transformer, norm first": (lambda: transformer(norm_first=True), (2, 10, 32)),
    "transformer, norm last": (lambda: transformer(norm_first=False), (2, 10, 32)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 50, 8)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 50, 8)),
    "mlp, tanh": (lambda: mlp(nn.Tanh, 4), (8, 16)),
    "mlp, sigmoid": (lambda: mlp(nn.Sigmoid, 3), (8, 16)),
    "convolutions": (convolutions, (4, 3, 14, 14)),
    "embedding": (Words, None),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_model_passes_at_initialization(case, training):
    make, shape = HEALTHY[case]
    for seed in range(5):
        torch.manual_seed(seed)
        model = make().train(training)
        gradwatch.assert_healthy(model, torch.randint(0, 50, (4, 7)) if shape is None else torch.randn(shape))


def test_what_the_healthy_models_are_here_for_is_there():
    """Their gradients really are zero or missing in places, or they would prove nothing."""
    assert norms(gradwatch.check(Lora(), torch.randn(8, 16)))["a.weight"] == 0
    assert norms(gradwatch.check(Lora(), torch.randn(8, 16)))["base.weight"] is None
    assert norms(gradwatch.check(ZeroGain(), torch.randn(8, 16)))["branches.0.0.weight"] == 0
    assert norms(gradwatch.check(resnet(), torch.randn(4, 3, 16, 16)))["3.0.conv1.bias"] < 1e-5


# --- batches, outputs, losses ---


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 4), nn.Linear(8, 4)

    def forward(self, left, right):
        return self.left(left) + 2 * self.right(right)


def test_a_tuple_is_positional_a_mapping_keywords_and_anything_else_one_argument():
    model, a, b = Two(), torch.randn(3, 16), torch.randn(3, 8)
    first = norms(gradwatch.check(model, (a, b)))
    assert all(n > 0 for n in first.values())
    assert norms(gradwatch.check(model, {"right": b, "left": a})) == first
    assert norms(gradwatch.check(model, OrderedDict(left=a, right=b))) == first

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, pair):
            assert type(pair) is list
            return self.inner(*pair)

    assert list(norms(gradwatch.check(Pair(), [a, b])).values()) == list(first.values())


@dataclasses.dataclass
class Output:
    first: torch.Tensor
    second: torch.Tensor
    count: int = 3


class Named(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class ModelOutput(OrderedDict):
    """Like Hugging Face's: an OrderedDict whose entries, some None, tuples or integers, are attributes too."""

    def __init__(self, first, second):
        super().__init__(loss=None, logits=first, hidden_states=(second,), ids=torch.arange(3))
        self.logits = first


OUTPUTS = {
    "dictionary": lambda a, b: {"a": a, "b": b, "name": "x"},
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: [a, {"deep": (b, None)}],
    "named tuple": Named,
    "dataclass": Output,
    "Hugging Face": ModelOutput,
    "complex": torch.complex,
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_default_loss_reaches_every_tensor_of_an_output(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            return OUTPUTS[kind](self.a(x), self.b(x))

    found = norms(gradwatch.assert_healthy(Model(), torch.randn(8, 16)))
    assert all(n > 0 for n in found.values())


def test_a_loss_takes_what_the_model_returned():
    model, x = mlp(nn.Tanh, 2), torch.randn(8, 16)
    got = []

    def loss(out):
        got.append(out)
        return 3 * out.sum()

    threefold = norms(gradwatch.check(model, x, loss=loss))
    once = norms(gradwatch.check(model, x, loss=lambda out: out.sum().reshape(1)))
    assert threefold == pytest.approx({name: 3 * n for name, n in once.items()}, rel=1e-5)
    assert torch.equal(got[0], model(x))


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            lambda out: out,
            r"loss must give a scalar tensor that depends on the parameters, got a tensor of shape \(8, 4\)$",
        ),
        (lambda out: out.detach().sum(), r"got a tensor of shape \(\) without a graph"),
        (lambda out: out.sum().item(), "got float"),
        (lambda _: None, "got NoneType"),
        (lambda out: torch.ones((), requires_grad=True) * out.detach().sum(), "none of them got a gradient"),
    ],
)
def test_a_loss_that_is_none_is_refused_with_what_is_allowed(loss, text):
    model = mlp(nn.ReLU, 2)
    with pytest.raises(ValueError, match=text):
        gradwatch.check(model, torch.randn(8, 16), loss=loss)
    assert all(p.grad is None for p in model.parameters())


def test_an_output_without_a_graph_is_refused():
    class Cut(nn.Linear):
        def forward(self, x):
            return {"classes": super().forward(x).argmax(-1)}

    with pytest.raises(
        ValueError, match=r"output must hold a floating-point tensor that depends on its parameters, got dict"
    ):
        gradwatch.assert_healthy(Cut(16, 4), torch.randn(8, 16))


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        gradwatch.check(lambda x: x, torch.ones(1))
    with pytest.raises(ValueError, match="lazy modules get them when a batch has gone through once"):
        gradwatch.check(nn.LazyLinear(3), torch.ones(2, 5))


# --- options ---


def test_what_is_muted_passes():
    model, x = mlp(nn.Sigmoid, 24), torch.randn(8, 16)
    with pytest.raises(GradientHealthError):
        gradwatch.assert_healthy(model, x, ignore=["GW101:head.*", "GW201"])
    assert gradwatch.assert_healthy(model, x, ignore=["GW101"]).open == ()


def test_the_thresholds_decide():
    model, x = mlp(nn.Sigmoid, 6), torch.randn(8, 16)
    gradwatch.assert_healthy(model, x, thresholds=Thresholds(vanishing_ratio=1e-9))
    with pytest.raises(GradientHealthError, match="GW101"):
        gradwatch.assert_healthy(model, x, thresholds=Thresholds(vanishing_ratio=0.5))


def test_a_detector_of_the_users_own_decides():
    def strict(history):
        yield gradwatch.Finding("MY1", "mine", Severity.ERROR, history.model.layers[0].name, evidence={"number": 7.0})

    with pytest.raises(GradientHealthError, match=r"MY1 mine \(error\) 0\s+0: number 7"):
        gradwatch.assert_healthy(mlp(nn.ReLU, 2), torch.randn(8, 16), detectors=[strict])


def test_a_detector_that_fails_is_not_passed_over():
    def broken(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gradwatch.check(mlp(nn.ReLU, 2), torch.randn(8, 16), detectors=[broken])


# --- everything as it was ---


class Busy(nn.Module):
    """Changes all that a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.momentum = nn.Linear(16, 8).requires_grad_(False)
        self.hidden, self.cell, self.state = torch.zeros(4), torch.zeros(4), (torch.zeros(4), torch.zeros(4))
        self.log, self.cache, self.recent = [], {}, deque(maxlen=3)
        self.calls = 0
        self.fail = False
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("links", torch.eye(4).to_sparse())

    def forward(self, x):
        out = self.body(x)
        with torch.no_grad():
            self.momentum.weight.mul_(0.9).add_(self.body[0].weight, alpha=0.1)
            self.cell += 1
            self.state[1].add_(1)
            self.links *= 2
        self.hidden = out.mean(0)
        self.seen = self.seen + random.random() + np.random.rand()  # noqa: NPY002  (the global state is tested)
        self.seen = self.seen + torch.rand(())
        self.calls += 1
        self.log.append(out)
        self.cache["out"] = out
        self.recent.append(1)
        self.register_buffer("late", torch.ones(1))
        self.body[2].eval()
        if self.fail:
            raise RuntimeError("mine")
        return out


def everything(model):
    """Return all that could change, so that two of these can be compared: values, and identities where they matter."""
    values, objects = {}, {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            objects[name, key] = id(value)
            values[name, key] = repr(list(value.items())) if isinstance(value, dict) else repr(value)
    for name, p in model.named_parameters():
        objects[name] = id(p), id(p.grad)
        values[name] = (
            p.detach().numpy().tobytes(),
            None if p.grad is None else p.grad.numpy().tobytes(),
            p.requires_grad,
        )
    for name, b in model.named_buffers():
        objects[name] = id(b)
        values[name] = b.to_dense().numpy().tobytes()
    states = (torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate())  # noqa: NPY002
    return values, objects, states


@pytest.mark.parametrize("fail", [False, True], ids=["forward returns", "forward raises"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without gradients"])
def test_the_model_and_all_random_states_are_left_exactly_as_they_were(fail, training, gradients):
    model, x = Busy().train(training), torch.randn(8, 16)
    model.body[0].bias.requires_grad_(False)
    model.fail = fail
    if gradients:
        for p in model.body.parameters():
            p.grad = torch.full_like(p, 3.0)
    before = everything(model)
    if fail:
        with pytest.raises(RuntimeError, match="mine"):
            gradwatch.check(model, x)
    else:
        assert norms(gradwatch.check(model, x))["body.3.weight"] > 0
    assert everything(model) == before
    with pytest.raises(RuntimeError) if fail else torch.no_grad():
        model(x)
    assert everything(model)[0] != before[0]  # or the model changes nothing, and this proves nothing


def test_no_hook_is_left_on_the_model_or_in_torch():
    def tables():
        return {
            name: dict(table)
            for name, table in vars(nn.modules.module).items()
            if name.startswith("_global_") and isinstance(table, dict)
        }

    model = mlp(nn.ReLU, 3)
    gc.collect()  # a watcher that an earlier test has dropped
    before = tables()
    for loss in (None, lambda _: None):
        with pytest.raises(ValueError, match="loss") if loss else torch.enable_grad():
            gradwatch.check(model, torch.randn(8, 16), loss=loss)
    assert tables() == before
    assert all(not table for m in model.modules() for name, table in vars(m).items() if name.endswith("_hooks"))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(without):
    model, x = mlp(nn.Tanh, 3), torch.randn(8, 16)
    truth = norms(gradwatch.check(model, x))
    with without():
        assert norms(gradwatch.check(model, x)) == truth
        assert not torch.is_grad_enabled()


def test_a_watched_training_goes_on_as_if_nothing_had_been_checked():
    def train(*, checked):
        torch.manual_seed(3)
        model, reports = nn.Sequential(mlp(nn.ReLU, 3), nn.Dropout(0.2), nn.BatchNorm1d(4)), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append]):
            for _ in range(5):
                model(torch.randn(8, 16)).pow(2).sum().backward()
                if checked:
                    gradwatch.check(model, torch.ones(8, 16))
                optimizer.step()
                optimizer.zero_grad()
                if checked:
                    gradwatch.check(model, torch.ones(8, 16))
        return [dataclasses.replace(r.snapshot, wall_time=0.0) for r in reports], [
            p.detach().clone() for p in model.parameters()
        ]

    plain, weights = train(checked=False)
    seen, same = train(checked=True)
    assert len(plain) == 5
    assert seen == plain
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


@pytest.mark.parametrize("entry", [1.0, float("nan")])  # a second pass looks for weights, or for what made the NaN
def test_what_only_a_check_has_run_is_still_unused_to_the_training(entry):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x, head="one"):
            return getattr(self, head)(self.body(x))

    model, reports = Heads(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append]):
        for _ in range(3):
            gradwatch.check(model, (torch.full((8, 16), entry), "two"))
            model(torch.randn(8, 16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    last = reports[-1].snapshot
    assert {p.layer: a for p, a in zip(last.model.parameters, last.absent, strict=True)} == {
        "body": None,
        "one": None,
        "two": "unused",
    }
    assert [layer.order for layer in last.model.layers] == [0, 1, None]
