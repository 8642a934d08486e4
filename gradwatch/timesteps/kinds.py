"""The kinds of recurrent modules, and what each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from gradwatch.values.sequences import Recurrence


@dataclass(frozen=True)
class Spec:
    """What a recurrent module is."""

    kind: Recurrence
    layers: int
    directions: int
    relu: bool
    bias: bool
    projected: bool
    dropout: float
    """Probability between layers in this call; 0 in evaluation."""

    @classmethod
    def of(cls, module: nn.Module) -> Spec:
        """Describe torch's recurrent modules, cells included."""
        if isinstance(module, nn.RNNBase):
            dropout = module.dropout if module.training and module.num_layers > 1 else 0.0
            return cls(
                _MODES[module.mode],
                module.num_layers,
                1 + module.bidirectional,
                module.mode == "RNN_RELU",
                module.bias,
                module.proj_size > 0,
                dropout,
            )
        kind = next(kind for cell, kind in _CELLS.items() if isinstance(module, cell))
        return cls(kind, 1, 1, getattr(module, "nonlinearity", "tanh") == "relu", bool(module.bias), False, 0.0)

    def part(self, number: int) -> str:
        """Name a layer and direction, counted as torch counts its weights: "l0", "l0_reverse", "l1", ..."""
        return f"l{number // self.directions}" + "_reverse" * (number % self.directions)


def recurrence_of(module: nn.Module) -> Recurrence | None:
    """Return what carries the state of a module: one of torch's, or one whose class is called after it.

    None where that is not known.
    """
    if isinstance(module, nn.RNNBase):
        return _MODES.get(module.mode)
    called = type(module).__name__.upper()
    of_torch = (kind for cell, kind in _CELLS.items() if isinstance(module, cell))
    return next(of_torch, next((kind for kind in _CELLS.values() if kind in called), None))


_MODES: Mapping[str, Recurrence] = {"LSTM": "LSTM", "GRU": "GRU", "RNN_TANH": "RNN", "RNN_RELU": "RNN"}
_CELLS: Mapping[type[nn.Module], Recurrence] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU", nn.RNNCell: "RNN"}
