"""What a layer is called, what it is, where it stands, and in which order layers run."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from loops import Watched, batches, loss_of
from models import tall
from torch import nn
from truth import by_hand, norm64, same

import gradwatch
from gradwatch.model.layers import describe, named_modules


class Backwards(nn.Module):
    """Its layers are registered in the opposite order of their use."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.ModuleDict({"deep": nn.LSTM(8, 8), "idle": nn.Linear(2, 2)})
        self.table = nn.Embedding(5, 8)

    def forward(self, x):
        return self.head(self.norm(self.inner["deep"](self.table(x))[0])) * self.gain


def test_layers_come_in_the_order_of_the_forward_pass_with_kind_role_and_place():
    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(5).view(5, 1)).square().sum().backward()
        optimizer.step()
    first, second = (s.model for s in watched.snapshots)
    assert {layer.order for layer in first.layers} == {None}
    ordered = [second.layers[i].name for i in second.forward_order]
    assert ordered == ["", "table", "inner.deep", "norm", "head", "inner.idle"]
    assert {layer.name: layer.order is None for layer in second.layers}["inner.idle"]
    assert {layer.name: layer.kind for layer in second.layers}["inner.deep"] == "LSTM"
    roles = {p.name: p.role for p in second.parameters}
    assert roles["gain"] == "gain"
    assert roles["table.weight"] == "embedding"
    assert roles["norm.weight"] == "normalization"
    assert roles["norm.bias"] == roles["inner.deep.bias_hh_l0"] == roles["head.bias"] == "bias"
    assert roles["inner.deep.weight_ih_l0"] == roles["head.weight"] == "weight"
    line = inspect.getsourcelines(Backwards.forward)[1]
    assert {layer.location for layer in second.layers} == {f"{__file__}:{line}"}


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_a_place_is_in_the_users_code_and_not_in_an_installed_library(folder, tmp_path):
    path = tmp_path / folder / "forecasts.py"
    path.parent.mkdir()
    path.write_text("""
from torch import nn
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
""")
    library = types.ModuleType("forecasts")
    exec(compile(path.read_text(), str(path), "exec"), vars(library))

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.head = library.Network(), nn.Linear(4, 1)

        @torch.autocast("cpu", enabled=False)
        def forward(self, x):
            return self.head(self.network.encoder(x))

    line = inspect.getsourcelines(Mine.forward)[1]
    mine, theirs = (
        {layer.name: layer.location for layer in describe(model, [], {})[0].layers}
        for model in (Mine(), library.Network())
    )

    assert mine == {"network.encoder": f"{__file__}:{line}", "head": f"{__file__}:{line}"}
    assert theirs == {"encoder": None}


def test_a_layer_whose_weights_another_uses_without_calling_it_stands_behind_that_one():
    model = nn.Sequential(nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        x = model[0](torch.ones(2, 3, 4))
        model[2](model[1](x, x, x)[0]).sum().backward()
        optimizer.step()
    info = watched.snapshots[1].model
    assert [info.layers[i].name for i in info.forward_order] == ["0", "1", "1.out_proj", "2"]


def test_names_are_free_of_what_wrappers_put_into_them():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

    inner = nn.Sequential(Wrapped(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    inner.add_module("module", nn.Linear(2, 2))
    model = nn.DataParallel(inner)
    watcher = gradwatch.watch(model)
    assert [p.name for p in watcher.report.snapshot.model.parameters] == [
        "0.weight",
        "0.bias",
        "1.0.weight",
        "1.0.bias",
        "module.weight",
        "module.bias",
    ]


def test_a_tied_weight_stands_once_under_its_first_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    model(torch.arange(5)).square().sum().backward()
    truth = norm64(model.table.weight.grad)
    optimizer.step()
    assert [p.name for p in watched.snapshots[0].model.parameters] == ["table.weight"]
    assert [layer.name for layer in watched.snapshots[0].model.layers] == ["table"]
    same(watched.norms(), [{"table.weight": truth}])


def test_a_layer_that_was_replaced_is_measured_under_its_old_name_and_new_shape():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    truth = []
    for step, batch in enumerate(batches(4)):
        if step == 2:
            model[0], model[2] = nn.Linear(4, 6), nn.Linear(6, 3)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        truth.append(by_hand(model))
        optimizer.step()
    same(watched.norms(), truth)
    assert [s.model.parameters[0].shape for s in watched.snapshots] == [(8, 4), (8, 4), (6, 4), (6, 4)]
    assert watched.snapshots[2].model is watched.snapshots[3].model


class Held(nn.Module):
    """Keeps the tensors of four layers in one place."""

    def __init__(self, tensors, used):
        super().__init__()
        self.tensors, self.used = tensors, used
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        for weight, bias in self.used(self.tensors):
            x = torch.tanh(x @ weight + bias)
        return self.head(x)


def container(kind, names):
    torch.manual_seed(0)
    values = {n: nn.Parameter(torch.randn(4, 4) if "kernel" in n else torch.zeros(4)) for n in names}
    if kind is nn.ParameterDict:
        return kind(values)
    made = nn.Module()  # as tensordict's does: names with dots, which `register_parameter` refuses
    made._parameters.update(values)
    return made


@pytest.mark.parametrize(("kind", "dot"), [(nn.ParameterDict, "/"), (nn.Module, ".")], ids=["slashes", "dots"])
def test_an_entry_of_a_container_is_a_layer_by_its_name_up_to_the_last_separator(kind, dot):
    names = [f"deep{dot}dense_{k}{dot}{what}" for k in range(4) for what in ("kernel", "bias")]

    def used(tensors):
        return [[tensors._parameters[n] for n in names[at : at + 2]] for at in range(0, 8, 2)]

    model = Held(container(kind, names), used)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for _ in range(3):
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    info = watched.snapshots[-1].model
    layers = [f"tensors.deep{dot}dense_{k}" for k in range(4)]
    assert [info.layers[i].name for i in info.forward_order] == [*layers, "head"]
    assert [layer.module for layer in info.layers] == ["tensors"] * 4 + ["head"]
    assert {p.name: p.layer for p in info.parameters}[f"tensors.deep{dot}dense_2{dot}kernel"] == layers[2]
    assert {p.role for p in info.parameters if p.name.endswith("bias")} == {"bias"}


@pytest.mark.parametrize("directions", [1, 2])
def test_a_recurrent_module_of_several_layers_is_several_steps_of_depth(directions):
    model = nn.Sequential(nn.LSTM(3, 4, 3, bidirectional=directions == 2), nn.ReLU())
    info = describe(model, (), {})[0]
    assert [(x.name, x.kind, x.module) for x in info.layers] == [(f"0.l{k}", "LSTM", "0") for k in range(3)]
    assert [sum(p.layer == x.name for p in info.parameters) for x in info.layers] == [4 * directions] * 3


def test_a_recurrent_module_of_one_layer_is_that_layer_and_a_model_that_is_one_has_its_layers():
    assert [x.name for x in describe(nn.LSTM(3, 4, bidirectional=True), (), {})[0].layers] == [""]
    assert [(x.name, x.module) for x in describe(nn.GRU(3, 4, 2), (), {})[0].layers] == [("l0", ""), ("l1", "")]


def test_layers_inside_of_a_module_run_when_it_runs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.lstm = nn.Linear(4, 1), nn.LSTM(3, 4, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 2, 3)).sum().backward()
        optimizer.step()
    last = watched.snapshots[-1]
    assert [last.model.layers[i].name for i in last.model.forward_order] == ["lstm.l0", "lstm.l1", "lstm.l2", "head"]
    assert last.absent is None


@pytest.mark.parametrize("wrappers", [("module",), ("_module",), ("module", "_module"), ("_module", "module")])
def test_what_wraps_a_whole_model_leaves_no_trace_in_names(wrappers):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for wrapper in wrappers:
        outer = nn.Module()
        outer.add_module(wrapper, model)  # as DistributedDataParallel does, and GradSampleModule of Opacus
        model = outer
    assert list(named_modules(model)) == ["", "0", "1"]


def test_a_part_of_a_model_may_be_called_as_a_wrapper_calls_it():
    model = nn.Module()
    model._module, model.head = nn.Linear(2, 2), nn.Linear(2, 1)
    assert list(named_modules(model)) == ["", "_module", "head"]
