"""Gradients and weights -> norms and counts, on the device and without a synchronisation (on CPU there is none to fear)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

# On CPU a float64 norm of a float32 tensor above this many entries costs 10 to 25 times the float32 one, because the
# converted copy no longer fits the cache; so such tensors are reduced by rows in float32 and combined in float64.
_BIG = 16384
_ROW = 512
# Outside of this range float32 squares under- or overflow, so a big tensor is read once more, in float64.
_TRUSTED = (1e-15, 1e18)
# The same for float64 squares of float64 entries.
_TRUSTED_DOUBLE = (1e-140, 1e140)


def plain(gradient: Tensor) -> Tensor:
    """Give the stored entries of a sparse, complex or narrow gradient as a real strided tensor with the same norm."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    elif gradient.layout != torch.strided:
        gradient = gradient.values()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    if gradient.element_size() == 1:  # the float8 formats have no arithmetic
        gradient = gradient.float()
    return gradient


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor, for tensors on one device.

    Args:
        tensors: real, strided, of any floating-point format, mixed as you like; see `plain`.

    Returns:
        float64, shape (len(tensors),), with a relative error of at most 1e-6 over the whole range of each format
        (float32 on devices that have no float64).

    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    device = tensors[0].device
    if device.type == "mps":
        return torch.stack([vector_norm(t, dtype=torch.float32) for t in tensors])
    if device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float64))
    small = [_rows(t) if t.numel() > _BIG and t.dtype is not torch.float64 else t for t in tensors]
    result = torch.stack(torch._foreach_norm(small, dtype=torch.float64))
    for index, value in enumerate(result.tolist()):
        if not _TRUSTED[0] <= value <= _TRUSTED[1]:
            tensor = tensors[index]
            if tensor.dtype is torch.float64:
                if not _TRUSTED_DOUBLE[0] <= value <= _TRUSTED_DOUBLE[1]:
                    result[index] = _rescaled(tensor)
            elif tensor.numel() > _BIG:
                result[index] = _in_double(tensor)
    return result


def _rows(tensor: Tensor) -> Tensor:
    """Norms of rows, whose norm is that of the tensor."""
    flat = tensor.reshape(-1)
    even = flat.numel() - flat.numel() % _ROW
    dtype = torch.float32 if tensor.element_size() < 4 else None
    body = vector_norm(flat[:even].view(-1, _ROW), dim=1, dtype=dtype)
    return body if even == flat.numel() else torch.cat([body, vector_norm(flat[even:], dtype=dtype).view(1)])


def _in_double(tensor: Tensor) -> Tensor:
    return vector_norm(torch.stack([vector_norm(piece, dtype=torch.float64) for piece in tensor.reshape(-1).split(65536)]))


def _rescaled(tensor: Tensor) -> Tensor:
    """Norm of float64 entries whose squares leave the range of float64."""
    if not tensor.numel():
        return tensor.new_zeros(())
    largest = tensor.abs().max()
    return vector_norm(tensor / largest) * largest if 0 < largest < torch.inf else vector_norm(tensor)


def nonfinite(tensor: Tensor) -> Tensor:
    """Count the NaN and infinite entries; int64, shape ()."""
    return torch.count_nonzero(tensor - tensor)  # x - x is 0 only where x is finite; three times faster than isfinite()


def nonzero(tensor: Tensor) -> Tensor:
    """Count the entries that are not exactly 0; int64, shape ()."""
    return torch.count_nonzero(tensor)


def tiny(tensor: Tensor, nonzero: Tensor, limit: float) -> Tensor:
    """Count the non-zero entries whose magnitude is below `limit`, given how many are not zero; int64, shape ()."""
    return torch.count_nonzero(tensor.abs() < limit) + nonzero - tensor.numel()
