"""Gradients and weights -> norms and counts, on the device and without a synchronisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm  # torch does not say what it returns

# What the fastest exact way is depends on the size, on CPU. Above _BIG entries a copy converted to float64 would leave
# the cache and cost 10 to 25 times the float32 norm; so rows of about _ROW entries are reduced in float32, and float64
# combines them. From _MANY tensors of one shape on, a stack of them is reduced at once: a call for each costs more
# than its arithmetic.
_BIG = 16384
_ROW = 512
_MANY = 16
_STACKED = 2**16
# Outside of this range float32 squares under- or overflow, so a big tensor is read once more, in float64.
_TRUSTED = (1e-15, 1e18)
# The same for float64 squares of float64 entries.
_TRUSTED_DOUBLE = (1e-140, 1e140)
# Formats that need no conversion.
_ORDINARY = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def plain(gradient: Tensor) -> Tensor:
    """Return the stored entries of any gradient as a real strided tensor with the same norm.

    Of a `DTensor` those of its piece here.
    """
    gradient = gradient.detach()
    if type(gradient) is Tensor and gradient.layout is torch.strided and gradient.dtype in _ORDINARY:
        return gradient
    gradient = piece(gradient)
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    elif gradient.layout != torch.strided:
        gradient = gradient.values()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    if gradient.element_size() == 1:  # the float8 formats have no arithmetic
        gradient = gradient.float()
    return gradient


def piece(tensor: Tensor) -> Tensor:
    """Return what this process holds of a `DTensor`; any other tensor is whole."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.wait() if hasattr(local, "wait") else local  # of a collective that is under way


def holders(tensor: Any) -> tuple[int, ...] | None:  # noqa: ANN401  (a DTensor, which is costly to import)
    """Return the ranks whose pieces make up a `DTensor`, copies of them left out; None where it is whole here.

    Raises:
        ValueError: the pieces are summands, which tell nothing of the sum.

    """
    if not hasattr(tensor, "placements"):
        return None
    if any(p.is_partial() for p in tensor.placements):
        raise ValueError("it is a sum over processes that has not been taken yet")
    ranks, here = tensor.device_mesh.mesh, tensor.device_mesh.get_coordinate()
    if here is None:
        return None
    for dimension in reversed(range(ranks.dim())):
        if tensor.placements[dimension].is_replicate():
            ranks = ranks.select(dimension, here[dimension])
    found = tuple(ranks.flatten().tolist())
    return found if len(found) > 1 else None


def number(value: float | Tensor) -> Tensor:
    """Return a number as a float64 tensor: where it is, or else on the CPU, whatever the default device is."""
    return torch.as_tensor(value, dtype=torch.float64, device=value.device if isinstance(value, Tensor) else "cpu")


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor, for tensors on one device.

    Args:
        tensors: real, strided, of any floating-point format, mixed as you like; see `plain`.

    Returns:
        float64, shape (len(tensors),), with a relative error of at most 1e-6 over the whole range of each format
        (float32 on devices that have no float64).

    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    device = tensors[0].device
    if device.type == "mps":
        return torch.stack([vector_norm(t, dtype=torch.float32) for t in tensors])
    if device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float64))
    any_big = max(map(torch.numel, tensors)) > _BIG
    values = _in_groups(
        [_rows(t) if t.numel() > _BIG and t.dtype is not torch.float64 else t for t in tensors] if any_big else tensors
    )
    if not (_TRUSTED[0] <= min(values) and sum(values) <= _TRUSTED[1]):  # seldom; a NaN fails the second
        values = [
            v if _TRUSTED[0] <= v <= _TRUSTED[1] else _second_look(t, v) for t, v in zip(tensors, values, strict=True)
        ]
    return torch.tensor(values, dtype=torch.float64, device=device)


def norm(tensor: Tensor) -> Tensor:
    """L2 norm of one tensor: the same as `norms` of it alone, in fewer calls; shape ()."""
    if tensor.device.type != "cpu":
        return norms([tensor])[0]
    big = tensor.numel() > _BIG and tensor.dtype is not torch.float64
    found = vector_norm(_rows(tensor) if big else tensor, dtype=torch.float64)
    value = found.item()
    return found if _TRUSTED[0] <= value <= _TRUSTED[1] else number(_second_look(tensor, value))


def _in_groups(tensors: Sequence[Tensor]) -> list[float]:
    """Norms in float64 of tensors that are small, or rows of what is big; many of one shape at once."""
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.shape, tensor.dtype), []).append(index)
    order: list[int] = []
    values: list[float] = []
    rest: list[int] = []
    for members in groups.values():
        if len(members) < _MANY:
            rest += members
            continue
        for chunk in _chunks(members, tensors[members[0]].numel()):
            stack = torch.stack([tensors[i] for i in chunk]).unsqueeze(-1)  # a number alone has no dimension to reduce
            values += vector_norm(stack.flatten(1), dim=1, dtype=torch.float64).tolist()
        order += members
    if rest:
        values += torch.stack(torch._foreach_norm([tensors[i] for i in rest], dtype=torch.float64)).tolist()
        order += rest
    result = [0.0] * len(tensors)
    for index, value in zip(order, values, strict=True):
        result[index] = value
    return result


def _chunks(members: list[int], size: int) -> Iterable[list[int]]:
    many = max(_STACKED // max(size, 1), 1)
    return (members[k : k + many] for k in range(0, len(members), many))


def _fits(width: int) -> bool:
    """Tell whether rows of this width are short enough for float32 to lose nothing, and long enough for a call."""
    return _ROW // 8 <= width <= _ROW * 3 // 2


def _rows(tensor: Tensor) -> Tensor:
    """Norms of rows, whose norm is that of the tensor; shape (rows,)."""
    dtype = torch.float32 if tensor.element_size() < torch.float32.itemsize else None
    tensor = tensor.contiguous()  # across strides torch adds one by one, and equal entries lose up to 4e-6
    if tensor.dim() > 1 and _fits(tensor.shape[-1]):
        return vector_norm(tensor, dim=-1, dtype=dtype).flatten()
    flat = tensor.reshape(-1)
    even = flat.numel() - flat.numel() % _ROW
    body = vector_norm(flat[:even].view(-1, _ROW), dim=1, dtype=dtype)
    return body if even == flat.numel() else torch.cat([body, vector_norm(flat[even:], dtype=dtype).view(1)])


def _second_look(tensor: Tensor, value: float) -> float:
    """Norm of a tensor whose squares may have left the range of the arithmetic that gave `value`."""
    if tensor.dtype is torch.float64:
        return value if _TRUSTED_DOUBLE[0] <= value <= _TRUSTED_DOUBLE[1] else float(_rescaled(tensor))
    if tensor.numel() <= _BIG:
        return value
    if value == 0:
        low, high = torch.aminmax(tensor)
        if low == 0 == high:
            return 0.0
    if math.isfinite(value):
        factor = 2.0**64 if value < 1 else 2.0**-64
        scaled = float(vector_norm(_rows(tensor.float() * factor), dtype=torch.float64))
        if _TRUSTED[0] <= scaled <= _TRUSTED[1]:
            return scaled / factor
    return float(
        vector_norm(
            torch.stack(
                [vector_norm(piece, dtype=torch.float64) for piece in torch.split(tensor.reshape(-1), _STACKED)]
            )
        )
    )


def _rescaled(tensor: Tensor) -> Tensor:
    """Norm of float64 entries whose squares leave the range of float64."""
    if not tensor.numel():
        return tensor.new_zeros(())
    largest = tensor.abs().max()
    return vector_norm(tensor / largest) * largest if 0 < largest < torch.inf else vector_norm(tensor)


def nonfinite(tensor: Tensor) -> Tensor:
    """Count the NaN and infinite entries; int64, shape ()."""
    return torch.count_nonzero(tensor - tensor)  # x - x is 0 only where x is finite; three times faster than isfinite()


def small(tensors: Sequence[Tensor], limits: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Count small entries, for tensors on one device.

    Args:
        tensors: as for `norms`.
        limits: one for each tensor.

    Returns:
        How many entries are exactly 0, and how many are not but have a magnitude below the limit; both float64, shape
        (len(tensors),).

    """
    if tensors[0].device.type == "cpu":
        found = [_small_on_cpu(t, limit) for t, limit in zip(tensors, limits, strict=True)]
        counts = torch.tensor(found, dtype=torch.float64, device="cpu")
        return counts[:, 0], counts[:, 1]
    zeros = torch.stack([t.numel() - torch.count_nonzero(t) for t in tensors])
    below = torch.stack([torch.count_nonzero(t.abs() < limit) for t, limit in zip(tensors, limits, strict=True)])
    return zeros, below - zeros


def _small_on_cpu(tensor: Tensor, limit: float) -> tuple[int, int]:
    import numpy as np  # counts what a comparison gives three times faster than torch does

    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    entries = wide.reshape(-1).numpy()
    zeros, below = 0, 0
    for start in range(0, entries.size, _STACKED):  # in pieces whose masks stay in the cache
        piece = entries[start : start + _STACKED]
        found = int(np.count_nonzero((piece < limit) & (piece > -limit)))
        below += found
        zeros += int(np.count_nonzero(piece == 0)) if found else 0
    return zeros, below - zeros


def spectral_norm(tensor: Tensor, iterations: int = 8) -> Tensor:
    """Return the largest singular value of a weight, its first dimension against all others; float32, shape ().

    From below and within a few percent, by power iteration from a fixed start, so that no random number is drawn.
    """
    matrix = tensor.reshape(tensor.shape[0], -1).float()
    vector = torch.cos(torch.arange(matrix.shape[1], device=matrix.device, dtype=torch.float32) ** 1.5)
    for _ in range(iterations):
        vector = matrix.mT @ (matrix @ vector)
        vector = vector / vector_norm(vector).clamp(min=1e-30)
    found: Tensor = vector_norm(matrix @ vector)
    return found
