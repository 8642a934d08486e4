"""Gradients and weights -> norms and counts, on the device and without a synchronisation."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm  # torch does not say what it returns

# What the fastest exact way is depends on the size, on CPU. Above _BIG entries a copy converted to float64 would leave
# the cache and cost 10 to 25 times the float32 norm; so rows of about _ROW entries are reduced in float32, and float64
# combines them: those of float32 by the dot product of BLAS, which reads twice as fast as torch's norm, but with one
# thread, so above _SHARED entries by torch. From _MANY tensors of one shape, or _PACKED of up to _SMALL entries, on,
# they are reduced at once: a call for each costs more than its arithmetic.
_BIG = 16384
_ROW = 512
_MANY = 16
_PACKED = 128
_SMALL = 512
_SHARED = 2**22
_STACKED = 2**16
# Outside of this range float32 squares under- or overflow, so a big tensor is read once more, in float64.
_TRUSTED = (1e-15, 1e18)
# The same for float64 squares of float64 entries.
_TRUSTED_DOUBLE = (1e-140, 1e140)
CLASSES = frozenset({Tensor, nn.Parameter})
"""Classes whose memory is what they say."""
PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Formats that need no conversion."""


def plain(gradient: Tensor) -> Tensor:
    """Return the stored entries of any gradient as a real strided tensor with the same norm.

    Of a `DTensor` those of its piece here.
    """
    gradient = gradient.detach()
    if type(gradient) is Tensor and gradient.layout is torch.strided and gradient.dtype in PLAIN:
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


def measured(tensors: Sequence[Tensor]) -> Tensor | Sequence[float]:
    """Return the same as `norms`, as plain numbers where that takes no copy from a device."""
    return on_cpu(tensors) if tensors and tensors[0].device.type == "cpu" else norms(tensors)


def divided(numbers: Tensor | Sequence[float], scale: float | Tensor) -> Tensor | Sequence[float]:
    """Return what was measured over a loss scale, which may have fallen to 0."""
    if isinstance(numbers, Tensor):
        return numbers / torch.as_tensor(scale, dtype=numbers.dtype, device=numbers.device)
    by = float(scale)
    return [n / by if by else n * math.inf for n in numbers]


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
    return torch.tensor(on_cpu(tensors), dtype=torch.float64, device=device)


def norm(tensor: Tensor) -> Tensor:
    """L2 norm of one tensor; shape ()."""
    return norms([tensor])[0] if tensor.device.type != "cpu" else number(on_cpu([tensor])[0])


def on_cpu(tensors: Sequence[Tensor]) -> list[float]:
    """Return the same as `norms`, of tensors on the CPU, as plain numbers."""
    import numpy as np

    if len(tensors) >= _PACKED:
        small = [_packs(t) for t in tensors]
        if _PACKED <= sum(small) < len(tensors):
            packed = iter(_packed(list(itertools.compress(tensors, small))))
            others = iter(on_cpu([t for t, its in zip(tensors, small, strict=True) if not its]))
            return [next(packed if its else others) for its in small]
        if all(small):
            return _packed(tensors)
    with np.errstate(all="ignore"):
        values = [_by_blas(t) for t in tensors]
    if None in values:
        left = iter(_by_torch([t for t, value in zip(tensors, values, strict=True) if value is None]))
        return [next(left) if value is None else value for value in values]
    return values  # type: ignore[return-value]  # none is None


def _by_blas(tensor: Tensor) -> float | None:
    """Return the norm of a float32 tensor; None of one that is of another format or class, or for several threads."""
    if tensor.dtype is not torch.float32 or type(tensor) not in CLASSES or (size := tensor.numel()) > _SHARED:
        return None
    entries = _entries(tensor)
    if size <= 2 * _ROW:
        square = float(entries.dot(entries))
    else:
        rows = entries[: size - size % _ROW].reshape(-1, _ROW)
        square = math.fsum(_dots(rows, rows).tolist())
        if size % _ROW:
            rest = entries[size - size % _ROW :]
            square += float(rest.dot(rest))
    value = math.sqrt(square)
    return value if _TRUSTED[0] <= value <= _TRUSTED[1] else _second_look(tensor, value)


def _entries(tensor: Tensor) -> Floats:
    """Return the entries of a float32 or float64 tensor on the CPU as an array of one dimension.

    On the same memory where it can be, and only as long as the tensor lives. `Tensor.numpy` would forbid the storage to
    be resized from then on, which FSDP does with what it gathers.
    """
    import numpy as np

    size = tensor.numel()
    if not size or not tensor.is_contiguous():
        whole: Floats = np.asarray(np.from_dlpack(tensor.detach().contiguous())).reshape(-1)
        return whole
    single = tensor.dtype is torch.float32
    memory = ((ctypes.c_float if single else ctypes.c_double) * size).from_address(tensor.data_ptr())
    entries: Floats = np.frombuffer(memory, np.float32 if single else np.float64)  # type: ignore[call-overload]
    return entries


def _dots(left: Floats, right: Floats) -> Floats:
    """Return the dot products of rows; `numpy.vecdot`, which numpy has from 2.0 on."""
    import numpy as np

    if hasattr(np, "vecdot"):
        found: Floats = np.vecdot(left, right)
        return found
    return np.asarray(np.matmul(left[:, None], right[:, :, None])).reshape(-1)


def _packs(tensor: Tensor) -> bool:
    """Tell whether a tensor is so small that many of them are copied side by side."""
    return tensor.numel() <= _SMALL and tensor.dtype is torch.float32 and type(tensor) in CLASSES


def _packed(tensors: Sequence[Tensor]) -> list[float]:
    """Norms of many small tensors, side by side and in float64: a call for each costs more than its sum."""
    import numpy as np

    flat, sums = _side_by_side(tensors)
    squares = _entries(flat).astype(np.float64)
    return list(np.sqrt(sums(np.multiply(squares, squares, out=squares))).tolist())


def _side_by_side(tensors: Sequence[Tensor]) -> tuple[Tensor, Callable[[NDArray[Any]], Floats]]:
    """Return the entries of many tensors in one, and what adds up by tensor an array of its length."""
    import numpy as np

    flat: Tensor = torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    sizes = np.array([t.numel() for t in tensors], dtype=np.intp)
    full = sizes > 0
    starts = (np.cumsum(sizes) - sizes)[full]

    def sums(values: NDArray[Any]) -> Floats:
        found = np.zeros(len(sizes))
        if len(starts):
            found[full] = np.add.reduceat(values, starts, dtype=np.float64)
        return found

    return flat, sums


def _by_torch(tensors: Sequence[Tensor]) -> list[float]:
    """Norms of tensors of any format and size."""
    values = _in_groups([_rows(t) if t.numel() > _BIG and t.dtype is not torch.float64 else t for t in tensors])
    if _TRUSTED[0] <= min(values) and sum(values) <= _TRUSTED[1]:  # nearly always; a NaN fails the second
        return values
    return [v if _TRUSTED[0] <= v <= _TRUSTED[1] else _second_look(t, v) for t, v in zip(tensors, values, strict=True)]


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
        return float(vector_norm(tensor, dtype=torch.float64))
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


def small(tensors: Sequence[Tensor], limits: Sequence[float]) -> tuple[Tensor | list[float], Tensor | list[float]]:
    """Count small entries, for tensors on one device.

    Args:
        tensors: as for `norms`.
        limits: one for each tensor.

    Returns:
        How many entries are not 0, and how many of these have a magnitude below the limit; tensors of (len(tensors),),
        or lists where the tensors are on the CPU.

    """
    if tensors[0].device.type == "cpu":
        if len(tensors) >= _PACKED and len(set(limits)) == 1 and all(map(_packs, tensors)):
            return _small_together(tensors, limits[0])
        found = [_small_on_cpu(t, limit) for t, limit in zip(tensors, limits, strict=True)]
        return [nonzero for nonzero, _ in found], [tiny for _, tiny in found]
    zeros = torch.stack([t.numel() - torch.count_nonzero(t) for t in tensors])
    below = torch.stack([torch.count_nonzero(t.abs() < limit) for t, limit in zip(tensors, limits, strict=True)])
    return torch.tensor([t.numel() for t in tensors], device=tensors[0].device) - zeros, below - zeros


def _small_on_cpu(tensor: Tensor, limit: float) -> tuple[int, int]:
    import numpy as np  # counts what a comparison gives three times faster than torch does

    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    entries = _entries(wide) if type(wide) in CLASSES else wide.reshape(-1).numpy()
    zeros, below = 0, 0
    for start in range(0, entries.size, _STACKED):  # in pieces whose masks stay in the cache
        piece = entries[start : start + _STACKED]
        found = int(np.count_nonzero((piece < limit) & (piece > -limit)))
        below += found
        zeros += int(np.count_nonzero(piece == 0)) if found else 0
    return entries.size - zeros, below - zeros


def _small_together(tensors: Sequence[Tensor], limit: float) -> tuple[list[float], list[float]]:
    """Count those of many small tensors, side by side."""
    flat, sums = _side_by_side(tensors)
    entries = _entries(flat)  # which live as long as `flat`
    sizes = [float(t.numel()) for t in tensors]
    mask = (entries < limit) & (entries > -limit)
    if not mask.any():
        return sizes, [0.0] * len(sizes)
    zeros = sums(entries == 0)
    return (sizes - zeros).tolist(), (sums(mask) - zeros).tolist()


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
