"""What a model returned -> the tensor whose memory is asked, and its dimension of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def chosen_of(returned: Any, output: Callable[[Any], Any] | None, steps: int | None) -> Tensor | PackedSequence:  # noqa: ANN401
    """Choose the tensor whose memory is asked: by `output`, or else the first floating-point one, a scalar only where there is no other.

    Args:
        returned: by the model.
        output: takes it and gives the tensor.
        steps: of a loop over timesteps; of a list with a tensor for each of them the newest counts.

    Raises:
        ValueError: there is no such tensor, or it has no graph.

    """
    if output is not None:
        chosen = output(returned)
        if not isinstance(chosen, Tensor | PackedSequence) or not data_of(chosen).requires_grad:
            raise ValueError(
                f"output must give a floating-point tensor that depends on the model's input, got {_shown(chosen)}"
            )
        return chosen
    found = [t for t in _outputs(returned, steps) if data_of(t).requires_grad]
    if not found:
        raise ValueError(
            f"the model's output must hold a floating-point tensor that depends on its input, got {_shown(returned)}"
        )
    return next((t for t in found if data_of(t).dim()), found[0])  # a loss beside predictions sums up all timesteps


def time_in(shape: torch.Size, steps: set[int], rows: int | None, likely: int) -> int | None:
    """Find the dimension of time in a tensor: of the size of the input's, beside one for the `rows` (None: there are none)."""
    if rows is None:
        return likely if len(shape) > likely and shape[likely] in steps else None
    for time in dict.fromkeys((likely, 1, 0)):
        if len(shape) > max(time, 1) and shape[time] in steps and shape[1 - min(time, 1)] == rows:
            return time
    return None


def data_of(value: Tensor | PackedSequence) -> Tensor:
    """Return the tensor in which the numbers are."""
    return value.data if isinstance(value, PackedSequence) else value


def _outputs(value: Any, steps: int | None) -> Iterator[Tensor | PackedSequence]:  # noqa: ANN401  (whatever a model returns)
    if isinstance(value, Tensor | PackedSequence):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _outputs(item, steps)
    elif isinstance(value, list | tuple):
        series = len(value) == steps and all(isinstance(v, Tensor) and v.shape == value[0].shape for v in value)
        for item in value[-1:] if series else value:
            yield from _outputs(item, steps)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            yield from _outputs(getattr(value, each.name), steps)


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a graph'}"
