"""The networks that the cost is measured on, each with what computes its loss, and a clock; they know no gradwatch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

Step = Callable[[], torch.Tensor]
Build = Callable[[], tuple[nn.Module, Step]]


class Clock:
    """Adds up the thread CPU seconds that are spent inside of what it wraps."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began

        return timed

    def take(self) -> float:
        """Return what has added up, and begin anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def mlp(
    layers: int, width: int, batch: int, kind: type[nn.Module] = nn.ReLU, *, vanished: bool = False
) -> tuple[nn.Module, Step]:
    """Build a plain network with He initialization, for gradients of a sound network's size: two tensors a layer."""
    net = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), kind())), nn.Linear(width, 1))
    for module in net:
        if isinstance(module, nn.Linear) and not vanished:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if kind is nn.ReLU else "linear")
    x, y = torch.randn(batch, width), torch.randn(batch, 1)
    return net, lambda: mse_loss(net(x), y)


class Gpt(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, blocks: int = 6, width: int = 256, vocabulary: int = 512, length: int = 128) -> None:
        """Build it."""
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next token."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(
            self.norm(self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1])), mask=mask, is_causal=True))
        )


def gpt(blocks: int = 6, width: int = 256, length: int = 128, batch: int = 8) -> tuple[nn.Module, Step]:
    """Build a decoder-only transformer, for 8 texts or so many."""
    net = Gpt(blocks, width, 512, length)
    x = torch.randint(512, (batch, length + 1))
    return net, lambda: cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


class Lstm(nn.Module):
    """Two layers, and a readout of the last step."""

    def __init__(self, hidden: int) -> None:
        """Build it."""
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, hidden, 2, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one number per sequence."""
        return self.head(self.lstm(x)[0][:, -1])


def lstm(hidden: int = 128, length: int = 256, batch: int = 32) -> tuple[nn.Module, Step]:
    """Build two recurrent layers and a readout."""
    net, x, y = Lstm(hidden), torch.randn(batch, length, 32), torch.randn(batch, 1)
    return net, lambda: mse_loss(net(x), y)


def conv(size: int = 32, layers: int = 20) -> tuple[nn.Module, Step]:
    """Build convolutions of 32 channels with BatchNorm, for 32 square images."""
    blocks = [
        m
        for i in range(layers)
        for m in (nn.Conv2d(32 if i else 3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    ]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    x, y = torch.randn(32, 3, size, size), torch.randint(10, (32,))
    return net, lambda: cross_entropy(net(x), y)
