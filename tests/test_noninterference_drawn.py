"""Trainings drawn at random, each run with and without gradwatch: not a bit may differ.

A short run is in every test run; `GRADWATCH_DRAWS=600 pytest -s -k drawn tests/test_noninterference_drawn.py` draws for ten minutes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import os
import pickle
import random
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import gradwatch

ROWS, LENGTH, WIDTH = 3, 5, 4


# --- models: every block takes and gives (rows, length, width) ---


class Call(nn.Module):
    """A module and what is done with it."""

    def __init__(self, inner: nn.Module, how) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        return self.how(self, x)


class Cells(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH)

    def forward(self, x):
        state, found = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)


class Carried(nn.Module):
    """Keeps its hidden state from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.state = nn.GRU(WIDTH, WIDTH, batch_first=True), None

    def forward(self, x):
        state = self.state.to(x.dtype) if self.state is not None and self.state.shape[1] == x.shape[0] else None
        y, state = self.rnn(x, state)
        self.state = state.detach()
        return y


@dataclasses.dataclass
class Given:
    value: torch.Tensor
    other: object = None


def edited(m, x):
    y = m.inner(x)
    y += 1
    y[:, 0] = 0
    return y


def noisy(m, x):
    return m.inner(x) + torch.randn_like(x) * random.random() * float(np.random.rand())  # noqa: NPY002  (the generator of the whole process)


def hooked(inner):
    inner.register_forward_hook(lambda _m, _i, y: y * 0.5)
    inner.register_forward_pre_hook(lambda _m, i: (i[0] + 1,))
    inner.weight.register_hook(lambda g: g * 2)
    return inner


def linear():
    return nn.Linear(WIDTH, WIDTH)


def plain(m, x):
    return m.inner(x)


def first(m, x):
    return m.inner(x)[0]


BLOCKS = {
    "linear": linear,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.4),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: Call(nn.BatchNorm1d(WIDTH), lambda m, x: m.inner(x.transpose(1, 2)).transpose(1, 2)),
    "convolution": lambda: Call(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), lambda m, x: m.inner(x.transpose(1, 2)).transpose(1, 2)),
    "lstm": lambda: Call(nn.LSTM(WIDTH, WIDTH, batch_first=True), first),
    "two lstms with dropout": lambda: Call(nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.3), first),
    "lstm with projection": lambda: Call(nn.LSTM(WIDTH, 6, batch_first=True, proj_size=WIDTH), first),
    "both directions": lambda: Call(nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True), first),
    "rnn, time first": lambda: Call(nn.RNN(WIDTH, WIDTH, nonlinearity="relu"), lambda m, x: m.inner(x.transpose(0, 1))[0].transpose(0, 1)),
    "last state": lambda: Call(nn.LSTM(WIDTH, WIDTH, batch_first=True), lambda m, x: x + m.inner(x)[1][0][-1][:, None]),
    "lstm cells": lambda: Cells(nn.LSTMCell),
    "rnn cells": lambda: Cells(nn.RNNCell),
    "carried state": Carried,
    "attention": lambda: Call(nn.MultiheadAttention(WIDTH, 2, batch_first=True, dropout=0.1), lambda m, x: m.inner(x, x, x, need_weights=False)[0]),
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True),
    "checkpoint": lambda: Call(nn.Sequential(linear(), nn.Dropout(0.2), linear()), lambda m, x: checkpoint(m.inner, x, use_reentrant=False)),
    "reentrant checkpoint": lambda: Call(nn.Sequential(linear(), nn.Dropout(0.2)), lambda m, x: checkpoint(m.inner, x, use_reentrant=True)),
    "checkpointed lstm": lambda: Call(nn.LSTM(WIDTH, WIDTH, batch_first=True), lambda m, x: checkpoint(m.inner, x, use_reentrant=False)[0]),
    "residual": lambda: Call(linear(), lambda m, x: x + m.inner(x)),
    "used twice": lambda: Call(linear(), lambda m, x: m.inner(m.inner(x).tanh())),
    "not used": lambda: Call(linear(), lambda _m, x: x),
    "used by chance": lambda: Call(linear(), lambda m, x: m.inner(x) if random.random() < 0.5 else x),
    "frozen": lambda: linear().requires_grad_(requires_grad=False),
    "parametrized": lambda: weight_norm(linear()),
    "edited in place": lambda: Call(linear(), edited),
    "noise of three generators": lambda: Call(linear(), noisy),
    "hooks of the user's": lambda: hooked(linear()),
    "gives a tuple": lambda: Call(Call(linear(), lambda m, x: (m.inner(x), None, 3)), first),
    "gives a dict": lambda: Call(Call(linear(), lambda m, x: {"y": m.inner(x)}), lambda m, x: m.inner(x)["y"]),
    "gives a dataclass": lambda: Call(Call(linear(), lambda m, x: Given(m.inner(x), "x")), lambda m, x: m.inner(x).value),
    "gives its input": lambda: Call(nn.Identity(), lambda m, x: y * 2 if (y := m.inner(x)) is x else x),
    "a branch without gradients": lambda: Call(linear(), lambda m, x: x + m.inner(x).detach()),
    "looks at numbers": lambda: Call(linear(), lambda m, x: x * float(m.inner(x.detach()).detach().float().numpy().mean() > 0) + m.inner(x)),
    "weight used without a call": lambda: Call(linear(), lambda m, x: nn.functional.linear(x, m.inner.weight)),
    "double backward inside": lambda: Call(
        linear(), lambda m, x: m.inner(x) * torch.autograd.grad(m.inner(x).sum(), m.inner.weight, create_graph=True)[0].mean()
    ),
}


class Net(nn.Module):
    def __init__(self, blocks) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*(BLOCKS[b]() for b in blocks)), nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.head(self.body(x)[:, -1])


# --- trainings ---


class Duck:
    """Acts like an optimizer, without its hooks."""

    def __init__(self, parameters) -> None:
        self.param_groups = [{"params": list(parameters)}]

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)

    def zero_grad(self, *, set_to_none=True):
        for p in self.param_groups[0]["params"]:
            p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p.grad)

    def state_dict(self):
        return {}


class Super(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "SGD by closure": lambda p: torch.optim.SGD(p, lr=0.05),
    "super": lambda p: Super(p, lr=0.05),
    "duck": Duck,
}
PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "autocast": torch.float32, "scaler": torch.float32}
EVENTS = (
    "nothing",
    "deepcopy",
    "save",
    "pickle",
    "evaluate",
    "forward fails",
    "backward fails",
    "unfreeze",
    "add",
    "double",
    "replace",
    "saliency",
    "no step",
    "reload",
)


@dataclasses.dataclass(frozen=True)
class Training:
    blocks: list[str]
    optimizer: str
    precision: str
    events: list[str]
    accumulate: int
    clip: float | None
    set_to_none: bool
    two: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Settings:
    every: int | None
    probe: int | None
    timesteps: object
    horizon: int | None
    explicit: bool
    losses: bool
    scaler: bool
    alerts: str
    again: bool


TRAININGS = st.builds(
    Training,
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    precision=st.sampled_from(sorted(PRECISIONS)),
    events=st.lists(st.sampled_from(EVENTS), min_size=4, max_size=6),
    accumulate=st.integers(1, 2),
    clip=st.sampled_from([None, 0.1]),
    set_to_none=st.booleans(),
    two=st.booleans(),
    seed=st.integers(0, 2**20),
)
SETTINGS = st.builds(
    Settings,
    every=st.sampled_from([None, 1, 2]),
    probe=st.sampled_from([None, 1, 1, 2]),
    timesteps=st.sampled_from(["auto", "auto", False, "body"]),
    horizon=st.sampled_from([None, None, 4]),
    explicit=st.booleans(),
    losses=st.booleans(),
    scaler=st.booleans(),
    alerts=st.sampled_from(["warn", "function", "fails"]),
    again=st.booleans(),
)


def fails(_alert):
    raise RuntimeError("a function of the user's")


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, _gradient):
        raise ArithmeticError("half of the way")


def watch(model, optimizers, how: Settings, scaler):
    timesteps = how.timesteps if how.timesteps != "body" else {"body": 1}
    return gradwatch.watch(
        model,
        optimizers,
        every_n_steps=how.every,
        probe_every_n_steps=how.probe,
        timesteps=timesteps,
        horizon=None if timesteps is False else how.horizon,
        scaler=scaler if how.scaler else None,
        on_alert={"warn": "warn", "function": lambda alert: None, "fails": fails}[how.alerts],
    )


def bits(tensor):
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    return str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def flat(value):
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return [(str(k), flat(v)) for k, v in value.items()]
    return [flat(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)


def happen(event, model, optimizers, x):  # noqa: C901, PLR0912  (a branch for each event)
    """Do what trainings do between steps."""
    if event == "deepcopy":
        copy.deepcopy(model)(x).sum().backward()
    elif event == "save":
        torch.save(model.state_dict(), io.BytesIO())
    elif event == "pickle":
        with contextlib.suppress(AttributeError, pickle.PicklingError):  # lambdas of this test's own
            pickle.dumps(model)
    elif event == "evaluate":
        model.eval()
        with torch.inference_mode():
            model(x)
        model.train()
    elif event == "forward fails":
        with contextlib.suppress(RuntimeError):
            model(x[..., :2])
    elif event == "backward fails":
        with contextlib.suppress(ArithmeticError):
            Broken.apply(model(x)).sum().backward()
    elif event == "unfreeze":
        model.requires_grad_(requires_grad=True)
    elif event == "add" and isinstance(optimizers[0], torch.optim.Optimizer) and not isinstance(optimizers[0], torch.optim.LBFGS):
        model.body.append(nn.Linear(WIDTH, WIDTH).to(x.dtype))
        optimizers[0].add_param_group({"params": list(model.body[-1].parameters())})
    elif event == "double" and x.dtype is torch.float32:
        model.double().float()
    elif event == "replace":
        old, model.head = model.head, nn.Linear(WIDTH, 1).to(x.dtype)
        fresh = {id(p): q for p, q in zip(old.parameters(), model.head.parameters(), strict=True)}
        for group in (g for o in optimizers for g in o.param_groups):
            group["params"][:] = [fresh.get(id(p), p) for p in group["params"]]
        for o, p in ((o, p) for o in optimizers for p in old.parameters()):
            getattr(o, "state", {}).pop(p, None)
    elif event == "saliency":
        leaf = x.clone().requires_grad_()
        with contextlib.suppress(RuntimeError):  # reentrant checkpoints allow none
            torch.autograd.grad(model(leaf).sum(), leaf, allow_unused=True)
    elif event == "reload":
        model.load_state_dict(copy.deepcopy(model.state_dict()))


def run(training: Training, how: Settings | None):  # noqa: C901, PLR0912  (a training has many forms, and this is all of them)
    """Train, watched or not; give every bit of what came of it."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(training.seed)
    dtype = PRECISIONS[training.precision]
    model = Net(training.blocks).to(dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = [parameters[:1], parameters[1:]] if training.two and len(parameters) > 1 and training.optimizer != "LBFGS" else [parameters]
    optimizers = [OPTIMIZERS[training.optimizer](part) for part in parts]
    closures = training.optimizer in {"LBFGS", "SGD by closure"}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if training.precision == "scaler" and not closures else None
    if isinstance(optimizers[0], Duck):
        scaler = None
    watcher = watch(model, optimizers, how, scaler) if how is not None else None
    trace = []
    for number, event in enumerate(training.events):
        batches = [torch.randn(ROWS, LENGTH, WIDTH, dtype=dtype) for _ in range(training.accumulate)]

        def backward(batches=batches):
            for o in optimizers:
                o.zero_grad(set_to_none=training.set_to_none)
            losses = []
            for x in batches:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.precision == "autocast"):
                    loss = model(x).square().mean()
                (scaler.scale(loss) if scaler is not None else loss).backward()
                losses.append(loss.detach())
            return torch.stack(losses).mean()

        happen(event, model, optimizers, batches[0])
        if how is not None and how.again and number == 2:
            watcher.close()
            watcher = watch(model, optimizers, how, scaler)
        if closures:
            trace += [bits(o.step(backward)) for o in optimizers]
        else:
            loss = backward()
            trace.append(bits(loss))
            if how is not None:
                if how.losses:
                    watcher.record(loss)
                if how.explicit:
                    watcher.step()
            for o in optimizers:
                if scaler is not None:
                    scaler.unscale_(o) if not (training.optimizer == "Adam, fused" and training.clip is None) else None
                if training.clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
                if event != "no step":
                    scaler.step(o) if scaler is not None else o.step()
            if scaler is not None and event != "no step":
                scaler.update()
        trace.append(bits(torch.get_rng_state()))
    if watcher is not None:
        watcher.close()
    hooks = [len(v) for k, v in sorted(vars(torch_modules).items()) if k.startswith("_global_") and hasattr(v, "__len__")]
    hooks += [len(v) for m in model.modules() for k, v in sorted(vars(m).items()) if k.endswith("_hooks") and hasattr(v, "__len__")]
    return {
        "losses and generators": trace,
        "parameters": flat(dict(model.state_dict())),
        "gradients": [bits(p.grad) for p in model.parameters()],
        "optimizers": [flat(o.state_dict()) for o in optimizers],
        "generators": [bits(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].tolist()],  # noqa: NPY002
        "modes": [m.training for m in model.modules()],
        "hooks": hooks,
    }


DRAWS = {"tried": 0, "compared": 0}


def both(training: Training, how: Settings) -> None:
    DRAWS["tried"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plainly = run(training, None)
        except (RuntimeError, ValueError, AssertionError):  # torch refuses some of what is drawn
            return
        warnings.filterwarnings("error", message=".*(measurement failed|switched off|could not be looked at).*", category=gradwatch.GradwatchWarning)
        watched = run(training, how)
    DRAWS["compared"] += 1
    for part, wanted in plainly.items():
        assert watched[part] == wanted, part


BUDGET = float(os.environ.get("GRADWATCH_DRAWS", "0"))


@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=100_000 if BUDGET else 120, deadline=None, derandomize=not BUDGET, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
@given(training=TRAININGS, how=SETTINGS)
def draw(training, how):
    if BUDGET and time.monotonic() > draw.until:
        return
    both(training, how)


@pytest.mark.filterwarnings("ignore")
def test_no_drawn_training_differs_by_a_bit_where_it_is_watched():
    draw.until = time.monotonic() + BUDGET
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        draw()
    finally:
        torch.set_num_threads(threads)
        gc.collect()
    print(f"{DRAWS['tried']} trainings drawn, {DRAWS['compared']} compared")  # noqa: T201  (the figure that a long run is for)
    assert DRAWS["compared"] > DRAWS["tried"] / 2  # else the draws are too wild to say anything
