"""Squared gradients by timestep and row -> the gain by lag, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradwatch.timesteps.adjoint import lags_of

_GROUPS = 8
"""Into how many groups the rows go, at most, of which each is left out once."""
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)
"""Student's t, 97.5 %, by degrees of freedom from 1 on: one less than there are groups."""
_Z95 = 1.96


def gain_and_error(directions: Sequence[Sequence[tuple[Tensor, Tensor]]], *, exact: bool) -> Tensor:
    """Return the length of the longest row, the gain by lag, and the error of its logarithm; float64, (1 + 2 T,).

    The gain is the root mean square over the rows that have this lag, each aligned at its own end. The error is half of
    a 95 % interval of the logarithm of the gain over its maximum, as an estimate of what all directions together give
    on these rows.

    Args:
        directions: by cotangent, and by sequence, the squared norms of gradients, (T, B), and the lengths of the rows,
            (B,).
        exact: whether the squares are those of the Jacobian itself, so that there is no error.

    """
    squares, there = _laid_out(directions)
    longest = torch.stack([lengths.max().to(squares.device) for _, lengths in directions[0]]).max().to(squares)
    gain = _root_mean(squares, there)
    error = torch.zeros_like(gain) if exact else torch.minimum(_spread(squares, there), _bound(squares))
    return torch.cat([longest.view(1), gain, error])


def gain_by_lag(directions: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
    """Return the gain of `gain_and_error` alone, (T,)."""
    return _root_mean(*_laid_out(directions))


def _root_mean(squares: Tensor, there: Tensor) -> Tensor:
    return (squares.mean(0).sum(1) / there.sum(1).clamp(min=1)).sqrt()


def _laid_out(directions: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Lay out squares by lag from each row's own end, (K, T, B), and tell which rows have that lag, (T, B)."""
    device, most = directions[0][0][0].device, max(len(squares) for squares, _ in directions[0])
    laid = [[_by_lag(squares.to(device), lengths.to(device), most) for squares, lengths in one] for one in directions]
    return torch.stack([torch.cat([s for s, _ in one], 1) for one in laid]), torch.cat([t for _, t in laid[0]], 1)


def _by_lag(squares: Tensor, lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Lay (T, B) out by lag from each row's own end, (most, B); and tell which rows have that lag."""
    if bool((lengths == len(squares)).all()):  # as nearly always
        laid, has = squares.flip(0), torch.ones_like(squares)
    else:
        lag, there = lags_of(squares, lengths)
        laid = torch.zeros_like(squares).scatter_add_(0, lag, squares * there)
        has = torch.zeros_like(squares).scatter_add_(0, lag, there)
    if len(squares) == most:
        return laid, has
    more = (0, 0, 0, most - len(squares))
    return nn.functional.pad(laid, more), nn.functional.pad(has, more)


def _bound(squares: Tensor) -> Tensor:
    """Return how far the logarithm of a gain can be off, (T,), where the Jacobian of each row is of rank 1.

    Then `||J^T v||^2` is spread as widely as it can be: as a square of a normal number, about. With more rows and
    directions it is a sum of them, whose quantile is that of Wilson and Hilferty, 1931.

    Args:
        squares: (K, T, B).

    """
    mean = squares.mean(0)
    rows = mean.sum(1).square() / mean.square().sum(1).clamp(min=torch.finfo(mean.dtype).tiny)
    freedom = (len(squares) * rows).clamp(min=1)
    lowest = 1 - 2 / (9 * freedom) - _Z95 * (2 / (9 * freedom)).sqrt()
    return -1.5 * lowest.clamp(min=0.1).log()


def _spread(squares: Tensor, there: Tensor) -> Tensor:
    """Return the same from what was measured: from direction to direction, or if there is one, from row to row."""
    if len(squares) > 1:
        mean = squares.mean(0)
        variance = (squares - mean).square().sum(0).sum(1) / (len(squares) - 1) / len(squares)
        relative = variance.sqrt() / mean.sum(1).clamp(min=torch.finfo(mean.dtype).tiny)
        of_peak = relative[mean.sum(1).argmax()]
        freedom = squares.shape[2] * (len(squares) - 1)
        return 0.5 * _T95[min(freedom, len(_T95)) - 1] * (relative.square() + of_peak.square()).sqrt()
    return _without_groups(squares[0], there)


def _without_groups(squares: Tensor, there: Tensor) -> Tensor:
    """Return the jackknife's error: of rows that are left out in groups, one after the other."""
    count = squares.shape[1]
    groups = min(_GROUPS, count)
    if groups < 2:
        return torch.full_like(squares[:, 0], torch.inf)
    parts, rows = squares, there
    if groups < count:
        of = torch.arange(count, device=squares.device) % groups
        parts, rows = (every.new_zeros((len(every), groups)).index_add_(1, of, every) for every in (squares, there))
    without = (parts.sum(1, keepdim=True) - parts).clamp(min=0) / (rows.sum(1, keepdim=True) - rows)
    share = without / without.nan_to_num(nan=0.0, posinf=0.0).amax(0)
    logs = 0.5 * share.clamp(min=torch.finfo(squares.dtype).tiny).log()
    variance = (logs - logs.mean(1, keepdim=True)).square().sum(1) * (groups - 1) / groups
    return (_T95[groups - 2] * variance.sqrt()).nan_to_num(nan=math.inf)
