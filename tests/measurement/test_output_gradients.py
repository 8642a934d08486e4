"""Gradients of what modules return, at probes, against autograd's: in one step, and wherever module hooks go wrong."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.measurement import norms
from gradwatch.sinks.reading import read_run


def watched(model, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    reports = []
    watcher = gradwatch.watch(
        model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], **options
    )
    return watcher, optimizer, reports


def truth(model, loss, names):
    """Norms of dL/d(output) by autograd on a copy: of all calls of the modules together."""
    twin = copy.deepcopy(model).double()
    kept: dict[str, list[torch.Tensor]] = {}
    modules = dict(twin.named_modules())
    for module in modules.values():
        if isinstance(module, Block):
            module.reentrant = None

    def hook(name):
        def keep(_module, _inputs, output):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                kept.setdefault(name, []).append(output)

        return keep

    for name in names:
        modules[name].register_forward_hook(hook(name))
    value = loss(twin)
    found = {
        name: torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        for name, tensors in kept.items()
    }
    return {
        name: float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
        for name, gradients in found.items()
    }


def step(optimizer, value):
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def by_name(report):
    return {a.module: a.grad_norm for a in report.snapshot.activations or ()}


class Block(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(8, 8), nn.Dropout(0.0), nn.Linear(8, 8)
        self.reentrant = reentrant

    def inner(self, x):
        return self.second(self.drop(self.first(x).tanh()))

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.through = nn.Linear(8, 8), nn.Identity()

    def forward(self, x):
        return self.layer(self.through(self.layer(x)).relu())


class Several(nn.Module):
    """Returns what the values of a kind hold."""

    @dataclasses.dataclass
    class Result:
        a: torch.Tensor
        b: torch.Tensor
        text: str = ""

    KINDS: ClassVar = {
        "tuple": lambda a, b: (a, (b, None, 3, "x")),
        "dict": lambda a, b: {"a": a, "b": [b]},
        "dataclass": Result,
        "the same twice": lambda a, b: (a, a, b),
    }

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(8, 4), nn.Linear(8, 4), kind

    def forward(self, x):
        return self.KINDS[self.kind](self.a(x), self.b(x))


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [value.a, value.b]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in leaves(v)] if isinstance(value, (list, tuple)) else []


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


MODELS = {
    "plain": lambda: (
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)),
        ["", "0", "1", "2", "3"],
    ),
    "in place": lambda: (nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), ["", "1", "2"]),
    "a layer called twice": lambda: (Twice(), ["", "layer", "through"]),
    "checkpointed": lambda: (
        nn.Sequential(nn.Linear(8, 8), Block(reentrant=False), nn.Linear(8, 3)),
        ["", "0", "1", "1.first", "1.second", "2"],
    ),
    "checkpointed, reentrant": lambda: (
        nn.Sequential(nn.Linear(8, 8), Block(reentrant=True), nn.Linear(8, 3)),
        ["", "0", "1", "2"],
    ),
    "frozen below": lambda: (
        nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 3)),
        ["", "2"],
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norms_are_those_of_autograd(kind, dtype):
    torch.manual_seed(0)
    model, names = MODELS[kind]()
    model = model.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    watcher, optimizer, reports = watched(model, torch.optim.SGD(trained, lr=0.1))
    for number in range(3):
        wanted = truth(model, lambda m: m(X.double()).square().mean(), names)
        step(optimizer, model(X.to(dtype)).square().mean())
        if number:
            assert {name: by_name(reports[-1])[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
            assert not any(a.scaled for a in reports[-1].snapshot.activations)
    assert reports[0].snapshot.activations is None  # nothing is armed at construction
    watcher.close()


def test_inside_of_a_reentrant_checkpoint_a_gradient_is_counted_once():
    torch.manual_seed(0)
    plain, wrapped = Block(), Block(reentrant=True)
    wrapped.load_state_dict(plain.state_dict())
    found = []
    for model in (plain, wrapped):
        watcher, optimizer, reports = watched(model)
        for _ in range(2):
            step(optimizer, model(X.clone().requires_grad_()).square().mean())
        watcher.close()
        found.append(by_name(reports[-1]))

    assert {k: v for k, v in found[1].items() if k} == pytest.approx({k: v for k, v in found[0].items() if k}, rel=1e-6)


@pytest.mark.parametrize("kind", Several.KINDS)
def test_of_several_outputs_it_is_the_norm_of_all_together(kind):
    model = Several(kind)
    watcher, optimizer, reports = watched(model)
    for _ in range(2):
        optimizer.zero_grad()
        given = list({id(t): t for t in leaves(model(X))}.values())
        for tensor in given:
            tensor.retain_grad()
        sum(t.square().sum() for t in given).backward()
        optimizer.step()
    watcher.close()

    assert by_name(reports[-1])[""] == pytest.approx(
        float(torch.cat([t.grad.flatten() for t in given]).norm()), rel=1e-6
    )


def test_micro_batches_add_up_as_the_rows_of_one_batch_would():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    watcher, optimizer, reports = watched(model)
    for split in (5, 2):
        for _ in range(2):
            optimizer.zero_grad()
            for part in X.split(split):
                (model(part).square().sum() * 0.1).backward()
            with torch.no_grad():
                kept = [p.clone() for p in model.parameters()]
            optimizer.step()
            with torch.no_grad():
                for p, k in zip(model.parameters(), kept, strict=True):
                    p.copy_(k)
    watcher.close()

    assert by_name(reports[-1]) == pytest.approx(by_name(reports[1]), rel=1e-5)


def test_what_several_backward_passes_reach_is_not_known():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    watcher, optimizer, reports = watched(model)
    for _ in range(2):
        optimizer.zero_grad()
        y = model(X)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        optimizer.step()
    watcher.close()

    assert set(by_name(reports[-1]).values()) == {None}


def validation_without_gradients(model):
    with torch.no_grad():
        model(X)


def loss_that_is_dropped(model):
    model(X).sum()


def saliency(model):
    x = X.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


def functional(model):
    torch.func.vmap(torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x,)).sum()), (None, 0))(
        dict(model.named_parameters()), X
    )


def forward_mode(model):
    torch.func.jvp(model, (X,), (X,))


def traced(model):
    torch.jit.trace(model, X, check_trace=False)


@pytest.mark.parametrize(
    "beside", [validation_without_gradients, loss_that_is_dropped, saliency, functional, forward_mode, traced]
)
def test_what_runs_beside_the_training_leaves_no_trace_in_it(beside):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    watcher, optimizer, reports = watched(model)
    for _ in range(3):
        wanted = truth(model, lambda m: m(X.double()).square().mean(), ["", "0", "1", "2"])
        beside(model)
        loss = model(X).square().mean()
        beside(model)
        step(optimizer, loss)
    watcher.close()

    assert by_name(reports[-1]) == pytest.approx(wanted, rel=1e-4)


def test_a_gradient_penalty_counts_with_the_pass_that_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    watcher, optimizer, reports = watched(model)

    def loss(m):
        dtype = next(m.parameters()).dtype
        x = X.to(dtype).requires_grad_()
        y = m(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.mean() + g.square().sum()

    for _ in range(2):
        wanted = truth(model, loss, ["0", "1", "2"])
        step(optimizer, loss(model))
    watcher.close()

    assert {n: by_name(reports[-1])[n] for n in wanted} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("told", [True, False])
def test_a_loss_scale_is_divided_out_or_said_to_be_in_it(told):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watcher, optimizer, reports = watched(model, scaler=scaler if told else None)
    for _ in range(2):
        wanted = truth(model, lambda m: m(X.double()).square().mean(), ["0", "1", "2"])
        optimizer.zero_grad()
        scaler.scale(model(X).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    watcher.close()

    found = reports[-1].snapshot.activations
    assert {a.scaled for a in found} == {not told}
    got = {n: by_name(reports[-1])[n] / (1 if told else 1024) for n in wanted}
    assert got == pytest.approx(wanted, rel=1e-4)


def test_each_optimizer_hears_of_its_own_modules():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 1)})
    optimizers = [torch.optim.SGD(model[k].parameters(), lr=0.1) for k in "ab"]
    reports = []
    with gradwatch.watch(model, optimizers, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append]):
        for _ in range(2):
            for o in optimizers:
                o.zero_grad()
            model["b"](model["a"](X)).sum().backward()
            for o in optimizers:
                o.step()

    assert [set(by_name(r)) for r in reports[2:]] == [{"a"}, {"b"}]


def test_an_output_that_is_edited_in_place_trains_as_ever_and_has_the_gradient_from_before_the_edit():
    class Edits(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.view, self.b = nn.Linear(8, 8), nn.Flatten(0), nn.Linear(8, 3)

        def forward(self, x):
            y = self.a(x)
            y += x
            v = self.view(y)
            v[::2] *= 3
            return self.b(v.view(-1, 8))

    weights = []
    for watch in (False, True):
        torch.manual_seed(0)
        model = Edits()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reports = []
        if watch:
            gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append])
        for _ in range(3):
            step(optimizer, model(X).square().mean())
        weights.append([p.tolist() for p in model.parameters()])

    assert weights[0] == weights[1]
    found = by_name(reports[-1])
    assert found["a"] > 0
    assert found["b"] == found[""]


def test_the_record_gives_them_back(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    watcher, optimizer, reports = watched(model, logdir=tmp_path)
    for _ in range(3):
        step(optimizer, model(X).square().mean())
    watcher.close()

    assert [s.activations for s in read_run(tmp_path).snapshots] == [r.snapshot.activations for r in reports]


class Token:
    """What a node of the graph keeps."""


class Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient, None


def test_neither_graph_nor_model_nor_watcher_is_held():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    watcher, optimizer, _ = watched(model)
    loss = model(X).sum()
    step(optimizer, loss)
    token = Token()
    kept = model(Passes.apply(X.clone().requires_grad_(), token)).sum()  # in the armed window, with its graph alive
    refs = [weakref.ref(token), weakref.ref(model)]
    del token
    watcher.close()
    ref = weakref.ref(watcher)
    del watcher
    gc.collect()
    assert ref() is None
    kept.backward()
    del kept, loss, model, optimizer
    gc.collect()

    assert [r() for r in refs] == [None, None]


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return x + self.shift  # saves nothing, so that a backward pass may follow a step


def test_hooks_are_gone_after_the_step_though_the_graph_lives_on():
    model = nn.Sequential(Shift(), Shift())
    watcher, optimizer, reports = watched(model)
    for _ in range(2):
        y = model(X)
        optimizer.zero_grad()
        y.sum().backward(retain_graph=True)
        optimizer.step()
    before = by_name(reports[-1])
    (7 * y).sum().backward()  # of the step before, in the window of the next one
    step(optimizer, model(X).sum())
    watcher.close()

    assert by_name(reports[-1])["1"] == pytest.approx(before["1"], rel=1e-6)


def test_a_tensor_that_several_modules_give_is_measured_once(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Identity())))
    measured = []
    kept = norms.norm
    monkeypatch.setattr(norms, "norm", lambda gradient: measured.append(gradient) or kept(gradient))
    watcher, optimizer, reports = watched(model)
    step(optimizer, model(X).square().mean())
    wanted = truth(model, lambda m: m(X.double()).square().mean(), ["", "0", "0.0", "0.0.0", "0.0.1", "0.0.2"])
    step(optimizer, model(X).square().mean())
    watcher.close()

    assert by_name(reports[-1]) == pytest.approx(wanted, rel=1e-4)
    assert len(measured) == 2


def test_what_one_optimizer_has_heard_of_is_still_heard_for_the_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))

    class Still(torch.optim.Optimizer):  # the graph outlives its step
        def step(self, closure=None):
            pass

    first, second = Still(model[0].parameters(), {}), torch.optim.SGD(model[1].parameters(), lr=0.0)
    reports = []
    with gradwatch.watch(model, [first, second], every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append]):
        for _ in range(2):
            given = model(X)  # the tensor of the model, of `1` and of `1.1`: the first step asks for the model alone
            torch.autograd.backward(model[0].weight.sum())
            first.step()
            step(second, given.square().mean())

    wanted = truth(model, lambda m: m(X.double()).square().mean(), ["1", "1.0", "1.1"])
    assert {n: by_name(reports[-1]).get(n) for n in wanted} == pytest.approx(wanted, rel=1e-4)
