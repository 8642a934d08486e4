"""Training that is watched is bitwise the training that is not, and what it saves carries nothing of gradwatch."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreters import warm
from models import Loop
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.checkpoint import checkpoint
from truth import bits

import gradwatch
from gradwatch import watch

STEPS = 4


def batch(*shape):
    """Draw from all three random generators, so that one more draw by anybody changes everything after it."""
    return torch.randn(*shape) + random.random() + float(np.random.rand())  # noqa: NPY002  (the process's generator)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.table(x))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.body = (
            nn.Linear(4, 8),
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2)),
        )

    def forward(self, x):
        return checkpoint(self.body, self.first(x), use_reentrant=self.reentrant)


def recurrent(kind, **options):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = kind(4, 6, **options), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.body(x)[0][-1])

    return Recurrent()


def normed():
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*(nn.utils.parametrizations.weight_norm(m) if isinstance(m, nn.Linear) else m for m in layers))


def plain(*shape, clip=None, autocast=False, create_graph=False):
    """Return one step of an ordinary loop on inputs of this shape."""

    def step(model, optimizer, look):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(batch(*shape)).float().square().mean()
        loss.backward(create_graph=create_graph)
        look(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return loss

    return step


def on_bfloat16(model, optimizer, look):
    optimizer.zero_grad()
    loss = model(batch(5, 4).bfloat16()).square().mean()
    loss.backward()
    look(loss)
    optimizer.step()
    return loss


def on_tokens(model, optimizer, look):
    optimizer.zero_grad()
    loss = model(torch.randint(9, (5,))).square().mean()
    loss.backward()
    look(loss)
    optimizer.step()
    return loss


def inside_autocast(model, optimizer, look):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.zero_grad()
        loss = model(batch(5, 4)).float().square().mean()
        loss.backward()
        look(loss)
        optimizer.step()
    return loss


def penalized(model, optimizer, look):
    optimizer.zero_grad()
    x = batch(5, 4).requires_grad_()
    output = model(x).square().mean()
    (slope,) = torch.autograd.grad(output, x, create_graph=True)
    loss = output + (slope.norm() - 1).square()
    loss.backward()
    look(loss)
    optimizer.step()
    return loss


def by_closure(model, optimizer, look):
    x = batch(5, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        look(loss)
        return loss

    return optimizer.step(closure)


def scaled(*, unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    calls = []

    def step(model, optimizer, look):
        optimizer.zero_grad()
        calls.append(None)
        loss = model(batch(5, 4)).square().mean() * (math.inf if len(calls) % STEPS == 2 else 1.0)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        look(loss)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))


def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2))


def transformer():
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), 2, enable_nested_tensor=False
    )


def using(kind, **options):
    return lambda parameters: kind(parameters, **options)


SGD, ADAM = using(torch.optim.SGD, lr=0.1, momentum=0.9), using(torch.optim.Adam, lr=0.01)
CASES = {
    "mlp dropout, sgd": lambda: (mlp(), SGD, plain(5, 4)),
    "conv batchnorm lazy, adamw foreach": lambda: (conv(), using(torch.optim.AdamW, foreach=True), plain(5, 3, 6, 6)),
    "lstm, adam, clipped": lambda: (recurrent(nn.LSTM), ADAM, plain(7, 5, 4, clip=0.1)),
    "gru of two layers, adam fused": lambda: (
        recurrent(nn.GRU, num_layers=2, dropout=0.3),
        using(torch.optim.Adam, fused=True),
        plain(7, 5, 4),
    ),
    "transformer, adamw fused": lambda: (transformer(), using(torch.optim.AdamW, fused=True), plain(3, 5, 8)),
    "sparse embedding, sparse adam": lambda: (
        nn.Embedding(9, 6, sparse=True),
        using(torch.optim.SparseAdam),
        on_tokens,
    ),
    "relu in place, sgd nesterov": lambda: (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)),
        using(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        plain(5, 4),
    ),
    "checkpoint, adam": lambda: (Checkpointed(reentrant=False), ADAM, plain(5, 4)),
    "checkpoint reentrant, adam": lambda: (Checkpointed(reentrant=True), ADAM, plain(5, 4)),
    "weight norm, rmsprop": lambda: (normed(), using(torch.optim.RMSprop), plain(5, 4)),
    "tied weights, adagrad": lambda: (Tied(), using(torch.optim.Adagrad), on_tokens),
    "gradient penalty, adam": lambda: (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), ADAM, penalized),
    "gradients with a graph, sgd": lambda: (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        SGD,
        plain(5, 4, create_graph=True),
    ),
    "bfloat16 autocast, adamw": lambda: (mlp(), using(torch.optim.AdamW), plain(5, 4, autocast=True)),
    "the step inside of autocast, sgd": lambda: (mlp(), SGD, inside_autocast),
    "bfloat16 weights, adam": lambda: (nn.Sequential(mlp(), nn.Linear(2, 2)).bfloat16(), ADAM, on_bfloat16),
    "cells in a loop, adam": lambda: (Loop(nn.LSTMCell, 4, 6), ADAM, plain(6, 5, 4)),
    "scaler, sgd": lambda: (mlp(), SGD, scaled(unscale=False)),
    "scaler unscaled, adam": lambda: (mlp(), ADAM, scaled(unscale=True)),
    "scaler, adam fused": lambda: (mlp(), using(torch.optim.Adam, fused=True), scaled(unscale=False)),
    "lbfgs": lambda: (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
        using(torch.optim.LBFGS, max_iter=4),
        by_closure,
    ),
    "lbfgs with a search and dropout": lambda: (
        mlp(),
        using(torch.optim.LBFGS, max_iter=4, line_search_fn="strong_wolfe"),
        by_closure,
    ),
}


def trained(case, form, tmp_path):
    """Train from fixed seeds; give every bit of what came of it, and the snapshots."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the generator of the whole process)
    torch.manual_seed(0)
    model, make, step = CASES[case]()
    if "lazy" in case:
        model(batch(5, 3, 6, 6))
    optimizer = make(model.parameters())
    reports = []
    look = lambda loss: None
    if form is not None:
        watcher = watch(
            model,
            optimizer,
            logdir=tmp_path / form,
            every_n_steps=1,
            probe_every_n_steps=1,
            sinks=[reports.append],
            on_alert=lambda _: None,
        )
        look = (lambda loss: watcher.step(loss=loss)) if form == "explicit" else watcher.record
    losses = [step(model, optimizer, look) for _ in range(STEPS)]
    kept = {
        "losses": losses,
        "weights": dict(model.state_dict()),
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": list(np.random.get_state()),  # noqa: NPY002  (the generator of the whole process)
        "python": repr(random.getstate()),
        "mode": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }
    result = bits(kept)
    for p in model.parameters():
        p.grad = None  # a graph of gradients is a cycle
    if form is not None:
        watcher.close()
    return result, [r.snapshot for r in reports]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_not_one_bit_of_training_changes_with_every_step_a_probe(case, tmp_path):
    alone, _ = trained(case, None, tmp_path)
    assert trained(case, None, tmp_path)[0] == alone  # or the comparison would say nothing
    for form in ("hook", "explicit"):
        watched, snapshots = trained(case, form, tmp_path)
        for (name, mine), (_, theirs) in zip(watched, alone, strict=True):
            assert mine == theirs, f"{name} differs in the {form} form"
        # It was watched, in full.
        assert len(snapshots) >= STEPS - 1
        assert all(n is not None for s in snapshots for n in s.norm)
        assert all(s.weight_norm is not None and s.zeros is not None for s in snapshots)
        assert all(s.update_ratio is not None for s in snapshots if not s.skipped)
        assert {layer.order is None for layer in snapshots[-1].model.layers} == {False}


FIRST = """
import random, sys, tempfile
import numpy, torch
import gradwatch

def states():
    return random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()

model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = states()
if "draw" in sys.argv:
    random.random()
watcher = gradwatch.watch(model, optimizer, logdir=sys.argv[1], probe_every_n_steps=1)
for _ in range(2):
    (model(torch.ones(1, 2)).sum() * float("inf")).backward()
    optimizer.step()
repr(watcher)
watcher.close()
print([mine == theirs for mine, theirs in zip(states(), before)])
"""


@pytest.mark.slow
def test_the_first_watcher_of_a_process_draws_no_random_number_also_while_it_imports(tmp_path):
    def run(*arguments):
        done = subprocess.run(
            [*warm(), "-c", FIRST, str(tmp_path), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run("draw") == "[False, True, True]"  # so that this test can fail
    assert run() == "[True, True, True]"


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x)[0][-1])
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    (tmp_path / "net_of_a_user.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    import net_of_a_user

    yield net_of_a_user.Net()
    del sys.modules["net_of_a_user"]


def in_armed_window(model, optimizer, **options):
    """Train until the next step is a probe and one reading awaits its optimizer: a checkpoint may be written here."""
    watcher = watch(model, optimizer, probe_every_n_steps=1, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 2, 4)).square().mean().backward()
        watcher.step()
        optimizer.step()
    model(torch.ones(3, 2, 4)).square().mean().backward()
    assert torch_modules._global_forward_pre_hooks
    return watcher


LOAD = """
import pickle, sys, torch
sys.modules["gradwatch"] = None
sys.path.insert(0, sys.argv[1])
def load(name):
    if name.endswith(".pt"):
        return torch.load(name, weights_only=False)
    with open(name, "rb") as file:
        return pickle.load(file)
for name in sys.argv[2:]:
    try:
        loaded = load(name)
    except ModuleNotFoundError as error:
        print("refused", error.name)
        continue
    if isinstance(loaded, torch.nn.Module):
        print("model", loaded(torch.ones(3, 2, 4)).double().sum().item())
    else:
        print(type(loaded).__name__)
"""


def test_what_is_saved_in_the_armed_window_loads_where_gradwatch_is_not_installed(net, tmp_path):
    optimizer = torch.optim.Adam(net.parameters())
    watcher = in_armed_window(net, optimizer)
    torch.save(net, tmp_path / "model.pt")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(net))
    (tmp_path / "copy.pickle").write_bytes(pickle.dumps(copy.deepcopy(net)))
    torch.save({"optimizer": optimizer.state_dict(), "model": net.state_dict()}, tmp_path / "states.pt")
    torch.save(optimizer, tmp_path / "optimizer.pt")
    (tmp_path / "ours.pickle").write_bytes(pickle.dumps(gradwatch.Thresholds()))  # so that this test can fail
    watcher.close()
    with torch.no_grad():
        truth = net(torch.ones(3, 2, 4)).double().sum().item()
    names = ["model.pt", "model.pickle", "copy.pickle", "states.pt", "optimizer.pt", "ours.pickle"]
    script = tmp_path / "load.py"
    script.write_text(textwrap.dedent(LOAD))
    done = subprocess.run(
        [*warm(), str(script), str(tmp_path), *(str(tmp_path / n) for n in names)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert [float(line.split()[1]) for line in lines[:3]] == pytest.approx([truth] * 3)
    assert lines[3:6] == ["dict", "Adam", "refused gradwatch.values"] or lines[3:6] == [
        "dict",
        "Adam",
        "refused gradwatch",
    ]


def test_a_copy_made_in_the_armed_window_is_not_watched(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reports = []
    watcher = in_armed_window(net, optimizer, sinks=[reports.append])
    count = len(reports)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    assert not twin_optimizer._optimizer_step_pre_hooks
    assert not twin_optimizer._optimizer_step_post_hooks
    twin(torch.ones(3, 2, 4)).sum().backward()
    twin_optimizer.step()
    assert len(reports) == count
    watcher.close()


def test_functional_transforms_and_scripting_work_in_the_armed_window(net):
    x = torch.ones(3, 2, 4)
    parameters = {k: v.detach() for k, v in net.named_parameters()}
    body = nn.Sequential(nn.Linear(4, 3), nn.Tanh())

    def results():
        loss = lambda p: torch.func.functional_call(net, p, (x,)).square().sum()
        slopes = torch.func.grad(loss)(parameters)
        mapped = torch.func.vmap(body)(x)
        return [*slopes.values(), mapped, torch.jit.script(body)(x), torch.jit.trace(body, x)(x)]

    truth = results()
    watcher = in_armed_window(net, torch.optim.SGD(net.parameters(), lr=0.0))
    assert all(map(torch.equal, results(), truth))
    watcher.close()


def tables(model):
    """Return everything that hangs on the modules and parameters of a model, and on torch's modules as a whole."""
    per_module = [
        (sorted(vars(m)), {k: len(v) for k, v in vars(m).items() if k.endswith("hooks")}) for m in model.modules()
    ]
    per_parameter = [
        (sorted(vars(p)), len(p._backward_hooks or ()), len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
        for p in model.parameters()
    ]
    everywhere = {
        k: len(v) for k, v in vars(torch_modules).items() if k.startswith("_global") and hasattr(v, "__len__")
    }
    return per_module, per_parameter, everywhere


FILES = Path("/proc/self/fd")


def open_files():
    return sorted(str(n.readlink()) for n in FILES.iterdir() if n.exists())


def test_after_close_no_hook_attribute_thread_or_file_is_left(net, tmp_path):
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3, 2, 4)).sum().backward()
    optimizer.step()  # the optimizer and torch have made what they make of their own
    before, attributes, threads = tables(net), sorted(vars(optimizer)), set(threading.enumerate())
    files = open_files() if FILES.is_dir() else []
    watcher = in_armed_window(net, optimizer, logdir=tmp_path / "runs")
    per_module, per_parameter, everywhere = tables(net)
    assert (per_module, per_parameter) == before[:2]  # modules and parameters carry nothing at any time
    assert everywhere != before[2]
    watcher.close()
    assert tables(net) == before
    assert sorted(vars(optimizer)) == attributes
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert set(threading.enumerate()) == threads
    if files:
        assert open_files() == files


def test_a_model_that_is_dropped_without_close_is_collected_with_all_that_watched_it(net, tmp_path):
    model = type(net)()
    optimizer = torch.optim.Adam(model.parameters())
    watcher = in_armed_window(model, optimizer, logdir=tmp_path / "runs")
    gone = [weakref.ref(o) for o in (model, optimizer, watcher)]
    del model, optimizer, watcher
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    assert not torch_modules._global_forward_pre_hooks


def test_a_watcher_that_is_kept_does_not_keep_the_model(net):
    model = type(net)()
    watcher = in_armed_window(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    watcher.close()


def test_a_watcher_that_goes_in_the_middle_of_a_forward_pass_does_not_take_it_along():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watchers = []

    def hook(*_):  # in front of that of a probe
        while watchers:
            watchers.pop().close()

    handle = torch_modules.register_module_forward_hook(hook)
    try:
        watcher = watch(net, optimizer, probe_every_n_steps=1)
        for number in range(3):
            if number == 1:
                watchers.append(watcher)
            net(torch.ones(3, 4)).sum().backward()
            optimizer.step()
    finally:
        handle.remove()
    assert not torch_modules._global_forward_hooks
