"""Padding at the ends of rows, and what the data before it gets of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def equal_to_last(x: Tensor) -> Tensor:
    """Tell which timesteps belong to the run of equal ones that each row ends with, (T, R), of (T, R, ...)."""
    return (x == x[-1]).flatten(2).all(-1).flip(0).to(torch.int64).cumprod(0).flip(0).bool()


def may_be_padded(x: Tensor) -> bool:
    """Tell whether any row of (T, R, ...) ends with two equal timesteps, as padding does; this waits for the values."""
    return len(x) > 1 and bool((x[-1] == x[-2]).flatten(1).all(-1).any())


def padding_of(same: Tensor, squares: Tensor) -> Tensor:
    """Return how long the padding of the median row is, and what its data gets of the gradient over what that gets.

    Padding is a run of equal timesteps at the end that is not as long in every row. So are a padding index, whatever
    its embedding is, and zeros; but not the blank end of a task that every row has.

    Args:
        same: as `equal_to_last` gives it, (T, R).
        squares: of the gradient at each timestep, (T, R).

    Returns:
        The length, 0 where there is no padding; and the largest norm at a timestep of data over the largest at one of
        padding, infinite where the padding gets nothing. Float64, (2,).

    """
    count = same.sum(0)
    length = torch.where(count > 1, count, 0)
    padded = same & (count > 1)
    norms = squares.double().sqrt()
    data, padding = (norms * ~padded).amax(0), (norms * padded).amax(0)
    share = torch.where(padding > 0, data / padding, torch.inf)
    typical = torch.where(length.max() > length.min(), length.double().median(), 0.0)
    return torch.stack([typical, share.median()])


def told(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the copied numbers of `padding_of`; None where there is no padding, or it gets nothing."""
    padding, data = numbers
    return (padding, data) if padding and math.isfinite(data) else (None, None)
