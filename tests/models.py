"""Models that several tests train."""

from __future__ import annotations

import torch
from torch import nn


def tall(*, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def deep(depth, width, activation=nn.Sigmoid):
    """Return a stack in which, of sigmoids, the gradient vanishes."""
    return nn.Sequential(
        *(m for _ in range(depth) for m in (nn.Linear(width, width), activation())), nn.Linear(width, 1)
    )


class Model(nn.Module):
    """Hands the work to a function, so that each case stands where it is tested."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


class Loop(nn.Module):
    """Calls a cell once a timestep, and reads its last output."""

    def __init__(self, kind, inputs, size):
        super().__init__()
        self.cell, self.head = kind(inputs, size), nn.Linear(size, 2)

    def forward(self, x):
        state = None
        for now in x:
            state = self.cell(now, state)
        return self.head(state[0] if isinstance(state, tuple) else state)
