"""A golden profile: it survives noise, threads and another torch, and fails for what changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch


class Market(nn.Module):
    def __init__(self, forget=4.0, spread=1.0, activation=nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.memory = nn.LSTM(4, 16, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 1))
        with torch.no_grad():
            self.memory.bias_ih_l0[16:32] = forget
            self.head[0].weight *= spread

    def forward(self, x):
        return self.head(self.memory(x)[0][:, -1])


@pytest.fixture
def batch():
    return torch.randn(16, 120, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def golden(tmp_path, batch):
    path = tmp_path / "golden.toml"
    with pytest.raises(gradwatch.GradientHealthError, match=r"there was no profile .* it was written now"):
        gradwatch.assert_profile(Market(), batch, path)
    return path


def test_the_same_model_passes_and_is_returned(golden, batch):
    before = golden.read_text()
    found = gradwatch.assert_profile(Market(), batch, golden)
    assert f'"memory" = {{ kind = "LSTM", norm = {found.layers["memory"].norm:.2f}' in before
    assert found.horizons[""].of == 120
    assert found.versions["torch"] == torch.__version__.partition("+")[0]
    assert golden.read_text() == before


def test_norms_are_those_of_autograd(batch):
    model = Market()
    found = gradwatch.profile(model, batch, loss=lambda given: given.square().mean())
    model(batch).square().mean().backward()
    for name in ("memory", "head.0", "head.4"):
        exact = torch.cat([p.grad.flatten().double() for p in model.get_submodule(name).parameters()]).norm().log10()
        assert found.layers[name].norm == pytest.approx(exact.item(), abs=1e-4)
    weight = model.head[0].weight
    exact = (weight.grad.double().norm() * weight.detach().double().norm()).log10()
    assert found.layers["head.0"].sensitivity == pytest.approx(exact.item(), abs=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_rounding_change_nothing(golden, batch, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gradwatch.assert_profile(Market(), batch, golden)
        gradwatch.assert_profile(Market().double(), batch.double(), golden)
    finally:
        torch.set_num_threads(before)


def test_a_loss_of_another_scale_changes_nothing(tmp_path, batch):
    path = tmp_path / "scaled.toml"
    gradwatch.assert_profile(Market(), batch, path, loss=lambda given: given.square().mean(), update=True)
    gradwatch.assert_profile(Market(), batch, path, loss=lambda given: 1e4 * given.square().mean())


def test_a_memory_that_became_short_fails_with_the_sentence(golden, batch):
    with pytest.raises(gradwatch.GradientHealthError) as error:
        gradwatch.assert_profile(Market(forget=0.0), batch, golden)
    assert "memory: at least 120 -> 1" in str(error.value)
    assert "the gradients are not those of golden.toml" in str(error.value)
    assert "pytest --gradwatch-update" in str(error.value)


def test_a_layer_that_vanishes_fails_and_a_tolerance_of_its_own_admits_it(golden, batch):
    with pytest.raises(gradwatch.GradientHealthError, match=r"memory: gradient x0\.0"):
        gradwatch.assert_profile(Market(spread=0.01), batch, golden)
    gradwatch.assert_profile(Market(spread=0.3), batch, golden, layers={"*": 3.0})
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_profile(Market(spread=0.3), batch, golden, tolerance=0.05)


def test_units_that_died_fail(golden, batch):
    model = Market()
    with torch.no_grad():
        model.head[2].bias -= 100
    with pytest.raises(gradwatch.GradientHealthError):
        gradwatch.assert_profile(model, batch, golden)


class Renamed(Market):
    def __init__(self):
        super().__init__()
        self.tail = self.head
        del self.head

    def forward(self, x):
        return self.tail(self.memory(x)[0][:, -1])


def test_new_names_alone_do_not_fail_and_missing_layers_do(golden, batch):
    gradwatch.assert_profile(Renamed(), batch, golden)
    with pytest.raises(gradwatch.GradientHealthError, match=r"2 layers are gone: head\.2 to head\.4"):
        gradwatch.assert_profile(Shorter(), batch, golden)


class Shorter(Market):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(16, 1))


def test_update_writes_what_is_there_now(golden, batch):
    gradwatch.assert_profile(Market(forget=0.0), batch, golden, update=True)
    gradwatch.assert_profile(Market(forget=0.0), batch, golden)


def test_a_file_of_another_torch_is_said_to_be_one(golden, batch):
    version = torch.__version__.partition("+")[0]
    golden.write_text(golden.read_text().replace(f'"torch" = "{version}"', '"torch" = "2.5.9"'))
    gradwatch.assert_profile(Market(), batch, golden)
    with pytest.raises(gradwatch.GradientHealthError, match=f"it was written with torch 2.5.9 \\(now {version}\\)"):
        gradwatch.assert_profile(Market(forget=0.0), batch, golden)


def test_bad_arguments(golden, batch):
    with pytest.raises(ValueError, match="tolerance must be a number of orders of magnitude above 0, got 0"):
        gradwatch.assert_profile(Market(), batch, golden, tolerance=0)
    golden.write_text("x")
    with pytest.raises(ValueError, match=r"golden.toml: it is not TOML"):
        gradwatch.assert_profile(Market(), batch, golden)


# --- another machine, another torch, another number of threads ---

GOLDEN = Path(__file__).parent / "data"
"""Written with torch 2.13.0 on one thread; `.ci/oldest` compares with them what torch 2.6.0 computes."""


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.norm = nn.LSTM(4, 32, 2, batch_first=True), nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x):
        return self.mlp(self.norm(self.rnn(x)[0][:, -1]))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv1d(4, 16, 5), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 5), nn.ReLU())
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.body(x.transpose(1, 2)).mean(2))


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0)
        self.into, self.head = nn.Linear(4, 32), nn.Linear(32, 1)
        self.blocks = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.blocks(self.into(x))[:, -1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [Recurrent, Convolutional, Attentive])
def test_a_profile_holds_on_another_machine_torch_format_and_number_of_threads(kind, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(1)
        x = torch.randn(16, 64, 4)
        gradwatch.assert_profile(kind().to(dtype), x.to(dtype), GOLDEN / f"{kind.__name__.lower()}.toml")
        other = kind().to(dtype)
        with torch.no_grad():
            first = next(p for name, p in other.named_parameters() if "weight" in name)
            first.mul_(0.0 if kind is not Recurrent else 8.0)
        with pytest.raises(gradwatch.GradientHealthError, match="the gradients are not those of"):
            gradwatch.assert_profile(other, x.to(dtype), GOLDEN / f"{kind.__name__.lower()}.toml")
    finally:
        torch.set_num_threads(before)
