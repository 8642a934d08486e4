"""A small training, one step after the other, and what is true of each of its steps."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Column = tuple[float | None, ...]
"""One number for each parameter of the model; None where there is no gradient."""
Make = Callable[[nn.Module, float | None], list[Any]]
"""Makes the optimizers of a model, with a learning rate (None: the class's default)."""

_ROWS, _TIMESTEPS = 32, 16
_EVALUATE_EVERY = 10
"""Steps between evaluations, for which schedule-free optimizers put other weights in place."""


@dataclass(frozen=True)
class Case:
    """An optimizer, and how a loop calls it."""

    library: str
    name: str
    make: Make
    loop: Callable[[Training], None]
    needs_rate: bool = False
    """Whether its learning rate has no default."""
    in_backward: bool = False
    """Whether it steps inside of the backward pass, each parameter by itself."""
    calls_backward: bool = False
    """Whether the library makes the backward passes, so that only hooks on the parameters see what they leave."""
    mixes: bool = False
    """Whether it steps with what it makes of several gradients, or of one: a snapshot may be of any of them."""
    second_order: bool = False
    """Whether it derives the gradient once more."""
    distributed: bool = False
    """Whether it wants a process group."""


@dataclass
class Truth:
    """What is true of one training step."""

    losses: list[float] = field(default_factory=list)
    """Of each evaluation."""
    passes: list[Column] = field(default_factory=list)
    """Norms of the gradients, right after each backward pass."""
    before_step: int = 0
    """How many of the passes there were when the call began that steps."""
    left: Column = ()
    """Norms of the gradients that the step has left."""
    weight_norm: Column = ()
    update_ratio: Column = ()
    weights: list[bytes] = field(default_factory=list)
    gradients: list[bytes | None] = field(default_factory=list)

    def gradients_taken(self, *, mixes: bool) -> list[Column]:
        """Return the norms of the gradient that the optimizer takes; of one that mixes, all that may be it.

        Of a closure that is evaluated several times, the first evaluation counts.
        """
        if mixes:
            return [*self.passes, self.left]
        return self.passes[self.before_step :][:1] or self.passes[-1:]


class Lstm(nn.Module):
    """Reads a sequence."""

    def __init__(self) -> None:
        """Make it."""
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number for each sequence."""
        return self.head(self.lstm(x)[0][:, -1])


def mlp() -> nn.Module:
    """Make a network of three layers."""
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (_ROWS, 16)),
    "lstm": (Lstm, (_ROWS, _TIMESTEPS, 8)),
}
"""How each is made, and the shape of its batches."""


class Training:
    """A model that trains, always from the same seed, and the truth about each step.

    Nothing is hung on optimizers, and on parameters only where the library calls `backward()`.
    """

    def __init__(self, case: Case, network: str, rate: float | None) -> None:
        """Make the model and its optimizers."""
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  (the state that everybody shares)
        make, self._shape = NETWORKS[network]
        self.case, self.model = case, make()
        self.parameters = list(self.model.parameters())
        if case.in_backward or case.calls_backward:  # before the optimizer's own hooks
            for p in self.parameters:
                p.register_post_accumulate_grad_hook(self._arrived)
        self.optimizers = case.make(self.model, rate)
        self.watcher: Any = None
        self.truths: list[Truth] = []
        self.random_states: tuple[object, ...] = ()
        """Those of torch, Python and NumPy, after the run."""
        self.x = self.target = torch.empty(0)

    @property
    def optimizer(self) -> Any:
        """The only optimizer."""
        (only,) = self.optimizers
        return only

    @property
    def truth(self) -> Truth:
        """That of the step that is under way."""
        return self.truths[-1]

    def run(self, steps: int) -> Training:
        """Train."""
        self._modes("train")
        for number in range(1, steps + 1):
            self.x = torch.randn(self._shape)
            self.target = self.x.flatten(1)[:, -1:]
            self.truths.append(Truth())
            self.case.loop(self)
            self.truth.left = self._norms()
            self.truth.weights = [raw(p) for p in self.parameters]
            self.truth.gradients = [None if p.grad is None else raw(p.grad) for p in self.parameters]
            if number % _EVALUATE_EVERY == 0:
                self._modes("eval")
                with torch.no_grad():
                    self.model(self.x)
                self._modes("train")
        numpy = repr(np.random.get_state())  # noqa: NPY002
        self.random_states = raw(torch.get_rng_state()), random.getstate(), numpy
        return self

    def _modes(self, mode: str) -> None:
        for optimizer in self.optimizers:
            # heavyball's wrapper has both, and hands them on to what may have neither
            if hasattr(getattr(optimizer, "wrapped_optimizer", optimizer), mode):
                getattr(optimizer, mode)()

    # --- what loops are made of ---

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss; the first of a step is told to gradwatch."""
        loss = nn.functional.mse_loss(output, target)
        if not self.truth.losses and self.watcher is not None:
            self.watcher.record(loss)
        self.truth.losses.append(loss.item())
        return loss

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        return self.criterion(self.model(self.x), self.target)

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def evaluate(self) -> Tensor:
        """Do what a closure does."""
        self.zero_grad()
        loss = self.loss()
        loss.backward(create_graph=self.case.second_order)
        self.passed()
        return loss

    def passed(self) -> None:
        """Take note: a backward pass is done."""
        self.truth.passes.append(self._norms())

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Compare the weights before and after the outermost call that steps."""
        self.truth.before_step = len(self.truth.passes)
        before = [p.detach().to(torch.float64, copy=True) for p in self.parameters]
        yield
        moved = [(p.detach().double() - old).norm().item() for p, old in zip(self.parameters, before, strict=True)]
        sizes = [old.norm().item() for old in before]
        self.truth.weight_norm = tuple(sizes)
        self.truth.update_ratio = tuple(
            move / size if size else math.inf if move else 0.0 for move, size in zip(moved, sizes, strict=True)
        )

    def _norms(self) -> Column:
        return tuple(None if p.grad is None else norm(p.grad) for p in self.parameters)

    def _arrived(self, parameter: Tensor) -> None:
        """Take note: a parameter has its gradient. A second one is of a further backward pass."""
        number = next(i for i, p in enumerate(self.parameters) if p is parameter)
        passes = self.truth.passes
        if not passes or passes[-1][number] is not None:
            passes.append((None,) * len(self.parameters))
        assert parameter.grad is not None
        passes[-1] = (*passes[-1][:number], norm(parameter.grad), *passes[-1][number + 1 :])


def norm(gradient: Tensor) -> float:
    """Return the norm in float64."""
    return gradient.detach().to_dense().double().norm().item()


def raw(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's entries."""
    return tensor.detach().to_dense().contiguous().flatten().view(torch.uint8).numpy().tobytes()
