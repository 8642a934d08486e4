"""Three tasks whose relevant lags are known, and a short training of any network on them by one of its inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.stock import truth
from gradwatch.model.arguments import labelled
from gradwatch.model.nested import mapped

STEPS, RATE, CLIP = 150, 2e-3, 1.0
EVENT = (0.84, 0.96)
"""Where the order flow has its signal, as shares of the sequence, from the newest timestep back."""
WORDS = 4
"""The first words are padding, beginning, end and mask."""


class Task(NamedTuple):
    """What a network is to learn."""

    name: str
    draw: Callable[[int, int], tuple[Tensor, Tensor]]
    """Takes rows and timesteps; returns numbers (rows, timesteps) and targets (rows,) of variance 1."""
    is_class: bool
    """Whether the targets are 1 and -1."""


def first_sign(rows: int, timesteps: int) -> tuple[Tensor, Tensor]:
    """Return noise, and the sign of its oldest value."""
    x = torch.randn(rows, timesteps)
    return x, x[:, 0].sign()


def adding(rows: int, timesteps: int) -> tuple[Tensor, Tensor]:
    """Return numbers from 0 to 1 of which two are marked, by 2 more; and the sum of those, standardized."""
    x = torch.rand(rows, timesteps)
    marked = torch.rand(rows, timesteps).argsort(1)[:, :2]
    y = x.gather(1, marked).sum(1)
    return x.scatter_add(1, marked, torch.full(marked.shape, 2.0)), (y - 1) * math.sqrt(6)


def order_flow(rows: int, timesteps: int) -> tuple[Tensor, Tensor]:
    """Return order flow, pressed to one side long ago, and to which."""
    x, y = torch.randn(rows, timesteps), torch.randint(0, 2, (rows,)) * 2.0 - 1
    oldest, newest = (timesteps - int(share * timesteps) for share in EVENT[::-1])
    x[:, oldest:newest] += y.unsqueeze(1)
    return x, y


TASKS = (
    Task("first sign", first_sign, is_class=True),
    Task("adding", adding, is_class=False),
    Task("order flow", order_flow, is_class=True),
)


class Fed(nn.Module):
    """A network whose one input is drawn anew, and a linear readout of its newest output."""

    def __init__(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], label: str) -> None:
        """Wrap it.

        Args:
            network: what is trained.
            args: its positional arguments.
            kwargs: its keyword arguments.
            label: the way to the input that is drawn, as gradwatch tells it.

        """
        super().__init__()
        self.network, self.args, self.kwargs = network, args, kwargs
        (self.old,) = (value for name, value in labelled(network, args, kwargs) if name == label)
        if not isinstance(self.old, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(self.old).__name__}")
        self.rows, self.timesteps = self.old.shape[:2]
        self.out = nn.Linear(self._newest(self.old).shape[1], 1)

    def get_input_embeddings(self) -> nn.Module:
        """Return what makes numbers of words."""
        return self.network.get_input_embeddings()  # type: ignore[no-any-return,operator]

    def fed(self, x: Tensor) -> Tensor:
        """Return numbers (rows, timesteps) as this input has them: the rest of its features are noise, or as words."""
        if not self.old.is_floating_point():
            return (WORDS + 5 + 4 * x).round().clamp(WORDS, 31).to(self.old.dtype)
        if self.old.dim() == 2:
            return x
        noise = torch.randn(self.old.shape)
        noise[..., 0] = x.view(*x.shape, *[1] * (noise.dim() - 3))
        return noise

    def arguments(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the network, with another input."""
        args, kwargs = mapped((self.args, self.kwargs), lambda value: x if value is self.old else value)
        return args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows,)."""
        return self.out(self._newest(x)).squeeze(1)

    def _newest(self, x: Tensor) -> Tensor:
        args, kwargs = self.arguments(x)
        output = truth.first_output(self.network(*args, **kwargs))
        newest = output[:, -1] if output.dim() > 2 and output.shape[1] == self.timesteps else output
        return newest.float().reshape(self.rows, -1)


def train(fed: Fed, task: Task) -> float:
    """Train a network on a task; return how much of it that has learned: right of 1, or 1 - the squared error."""
    optimizer = torch.optim.Adam(fed.parameters(), lr=RATE)
    fed.train()
    for _ in range(STEPS):
        x, y = task.draw(fed.rows, fed.timesteps)
        loss = (fed(fed.fed(x)) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(fed.parameters(), CLIP)
        optimizer.step()
    fed.eval()
    scores = []
    for _ in range(512 // fed.rows):
        x, y = task.draw(fed.rows, fed.timesteps)
        said = fed(fed.fed(x)).detach()
        scores.append((said.sign() == y).float().mean() if task.is_class else 1 - (said - y).square().mean())
    return float(torch.stack(scores).mean())


def seconds(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return how long the processor needs for a forward and backward pass, of two the second."""
    for _ in range(2):
        began = time.process_time()
        truth.first_output(network(*args, **kwargs)).sum().backward()
        taken = time.process_time() - began
    network.zero_grad()
    return taken
