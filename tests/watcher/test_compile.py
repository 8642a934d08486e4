"""Under torch.compile, training and compiling go as without gradwatch, and fused recurrent modules are measured."""

from __future__ import annotations

import copy
import functools
import io
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from interpreters import warm
from torch import nn
from torch.nn.modules import module as torch_modules

from gradwatch import watch
from gradwatch.model.compiled import graphs

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # dynamo's own, of a compiled cell
)
T, IN, H = 5, 4, 6
FIXED, VARIED = (3,) * 8, (3, 3, 3, 4, 5, 5, 6, 3)
NOT_MEASURED = "it is not measured: torch.compile is in use, and compiled code calls no hooks"


class Fused(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.embed, self.rnn, self.head = (
            nn.Linear(IN, IN),
            kind(IN, H),
            nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, 2)),
        )

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][-1])


class Raw(Fused):
    """A recurrent network that gets its input as it is."""

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


class Cells(nn.Module):
    def __init__(self, kind=nn.LSTMCell):
        super().__init__()
        self.rnn, self.head = kind(IN, H), nn.Linear(H, 2)

    def forward(self, x):
        state = None
        for now in x:
            state = self.rnn(now, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.TransformerEncoderLayer(IN, 2, 8, 0.2, batch_first=True), nn.Linear(IN, 2)

    def forward(self, x):
        return self.head(self.rnn(x.transpose(0, 1))[:, -1])


KINDS = {
    "lstm": (Fused, True),
    "gru on the input": (functools.partial(Raw, nn.GRU), True),
    "lstm cells": (Cells, False),
    "gru cells": (functools.partial(Cells, nn.GRUCell), False),
    "transformer": (Encoder, False),
}
"""By name: a model, and whether its sequence module "rnn" is measured."""


def before(model, backend):
    return lambda: torch.compile(model, backend=backend)


def in_place(model, backend):
    def compiled():
        model.compile(backend=backend)
        return model

    return compiled


def children(model, backend):
    def compiled():
        for name, child in list(model.named_children()):
            setattr(model, name, torch.compile(child, backend=backend))
        return model

    return compiled


def function(model, backend):
    def call(x):
        return model(x)

    return lambda: torch.compile(call, backend=backend)


WAYS = {"model": before, "in place": in_place, "children": children, "function": function}


def compilations():
    """Return what dynamo has counted since it was reset: frames, breaks of the graph, graphs."""
    counters = torch._dynamo.utils.counters
    return dict(counters["frames"]), sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs.__init__()  # which knows what the counters have counted
    torch.manual_seed(0)


def trained(kind, way, backend, sizes, *, late=False, every=1, **options):
    """Train what is compiled, and give what came of it, what was compiled until each step, and what was seen."""
    fresh()
    model = KINDS[kind][0]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    compile_it, reports, watcher, run = WAYS[way](model, backend), [], None, None
    if not late:
        run = compile_it()
    if options:
        watcher = watch(
            model,
            optimizer,
            every_n_steps=1,
            probe_every_n_steps=every,
            sinks=[reports.append],
            on_alert=lambda _: None,
            **options,
        )
    if late:
        run = compile_it()
    losses, counts = [], []
    for size in sizes:
        optimizer.zero_grad()
        loss = run(torch.randn(T, size, IN)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        counts.append(compilations())
    if watcher is not None:
        watcher.close()
    state = [p.detach() for p in model.parameters()] + [v for s in optimizer.state.values() for v in s.values()]
    return [*losses, *state, torch.get_rng_state()], counts, [r.snapshot for r in reports]


def compare(kind, way, backend, sizes, caplog, **options):
    caplog.set_level(logging.WARNING, "gradwatch")
    timesteps = {"rnn": 1} if kind == "transformer" else "auto"
    alone, expected, _ = trained(kind, way, backend, sizes)
    for late, every in ((False, 1), (True, 3)):
        caplog.clear()
        watched, counts, snapshots = trained(
            kind, way, backend, sizes, late=late, every=every, timesteps=timesteps, **options
        )
        assert all(map(torch.equal, watched, alone))
        assert counts == expected
        assert len(snapshots) == len(sizes)
        probes = [s for s in snapshots if s.sequences]
        assert [s.step for s in probes] == [k for k in range(1, len(sizes)) if k % every == 0]
        for snapshot in probes:
            whole = next(s for s in snapshot.sequences if s.part == "" and s.module == "rnn")
            parts = [s for s in snapshot.sequences if s.part == "l0"]
            if KINDS[kind][1]:
                assert whole.grad_input is not None
                assert whole.lag_gain is not None
                assert len(parts) == 1
                assert whole.note is None
            else:
                assert whole.note == NOT_MEASURED
                assert whole.grad_input is None
        (said,) = caplog.records  # once
        assert "torch.compile" in said.message


@pytest.mark.parametrize(
    ("kind", "way", "sizes"),
    [
        ("lstm", "model", VARIED),
        ("lstm", "children", FIXED),
        ("gru on the input", "function", VARIED),
        ("lstm cells", "in place", VARIED),
        ("gru cells", "function", VARIED),
        ("transformer", "model", VARIED),
    ],
)
def test_what_is_compiled_trains_and_compiles_as_it_does_unwatched(kind, way, sizes, caplog):
    compare(kind, way, "eager", sizes, caplog)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "sizes"), [("eager", FIXED), ("eager", VARIED), ("aot_eager", VARIED)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compiled_trains_and_compiles_as_it_does_unwatched_in_every_way(kind, way, backend, sizes, caplog):
    compare(kind, way, backend, sizes, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "gru cells"])
def test_inductor_trains_and_compiles_as_it_does_unwatched(kind, caplog):
    compare(kind, "model", "inductor", VARIED, caplog)


def test_a_declared_need_changes_nothing_and_says_why_the_model_is_not_measured(caplog):
    compare("lstm", "model", "eager", VARIED, caplog, horizon=3)
    _, _, snapshots = trained("lstm", "model", "eager", FIXED, horizon=3)
    (own,) = (s for s in snapshots[-1].sequences if s.part == "model")
    assert own.lag_gain is None
    assert own.need == 3
    assert own.note == "torch.compile is in use, and compiled code calls no hooks"


def test_where_dynamo_is_allowed_to_trace_recurrent_networks_they_are_left_alone_too():
    with torch._dynamo.config.patch(allow_rnn=True):
        alone, expected, _ = trained("lstm", "model", "eager", VARIED)
        watched, counts, snapshots = trained("lstm", "model", "eager", VARIED, timesteps="auto")
    assert expected[-1][2] > 0  # it was traced
    assert all(map(torch.equal, watched, alone))
    assert counts == expected
    assert [s.note for s in snapshots[-1].sequences] == [NOT_MEASURED]


def test_a_compiled_loss_beside_a_model_that_is_not_compiled_leaves_fused_networks_measured():
    fresh()
    model = Fused()
    loss_of = torch.compile(lambda y: y.square().mean(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports = []
    with watch(model, optimizer, probe_every_n_steps=1, sinks=[reports.append]):
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(torch.randn(T, 3, IN))).backward()
            optimizer.step()
    whole, part = reports[-1].snapshot.sequences
    assert whole.grad_input is not None
    assert part.grad_cell is not None


def said_by_us(caplog):
    return [record.message for record in caplog.records if record.name == "gradwatch"]


def test_a_compiled_step_beside_a_model_that_is_not_compiled_leaves_the_forward_pass_measured(caplog):
    fresh()
    model = Fused()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = torch.compile(lambda: optimizer.step(), backend="eager")  # noqa: PLW0108  (torch's own recipe)
    reports = []
    with watch(model, optimizer, every_n_steps=1, probe_every_n_steps=3, sinks=[reports.append]):
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.randn(T, 3, IN)).square().mean().backward()
            step()
    assert compilations()[2] > 0  # or nothing was compiled, and the test sees nothing
    assert [r.snapshot.step for r in reports] == [*range(7)]
    probes = [reports[k].snapshot for k in (3, 6)]
    assert all(s.activations and s.update_ratio is not None for s in probes)
    assert all(s.sequences[0].grad_input is not None for s in probes)
    assert [layer.order for layer in probes[-1].model.layers] == [0, 1, 2, 3]
    assert said_by_us(caplog) == []


def test_a_model_that_is_compiled_as_a_full_graph_is_known_for_one(caplog):
    fresh()
    model = nn.Sequential(nn.Linear(IN, H), nn.Tanh(), nn.Linear(H, 2))
    run = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports = []
    with watch(run, optimizer, probe_every_n_steps=1, sinks=[reports.append]):
        for _ in range(4):
            optimizer.zero_grad()
            run(torch.randn(3, IN)).square().mean().backward()
            optimizer.step()
    assert [r.snapshot.step for r in reports] == [*range(4)]
    assert not any(r.snapshot.activations for r in reports)
    (said,) = said_by_us(caplog)
    assert "the forward pass is not measured: torch.compile is in use" in said


def test_compiling_that_begins_within_a_probe_trains_the_same_and_settles_with_the_next_step():
    def losses(*, watched):
        fresh()
        model = Fused()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watcher = watch(model, optimizer, probe_every_n_steps=1, sinks=[reports.append]) if watched else None
        found, counts = [], []
        for step in range(6):
            if step == 3:
                model.compile(backend="eager")
            optimizer.zero_grad()
            found.append(model(torch.randn(T, 3, IN)).square().mean())
            found[-1].backward()
            optimizer.step()
            counts.append(compilations())
        if watcher is not None:
            watcher.close()
        return [loss.item() for loss in found], counts

    reports = []
    alone, _ = losses(watched=False)
    found, counts = losses(watched=True)
    assert found == alone
    assert counts[3] == counts[4] == counts[5]  # nothing is compiled once more when the hooks leave
    assert [s.part for s in reports[-1].snapshot.sequences] == ["", "l0"]


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(4, 4), nn.LSTM(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][-1])
"""

LOAD = """
import sys
sys.modules["gradwatch"] = None
sys.path.insert(0, sys.argv[1])
import torch
for name in sys.argv[2:]:
    model = torch.load(name, weights_only=False)
    print(model(torch.ones(3, 2, 4)).double().sum().item())
"""


def hooks_of(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs) for m in model.modules()
    )


@pytest.mark.parametrize("way", ["model", "in place", "children"])
def test_what_is_saved_within_a_probe_loads_where_gradwatch_is_not_installed_and_is_not_watched(
    way, tmp_path, monkeypatch
):
    (tmp_path / "compiled_net_of_a_user.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    import compiled_net_of_a_user

    fresh()
    model, ones = compiled_net_of_a_user.Net(), torch.ones(3, 2, 4)
    run = WAYS[way](model, "eager")()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports, files, truths = [], [], []
    watcher = watch(model, optimizer, probe_every_n_steps=1, sinks=[reports.append])
    for step in range(3):
        optimizer.zero_grad()
        loss = run(torch.randn(3, 2, 4)).square().mean()
        assert (hooks_of(model) > 0) is (step > 0)  # there is something that could be saved along
        if way != "children":  # torch does not save what it compiled in place of a module
            files += [tmp_path / f"saved{step}.pt", tmp_path / f"copied{step}.pt", tmp_path / f"pickled{step}.pt"]
            torch.save(model, files[-3])
            torch.save(copy.deepcopy(model), files[-2])
            torch.save(pickle.loads(pickle.dumps(model)), files[-1])
        twin = copy.deepcopy(model)
        count = len(reports)
        twin(ones).sum().backward()
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
        assert len(reports) == count
        with torch.no_grad():
            truths += [run(ones).double().sum().item()] * (3 if way != "children" else 0)
        loss.backward()
        optimizer.step()
        if step:
            whole, part = reports[-1].snapshot.sequences
            assert whole.grad_input is not None
            assert part.lag_gain_cell is not None
    watcher.close()
    assert hooks_of(model) == 0
    assert not torch_modules._global_forward_hooks
    assert not torch_modules._global_forward_pre_hooks
    assert not torch_modules._global_forward_hooks_with_kwargs
    del sys.modules["compiled_net_of_a_user"]
    if files:
        script = tmp_path / "load.py"
        script.write_text(LOAD)
        done = subprocess.run(
            [*warm(), str(script), str(tmp_path), *map(str, files)],
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        assert list(map(float, done.stdout.split())) == pytest.approx(truths)


def test_state_dicts_and_optimizers_are_saved_within_a_probe():
    fresh()
    model = Fused()
    run = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(model.parameters())
    with watch(model, optimizer, probe_every_n_steps=1):
        for _ in range(3):
            run(torch.randn(T, 3, IN)).sum().backward()
            saved = io.BytesIO()
            torch.save(
                {"compiled": run.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved
            )
            assert b"gradwatch" not in saved.getvalue()
            optimizer.step()
