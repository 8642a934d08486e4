"""The default device and the default format of the process are the user's: nothing that is measured depends on them."""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradwatch

HERE = Path(__file__).parents[2]
LENGTHS = torch.tensor([6, 4, 3, 2])
STEPS = 7
FACTORIES = re.compile(r"torch\.(Generator|arange|(as_)?tensor|empty(_strided)?|full|ones|rand(int|n)?|zeros)")


class Net(nn.Module):
    """Every kind of recurrent module, a cell in a loop, padded and packed; ReLUs; a layer big enough for row norms."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, 2, batch_first=True, dropout=0.2)
        self.cell = nn.LSTMCell(5, 4)
        self.gru = nn.GRU(4, 4, bidirectional=True, batch_first=True)
        self.rnn = nn.RNN(8, 4, batch_first=True)
        self.wide = nn.Linear(4, 5000)
        self.head = nn.Linear(5000, 2)

    def forward(self, x):
        y, state, given = self.lstm(x)[0], None, []
        for step in y.unbind(1):
            state = self.cell(step, state)
            given.append(state[0])
        packed = pack_padded_sequence(torch.stack(given, 1), LENGTHS, batch_first=True)
        y = self.rnn(pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0])[0]
        return self.head(torch.relu(self.wide(y[:, -1])))


def trained(net, batches, scale):
    """Train with everything on; return the snapshots, the bits of the parameters at the end, and the random state."""
    snapshots = []
    torch.manual_seed(0)
    with torch.device("cpu"):
        net = copy.deepcopy(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scale)
        scaler.scale(torch.zeros(()))  # here it makes its tensors
    with gradwatch.watch(
        net,
        optimizer,
        scaler=scaler,
        every_n_steps=1,
        probe_every_n_steps=2,
        horizon=4,
        sinks=[lambda report: snapshots.append(report.snapshot)],
        on_alert=lambda _: None,
    ) as watcher:
        for number, x in enumerate(batches):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            watcher.record(loss if number % 2 else loss.item())
            scaler.scale(loss).backward()
            if number == STEPS - 1:
                net.head.bias.grad[0] = torch.nan
            if scale:
                watcher.step()
            scaler.step(optimizer)
            scaler.update()
    return snapshots, [p.detach().view(torch.int32) for p in net.parameters()], torch.get_rng_state()


@pytest.fixture
def defaults():
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    "change",
    [lambda: torch.set_default_device("meta"), lambda: torch.set_default_dtype(torch.float64)],
    ids=["device", "format"],
)
def test_a_snapshot_is_the_same_whatever_the_defaults_are(change, scale, defaults):
    net, batches = Net(), torch.randn(STEPS, 4, 6, 3)
    expected, parameters, random = trained(net, batches, scale)
    change()
    found, others, drawn = trained(net, batches, scale)
    torch.set_default_device(None)

    assert len(expected) == len(found) >= STEPS - 1
    for one, other in zip(expected, found, strict=True):
        for field in dataclasses.fields(one):
            if field.name != "wall_time":
                assert repr(getattr(one, field.name)) == repr(getattr(other, field.name)), (one.step, field.name)
    assert all(map(torch.equal, parameters, others))
    assert torch.equal(random, drawn)
    probe = expected[4]
    assert {s.module for s in probe.sequences} == {"", "lstm", "cell", "gru", "rnn"}
    assert not any(s.note for s in probe.sequences)
    assert probe.activations
    assert probe.update_ratio
    assert probe.zeros
    assert (probe.scale == 8.0) is scale


def test_a_check_is_the_same_on_another_default_device(defaults):
    with torch.device("cpu"):
        net, x = Net(), torch.randn(4, 6, 3)
    expected = gradwatch.check(net, x), gradwatch.horizon(net, x)
    torch.set_default_device("meta")
    found = gradwatch.check(net, x), gradwatch.horizon(net, x)

    assert repr(found[1]) == repr(expected[1])
    one, other = (dataclasses.replace(report.snapshot, wall_time=0.0) for report, _ in (expected, found))
    assert repr(one) == repr(other)


@pytest.mark.parametrize("file", sorted((HERE / "gradwatch").rglob("*.py")), ids=lambda file: file.stem)
def test_no_tensor_is_made_on_the_default_device(file):
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    made = [call for call in calls if FACTORIES.fullmatch(ast.unparse(call.func))]

    assert [ast.unparse(call) for call in made if "device" not in {keyword.arg for keyword in call.keywords}] == []
