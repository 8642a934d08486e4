"""A forward or backward pass that an exception ends leaves nothing behind: the next one is measured as usual."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

import gradwatch

STEPS = 6
STRUCK = 3
"""The step at which an exception comes; each step from the second on is a probe."""


class StruckError(RuntimeError):
    """What goes wrong."""


class Net(nn.Module):
    """ReLU and tanh, a fused LSTM, and a cell in a loop that goes on from a state of its own."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(3, 8)
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.cell = nn.LSTMCell(5, 4)
        self.head = nn.Linear(4, 2)
        self.fault = ""
        self.error = StruckError
        self.carried = False

    def strike(self, where):
        if self.fault == where:
            self.fault = ""
            raise self.error("struck")

    def forward(self, x):
        y = self.lstm(torch.tanh(self.wide(torch.relu(x))))[0]
        self.strike("between modules")
        start = torch.full((len(x), 4), 0.1)
        state = (start, start)
        for time, step in enumerate(y.unbind(1)):
            if time == 3:
                self.strike("between calls")
            if time == 3 and self.fault == "within the cell":
                self.fault = ""
                self.cell(step[:, :1], state)
            state = self.cell(step, state)
            if time == 3 and self.fault == "backward":
                state[0].register_hook(lambda _: self.strike("backward"))
        if self.fault == "late in backward":
            y.register_hook(lambda _: self.strike("late in backward"))
        given = self.head(torch.relu(state[0]))
        if self.fault == "early in backward":
            given.register_hook(lambda _: self.strike("early in backward"))
        self.strike("at the end")
        return given


def trained(net, batches, fault="", error=StruckError, *, again=True, parts=1, **options):
    """Train, with a fault at one step, whose batch comes once more or never; return the snapshots and the weights."""
    snapshots = []
    net = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    options = {"every_n_steps": 1, "probe_every_n_steps": 1, "horizon": 4} | options
    with gradwatch.watch(
        net, optimizer, sinks=[lambda report: snapshots.append(report.snapshot)], on_alert=lambda _: None, **options
    ) as watcher:
        for number, batch in enumerate(batches):
            net.fault, net.error = (fault if number == STRUCK else ""), error
            for _ in range(2):
                struck = False
                optimizer.zero_grad()
                try:
                    for x in batch.chunk(parts):
                        loss = net(x).square().mean()
                        loss.backward()
                except (KeyboardInterrupt, RuntimeError):
                    struck = True
                if not (struck and again):
                    break
            if not struck:
                watcher.record(loss)
                optimizer.step()
    return [dataclasses.replace(s, wall_time=0.0) for s in snapshots], [p.detach() for p in net.parameters()]


@functools.cache
def unharmed(again, parts):
    """Return what the training is without a fault, and without the batch that a fault takes away."""
    net, batches = begun()
    return trained(net, batches if again else torch.cat([batches[:STRUCK], batches[STRUCK + 1 :]]), parts=parts)


def begun():
    torch.manual_seed(0)
    return Net(), torch.randn(STEPS, 6, 5, 3)


FAULTS = [
    "between modules",
    "between calls",
    "within the cell",
    "at the end",
    "backward",
    "late in backward",
    "early in backward",
]


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "accumulated"])
@pytest.mark.parametrize("again", [True, False], ids=["again", "skipped"])
@pytest.mark.parametrize("error", [StruckError, KeyboardInterrupt])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_an_exception_ends_leaves_nothing_behind(fault, error, again, parts):
    expected, weights = unharmed(again, parts)
    found, others = trained(*begun(), fault, error, again=again, parts=parts)

    assert all(map(torch.equal, weights, others))
    assert len(found) == len(expected) == STEPS - (not again)
    for one, other in zip(expected, found, strict=True):
        for field in dataclasses.fields(one):
            assert repr(getattr(one, field.name)) == repr(getattr(other, field.name)), (one.step, field.name)
    cell = next(s for s in found[STRUCK].sequences if (s.module, s.part) == ("cell", "l0"))
    assert cell.length == 5
    assert None not in (cell.grad_hidden, cell.grad_cell)
    assert any(a.grad_norm for a in found[STRUCK].activations)
    assert any(a.dead is not None for a in found[STRUCK].activations)
    assert any(a.saturated is not None for a in found[STRUCK].activations)
