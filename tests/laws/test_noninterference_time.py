"""Gradients through time at every step change no bit of training.

They leave nothing behind in what is saved or copied, nor where a step has failed.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import logging
import pickle
import random
import subprocess
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from interpreters import warm
from models import Loop
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from truth import bits

from gradwatch import Thresholds, detectors, watch
from gradwatch.timesteps.model_calls import ModelCalls
from gradwatch.timesteps.recorder import Recorder
from gradwatch.values import sequences

STEPS = 6
T, B, IN, H = 7, 5, 4, 6
NEED = 5


def draw():
    """Draw from the three generators of the process, so that one more draw by anybody changes everything after it."""
    return random.random() + float(np.random.rand())  # noqa: NPY002  (the generator of the whole process)


def begin():
    """Seed them."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the generator of the whole process)
    torch.manual_seed(0)


# --- models ---


class Fused(nn.Module):
    """A recurrent network and a readout of its last timestep, or of all of them."""

    def __init__(self, kind=nn.LSTM, *, every=False, **options):
        super().__init__()
        self.rnn = kind(IN, H, **options)
        self.head = nn.Linear((options.get("proj_size") or H) * (1 + options.get("bidirectional", False)), 2)
        self.every = every

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.head(y if self.every else y[-1])


class Softened(Fused):
    """Drops entries of its input, and draws from numpy and Python as it runs."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return super().forward(self.drop(x)) + draw()


class Hooked(Fused):
    """Has user hooks that edit the input in place and read it as an array: a leaf with a gradient allows neither."""

    def __init__(self):
        super().__init__()
        self.read = 0.0
        self.rnn.register_forward_pre_hook(self.edit)
        self.rnn.register_forward_hook(self.note)

    @staticmethod
    def edit(_module, args):
        args[0].mul_(0.9)

    def note(self, _module, args, _output):
        self.read = float(args[0].numpy().sum())


class Packed(nn.Module):
    def __init__(self, kind, *, ordered, **options):
        super().__init__()
        self.rnn, self.head, self.ordered = (
            kind(IN, H, **options),
            nn.Linear(H * (1 + options.get("bidirectional", False)), 2),
            ordered,
        )

    def forward(self, x):
        lengths = [T, T - 1, 4, 2, 1] if self.ordered else [4, T, 1, T - 1, 2]
        y, _ = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=self.ordered))
        return self.head(pad_packed_sequence(y)[0])


class OwnCell(nn.Module):
    """An LSTM cell written by hand."""

    def __init__(self, inputs, size):
        super().__init__()
        self.gates = nn.Linear(inputs + size, 4 * size)

    def forward(self, x, state):
        h, c = (x.new_zeros(len(x), H),) * 2 if state is None else state
        i, f, g, o = self.gates(torch.cat([x, h.to(x.dtype)], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class LinearCell(nn.Module):
    def __init__(self, inputs, size):
        super().__init__()
        self.linear = nn.Linear(inputs + size, size)

    def forward(self, x, h):
        return self.linear(torch.cat([x, x.new_zeros(len(x), H) if h is None else h.to(x.dtype)], 1)).tanh()


class Stepwise(nn.Module):
    """Calls a fused network with one timestep at a time."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(IN, H), nn.Linear(H, 2)

    def forward(self, x):
        state = None
        for now in x:
            y, state = self.rnn(now.unsqueeze(0), state)
        return self.head(y[-1])


class Stateful(nn.Module):
    """Carries its hidden state from batch to batch."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head, self.state = nn.LSTM(IN, H), nn.Linear(H, 2), None

    def forward(self, x):
        y, state = self.rnn(x, self.state)
        self.state = tuple(s.detach() for s in state)
        return self.head(y[-1])


class Pooled(nn.Module):
    """Embeds words, reads them, and attends to what it has read."""

    def __init__(self):
        super().__init__()
        self.words, self.rnn = nn.Embedding(11, IN), nn.LSTM(IN, H, batch_first=True)
        self.score, self.head = nn.Linear(H, 1), nn.Linear(H, 2)

    def forward(self, words):
        y, _ = self.rnn(self.words(words))
        return self.head((self.score(y).softmax(1) * y).sum(1))


class Encoder(nn.Module):
    """A Transformer encoder after a projection, or on the input as it is."""

    def __init__(self, *, embedded):
        super().__init__()
        width = 8 if embedded else IN
        self.embed = nn.Linear(IN, width) if embedded else nn.Identity()
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.2, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.transpose(0, 1)))[:, -1])


class Convolutions(nn.Module):
    """A temporal convolution with BatchNorm and activations in place."""

    def __init__(self):
        super().__init__()
        layers = [
            m
            for d, i in ((1, IN), (2, H))
            for m in (nn.Conv1d(i, H, 3, dilation=d, padding=d), nn.BatchNorm1d(H), nn.ReLU(inplace=True))
        ]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(H, 2)

    def forward(self, x):
        return self.head(self.body(x.permute(1, 2, 0))[..., -1])


class CheckpointedLayer(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.embed, self.rnn, self.head, self.reentrant = (
            nn.Linear(IN, IN),
            nn.LSTM(IN, H, 2, dropout=0.3),
            nn.Linear(H, 2),
            reentrant,
        )

    def forward(self, x):
        x = self.embed(x) if self.reentrant else x  # the reentrant kind wants an input that has a gradient
        return self.head(checkpoint(lambda x: self.rnn(x)[0], x, use_reentrant=self.reentrant)[-1])


class CheckpointedCells(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.embed, self.cell, self.head, self.reentrant = (
            nn.Linear(IN, IN),
            nn.GRUCell(IN, H),
            nn.Linear(H, 2),
            reentrant,
        )

    def forward(self, x):
        x = self.embed(x) if self.reentrant else x
        h = x.new_zeros(x.shape[1], H)
        for now in x:
            h = checkpoint(self.cell, now, h, use_reentrant=self.reentrant)
        return self.head(h)


class CutOff(nn.Module):
    """Checkpoints, in the reentrant way, a layer whose input has no gradient: it learns nothing, and must not begin."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(IN, H), nn.Linear(H, H)

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=True).tanh())


class Keeping(nn.Module):
    """Keeps its input, to look at it later in a way that only a tensor without a gradient allows."""

    def __init__(self):
        super().__init__()
        self.first, self.input = nn.Linear(IN, H), torch.zeros(1)

    def forward(self, x):
        mean = float(self.input.numpy().mean())
        self.input = x
        return self.first(x) + mean


class Editing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(IN, H)

    def forward(self, x):
        return self.first(x.mul_(0.5))


class Around(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(H, 2)

    def forward(self, x):
        return self.head(self.body(x)[-1])


def normed():
    model = Fused()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrizations.weight_norm(model.rnn, name)
    return model


class Frozen(Fused):
    """Trains only its readout, on what the network gives: that has no gradient, and must not get one."""

    def __init__(self):
        super().__init__()
        self.rnn.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.head(torch.from_numpy(self.rnn(x)[0].float().numpy().copy())[-1])


# --- loops ---


def numbers():
    return torch.randn(T, B, IN) + draw()


def words():
    return torch.randint(11, (B, T)) + int(2 * draw()) % 2 * 0


def autocast(low):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=low)


def lossy(model, data, low):
    with autocast(low):
        return model(data()).float().square().mean()


def plain(model, optimizers, look, data, low):
    optimizers[0].zero_grad()
    loss = lossy(model, data, low)
    loss.backward()
    look(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizers[0].step()
    return loss


def accumulated(model, optimizers, look, data, low):
    optimizers[0].zero_grad()
    losses = [lossy(model, data, low) / 3 for _ in range(2)]
    for loss in losses:
        loss.backward()
    losses.append(lossy(model, data, low) / 3)
    losses[-1].backward()
    look(sum(losses))
    optimizers[0].step()
    return sum(losses)


def by_turns(model, optimizers, look, data, low):
    """Step two optimizers, the second after a validation."""
    losses = []
    for optimizer in optimizers:
        optimizer.zero_grad()
        losses.append(lossy(model, data, low))
        losses[-1].backward()
        look(losses[-1], optimizer)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            losses.append(lossy(model, data, low))
        model.train()
    return torch.stack(losses)


def by_closure(model, optimizers, look, data, low):
    x = data()

    def closure():
        optimizers[0].zero_grad()
        loss = lossy(model, lambda: x, low)
        loss.backward()
        look(loss)
        return loss

    return optimizers[0].step(closure)


def penalized(model, optimizers, look, data, low):
    """Punish the slope of the loss by its input: a backward pass through a backward pass."""
    optimizers[0].zero_grad()
    x = data().requires_grad_()
    loss = lossy(model, lambda: x, low)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    loss = loss + slope.square().sum()
    loss.backward()
    look(loss)
    optimizers[0].step()
    return loss


def scaled():
    scaler, calls = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2), []

    def step(model, optimizers, look, data, low):
        optimizers[0].zero_grad()
        calls.append(None)
        with autocast(low):  # the CPU has no recurrent networks in float16
            loss = model(data()).float().square().mean() * (float("inf") if len(calls) == 3 else 1.0)
        scaler.scale(loss).backward()
        look(loss)
        scaler.step(optimizers[0])
        scaler.update()
        return loss

    return step


def adam(model):
    return [torch.optim.Adam(model.parameters(), lr=0.01)]


def sgd(model):
    return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]


def fused_adamw(model):
    return [torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)]


def lbfgs(model):
    return [torch.optim.LBFGS(model.parameters(), max_iter=3)]


def two(model):
    return [torch.optim.Adam(model.rnn.parameters(), lr=0.01), torch.optim.SGD(model.head.parameters(), lr=0.1)]


@dataclasses.dataclass
class Kind:
    """A model, how it is trained, and what a probe must have seen of it."""

    model: Callable[[], nn.Module]
    seen: set[str] = dataclasses.field(default_factory=lambda: {"rnn"})
    """Modules whose input must have had a gradient at the last probe."""
    hidden: bool = True
    """Whether there must be a series of the hidden states too."""
    timesteps: Any = "auto"
    optimizers: Callable[[nn.Module], list[Any]] = adam
    step: Callable[[], Callable[..., torch.Tensor]] = lambda: plain
    data: Callable[[], torch.Tensor] = numbers
    said: str = ""
    """What a note must say."""
    refused: str = ""
    """Why the model's own horizon cannot be measured."""

    @property
    def needs(self):
        """Return a need for each of its modules that a probe sees, and one of its readout."""
        return dict.fromkeys([*self.seen, "head"], 3)


CELL = {"cell": None}
KINDS = {
    "lstm": Kind(Fused),
    "lstm many to many": Kind(lambda: Fused(every=True), optimizers=sgd),
    "lstm of two layers, both directions, dropout": Kind(lambda: Fused(num_layers=2, bidirectional=True, dropout=0.4)),
    "lstm projected": Kind(lambda: Fused(num_layers=2, proj_size=3), optimizers=fused_adamw),
    "lstm after dropout, draws in its forward": Kind(Softened),
    "lstm with weight norm": Kind(normed),
    "lstm frozen": Kind(Frozen, seen=set(), refused="numpy"),
    "lstm with hooks of its user": Kind(Hooked),
    "lstm once a timestep": Kind(Stepwise),
    "lstm that keeps its state": Kind(Stateful),
    "lstm on words, attention": Kind(Pooled, data=words),
    "gru": Kind(lambda: Fused(nn.GRU), optimizers=sgd),
    "gru of two layers, dropout": Kind(
        lambda: Fused(nn.GRU, num_layers=2, dropout=0.4, every=True), optimizers=fused_adamw
    ),
    "rnn tanh": Kind(lambda: Fused(nn.RNN)),
    "rnn relu": Kind(lambda: Fused(nn.RNN, nonlinearity="relu", bias=False)),
    "lstm packed": Kind(lambda: Packed(nn.LSTM, ordered=True)),
    "lstm packed, unsorted, dropout": Kind(
        lambda: Packed(nn.LSTM, ordered=False, num_layers=2, dropout=0.4, bidirectional=True)
    ),
    "gru packed": Kind(lambda: Packed(nn.GRU, ordered=True, num_layers=2, dropout=0.4)),
    "gru packed, unsorted": Kind(lambda: Packed(nn.GRU, ordered=False)),
    "lstm cells": Kind(lambda: Loop(nn.LSTMCell, IN, H), seen={"cell"}),
    "gru cells": Kind(lambda: Loop(nn.GRUCell, IN, H), seen={"cell"}),
    "rnn cells": Kind(lambda: Loop(nn.RNNCell, IN, H), seen={"cell"}, optimizers=sgd),
    "own cells": Kind(lambda: Loop(OwnCell, IN, H), seen={"cell"}, timesteps=CELL),
    "a linear layer in a loop": Kind(
        lambda: Loop(LinearCell, IN, H), seen={"cell", "cell.linear"}, timesteps=CELL | {"cell.linear": None}
    ),
    "transformer embedded": Kind(
        lambda: Encoder(embedded=True), seen={"encoder"}, hidden=False, timesteps={"encoder": 1}
    ),
    "transformer on the input": Kind(
        lambda: Encoder(embedded=False), seen={"encoder", ""}, hidden=False, timesteps={"encoder": 1, "": 0}
    ),
    "convolutions in place": Kind(Convolutions, seen={"body"}, hidden=False, timesteps={"body": 2}, optimizers=sgd),
    "checkpoint around the layer": Kind(lambda: CheckpointedLayer(reentrant=False)),
    "checkpoint reentrant around the layer": Kind(lambda: CheckpointedLayer(reentrant=True), refused="reentrant"),
    "checkpoint around each cell": Kind(lambda: CheckpointedCells(reentrant=False), seen={"cell"}),
    "checkpoint reentrant around each cell": Kind(
        lambda: CheckpointedCells(reentrant=True),
        seen=set(),
        hidden=False,
        said="single timesteps",
        refused="reentrant",
    ),
    "checkpoint reentrant that cuts off": Kind(
        lambda: Around(CutOff()),
        seen=set(),
        hidden=False,
        timesteps={"body": 0},
        said="train differently",
        refused="reentrant",
    ),
    "a body that keeps its input": Kind(
        lambda: Around(Keeping()), seen=set(), hidden=False, timesteps={"body": 0}, said="train differently"
    ),
    "a body that edits its input": Kind(
        lambda: Around(Editing()), seen=set(), hidden=False, timesteps={"body": 0}, said="train differently"
    ),
    "accumulated gradients": Kind(lambda: Fused(num_layers=2, dropout=0.4), step=lambda: accumulated),
    "two optimizers and a validation": Kind(
        lambda: Fused(num_layers=2, dropout=0.4), step=lambda: by_turns, optimizers=two
    ),
    "lbfgs": Kind(lambda: Fused(num_layers=2, dropout=0.4), step=lambda: by_closure, optimizers=lbfgs),
    "gradient penalty": Kind(lambda: Loop(nn.GRUCell, IN, H), seen={"cell"}, hidden=False, step=lambda: penalized),
    "scaler": Kind(Fused, step=scaled, optimizers=sgd),
}


def kept_by(module):
    """Return what a module keeps as attributes of its own: tensors, numbers, names of the rest."""
    return {
        k: v if isinstance(v, torch.Tensor | tuple | int | float) else str(type(v))
        for k, v in vars(module).items()
        if not k.startswith("_")
    }


def trained(name, low, *, explicit=False, **options):
    """Train from fixed seeds; give every bit of what came of it, and what was seen."""
    begin()
    kind = KINDS[name]
    model = kind.model()
    optimizers, step = kind.optimizers(model), kind.step()
    reports = []
    watcher = None
    if options:
        watcher = watch(
            model,
            optimizers,
            every_n_steps=1,
            probe_every_n_steps=1,
            sinks=[reports.append],
            on_alert=lambda _: None,
            **options,
        )

    def look(loss, optimizer=None):
        if watcher is not None and explicit:
            watcher.step(loss=loss, optimizer=optimizer)

    states = []
    for _ in range(STEPS):
        loss = step(model, optimizers, look, kind.data, low)
        states.append((loss, torch.get_rng_state(), list(np.random.get_state()), repr(random.getstate())))  # noqa: NPY002
    result = bits(
        {
            "losses and random states": states,
            "parameters and buffers": dict(model.state_dict()),
            "gradients": {n: p.grad for n, p in model.named_parameters()},
            "optimizers": [o.state_dict() for o in optimizers],
            "modes": [m.training for m in model.modules()],
            "attributes": [kept_by(m) for m in model.modules()],
        }
    )
    if watcher is not None:
        watcher.close()
    return result, [r.snapshot for r in reports]


def unperturbed(name, low, *, combinations, caplog, **options):
    """Compare a training with what it is when it is watched, and make sure that it was."""
    caplog.set_level(logging.WARNING, "gradwatch")
    alone, _ = trained(name, low)
    kind = KINDS[name]
    for explicit, horizon in combinations:
        watched, snapshots = trained(name, low, explicit=explicit, timesteps=kind.timesteps, horizon=horizon, **options)
        for (part, mine), (_, theirs) in zip(watched, alone, strict=True):
            assert mine == theirs, f"{part} differ {'in the explicit form ' * explicit}with horizon={horizon}"
        seen = [s.sequences for s in snapshots if s.sequences]
        assert len(seen) >= STEPS - 2  # not the first step, nor one that a scaler skips
        sequences = [one for step in seen[-2 if kind.optimizers is two else -1 :] for one in step]
        assert kind.seen <= {s.module for s in sequences if s.grad_input is not None}, sequences
        assert kind.hidden is any(s.grad_hidden is not None for s in sequences), sequences
        assert any(kind.said in (s.note or "") for s in sequences), sequences
        if isinstance(horizon, int):
            for own in (s for s in sequences if s.part == "model"):
                assert bool(own.lag_gain) is not bool(kind.refused), own.note
                assert kind.refused in (own.note or ""), own.note
            assert any(s.part == "model" for s in sequences)
    assert not caplog.records  # nothing failed quietly


quiet = pytest.mark.filterwarnings(
    "ignore:LSTM with projections:UserWarning", "ignore:None of the inputs have requires_grad=True:UserWarning"
)
NORMAL = [(False, None), (True, NEED)]
"""Of the explicit form and the horizon, what every run of the tests sees."""


@quiet
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_not_one_bit_of_training_changes(name, low, caplog):
    unperturbed(name, low, combinations=NORMAL, caplog=caplog)


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_not_one_bit_of_training_changes_in_any_combination_with_files_written(name, low, caplog, tmp_path):
    every = [(explicit, horizon) for explicit in (False, True) for horizon in (None, NEED, KINDS[name].needs)]
    unperturbed(name, low, combinations=every, caplog=caplog, logdir=tmp_path)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.one, self.other = (
            nn.GRU(IN, H),
            nn.Linear(H, 2),
            nn.Linear(H, 2),
        )  # which saves more where its input has a gradient


def test_a_probe_that_begins_between_a_forward_pass_and_the_backward_pass_that_repeats_it_changes_nothing():
    def losses(*, watched):
        torch.manual_seed(0)
        model = TwoHeads()
        first = torch.optim.SGD(model.one.parameters(), lr=0.1)
        second = torch.optim.SGD([*model.rnn.parameters(), *model.other.parameters()], lr=0.1)
        watcher = watch(model, [first, second], probe_every_n_steps=1, sinks=[reports.append]) if watched else None
        found = []
        for _ in range(STEPS):
            x = torch.randn(T, B, IN)
            last = [checkpoint(lambda x: model.rnn(x)[0][-1], x, use_reentrant=False) for _ in range(2)]
            one, other = model.one(last[0].detach()).square().mean(), model.other(last[1]).square().mean()
            one.backward()
            first.step()  # after this step its next one, a probe, begins
            other.backward()
            second.step()
            first.zero_grad()
            second.zero_grad()
            found += [one.item(), other.item()]
        if watcher is not None:
            watcher.close()
        return found

    reports = []
    assert losses(watched=True) == losses(watched=False)
    assert len(reports) == 2 * STEPS


# --- what is saved and copied while a probe is under way ---


def moments(name, seconds, **options):
    """Train a watched model, and stop at every moment of its steps in which somebody may look at it."""
    kind = KINDS[name]
    model = kind.model()
    (optimizer,), step = kind.optimizers(model), 0
    watcher = watch(
        model,
        optimizer,
        every_n_steps=1,
        probe_every_n_steps=1,
        on_alert=lambda _: None,
        timesteps=kind.timesteps,
        **options,
    )
    while step < seconds:
        optimizer.zero_grad()
        yield "between two steps", model, watcher
        loss = model(kind.data()).square().mean()
        yield "before the backward pass", model, watcher
        loss.backward()
        yield "before the step", model, watcher
        optimizer.step()
        step += 1
    watcher.close()


def hooks_of(model):
    """Count what hangs on the modules and parameters of a model, and on all modules."""
    tables = [
        t
        for m in model.modules()
        for k, t in vars(m).items()
        if k.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called")) and t
    ]
    tables += [
        t
        for p in [*model.parameters(), *model.buffers()]
        for t in (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
        if t
    ]
    return sum(map(len, tables))


def everywhere():
    return {k: len(v) for k, v in vars(torch_modules).items() if k.startswith("_global") and hasattr(v, "__len__")}


SAVED = [
    "lstm that keeps its state",
    "gru packed",
    "lstm cells",
    "own cells",
    "transformer on the input",
    "convolutions in place",
]


@pytest.mark.parametrize("horizon", [None, NEED])
@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_or_copied_at_any_moment_carries_nothing_of_gradwatch(name, horizon):
    looked = set()
    for moment, model, _ in moments(name, 3, horizon=horizon):
        looked.add((moment, bool(torch_modules._global_forward_hooks)))
        assert hooks_of(model) == 0, moment
        saved = io.BytesIO()
        torch.save(model, saved)
        pickled = pickle.dumps(model)
        twin, averaged = copy.deepcopy(model), AveragedModel(model)
        averaged.update_parameters(model)
        for written in (saved.getvalue(), pickled, pickle.dumps(twin), pickle.dumps(averaged)):
            assert b"gradwatch" not in written, moment
        assert hooks_of(twin) == hooks_of(averaged) == 0, moment
    assert looked == {  # the first step is never a probe, and the first moment is between it and the construction
        ("between two steps", False),
        ("before the backward pass", False),
        ("before the step", False),
        ("between two steps", True),
        ("before the backward pass", True),
        ("before the step", True),
    }


class Remembering(Fused):
    """Keeps what it has seen and given as attributes."""

    def __init__(self, *, embeds):
        super().__init__()
        self.embed = nn.Linear(IN, IN) if embeds else nn.Identity()

    def forward(self, x):
        self.seen = self.embed(x)
        self.given, self.state = self.rnn(self.seen)
        return self.head(self.given[-1])


@pytest.mark.parametrize("embeds", [False, True])
def test_a_model_that_keeps_its_activations_can_be_saved_without_a_warning_and_keeps_none_of_our_hooks(embeds):
    model = Remembering(embeds=embeds)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = watch(model, optimizer, probe_every_n_steps=1)
    for _ in range(3):
        optimizer.zero_grad()
        x = numbers()
        loss = model(x).square().mean()
        saved = io.BytesIO()
        torch.save(model, saved)  # a warning would be an error here
        assert b"gradwatch" not in saved.getvalue()
        loss.backward()
        assert (model.seen is x) is not embeds
        assert not x.requires_grad
        optimizer.step()
        assert not any(t._backward_hooks for t in kept_of(model))
    loss = model(numbers()).square().mean()
    assert ours()
    watcher.close()  # between the two passes
    assert not ours()
    loss.backward()


def kept_of(model):
    return [model.seen, model.given, *model.state]


def ours():
    """Return the functions of gradwatch that were made while a forward pass ran: hooks on its tensors."""
    return [
        f
        for f in gc.get_objects()
        if type(f) is types.FunctionType
        and f.__module__ == "gradwatch.timesteps.recorder"
        and "<locals>" in f.__qualname__
    ]


def scripted(model):
    x = torch.randn(T, 2, IN)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    slopes = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    return [torch.jit.script(model)(x), torch.jit.trace(model, x)(x), *slopes.values()]


def mapped(model):
    x = torch.randn(T, 2, 1, IN)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    every = torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x,)).square().sum()), (None, 1)
    )(parameters, x)
    with torch.inference_mode():
        inferred = model(x[:, 0]).clone()
    return [
        torch.func.vmap(model, 1)(x),
        torch.func.jacrev(model)(x[:, 0]),
        torch.func.jvp(model, (x[:, 0],), (x[:, 1],))[1],
        inferred,
        *every.values(),
    ]


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "made", "horizon"),
    [("lstm many to many", scripted, NEED), ("own cells", mapped, None), ("own cells", mapped, NEED)],
)
def test_scripts_traces_and_transforms_made_at_any_moment_are_what_they_are_without_gradwatch(
    name, made, horizon, caplog
):
    for moment, model, _ in moments(name, 3, horizon=horizon):
        seed = torch.get_rng_state()
        results = made(model)
        with pytest.MonkeyPatch.context() as patch:
            for table in ("_global_forward_hooks", "_global_forward_pre_hooks"):
                patch.setattr(torch_modules, table, OrderedDict())
            torch.set_rng_state(seed)
            assert all(map(torch.equal, results, made(model))), moment
    assert not caplog.records


NETS = """
import torch
from torch import nn

class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head, self.state = nn.LSTMCell(4, 6), nn.Linear(6, 2), None

    def forward(self, x):
        state = self.state
        for now in x:
            state = self.cell(now, state)
        self.state = tuple(s.detach() for s in state)
        return self.head(state[0])

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        self.given = self.encoder(x)
        return self.given
"""

LOAD = """
import pickle, sys
sys.modules["gradwatch"] = None
sys.path.insert(0, sys.argv[1])
import torch
for name in sys.argv[2:]:
    try:
        model = torch.load(name, weights_only=False)
    except ModuleNotFoundError as error:
        print("refused")
        continue
    print(model(torch.ones(3, 2, 4)).double().sum().item())
"""


def test_what_is_saved_within_a_probe_loads_where_gradwatch_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "nets_of_a_user.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import nets_of_a_user

    files, truths = [], []
    for make, timesteps in ((nets_of_a_user.Cells, "auto"), (nets_of_a_user.Encoder, {"encoder": 1})):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, probe_every_n_steps=1, timesteps=timesteps, horizon=2):
            for step in range(3):
                optimizer.zero_grad()
                loss = model(torch.randn(3, 2, 4)).square().mean()
                loss.backward()
                files.append(tmp_path / f"{make.__name__}{step}.pt")
                torch.save(model, files[-1])
                truths.append(copy_of(model)(torch.ones(3, 2, 4)).double().sum().item())
                optimizer.step()
    del sys.modules["nets_of_a_user"]
    files.append(tmp_path / "ours.pt")  # so that this test can fail
    torch.save(Thresholds(), files[-1])
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    done = subprocess.run(
        [*warm(), str(script), str(tmp_path), *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert lines.pop() == "refused"
    assert list(map(float, lines)) == pytest.approx(truths)


def copy_of(model):
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


# --- what is left behind: nothing ---


@pytest.mark.parametrize(
    ("name", "horizon"),
    [
        ("lstm", None),
        ("gru packed, unsorted", NEED),
        ("lstm cells", {"head": 1}),
        ("own cells", NEED),
        ("transformer on the input", {"encoder": 3}),
        ("checkpoint reentrant around the layer", None),
    ],
)
def test_closing_at_any_moment_leaves_nothing_behind(name, horizon):
    before = everywhere()
    for number in (0, 1, 3, 4, 5, 7):
        training = moments(name, 3, horizon=horizon)
        for _ in range(number + 1):
            _, model, watcher = next(training)
        assert (everywhere() != before) is (number >= 3)
        watcher.close()
        assert everywhere() == before
        assert hooks_of(model) == 0
        gone = weakref.ref(model)
        del model
        training.close()
        del training
        assert gone() is None  # the watcher is still here


@pytest.mark.parametrize("horizon", [None, NEED, {"rnn": 3, "head": 1}])
def test_a_watcher_that_is_kept_keeps_nothing_of_the_model_at_any_moment(horizon):
    before = everywhere()
    for number in range(9):
        training = moments("lstm", 3, horizon=horizon)
        for _ in range(number + 1):
            _, model, watcher = next(training)
        gone = [weakref.ref(m) for m in model.modules()]
        del model
        gc.disable()
        try:
            training.close()  # which drops the model and its optimizer, and closes nothing
            assert [ref() for ref in gone] == [None] * len(gone)
        finally:
            gc.enable()
        watcher.close()
        assert everywhere() == before


def things():
    """Count the objects of the process, and the tensors among them, beside what is remembered up to a bound."""
    for remembered in (sequences._remembered, detectors.time._growth):
        remembered.cache_clear()
    every = gc.get_objects()
    return len(every), sum(issubclass(type(o), torch.Tensor) for o in every)


def growth(name, steps, *, watched=True, settle=60, **options):
    """Return how many objects and tensors a training leaves behind, with nobody to collect cycles."""
    begin()
    kind = KINDS[name]
    model = kind.model()
    optimizers, step = kind.optimizers(model), kind.step()
    if watched:
        watcher = watch(
            model,
            optimizers,
            every_n_steps=1,
            probe_every_n_steps=1,
            on_alert=lambda _: None,
            timesteps=kind.timesteps,
            **options,
        )

    def train(count):
        for _ in range(count):
            step(model, optimizers, lambda *_: None, kind.data, False)
        return things()

    gc.collect()
    gc.disable()
    try:
        first = train(settle)  # from here on the history forgets as much as it learns
        second = train(steps)
    finally:
        gc.enable()
    if watched:
        watcher.close()
    return tuple(b - a for a, b in zip(first, second, strict=True))


def grows(name, steps, horizon, settle=60):
    """Compare what is left behind with what torch itself leaves.

    A checkpoint makes cycles, in the model's own pass too, and LBFGS keeps a history.
    """
    objects, tensors = growth(name, steps, watched=False, settle=settle)
    more_objects, more_tensors = growth(name, steps, horizon=horizon, settle=settle)
    return more_tensors > max(tensors, 0) or more_objects - (1 + (horizon is not None)) * max(objects, 0) > steps / 2


@pytest.mark.parametrize(
    ("name", "horizon"),
    [("lstm cells", NEED), ("gru packed", {"head": 1}), ("checkpoint reentrant around the layer", NEED)],
)
def test_nothing_grows_from_probe_to_probe_even_if_nobody_collects_cycles(name, horizon):
    assert not grows(name, 40, horizon)


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("name", KINDS)
def test_nothing_grows_from_probe_to_probe_in_any_kind_of_training(name):
    assert not grows(
        name, 70, NEED, settle=170
    )  # of layers that begin to look ill on the way, more is measured from there on


class Witness(torch.autograd.Function):
    """Lives as long as the graph that it is in."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.witness = type("Thing", (), {})()
        Witness.alive.add(ctx.witness)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("horizon", [None, NEED, {"rnn": 2, "head": 1}])
@pytest.mark.parametrize("within", [True, False], ids=["armed", "not armed"])
def test_a_forward_pass_without_a_backward_pass_does_not_keep_its_graph(horizon, within):
    model = Fused(num_layers=2)
    front = nn.Linear(IN, IN)
    optimizer = torch.optim.SGD([*front.parameters(), *model.parameters()], lr=0.1)
    watcher = watch(model, optimizer, probe_every_n_steps=1 if within else 1000, horizon=horizon)
    for _ in range(2):
        model(front(numbers())).sum().backward()
        optimizer.step()
    assert bool(torch_modules._global_forward_hooks) is within
    gc.disable()
    try:
        output = model(Witness.apply(front(numbers())))
        assert len(Witness.alive) == 1
        del output
        assert len(Witness.alive) == 0
    finally:
        gc.enable()
        watcher.close()


class Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError


class Failing(nn.Module):
    """A recurrent network after which something breaks when it is told to."""

    def __init__(self):
        super().__init__()
        self.rnn, self.cell, self.head, self.breaks = nn.LSTM(IN, H), nn.GRUCell(H, H), nn.Linear(H, 2), ""

    def forward(self, x):
        y, h = self.rnn(Witness.apply(x))[0], None
        for k, now in enumerate(y):
            if self.breaks == "forward" and k == 3:
                raise ArithmeticError
            h = self.cell(Refuses.apply(now) if self.breaks == "backward" and k == 3 else now, h)
        return self.head(h)


class Stumbling(torch.optim.SGD):
    breaks = False

    def step(self, closure=None):
        if self.breaks:
            raise ArithmeticError
        return super().step(closure)


def stumbled(where, **options):
    """Train for eight steps, of which two break off."""
    begin()
    model = Failing()
    optimizer = Stumbling(model.parameters(), lr=0.1)
    reports, watcher = [], None
    if options:
        watcher = watch(
            model,
            optimizer,
            every_n_steps=1,
            probe_every_n_steps=1,
            sinks=[reports.append],
            on_alert=lambda _: None,
            **options,
        )
    losses, raised = [], 0
    for k in range(8):
        model.breaks, optimizer.breaks = (where, where == "optimizer") if k in (3, 4) else ("", False)
        try:
            optimizer.zero_grad()
            loss = model(numbers()).square().mean()
            losses.append(loss)
            loss.backward()
            optimizer.step()
        except ArithmeticError:
            raised += 1
    assert raised == 2
    kept = bits({"losses": losses, "weights": dict(model.state_dict()), "random state": torch.get_rng_state()})
    return kept, [r.snapshot for r in reports], watcher, model


@pytest.mark.parametrize("horizon", [None, NEED])
@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_a_step_that_breaks_off_changes_nothing_leaves_nothing_and_the_next_is_whole(where, horizon, caplog):
    caplog.set_level(logging.WARNING, "gradwatch")
    before = everywhere()
    alone, *_ = stumbled(where)
    watched, snapshots, watcher, model = stumbled(where, timesteps="auto", horizon=horizon)
    assert watched == alone
    assert len(snapshots) == 6
    last = {s.module: s for s in snapshots[-1].sequences if not s.part}
    assert last.keys() == {"rnn", "cell"}
    assert all(
        s.length == T and s.grad_input is not None and s.lag_gain is not None and s.note is None for s in last.values()
    )
    if horizon:
        assert next(s for s in snapshots[-1].sequences if s.part == "model").lag_gain
    assert not caplog.records
    watcher.close()
    assert everywhere() == before
    assert hooks_of(model) == 0
    assert len(Witness.alive) == 0


@pytest.mark.parametrize("place", ["entered", "left", "_arrived", "clear"])
def test_a_failure_of_our_own_in_a_hook_changes_nothing_and_leaves_nothing(place, monkeypatch):
    alone, _ = trained("lstm cells", False)
    before = everywhere()
    calls = []

    def broken(*_, **__):
        calls.append(place)
        raise RuntimeError(place)

    if place != "clear":
        monkeypatch.setattr(Recorder, place, broken)
    else:
        monkeypatch.setattr(ModelCalls, "entered", broken)
    watched, snapshots = trained("lstm cells", False, horizon=NEED)
    assert calls
    assert watched == alone
    assert len(snapshots) == STEPS
    assert everywhere() == before
