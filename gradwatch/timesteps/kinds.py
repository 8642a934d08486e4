"""The kinds of recurrent modules, and what each is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Spec:
    """What a recurrent module is."""

    kind: str
    """LSTM, GRU or RNN."""
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
            kind = {"RNN_TANH": "RNN", "RNN_RELU": "RNN"}.get(module.mode, module.mode)
            dropout = module.dropout if module.training and module.num_layers > 1 else 0.0
            return cls(
                kind,
                module.num_layers,
                1 + module.bidirectional,
                module.mode == "RNN_RELU",
                module.bias,
                module.proj_size > 0,
                dropout,
            )
        kind = next(
            k for k, c in (("LSTM", nn.LSTMCell), ("GRU", nn.GRUCell), ("RNN", nn.RNNCell)) if isinstance(module, c)
        )
        return cls(kind, 1, 1, getattr(module, "nonlinearity", "tanh") == "relu", bool(module.bias), False, 0.0)
