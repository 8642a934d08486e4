"""What a caller hands over as a batch -> arguments of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.arguments import takes


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    """Return the positional and the keyword arguments that a batch stands for.

    A tuple is positional arguments, a mapping keyword arguments, and anything else one argument; so are those two where
    the model could not be called with them otherwise, as one that takes a whole dict.
    """
    if isinstance(batch, tuple) and not isinstance(batch, PackedSequence):
        one = not takes(model, *batch) and takes(model, batch)
        return ((batch,) if one else tuple(batch)), {}
    if isinstance(batch, Mapping):
        # A TensorDict iterates over its rows, and is one argument.
        names = all(isinstance(name, str) for name in batch)
        if names and (takes(model, **batch) or not takes(model, batch)):
            return (), dict(batch)
    return (batch,), {}
