"""A pass through a model leaves nothing behind, and its hooks are not called.

Bits of all that modules hold, random states, gradients and modes stay as they were.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import random
import subprocess
import sys
import types
import weakref
from collections import deque
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from truth import bits, cotangent

import gradwatch
from gradwatch.model.rerun import as_it_was, without_hooks
from gradwatch.timesteps.model_pass import model_gain


@dataclasses.dataclass
class Cache:
    keys: list


class State(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor


class Busy(nn.Module):
    """Changes all that a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(3, 4, 2, batch_first=True, dropout=0.5)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.momentum = nn.Linear(4, 8).requires_grad_(False)
        self.moved = nn.Linear(4, 8).requires_grad_(False)
        self.hidden = None
        self.state = State(torch.zeros(4), torch.zeros(4))
        self.deep = {"layers": [(torch.zeros(2), {"k": torch.zeros(2)})], "count": 0}
        self.cache = Cache([torch.zeros(2)])
        self.log, self.recent, self.kinds = [], deque(maxlen=3), {"a"}
        self.teacher = [nn.BatchNorm1d(4)]  # in a list, so that its weights are no parameters of this module
        self.generator, self.dice = torch.Generator().manual_seed(1), random.Random(1)
        self.rng = np.random.default_rng(1)
        self.calls = 0
        self.carried = torch.zeros(2, 1, 4)
        self.register_buffer("seen", torch.tensor([0.0, -0.0, torch.nan]))
        self.register_buffer("links", torch.eye(4).to_sparse())
        self.register_buffer("places", torch.arange(4).expand(2, 4))
        self.fail = False

    def forward(self, x):
        state = self.carried.repeat(1, len(x), 1)
        out = self.body(self.memory(x, (state, state))[0][:, -1])
        with torch.no_grad():
            self.momentum.weight.mul_(0.9).add_(self.body[0].weight, alpha=0.1)
            self.moved.weight.data = self.moved.weight.data * 0.9 + self.body[0].weight.data * 0.1
            self.state.c.add_(1)
            self.deep["layers"][0][1]["k"] += 1
            self.deep["layers"][0][0].add_(1)
            self.deep["count"] = 1
            self.deep["layers"].append(3)
            self.cache.keys[0] += 1
            self.cache.keys.append(out)
            self.links *= 2
            self.teacher[0](out.detach())
            self.seen[:2] = -self.seen[:2]
            self.carried += 1
            self.carried.requires_grad_(False)
        self.hidden = out.mean(0)
        self.drawn = random.random() + np.random.rand()  # noqa: NPY002  (the global state is what is tested)
        self.drawn = self.drawn + torch.rand(()) + self.dice.random() + self.rng.random()
        torch.rand((), generator=self.generator)
        self.calls += 1
        self.log.append(out)
        self.recent.append(1)
        self.kinds.add("b")
        self.register_buffer("late", torch.ones(1))
        self.body[2].eval()
        self.momentum.requires_grad_(True)
        self.body[0].bias.grad = None
        self.memory.register_forward_hook(lambda *_: None)
        if self.fail:
            raise RuntimeError("mine")
        return out


def described(value, seen):
    """Return all of a value that could change, to any depth: tensors' bits and places, contents, identities."""
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    inside = None
    if isinstance(value, torch.Tensor):
        gradient = (id(value.grad), bits(value.grad)) if value.is_leaf and value.grad is not None else None
        place = 0 if value.layout is not torch.strided else value.data_ptr()
        inside = place, tuple(value.shape), bits(value), value.requires_grad, gradient
    elif isinstance(value, nn.Module) or dataclasses.is_dataclass(value):
        inside = described(vars(value), seen)[1]
    elif isinstance(value, dict):
        inside = {k: described(v, seen) for k, v in value.items()}
    elif isinstance(value, list | tuple | deque):
        inside = [described(v, seen) for v in value]
    elif isinstance(value, torch.Generator):
        inside = bits(value.get_state())
    elif isinstance(value, random.Random):
        inside = value.getstate()
    elif isinstance(value, np.random.Generator):
        inside = repr(value.bit_generator.state)
    else:
        inside = repr(value)
    return id(value), inside


def everything(model):
    states = (bits(torch.get_rng_state()), repr(np.random.get_state()), random.getstate())  # noqa: NPY002
    return described(model, set()), states


def fails(model, x):
    with pytest.raises(gradwatch.GradientHealthError, match="learns from the last"):
        gradwatch.assert_horizon(model, x, at_least=99)


WAYS = {
    "horizon": gradwatch.horizon,
    "assert_horizon": lambda model, x: gradwatch.assert_horizon(model, x, at_least=1),
    "check": gradwatch.check,
    "assert_horizon that fails": fails,
}


@pytest.mark.parametrize("fail", [False, True], ids=["forward returns", "forward raises"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", WAYS)
def test_the_model_and_all_random_states_are_left_exactly_as_they_were(way, training, fail):
    model, x = Busy().train(training), torch.randn(4, 40, 3)
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 3.0) if number % 2 else None
    model.fail = fail
    before, given = everything(model), x.clone()
    if fail:
        with pytest.raises(RuntimeError, match="mine"):
            WAYS["check" if way == "check" else "horizon"](model, x)
    else:
        WAYS[way](model, x)
    assert everything(model) == before
    assert torch.equal(x, given)
    assert not x.requires_grad
    assert x.grad is None
    with pytest.raises(RuntimeError) if fail else torch.no_grad():
        model(x)
    now, then = everything(model)[0][1], before[0][1]
    changed = {name for name, was in then.items() if now[name] != was}
    assert changed >= {
        "_buffers",
        "_modules",
        "hidden",
        "state",
        "deep",
        "cache",
        "log",
        "recent",
        "kinds",
        "teacher",
        "generator",
        "dice",
        "rng",
        "calls",
        "carried",
    }
    assert now.keys() > then.keys()


def test_the_same_bits_are_put_back_and_not_equal_ones():
    model = nn.Module()
    model.register_buffer("zero", torch.tensor([-0.0, 1.0]))
    model.register_buffer("odd", torch.tensor([-0.0, torch.nan]))
    before = bits(model.zero), bits(model.odd)
    with as_it_was(model):
        model.zero[0] = model.odd[0] = 0.0
    assert (bits(model.zero), bits(model.odd)) == before


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.int8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
)
def test_tensors_of_every_format_are_put_back(dtype):
    model = nn.Module()
    model.register_buffer("values", torch.ones(3, 2).to(dtype).t())
    model.register_buffer("inference", None)
    with torch.inference_mode():
        model.inference = torch.ones(3)
    before, stride = model.values.clone(), model.values.stride()
    with as_it_was(model):
        model.values.zero_()
        with torch.inference_mode():
            model.inference.zero_()
    assert torch.equal(model.values, before)
    assert model.values.stride() == stride
    assert torch.equal(model.inference, torch.ones(3))


def test_what_is_put_back_is_no_edit_over_which_a_waiting_graph_stumbles():
    class Momentum(nn.Linear):
        def forward(self, x):
            self.weight.data.mul_(0.9)
            return super().forward(x)

    model, x = Momentum(3, 3), torch.randn(2, 3, requires_grad=True)
    loss = model(x).square().sum()
    with as_it_was(model):
        model(x)
    loss.backward()
    assert x.grad is not None


def test_a_training_between_whose_passes_the_horizon_is_measured_is_the_same_training():
    def train(*, measured):
        torch.manual_seed(3)
        model = Busy()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(4):
            loss = model(torch.randn(4, 6, 3)).square().sum()
            if measured:
                gradwatch.horizon(model, torch.ones(5, 7, 3))
            loss.backward()
            if measured:
                gradwatch.horizon(model, torch.ones(5, 7, 3))
            optimizer.step()
            optimizer.zero_grad()
            model.momentum.requires_grad_(False)
            losses.append(loss.item())
        return losses, [bits(t) for t in (*model.parameters(), *model.buffers())], bits(torch.get_rng_state())

    assert train(measured=True) == train(measured=False)


def test_lazy_modules_are_refused():
    with pytest.raises(ValueError, match="the parameters of model must have their shapes"), as_it_was(nn.LazyLinear(3)):
        pass


def test_what_cannot_be_put_back_is_an_error():
    class Stubborn(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.copy_, torch.Tensor.data.__set__):
                raise RuntimeError("never")
            return super().__torch_function__(function, types, args, kwargs)

    model = nn.Module()
    model.stubborn = torch.zeros(2).as_subclass(Stubborn)
    with (
        pytest.raises(
            RuntimeError,
            match=r"1 tensor of the model could not be put back as it was, of shape \(2,\): never",
        ),
        as_it_was(model),
    ):
        model.stubborn.add_(1)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_gets_its_attributes_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.h = nn.Linear(3, 3), torch.zeros(2)
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x):
            self.h = self.h + 1
            self.seen += 1
            return self.body(x)

    model = torch.jit.script(Counting())
    buffer = io.BytesIO()
    torch.jit.save(model, buffer)
    buffer.seek(0)
    for scripted in (model, torch.jit.load(buffer)):
        found = gradwatch.horizon(nn.Sequential(scripted), torch.randn(4, 9, 3))
        assert found.length == 9
        assert torch.equal(scripted.h, torch.zeros(2))
        assert torch.equal(scripted.seen, torch.zeros(2))
        scripted(torch.randn(2, 3))
        assert torch.equal(scripted.seen, torch.ones(2))


# --- hooks ---


class Net(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        self.memory, self.head = nn.GRU(3, 4, batch_first=True), head or nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.memory(x)[0][:, -1])


def hooked(model, called):
    """Put every kind of hook on a model, and give the handles."""
    note = lambda name: lambda *_, **__: called.append(name) or None
    module = nn.modules.module
    tensor = model.memory.weight_hh_l0
    return [
        model.memory.register_forward_hook(note("forward")),
        model.memory.register_forward_hook(note("forward, keywords"), with_kwargs=True),
        model.head.register_forward_hook(note("always"), always_call=True),
        model.register_forward_pre_hook(note("before")),
        model.head.register_forward_pre_hook(note("before, keywords"), with_kwargs=True),
        model.head.register_full_backward_hook(note("backward")),
        model.head.register_full_backward_pre_hook(note("before backward")),
        module.register_module_forward_hook(note("global forward")),
        module.register_module_forward_pre_hook(note("global before")),
        module.register_module_full_backward_hook(note("global backward")),
        module.register_module_full_backward_pre_hook(note("global before backward")),
        tensor.register_hook(note("tensor")),
        tensor.register_post_accumulate_grad_hook(note("accumulated")),
    ]


@pytest.mark.parametrize("failing", [False, True], ids=["horizon", "a verdict"])
@pytest.mark.filterwarnings("ignore:.*Full backward hook.*")
def test_no_hook_is_called_and_all_of_them_stay(failing):
    model, x, called = Net(), torch.randn(4, 30, 3), []
    handles = hooked(model, called)
    tables = [
        (t, list(t.items()))
        for m in model.modules()
        for name, t in vars(m).items()
        if name.endswith(("_hooks", "_kwargs", "_called"))
    ]
    try:
        WAYS["assert_horizon that fails" if failing else "horizon"](model, x)
        assert called == []
        assert [(t, list(t.items())) for t, _ in tables] == tables
        model(x).sum().backward()
        assert len(set(called)) == 13
    finally:
        for handle in handles:
            handle.remove()


def test_the_derivative_by_a_parameter_calls_no_hook_of_it_even_where_it_is_the_input():
    class Learned(nn.Module):
        def __init__(self, *, view):
            super().__init__()
            self.query, self.memory, self.view = (
                nn.Parameter(torch.randn(4, 9, 3)),
                nn.GRU(3, 4, batch_first=True),
                view,
            )

        def forward(self, x):
            return (
                self.memory(
                    self.query.flip(1) if self.view is None else self.query[:, 1:] if self.view else self.query
                )[0][:, -1]
                * x
            )

    for view in (True, False, None):
        model, called = Learned(view=view), []
        model.query.register_hook(called.append)
        assert gradwatch.horizon(model, torch.ones(4, 4)).lag_gain[0] > 0
        assert called == []
        assert model.query.grad is None


def test_a_hook_that_is_removed_meanwhile_stays_removed():
    model, called = Net(), []
    handle = model.memory.register_forward_hook(lambda *_: called.append(1))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: called.append(2))
    with without_hooks(model):
        handle.remove()
        everywhere.remove()
    model(torch.randn(2, 5, 3))
    assert called == []


def magnitude(name):
    class Own(prune.L1Unstructured):
        """A way of pruning of the user's own."""

    Own.__module__ = name
    return Own


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: nn.utils.weight_norm(m.head),
        lambda m: nn.utils.spectral_norm(m.head),
        lambda m: nn.utils.weight_norm(m.memory, "weight_hh_l0"),
        lambda m: parametrizations.weight_norm(m.head),
        lambda m: parametrizations.spectral_norm(m.head),
        lambda m: parametrizations.orthogonal(m.memory, "weight_hh_l0"),
        lambda m: prune.l1_unstructured(m.head, "weight", 0.5),
        lambda m: magnitude("mine").apply(m.head, "weight", amount=0.5),
    ],
    ids=[
        "weight_norm",
        "spectral_norm",
        "weight_norm, recurrent",
        "weight_norm, new",
        "spectral_norm, new",
        "orthogonal",
        "pruning",
        "own pruning",
    ],
)
@pytest.mark.usefixtures("one_direction")
def test_what_torch_computes_in_hooks_of_its_own_is_computed(change, training):
    model, x = Net().double(), torch.randn(4, 9, 3).double()
    change(model)
    model.train(training)
    before = everything(model)
    found = gradwatch.horizon(model, x)
    assert everything(model) == before
    with torch.no_grad():  # an optimizer moves the weights that the hooks compute from
        for p in model.parameters():
            p.mul_(1.5)
    moved = gradwatch.horizon(model, x)
    assert moved.lag_gain != found.lag_gain
    plain = x.clone().requires_grad_()
    out = model(plain)
    v = cotangent(out.shape, 2)
    (gradient,) = torch.autograd.grad(out, plain, v)
    assert moved.lag_gain == pytest.approx(gradient.square().sum(2).mean(0).sqrt().flip(0).tolist(), rel=1e-10)


def test_a_watcher_of_the_same_model_sees_nothing_of_it():
    model, reports = Net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append]):
        for _ in range(3):
            gradwatch.horizon(model, torch.randn(4, 9, 3))
            model(torch.randn(4, 5, 3)).square().sum().backward()
            gradwatch.horizon(model, torch.randn(4, 9, 3))
            optimizer.step()
            optimizer.zero_grad()
    lengths = {s.length for r in reports for s in r.snapshot.sequences or ()}
    assert lengths <= {5}


@pytest.mark.parametrize("package", ["transformers.utils.output_capturing", "my_own"])
def test_what_a_model_of_transformers_collects_in_hooks_is_there(package):
    """Its mixtures of experts make a loss of what a hook of the library has collected; other hooks are not called."""
    collected = []

    def collect(_module, _inputs, output):
        collected.append(output)

    collect.__module__ = package

    class Balanced(Net):
        def forward(self, x):
            collected.clear()
            y = super().forward(x)
            return y + sum(out.mean() for out in collected)

    model, x = Balanced().double(), torch.randn(4, 9, 3).double()
    plain = gradwatch.horizon(model, x).lag_gain
    model.head.register_forward_hook(collect)
    assert (gradwatch.horizon(model, x).lag_gain != plain) == (package != "my_own")


def test_no_hook_is_left_on_the_model_or_in_torch():
    def everywhere():
        return [
            name
            for name, table in vars(nn.modules.module).items()
            if name.startswith("_global_") and isinstance(table, dict) and table
        ]

    gc.collect()  # a watcher that an earlier test has dropped may still look at the next forward pass
    before = everywhere()
    model = Net()
    for output in (None, lambda _: None):
        with pytest.raises(ValueError, match="output") if output else torch.enable_grad():
            gradwatch.horizon(model, torch.randn(8, 6, 3), output=output)
    assert everywhere() == before
    assert all(
        not table
        for m in model.modules()
        for name, table in vars(m).items()
        if name.endswith(("_hooks", "_kwargs", "_called"))
    )
    assert all(p.grad is None for p in model.parameters())


# --- other devices ---


def test_the_random_state_of_a_device_is_written_only_where_it_was_drawn_from():
    """Writing it makes cuDNN begin a new dropout sequence, even if it is the same state."""

    class Device:
        def __init__(self):
            self.generator, self.written = torch.Generator().manual_seed(5), 0

        def get_state(self):
            return self.generator.get_state()

        def set_state(self, state):
            self.written += 1
            self.generator.set_state(state)

    idle, drawn = Device(), Device()
    before = drawn.get_state()
    with as_it_was(nn.Linear(2, 2), [idle, drawn]):
        torch.rand((), generator=drawn.generator)
    assert (idle.written, drawn.written) == (0, 1)
    assert torch.equal(drawn.get_state(), before)


@dataclasses.dataclass(slots=True)
class Slots:
    """A dataclass without a dict of its attributes."""

    kept: torch.Tensor


def test_tensors_in_what_has_no_dict_of_attributes_are_put_back():
    model = nn.Linear(2, 2)
    model.slots, model.proxy = Slots(torch.zeros(3)), types.MappingProxyType({"kept": torch.zeros(3)})
    with as_it_was(model):
        model.slots.kept.add_(1)
        model.proxy["kept"].add_(1)
    assert torch.equal(model.slots.kept, torch.zeros(3))
    assert torch.equal(model.proxy["kept"], torch.zeros(3))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_recurrent_networks_of_cudnn_run_so_that_they_can_be_differentiated_and_lose_no_random_state(training):
    ran = []

    class Model(Net):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)))
            self.memory = nn.GRU(3, 4, 2, batch_first=True, dropout=0.5)

        def forward(self, x):
            ran.append((torch.backends.cudnn.enabled, self.memory.dropout, self.head[0].training, self.memory.training))
            return super().forward(x)

    model, x = Model().train(training), torch.randn(4, 9, 3)
    before = everything(model)
    found = model_gain(model, (x,), {}, on_cudnn=[model.memory])
    assert ran == [(True, 0.0, False, True) if training else (False, 0.5, False, False)]
    assert found.note == (
        "it was measured without dropout, because cuDNN keeps the random state of recurrent dropout to itself"
        if training
        else None
    )
    assert everything(model) == before
    assert torch.backends.cudnn.enabled


# --- several processes ---


@pytest.fixture
def one_process():
    """Return a process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_is_taken_out_of_its_wrapper_for_several_processes_and_a_part_of_it_is_not(one_process):
    model, x = Net(), torch.randn(4, 9, 3)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert gradwatch.horizon(wrapped, x) == gradwatch.horizon(model, x)
    with pytest.raises(
        RuntimeError, match="cannot be run by one process alone: a part of it is wrapped in DistributedDataParallel"
    ):
        gradwatch.horizon(nn.Sequential(wrapped), x)


def test_what_would_wait_for_other_processes_is_refused(one_process, monkeypatch):
    model = Net(nn.Sequential(nn.SyncBatchNorm(4), nn.Linear(4, 2)))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="SyncBatchNorm in training mode averages over several"):
        gradwatch.horizon(model, torch.randn(4, 9, 3))
    assert gradwatch.horizon(model.eval(), torch.randn(4, 9, 3)).length == 9


def test_no_graph_is_kept():
    seen = []

    class Noting(Net):
        def forward(self, x):
            out = super().forward(x)
            seen.append(weakref.ref(out))
            return out

    gc.disable()
    try:
        gradwatch.horizon(Noting(), torch.randn(4, 9, 3))
        assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()


def test_passes_draw_the_same_where_the_model_is_the_first_to_draw_from_numpy():
    """Newer ones of numpy import what draws when somebody first does."""
    program = """
import numpy as np
import torch
from gradwatch.model.rerun import as_it_was


class Drawing(torch.nn.Module):
    def forward(self, x):
        return x * np.random.rand()


model, drawn = Drawing(), []
for _ in range(2):
    with as_it_was(model):
        drawn.append(float(model(torch.ones(()))))
assert drawn[0] == drawn[1], drawn
"""
    subprocess.run([sys.executable, "-c", program], check=True)
