"""The kinds of recurrence that can be walked back through: one row each, and nothing else tells them apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from gradwatch.timesteps.adjoint import Cell, Gru, LayerWeights, Lstm, Rnn, saturation
from gradwatch.values.sequences import RecurrenceName
from gradwatch.values.snapshot import FactName

Facts = dict[FactName, Tensor]
"""By name."""

Fused = nn.RNNBase
"""What runs over a whole sequence in one of torch's kernels, cuDNN's among them."""

_POWERS = 10
"""Squarings of a matrix whose norm then gives its spectral radius: the 1024th root takes the constant away, nearly."""
_LARGEST = 256
"""Hidden units up to which that is worth its price."""


def _weights(module: nn.Module) -> list[Tensor]:
    """Return the weights of all layers and directions as they are in this call, parametrized or not."""
    flat: Any = getattr(module, "_flat_weights", None)
    if flat is not None:
        return list(flat)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [weight for name in names if (weight := getattr(module, name)) is not None]


def _no_facts(cell: Cell, weights: LayerWeights) -> Facts:  # noqa: ARG001  (as the others)
    return {}


@dataclass(frozen=True)
class Kind:
    """One kind of recurrence: its modules, their weights, its equations, and what tells how long it remembers."""

    name: RecurrenceName
    sequence: type[nn.Module]
    """Its module that runs over a whole sequence; it has `batch_first`, and what `Recurrence.of` asks for."""
    cell: type[nn.Module]
    """Its module of which each call is one timestep."""
    gates: int
    """How many blocks of hidden units the rows of its weights are."""
    equations: Callable[[Tensor, Tensor, LayerWeights], Cell]
    """Takes the inputs, the hidden states before each timestep, and the weights of a layer and direction."""
    kernel: Callable[..., Any]
    """Runs one layer and direction, with the arguments of torch.lstm."""
    mode: str | None = None
    """What the `mode` of `sequence` says, where several kinds share that class."""
    nonlinearity: str | None = None
    """What the `nonlinearity` of `cell` says, where several kinds share that class."""
    has_cell_state: bool = False
    weights: Callable[[nn.Module], list[Tensor]] = _weights
    """Returns, for each layer and direction: w_ih, w_hh, with a bias b_ih and b_hh, with a projection w_hr."""
    facts: Callable[[Cell, LayerWeights], Facts] = _no_facts
    """What decides how long a layer and direction remembers, by name, once it has run."""
    saturation: Callable[[Tensor], Tensor] | None = None
    """Of outputs that saturate: which share of them does."""

    def includes(self, module: nn.Module) -> bool:
        """Tell whether a module is of this kind."""
        if isinstance(module, self.sequence):
            return self.mode is None or module.mode == self.mode
        return isinstance(module, self.cell) and self.nonlinearity in (None, getattr(module, "nonlinearity", None))


def _lstm_facts(cell: Cell, weights: LayerWeights) -> Facts:
    facts: Facts = {**_gates(cell), **({} if cell.kept is None else {"forget_gate": cell.kept.mean()})}
    if cell.let_in is not None and cell.saturated is not None:
        facts |= {"input_gate": cell.let_in, "cell_saturation": cell.saturated}
    if weights.b_ih is not None and weights.b_hh is not None:
        enter, forget, *_ = (weights.b_ih + weights.b_hh).chunk(4)  # torch's order: input, forget, cell, output
        facts |= {"forget_bias": forget.mean(), "input_bias": enter.mean()}
    return facts


def _gru_facts(cell: Cell, weights: LayerWeights) -> Facts:  # noqa: ARG001  (as the others)
    return {**_gates(cell), **({} if cell.kept is None else {"update_gate": cell.kept.mean()})}


def _rnn_facts(cell: Cell, weights: LayerWeights) -> Facts:
    if weights.hh.shape[-1] > _LARGEST:
        return _gates(cell)
    w = weights.hh.float()
    return {**_gates(cell), "spectral_radius": _radius(w), "spectral_norm": _radius(w.T @ w).sqrt()}


def _gates(cell: Cell) -> Facts:
    return {} if cell.flat is None else {"saturated_gates": cell.flat}


def _radius(matrix: Tensor) -> Tensor:
    """Spectral radius by Gelfand's formula, ||M^k||^(1/k), with k = 2^10 by squaring."""
    log, tiny = matrix.new_zeros(()), torch.finfo(matrix.dtype).tiny
    for power in range(_POWERS):
        size = torch.linalg.matrix_norm(matrix).clamp(min=tiny)
        log = log + size.log() / 2**power
        matrix = matrix / size
        matrix = matrix @ matrix
    radius: Tensor = (log + torch.linalg.matrix_norm(matrix).clamp(min=tiny).log() / 2**_POWERS).exp()
    return radius


KINDS = (
    Kind(
        "LSTM",
        nn.RNNBase,
        nn.LSTMCell,
        gates=4,
        equations=Lstm,
        kernel=torch._VF.lstm,
        mode="LSTM",
        has_cell_state=True,
        facts=_lstm_facts,
    ),
    Kind("GRU", nn.RNNBase, nn.GRUCell, gates=3, equations=Gru, kernel=torch._VF.gru, mode="GRU", facts=_gru_facts),
    Kind(
        "RNN",
        nn.RNNBase,
        nn.RNNCell,
        gates=1,
        equations=Rnn,
        kernel=torch._VF.rnn_tanh,
        mode="RNN_TANH",
        nonlinearity="tanh",
        facts=_rnn_facts,
        saturation=saturation,
    ),
    Kind(
        "RNN",
        nn.RNNBase,
        nn.RNNCell,
        gates=1,
        equations=functools.partial(Rnn, relu=True),
        kernel=torch._VF.rnn_relu,
        mode="RNN_RELU",
        nonlinearity="relu",
        facts=_rnn_facts,
    ),
)

_MIXES = (nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""Modules of torch's own, beside the recurrent ones, that mix timesteps where they go along time."""
_HOLDS = (
    nn.Sequential,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of torch's own that may hold others that do."""

_STOCK = frozenset(c.forward for c in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell))


def kind_of(module: nn.Module, kinds: Sequence[Kind] = KINDS) -> Kind | None:
    """Return the kind of recurrence that a module is, None if it is none that can be walked back through."""
    return next((kind for kind in kinds if kind.includes(module)), None)


def recurrence_of(module: nn.Module, kinds: Sequence[Kind] = KINDS) -> RecurrenceName | None:
    """Return what carries the state of a module: one of the kinds, or one whose class is called after it.

    None where that is not known.
    """
    kind = kind_of(module, kinds)
    called = type(module).__name__.upper()
    return kind.name if kind is not None else next((kind.name for kind in kinds if kind.name in called), None)


def is_recurrent(module: nn.Module) -> bool:
    """Tell whether a module is recurrent: of one of the kinds, or somebody's own upon torch's classes for these."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase) or kind_of(module) is not None


def mixes(module: nn.Module) -> bool:
    """Tell whether a module of torch's mixes timesteps where it goes along time."""
    return is_recurrent(module) or isinstance(module, _MIXES)


def may_mix(module: nn.Module) -> bool:
    """Tell whether a module may mix timesteps: most of torch's own work on each by itself."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return not own or mixes(module) or isinstance(module, _HOLDS)


def is_cell(module: nn.Module, kinds: Sequence[Kind] = KINDS) -> bool:
    """Tell whether each call of a recurrent module is one timestep."""
    return isinstance(module, (nn.RNNCellBase, *(kind.cell for kind in kinds)))


def is_fused(module: nn.Module) -> TypeGuard[Fused]:
    """Tell whether a module runs over a whole sequence in one of torch's kernels."""
    return isinstance(module, Fused)


def is_stock(module: nn.Module) -> bool:
    """Tell whether a module runs as torch wrote it."""
    return type(module).forward in _STOCK


def time_of(module: nn.Module, dimensions: int, kinds: Sequence[Kind] = KINDS) -> int | None:
    """Return which of so many dimensions of a recurrent module's input is time; None: each call is a timestep."""
    return None if is_cell(module, kinds) else int(bool(module.batch_first) and dimensions > 2)


@dataclass(frozen=True)
class Recurrence:
    """What one recurrent module is in one call: its kind, and how it is put together."""

    kind: Kind
    layers: int
    directions: int
    bias: bool
    projected: bool
    dropout: float
    """Probability between layers in this call; 0 in evaluation."""

    @classmethod
    def of(cls, module: Any, kind: Kind) -> Recurrence:  # noqa: ANN401  (a module with the attributes of torch's)
        """Describe a module of this kind; a cell is one layer."""
        layers = getattr(module, "num_layers", 1)
        return cls(
            kind,
            layers,
            directions=1 + getattr(module, "bidirectional", False),
            bias=bool(module.bias),
            projected=getattr(module, "proj_size", 0) > 0,
            dropout=getattr(module, "dropout", 0.0) if module.training and layers > 1 else 0.0,
        )

    @property
    def parts(self) -> int:
        """How many layers and directions there are, in the order of torch's states: l0, l0_reverse, l1, ..."""
        return self.layers * self.directions

    def part(self, number: int) -> str:
        """Return the name of a layer and direction."""
        return f"l{number // self.directions}" + "_reverse" * (number % self.directions)

    def of_part(self, weights: Sequence[Tensor], number: int) -> LayerWeights:
        """Return the weights of a layer and direction, out of those that `Kind.weights` returns."""
        per = 2 + 2 * self.bias + self.projected
        mine = weights[number * per : (number + 1) * per]
        return LayerWeights(
            ih=mine[0],
            hh=mine[1],
            b_ih=mine[2] if self.bias else None,
            b_hh=mine[3] if self.bias else None,
            hr=mine[-1] if self.projected else None,
        )
