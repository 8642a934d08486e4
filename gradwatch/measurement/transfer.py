"""The bridge: tensors go in, one copy per device is made, and plain numbers come out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


class Pending:
    """Numbers that are on their way from a device."""

    __slots__ = ("_values",)

    def __init__(self, values: Sequence[float] | None = None) -> None:
        """Begin without them, or with what is here already."""
        self._values = values

    @property
    def values(self) -> Sequence[float]:
        """The entries of the tensor, in its order.

        Raises:
            RuntimeError: the transfer has not run yet.

        """
        if self._values is None:
            raise RuntimeError("the numbers are still on their device: the transfer must run first")
        return self._values

    @property
    def value(self) -> float:
        """The only entry."""
        (value,) = self.values
        return value

    def arrive(self, values: Sequence[float]) -> None:
        """Take the numbers."""
        self._values = values


class Transfer:
    """Collects tensors that are to be copied, and copies them all at once: one copy, and one wait, for each device."""

    def __init__(self) -> None:
        """Begin with none."""
        self._waiting: dict[torch.device, list[tuple[Tensor, Pending]]] = {}

    def add(self, tensor: Tensor) -> Pending:
        """Return a handle at which the entries of this tensor, of any real format and shape, will stand."""
        pending = Pending()
        self._waiting.setdefault(tensor.device, []).append((tensor.reshape(-1), pending))
        return pending

    def run(self) -> None:
        """Copy what was added since the last run."""
        waiting, self._waiting = self._waiting, {}
        for device, added in waiting.items():
            if device.type == "cpu":  # where there is nothing to copy
                for tensor, pending in added:
                    pending.arrive(tensor.tolist())
                continue
            wide = torch.float32 if device.type == "mps" else torch.float64
            numbers = iter(torch.cat([tensor.to(wide) for tensor, _ in added]).tolist())
            for tensor, pending in added:
                pending.arrive(list(itertools.islice(numbers, tensor.numel())))
