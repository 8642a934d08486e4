"""What a caller hands over as a batch -> arguments of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.utils.rnn import PackedSequence


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    """Return the positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, tuple) and not isinstance(batch, PackedSequence):
        return batch, {}
    return ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})
