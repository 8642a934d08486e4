"""What a recurrent module is, and the names of its parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.timesteps.kinds import Spec, recurrence_of


class Mine(nn.LSTM):
    """One of torch's by another name."""


class LayerNormLSTM(nn.Module):
    """One that is not torch's."""


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LSTM(2, 3), "LSTM"),
        (nn.LSTM(2, 3, proj_size=2), "LSTM"),
        (nn.GRU(2, 3), "GRU"),
        (nn.RNN(2, 3), "RNN"),
        (nn.RNN(2, 3, nonlinearity="relu"), "RNN"),
        (nn.LSTMCell(2, 3), "LSTM"),
        (nn.GRUCell(2, 3), "GRU"),
        (nn.RNNCell(2, 3), "RNN"),
        (Mine(2, 3), "LSTM"),
        (LayerNormLSTM(), "LSTM"),
        (nn.Conv1d(2, 3, 1), None),
        (nn.TransformerEncoderLayer(4, 2), None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else v,
)
def test_what_carries_the_state_of_a_module_is_known(module, kind):
    assert recurrence_of(module) == kind


def test_parts_are_named_as_torch_names_its_weights():
    module = nn.GRU(2, 3, num_layers=2, bidirectional=True)
    names = [Spec.of(module).part(number) for number in range(4)]

    assert [f"weight_hh_{name}" for name in names] == [n for n, _ in module.named_parameters() if "weight_hh" in n]


def test_a_probe_tells_the_kind_of_a_module_and_the_direction_of_its_parts():
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 3, bidirectional=True, batch_first=True), "head": nn.Linear(6, 1)})
    optimizer, reports = torch.optim.SGD(model.parameters(), lr=0.1), []
    with gradwatch.watch(
        model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], on_alert=lambda _: None
    ):
        for _ in range(2):
            optimizer.zero_grad()
            model["head"](model["rnn"](torch.randn(4, 8, 2))[0][:, -1]).sum().backward()
            optimizer.step()
    snapshot = reports[-1].snapshot

    assert [(s.part, s.kind, s.reverse) for s in snapshot.sequences] == [
        ("", "LSTM", False),
        ("l0", None, False),
        ("l0_reverse", None, True),
    ]
    assert {(f.name, f.part) for f in snapshot.facts if f.part} == {
        (name, part) for name in ("forget_gate", "forget_bias") for part in ("l0", "l0_reverse")
    }
