"""The table of kinds: a kind of one's own takes a row and its equations, and nothing else here tells kinds apart."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch.model.forward_hooks import listening
from gradwatch.timesteps.adjoint import Cell
from gradwatch.timesteps.kinds import KINDS, Kind, Recurrence, kind_of, recurrence_of
from gradwatch.timesteps.recorder import Recorder
from gradwatch.timesteps.series import traces

ROOT = Path(gradwatch.__file__).parent
T, B, D, H = 12, 5, 4, 3
CLOSE = {"rel": 1e-9, "abs": 1e-30}


# --- a kind that the package does not know: the minimal gated unit ---


def unit(x, h, w_ih, w_hh, b_ih, b_hh):
    """f = sigmoid(...), n = tanh(W_in x + b_in + f (W_hn h + b_hn)), h' = (1 - f) n + f h."""
    xf, xn = functional.linear(x, w_ih, b_ih).chunk(2, -1)
    hf, hn = functional.linear(h, w_hh, b_hh).chunk(2, -1)
    f = (xf + hf).sigmoid()
    return (1 - f) * (xn + f * hn).tanh() + f * h


class Mgu(Cell):
    """Its equations and their derivatives."""

    def run(self, c0):
        assert c0 is None
        xf, xn = self._from_input().chunk(2, -1)
        hf, q = self._from_state().chunk(2, -1)
        f = self.kept = (xf + hf).sigmoid()
        n = (xn + f * q).tanh()
        self.f, self.slope = f, (1 - f) * (1 - n * n)
        self.by_gate = (self.before - n + self.slope * q) * f * (1 - f)
        return (1 - f) * n + f * self.before

    def back(self, t, dh, dc, out):
        gate, new = out.chunk(2, -1)
        gate.copy_(dh * self.by_gate[t])
        new.copy_(dh * self.slope[t])
        return torch.cat([gate, new * self.f[t]], -1) @ self.weights.hh + dh * self.f[t], None, dc


class MguCell(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.bias, self.hidden_size = True, hidden
        self.weight_ih = nn.Parameter(torch.randn(2 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.randn(2 * hidden, hidden))
        self.bias_ih, self.bias_hh = nn.Parameter(torch.randn(2 * hidden)), nn.Parameter(torch.randn(2 * hidden))

    def forward(self, x, h):
        return unit(x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class MguSequence(nn.Module):
    def __init__(self, inputs, hidden, num_layers=1):
        super().__init__()
        self.bias, self.hidden_size, self.num_layers, self.batch_first = True, hidden, num_layers, True
        self.cells = nn.ModuleList([MguCell(hidden if k else inputs, hidden) for k in range(num_layers)])

    def forward(self, x, h0):
        self.states, last = [], []
        for cell, state in zip(self.cells, h0, strict=True):
            h, states = state, []
            for t in range(x.shape[1]):
                h = cell(x[:, t], h)
                states.append(h)
            self.states.append(states)
            last.append(h)
            x = torch.stack(states, 1)
        return x, torch.stack(last)


def kernel(x, h, weights, *_):
    h, outputs = h[0], []
    for now in x:
        h = unit(now, h, *weights)
        outputs.append(h)
    return torch.stack(outputs), h


MGU = Kind(
    "MGU",
    MguSequence,
    MguCell,
    gates=2,
    equations=Mgu,
    kernel=kernel,
    weights=lambda module: [w for cell in getattr(module, "cells", [module]) for w in cell.parameters()],
    facts=lambda cell, weights: {"forget_gate": cell.kept.mean()},
)


@pytest.fixture(autouse=True)
def _wide():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recorded(model, module, run):
    """Return what comes of one pass, by part: series and facts."""
    recorder = Recorder("auto", kinds=(*KINDS, MGU))
    chosen = recorder.arm({"rnn": module}, compiled=False)
    assert list(chosen.values()) == [module]

    def before(module, args, kwargs):
        return recorder.entered(module, args) or args, kwargs

    with listening([module], before, recorder.left):
        run(model)
    (trace,) = traces(recorder.targets.values(), torch.Generator().manual_seed(0))
    recorder.clear()
    assert trace.notes == []
    return {s.part: {name: value.tolist() for name, value in s.values.items()} for s in trace.series}, trace.facts


def norms(gradients):
    return [float(torch.linalg.vector_norm(g)) for g in gradients]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_kind_of_ones_own_takes_a_row_and_its_equations(layers):
    model, head, x = MguSequence(D, H, layers), torch.randn(H), torch.randn(B, T, D)
    h0 = torch.randn(layers, B, H)

    def loss_of(y):
        return (y[:, -1] @ head).sin().sum() + (y[:, 4] ** 2).sum()

    found, facts = recorded(model, model, lambda m: loss_of(m(x.clone().requires_grad_(), h0)[0]).backward())

    leaf = x.clone().requires_grad_()
    y, _ = model(leaf, h0)
    places = [h for states in model.states for h in states]
    of_x, *of_h = torch.autograd.grad(loss_of(y), [leaf, *places], retain_graph=True)
    assert found[""]["grad_input"] == pytest.approx(norms(of_x.unbind(1)), **CLOSE)
    for layer in range(layers):
        mine = found[f"l{layer}"]["grad_hidden"]
        assert mine == pytest.approx(norms(of_h[layer * T : (layer + 1) * T]), **CLOSE), layer
    # As wide as there are cotangents, these are a basis, and the gain is that of the Jacobian itself.
    slopes = [torch.autograd.grad(y[:, -1, k].sum(), leaf, retain_graph=True)[0] for k in range(H)]
    squares = sum(s.square().sum((0, 2)) for s in slopes) / (H * B)
    assert found[""]["lag_gain"] == pytest.approx([math.sqrt(s) for s in squares.flip(0).tolist()], **CLOSE)
    assert found[""]["replay_residual"] < 1e-14
    assert found[""]["adjoint_residual"] < 1e-13
    assert set(facts) == {("forget_gate", f"l{layer}") for layer in range(layers)}


def test_its_cell_in_a_loop_is_one_sequence():
    cell, x = MguCell(D, H), torch.randn(B, T, D)

    def run(cell, x):
        h, states = torch.zeros(B, H), []
        for t in range(T):
            h = cell(x[:, t], h)
            states.append(h)
        return states

    found, _ = recorded(cell, cell, lambda m: run(m, x.clone().requires_grad_())[-1].sin().sum().backward())
    went = run(cell, x)
    assert found["l0"]["grad_hidden"] == pytest.approx(norms(torch.autograd.grad(went[-1].sin().sum(), went)), **CLOSE)
    assert len(found[""]["lag_gain"]) == T
    assert found[""]["adjoint_residual"] < 1e-13


def test_a_kind_that_is_not_in_the_table_is_not_seen():
    recorder = Recorder("auto")
    recorder.arm({"rnn": MguSequence(D, H), "cell": MguCell(D, H)}, compiled=False)
    assert recorder.targets == {}
    assert kind_of(MguCell(D, H)) is None


@pytest.mark.parametrize(
    ("module", "name", "mode"),
    [
        (nn.LSTM(D, H, 2, proj_size=2), "LSTM", "LSTM"),
        (nn.LSTMCell(D, H), "LSTM", "LSTM"),
        (nn.GRU(D, H), "GRU", "GRU"),
        (nn.GRUCell(D, H), "GRU", "GRU"),
        (nn.RNN(D, H), "RNN", "RNN_TANH"),
        (nn.RNN(D, H, nonlinearity="relu"), "RNN", "RNN_RELU"),
        (nn.RNNCell(D, H), "RNN", "RNN_TANH"),
        (nn.RNNCell(D, H, nonlinearity="relu"), "RNN", "RNN_RELU"),
    ],
)
def test_each_module_of_torch_is_of_one_kind(module, name, mode):
    (kind,) = [kind for kind in KINDS if kind.includes(module)]
    assert (kind.name, kind.mode) == (name, mode)
    assert kind is kind_of(module)
    assert len(kind.weights(module)[1]) == kind.gates * H


class Mine(nn.LSTM):
    """One of torch's by another name."""


class LayerNormLSTM(nn.Module):
    """One that is not torch's."""


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LSTM(2, 3), "LSTM"),
        (nn.LSTM(2, 3, proj_size=2), "LSTM"),
        (nn.GRU(2, 3), "GRU"),
        (nn.RNN(2, 3), "RNN"),
        (nn.RNN(2, 3, nonlinearity="relu"), "RNN"),
        (nn.LSTMCell(2, 3), "LSTM"),
        (nn.GRUCell(2, 3), "GRU"),
        (nn.RNNCell(2, 3), "RNN"),
        (Mine(2, 3), "LSTM"),
        (LayerNormLSTM(), "LSTM"),
        (nn.Conv1d(2, 3, 1), None),
        (nn.TransformerEncoderLayer(4, 2), None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else v,
)
def test_what_carries_the_state_of_a_module_is_known(module, kind):
    assert recurrence_of(module) == kind


def test_parts_are_named_as_torch_names_its_weights():
    module = nn.GRU(2, 3, num_layers=2, bidirectional=True)
    recurrence = Recurrence.of(module, kind_of(module))
    names = [recurrence.part(number) for number in range(recurrence.parts)]

    assert [f"weight_hh_{name}" for name in names] == [n for n, _ in module.named_parameters() if "weight_hh" in n]


def test_a_probe_tells_the_kind_of_a_module_and_the_direction_of_its_parts():
    torch.set_default_dtype(torch.float32)
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 3, bidirectional=True, batch_first=True), "head": nn.Linear(6, 1)})
    optimizer, reports = torch.optim.SGD(model.parameters(), lr=0.1), []
    with gradwatch.watch(
        model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], on_alert=lambda _: None
    ):
        for _ in range(2):
            optimizer.zero_grad()
            model["head"](model["rnn"](torch.randn(4, 8, 2))[0][:, -1]).sum().backward()
            optimizer.step()
    snapshot = reports[-1].snapshot

    assert [(s.part, s.kind, s.reverse) for s in snapshot.sequences] == [
        ("", "LSTM", False),
        ("l0", None, False),
        ("l0_reverse", None, True),
    ]
    assert {(f.name, f.part) for f in snapshot.facts if f.part} == {
        (name, part)
        for name in (
            "forget_gate",
            "forget_bias",
            "input_gate",
            "input_bias",
            "cell_saturation",
            "saturated_gates",
        )
        for part in ("l0", "l0_reverse")
    }


# --- nothing else tells them apart ---

TORCHS = {f"{kind}{form}" for kind in ("RNN", "LSTM", "GRU") for form in ("", "Cell")} | {"RNNBase", "RNNCellBase"}
EQUATIONS = {"Rnn", "Gru", "Lstm"}


def mentions(path):
    """Return the kinds that the code of a file names, in whatever way but in prose."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {
            ast.Attribute: lambda n: {n.attr},
            ast.Name: lambda n: {n.id},
            ast.alias: lambda n: {n.name},
            ast.Constant: lambda n: {n.value} if isinstance(n.value, str) else set(),
        }.get(type(node), lambda _: set())(node)
        found |= names & (TORCHS | EQUATIONS)
    return found


def test_only_the_table_tells_kinds_apart():
    wings = ("model", "measurement", "timesteps", "watcher", "checks")
    found = {
        path.relative_to(ROOT).as_posix(): mentions(path) for wing in wings for path in (ROOT / wing).rglob("*.py")
    }
    assert found.pop("timesteps/kinds.py") == TORCHS | EQUATIONS
    assert found.pop("timesteps/adjoint.py") == set()  # it defines the equations, and asks for none of them
    for file in ("weights", "structure"):  # a remedy is for one of torch's classes, and writes code that names it
        assert found.pop(f"checks/cures/{file}.py")
    assert {path: names for path, names in found.items() if names} == {}
