"""Remedies that set weights and biases: gates, recurrent matrices, initializations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradwatch.checks.cures.changes import BOUNDED, LINEAR, NORMALIZATIONS, NotTried, Patient, may_begin_anew
from gradwatch.detectors.remedies import Remedy

_TANH_GAIN = 5 / 3
_SMALL = 0.02
_GATES = {"input": 0, "forget": 1, "update": 1}
"""Which of the parts of a bias is a gate's, in torch's order: input, forget, cell, output; reset, update, new."""


def gate_biases(patient: Patient, remedy: Remedy) -> list[str]:
    """Set the biases of gates: that of the input to the module, and that of its state to 0, for they add up."""
    value = remedy.value or 0.0
    if remedy.action == "update_bias":
        return _set_gates(patient, remedy, (nn.GRU, nn.GRUCell), {"update": value})
    if remedy.action == "input_bias":
        return _set_gates(patient, remedy, (nn.LSTM, nn.LSTMCell), {"input": value})
    return _set_gates(patient, remedy, (nn.LSTM, nn.LSTMCell), {"input": -value, "forget": value})


def _set_gates(
    patient: Patient, remedy: Remedy, kinds: tuple[type[nn.Module], ...], gates: dict[str, float]
) -> list[str]:
    lines = []
    for module in patient.among(remedy, kinds):
        size, spelt = module.hidden_size, patient.code(module)
        for name, bias in module.named_parameters(recurse=False):
            if not name.startswith("bias_"):
                continue
            with torch.no_grad():
                for gate, value in gates.items():
                    begin = _GATES[gate] * size
                    set_to = value if name.startswith("bias_ih") else 0.0
                    bias[begin : begin + size] = set_to
                    lines.append(f"+ {spelt}.{name}.data[{begin}:{begin + size}] = {set_to:.3g}  # {gate} gate")
            patient.changed.append(bias)
        if not module.bias:
            raise NotTried(f"{patient.name_of(module)} has no biases (bias=False)")
    return lines


def recurrent_matrix(patient: Patient, remedy: Remedy) -> list[str]:
    """Make the matrix of the state, or that of each gate, an orthogonal one, or the identity with biases of 0."""
    lines, kinds = [], (nn.RNNBase, nn.RNNCellBase) if remedy.action == "orthogonal" else (nn.RNN, nn.RNNCell)
    for module in patient.among(remedy, kinds):
        spelt = patient.code(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("weight_hh"):
                parts = list(parameter.data.split(module.hidden_size))  # one of each gate
                set_by = nn.init.orthogonal_ if remedy.action == "orthogonal" else nn.init.eye_
                for part in parts:
                    set_by(part)
                init = f"torch.nn.init.{set_by.__name__}"
                if len(parts) == 1:
                    lines.append(f"+ {init}({spelt}.{name})")
                else:
                    lines.append(f"+ for part in {spelt}.{name}.data.split({module.hidden_size}): {init}(part)")
            elif name.startswith("bias_") and remedy.action == "identity":
                nn.init.zeros_(parameter)
                lines.append(f"+ torch.nn.init.zeros_({spelt}.{name})")
            else:
                continue
            patient.changed.append(parameter)
    return lines


def initialize(patient: Patient, remedy: Remedy) -> list[str]:
    """Begin weights at the size that their activation needs: Glorot's where it is bounded, else He's."""
    lines = []
    for module in patient.among(remedy, (*LINEAR, nn.RNNBase, nn.RNNCellBase)):
        if not may_begin_anew(module):
            continue
        spelt, bounded = patient.code(module), module
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            place = patient.activation_of(module, BOUNDED)
            bounded = None if place is None else place.module
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2:
                continue
            lines.append(f"+ {_begin(weight, bounded)}({spelt}.{name}{_options(bounded)})")
            patient.changed.append(weight)
    if not lines:
        raise NotTried("its weights are frozen, or computed (weight_norm, spectral_norm)")
    return lines


def _begin(weight: Tensor, bounded: nn.Module | None) -> str:
    if bounded is None:
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
        return "torch.nn.init.kaiming_normal_"
    nn.init.xavier_normal_(weight, gain=_TANH_GAIN if isinstance(bounded, nn.Tanh) else 1.0)
    return "torch.nn.init.xavier_normal_"


def _options(bounded: nn.Module | None) -> str:
    if bounded is None:
        return ', nonlinearity="relu"'
    return ", gain=5 / 3" if isinstance(bounded, nn.Tanh) else ""


def begin_small(patient: Patient, remedy: Remedy) -> list[str]:
    """Begin weights that are all 0 at something small."""
    lines = []
    for place in remedy.places:
        module = patient.at(place)
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() > 1:
                nn.init.normal_(weight, std=_SMALL)
                lines.append(f"+ torch.nn.init.normal_({patient.code(module)}.{name}, std={_SMALL})")
                patient.changed.append(weight)
    if not lines:
        raise NotTried(f"there are no weights at {' and '.join(remedy.places)}")
    return lines


def zero_bias(patient: Patient, remedy: Remedy) -> list[str]:
    """Set the biases of a layer, and of what is in it, to 0."""
    lines = []
    for module in patient.among(remedy, (*LINEAR, *NORMALIZATIONS)):
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
            lines.append(f"+ torch.nn.init.zeros_({patient.code(module)}.bias)")
            patient.changed.append(module.bias)
    if not lines:
        raise NotTried(f"there is no bias at {' and '.join(remedy.places)}")
    return lines
