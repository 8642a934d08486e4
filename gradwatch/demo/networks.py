"""The networks that the demo trains, sick and healthy."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gradwatch.demo.market import FEATURES
from gradwatch.demo.tasks import LENGTH, NEED

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

DEPTH, WIDTH = 20, 64
"""Layers of a deep network, and units of each."""
STATE = 32
"""Units of a recurrent network."""


@dataclass(frozen=True)
class Subject:
    """A network that the demo trains."""

    name: str
    says: str
    build: Callable[[], tuple[nn.Module, Optimizer]]


def network(inputs: int, *, healthy: bool) -> nn.Sequential:
    """Build a deep network on `inputs` numbers: ReLU with He initialization, or sigmoids with PyTorch's default one."""
    from torch import nn

    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for depth in range(DEPTH):
        linear = nn.Linear(WIDTH if depth else inputs, WIDTH)
        if healthy:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        layers[f"hidden{depth + 1}"] = linear
        layers[f"act{depth + 1}"] = nn.ReLU() if healthy else nn.Sigmoid()
    return nn.Sequential(OrderedDict([*layers.items(), ("head", nn.Linear(WIDTH, 1)), ("forecast", nn.Flatten(0))]))


def recurrent(kind: str, outputs: int, *, remembers: int | None = None) -> nn.Module:
    """Build an RNN, LSTM or GRU with a readout of its newest output.

    Args:
        kind: "RNN", "LSTM" or "GRU"; in small letters it is the name of the module.
        outputs: numbers that it returns for each sequence; a single one has no dimension of its own.
        remembers: bars after which the cell of an LSTM still holds e^-1 of its content, by the bias of its forget gate,
            and of which it takes in one share each, by that of its input gate; None leaves PyTorch's default.

    """
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(kind.lower(), getattr(nn, kind)(len(FEATURES), STATE, batch_first=True))
            self.head = nn.Linear(STATE, outputs)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.get_submodule(kind.lower())(x)
            forecast: Tensor = self.head(states[:, -1])
            return forecast.squeeze(-1)

    made = Network()
    if remembers is not None:
        lstm = made.get_submodule("lstm")
        enter, forget = slice(STATE), slice(STATE, 2 * STATE)  # torch's order of the gates: input, forget, cell, output
        with torch.no_grad():
            bias = lstm.get_parameter("bias_ih_l0")
            bias[enter], bias[forget] = -math.log(remembers), math.log(remembers)
            lstm.get_parameter("bias_hh_l0")[: 2 * STATE] = 0.0  # the two are added up
    return made


def _deep(*, healthy: bool) -> tuple[nn.Module, Optimizer]:
    import torch

    net = network(LENGTH * len(FEATURES), healthy=healthy)
    return net, torch.optim.Adam(net.parameters(), lr=1e-3) if healthy else torch.optim.SGD(net.parameters(), lr=0.02)


def _recurrent(kind: str, outputs: int, *, remembers: int | None = None) -> tuple[nn.Module, Optimizer]:
    import torch

    net = recurrent(kind, outputs, remembers=remembers)
    return net, torch.optim.Adam(net.parameters(), lr=3e-3)


DEEP = (
    Subject(
        "sigmoid",
        f"{DEPTH} layers with sigmoid activations and PyTorch's default initialization.",
        partial(_deep, healthy=False),
    ),
    Subject("relu", f"The same {DEPTH} layers with ReLU and He initialization.", partial(_deep, healthy=True)),
)
FLOW = (
    Subject("flow-rnn", "A vanilla RNN as PyTorch makes it.", partial(_recurrent, "RNN", 2)),
    Subject("flow-lstm", "An LSTM as PyTorch makes it.", partial(_recurrent, "LSTM", 2)),
    Subject(
        "flow-lstm-bias",
        f"The same LSTM, its forget-gate bias set to {math.log(NEED):.1f}, the log of {NEED}, and its input-gate bias"
        f" to -{math.log(NEED):.1f}.",
        partial(_recurrent, "LSTM", 2, remembers=NEED),
    ),
)
STOCK = tuple(
    Subject(f"prices-{kind.lower()}", f"{kind} as PyTorch makes it.", partial(_recurrent, kind, 1))
    for kind in ("RNN", "LSTM", "GRU")
)
