"""The laws on each device: what is said of the CPU elsewhere holds where gradients lie on another device too.

Law 8, what is imported, is the same on every device.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import warnings
import weakref

import pytest
import torch
from loops import Watched
from models import deep
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import TorchDispatchMode
from truth import bits, by_hand, column, norm64, same

import gradwatch
from gradwatch.detectors.alerts import judge
from gradwatch.values.history import History

STEPS, ROWS, LENGTH, WIDTH, SIZE = 6, 4, 7, 3, 5
EVERY = {"every_n_steps": 1, "probe_every_n_steps": 1, "on_alert": lambda _: None}
"""Each step measured in full."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Compute on this device, in the same order each time."""
    torch.use_deterministic_algorithms(mode=True)
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(mode=False)


class Net(nn.Module):
    """A fused LSTM, a layer that draws random numbers, one that keeps buffers, and a head."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, SIZE, batch_first=True)
        self.body = nn.Sequential(nn.Linear(SIZE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(self.rnn(x)[0][:, -1]))


def made(device, build=Net, dtype=torch.float32, kind=torch.optim.Adam):
    torch.manual_seed(0)  # of every device
    model = build().to(device, dtype)
    return model, kind(model.parameters(), lr=0.01)


def inputs(device, dtype=torch.float32):
    return torch.randn(ROWS, LENGTH, WIDTH, device=device, dtype=dtype)


def step(model, optimizer, device):
    optimizer.zero_grad()
    loss = model(inputs(device)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def states(device):
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def trained(device, watching, kind=torch.optim.Adam):
    """Train, and return every bit of what came of it; `watching` attaches to model and optimizer what it likes."""
    model, optimizer = made(device, kind=kind)
    watcher = watching(model, optimizer)
    losses = [step(model, optimizer, device) for _ in range(STEPS)]
    result = bits(
        {
            "losses": losses,
            "parameters and buffers": dict(model.state_dict()),
            "gradients": [p.grad for p in model.parameters()],
            "optimizer": optimizer.state_dict(),
            "random states": states(device),
        }
    )
    if watcher is not None:
        watcher.close()
    return result


def alone(model, optimizer):
    """Attach nothing."""


# --- 1: non-interference ---


@pytest.mark.parametrize("horizon", [None, 3])
def test_not_one_bit_of_training_changes(device, horizon):
    reports = []

    def watching(model, optimizer):
        return gradwatch.watch(model, optimizer, horizon=horizon, sinks=[reports.append], **EVERY)

    bare = trained(device, alone)
    assert trained(device, alone) == bare  # or the comparison would say nothing
    for (part, mine), (_, theirs) in zip(trained(device, watching), bare, strict=True):
        assert mine == theirs, part
    last = reports[-1].snapshot
    assert len(reports) == STEPS
    assert None not in (*last.norm, *last.update_ratio)
    assert {s.module for s in last.sequences if s.grad_hidden is not None} == {"rnn"}
    assert any(s.part == "model" and s.lag_gain for s in last.sequences) is (horizon is not None)


# --- 2: close ---


def test_nothing_is_left_behind(device):
    model, optimizer = made(device)
    step(model, optimizer, device)
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    attributes = [sorted(vars(m)) for m in model.modules()]

    watcher = gradwatch.watch(model, optimizer, **EVERY)
    for _ in range(3):
        step(model, optimizer, device)
    saved = io.BytesIO()
    torch.save((model, optimizer), saved)  # a probe is under way
    twin = copy.deepcopy(model)
    watcher.close()

    assert b"gradwatch" not in saved.getvalue()
    for net in (model, twin):
        assert [sorted(vars(m)) for m in net.modules()] == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in net.parameters())
    assert not torch_modules._global_forward_pre_hooks
    assert not torch_modules._global_forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    del twin, net, saved
    gc.collect()
    assert before is None or torch.cuda.memory_allocated(device) == before
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None


# --- 3: training goes on ---


class Shy(torch.optim.RMSprop):
    """An optimizer that works, and lets nobody look."""

    @property
    def grad_scale(self):
        raise RuntimeError("do not look at me")


@pytest.mark.parametrize("broken", ["sinks", "detectors", "optimizer"])
def test_what_breaks_in_gradwatch_ends_no_training_and_changes_none(device, broken):
    def breaks(_):
        raise RuntimeError("do not look at me")

    def watching(model, optimizer):
        return gradwatch.watch(model, optimizer, **EVERY, **({} if broken == "optimizer" else {broken: [breaks]}))

    with pytest.warns(gradwatch.GradwatchWarning, match="do not look at me"):
        watched = trained(device, watching, Shy if broken == "optimizer" else torch.optim.RMSprop)

    assert watched == trained(device, alone, torch.optim.RMSprop)


# --- 4: replay ---


def test_a_record_replayed_gives_the_alerts_of_the_live_run(device, tmp_path):
    model, optimizer = made(device, lambda: deep(14, 6))
    live = []
    with gradwatch.watch(
        model, optimizer, logdir=tmp_path, sinks=[lambda r: live.append((r.began, r.open, r.cleared))], **EVERY
    ) as watcher:
        for number in range(30):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 6, device=device)).square().mean() * (float("inf") if number == 25 else 1.0)
            watcher.record(loss)
            loss.backward()
            if number != 25:
                optimizer.step()
    history, still, replayed = History(), (), []
    for snapshot in gradwatch.read_run(tmp_path).snapshots:
        report = judge(history, snapshot, still)
        still = report.open
        replayed.append((report.began, report.open, report.cleared))

    assert {alert.finding.code for began, _, _ in live for alert in began} >= {"GW101"}
    assert repr(replayed) == repr(live)  # as text, in which a NaN equals itself


# --- 5: oracle ---


def test_every_norm_is_that_of_float64(device):
    model, optimizer = made(device)
    watched = Watched(model, optimizer, **EVERY)
    norms, weights, ratios = [], [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(inputs(device)).square().mean().backward()
        norms.append(by_hand(model))
        before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        optimizer.step()
        weights.append({name: norm64(p) for name, p in before.items()})
        updates = {name: norm64(p.double() - before[name]) for name, p in model.named_parameters()}
        ratios.append({name: updates[name] / weight if weight else math.inf for name, weight in weights[-1].items()})

    same(watched.norms(), norms)
    same([column(s, s.weight_norm) for s in watched.snapshots], weights)
    same([column(s, s.update_ratio) for s in watched.snapshots[1:]], ratios[1:])


def test_every_series_is_that_of_a_loop_in_float64(device):
    model, optimizer = made(device, dtype=torch.float64)
    model.body[3].p = 0.0
    watched = Watched(model, optimizer, **EVERY)
    for _ in range(2):
        x = inputs(device, torch.float64)
        twin = copy.deepcopy(model)
        cell = nn.LSTMCell(WIDTH, SIZE).to(device, torch.float64)
        cell.load_state_dict({name: getattr(twin.rnn, f"{name}_l0") for name in cell.state_dict()})
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    steps, state, went = [row.requires_grad_() for row in x.clone().unbind(1)], None, []
    for row in steps:
        state = cell(row, state)
        went.append(state)
    loss = twin.head(twin.body(state[0])).square().mean()
    hidden, cells = zip(*went, strict=True)
    truth = [
        [float(g.norm()) for g in torch.autograd.grad(loss, series, retain_graph=True)]
        for series in (steps, hidden, cells)
    ]
    found = {s.part: s for s in watched.snapshots[-1].sequences}

    assert found[""].grad_input == pytest.approx(truth[0], rel=1e-6, abs=0)
    assert found["l0"].grad_hidden == pytest.approx(truth[1], rel=1e-6, abs=0)
    assert found["l0"].grad_cell == pytest.approx(truth[2], rel=1e-6, abs=0)


# --- 6: scale ---


@pytest.mark.parametrize("scale", [1e-8, 2.0**12])
@pytest.mark.parametrize("build", [lambda: deep(14, 6), lambda: deep(2, 6, nn.Tanh)], ids=["sick", "well"])
def test_the_same_training_at_another_scale_has_the_same_verdicts(device, build, scale):
    def verdicts(scale, *, scaled=False):
        torch.manual_seed(0)
        model = build().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05 / (1 if scaled else scale))
        scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=scaled)
        watched = Watched(model, optimizer, scaler=scaler, on_alert=lambda _: None)
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 6, device=device)).square().mean() * (1 if scaled else scale)
            watched.watcher.record(loss)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        watched.watcher.close()
        return [(a.finding.code, a.finding.place, a.severity, a.began) for r in watched.reports for a in r.began]

    true = verdicts(1.0)
    assert ("GW101" in {code for code, *_ in true}) is (len(list(build().modules())) > 10)
    assert verdicts(scale) == true
    assert verdicts(scale, scaled=True) == true


# --- 7: one copy ---


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_that_is_not_measured_runs_not_one_operator_more(device):
    def operators(watching):
        model, optimizer = made(device)
        watcher = watching(model, optimizer)
        counts = []
        for _ in range(STEPS):
            with Operators() as operators:
                step(model, optimizer, device)
            counts.append(operators.count)
        if watcher is not None:
            watcher.close()
        return counts

    bare = operators(alone)
    watched = operators(lambda model, optimizer: gradwatch.watch(model, optimizer, every_n_steps=3))

    assert [a == b for a, b in zip(bare, watched, strict=True)] == [False, True, True, False, True, True]


def waits(model, optimizer, device):
    """Return how often a step waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step(model, optimizer, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [w for w in said if issubclass(w.category, gradwatch.GradwatchWarning)]
    return sum("synchronizing CUDA operation" in str(w.message) for w in said)


@pytest.mark.gpu
@pytest.mark.parametrize("horizon", [None, 3])
def test_a_measured_step_waits_once_for_its_device_and_no_other_step_waits(horizon):
    device = torch.device("cuda")
    model, optimizer = made(device)
    reports = []
    with gradwatch.watch(
        model, optimizer, every_n_steps=3, probe_every_n_steps=6, horizon=horizon, sinks=[reports.append]
    ):
        found = [waits(model, optimizer, device) for _ in range(13)]

    assert [r.snapshot.step for r in reports] == [0, 3, 6, 9, 12]
    assert found == [1 if number % 3 == 0 else 0 for number in range(13)]


@pytest.mark.gpu
def test_a_step_that_is_not_measured_runs_where_waiting_is_an_error():
    device = torch.device("cuda")
    model, optimizer = made(device)
    with gradwatch.watch(model, optimizer, every_n_steps=2):
        step(model, optimizer, device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, optimizer, device)
            with pytest.raises(RuntimeError, match="synchronizing"):
                torch.ones(1, device=device).item()  # it would have been seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
