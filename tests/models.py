"""Models that several tests train."""

from __future__ import annotations

import torch
from torch import nn


def tall(*, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
