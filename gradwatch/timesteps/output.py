"""What a model returned -> the tensor whose horizon is asked, and its newest timestep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.nested import data_of, leaves, parts, storage_of
from gradwatch.timesteps.input_calls import InputSequence, packed_lengths
from gradwatch.timesteps.layout import Layout


def chosen_of(
    returned: Any,  # noqa: ANN401  (whatever a model returns)
    output: Callable[[Any], Any] | None,
    steps: int | None,
    given: Collection[int] = (),
) -> Tensor | PackedSequence:
    """Choose the tensor whose horizon is asked.

    By `output`, or else the first floating-point one, a scalar only where there is no other; of a distribution that is
    its mean.

    Args:
        returned: by the model.
        output: takes it and gives the tensor.
        steps: of a loop over timesteps; of a list with a tensor for each of them the newest counts.
        given: what the inputs of the model lie in, as `storage_of`: one that it hands on beside others is not meant.

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
    found = [t for t in leaves(returned, _newest_of_lists(steps)) if data_of(t).requires_grad]
    if not found:
        raise ValueError(
            f"the model's output must hold a floating-point tensor that depends on its input, got {_shown(returned)}"
        )
    made = [t for t in found if storage_of(data_of(t)) not in given] or found
    return next((t for t in made if data_of(t).dim()), made[0])  # a loss beside predictions sums up all timesteps


def leaves_of(returned: Any, steps: Collection[int]) -> list[Tensor | PackedSequence]:  # noqa: ANN401  (as above)
    """Return the tensors in what a model returned, of distributions the parameters.

    Args:
        returned: by the model.
        steps: how many timesteps there may be: a list with a tensor for each of them is one tensor, time first.

    """

    def within(value: Any) -> Iterable[Any]:  # noqa: ANN401
        if isinstance(value, list | tuple) and len(value) in steps and _alike(value):
            return [torch.stack(list(value))]
        if isinstance(value, Distribution):
            return [v for name in value.arg_constraints if isinstance(v := getattr(value, name, None), Tensor)]
        return parts(value)

    return list(leaves(returned, within))


def time_in(shape: torch.Size, steps: set[int], rows: int | None, likely: int) -> int | None:
    """Find the dimension of time in an output.

    Args:
        shape: of the output.
        steps: sizes that it may have.
        rows: how many there are, in the dimension beside it; None: there is no such dimension.
        likely: the dimension to look at first.

    """
    if rows is None:
        return likely if len(shape) > likely and shape[likely] in steps else None
    for time in dict.fromkeys((likely, 1, 0)):
        if len(shape) > max(time, 1) and shape[time] in steps and shape[1 - min(time, 1)] == rows:
            return time
    return None


class OverBatch(ValueError):  # noqa: N818  (it is about the model)
    """A module goes over the batch, and not over time."""

    def __init__(self, place: str, shape: torch.Size, steps: int, rows: int) -> None:
        """Say so, of an output of this shape."""
        super().__init__(
            f"{place or 'the model'} runs over the batch: the output of shape {tuple(shape)} has a row for each of its"
            f" {steps} timesteps and none for its {rows} rows; set batch_first=True, or transpose (not view) what goes"
            " in"
        )
        self.place, self.steps, self.rows = place, steps, rows


def over_batch(shape: torch.Size | None, layout: Layout) -> bool:
    """Tell whether a recurrent module runs over the batch.

    So it is where what the model gives has a row for each of its timesteps, and no dimension for its rows.

    Args:
        shape: of the model's output; None where that is not known.
        layout: of the module's input.

    """
    if shape is None or layout.single or not layout.batched or layout.lengths is not None:
        return False
    return len(shape) > 0 and shape[0] == layout.steps > 1 and layout.count > 1 and layout.count not in shape


def newest_of(
    chosen: Tensor | PackedSequence, sequence: InputSequence, sizes: Iterable[tuple[int, int]], time: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return an output at the newest timestep of each row, and how long the rows are, if that is known by now.

    Args:
        chosen: the output; where it has no dimension of time, all of it is meant.
        sequence: what entered the sequence module.
        sizes: of the first two dimensions of the model's inputs.
        time: the dimension of time of the output, if it is known: it may have fewer timesteps than the sequence.

    """
    if isinstance(chosen, PackedSequence):
        lengths = packed_lengths(chosen)
        starts = chosen.batch_sizes.cumsum(0) - chosen.batch_sizes
        newest = starts[lengths - 1] + torch.arange(len(lengths), device="cpu")
        return chosen.data[newest.to(chosen.data.device)], None
    call, packed = sequence.calls[0], sequence.packed
    if time is None:
        time = _time_in_output(chosen, sequence, sizes)
    elif chosen.shape[time] != sequence.steps or sequence.rows != chosen.shape[1 - min(time, 1)]:
        return chosen.select(time, -1), None
    if time is None:
        return chosen, None
    if not call.batched:
        return chosen.movedim(time, 0)[-1:], None
    laid = chosen.movedim((time, 1 - min(time, 1)), (0, 1))
    every = torch.arange(sequence.rows, device=chosen.device)
    if packed is None:
        ends = sequence.full()
        return laid[ends.to(chosen.device) - 1, every], ends
    ends = packed_lengths(packed).to(chosen.device)
    if packed.unsorted_indices is not None:
        ends = ends[packed.unsorted_indices.to(chosen.device)]
    return laid[ends - 1, every], None


def _time_in_output(chosen: Tensor, sequence: InputSequence, sizes: Iterable[tuple[int, int]]) -> int | None:
    call, rows = sequence.calls[0], sequence.rows
    if sequence.packed is not None:
        # It may have been padded to more than its own longest row, as the batch was.
        padded = {n for pair in sizes for n, other in (pair, pair[::-1]) if other == rows and n >= sequence.steps}
        return time_in(chosen.shape, {sequence.steps} | padded, rows, 1)
    likely = 1 if call.time is None else call.time
    return time_in(chosen.shape, {sequence.steps}, rows if call.batched else None, likely)


def mean_of(distribution: Distribution) -> Tensor | None:
    """Return the mean of a distribution, or where that depends on nothing its first parameter that does."""
    known = [getattr(distribution, name, None) for name in ("mean", *distribution.arg_constraints)]
    graph = (v for v in known if isinstance(v, Tensor) and v.requires_grad and bool(torch.isfinite(v.detach()).all()))
    return next(graph, None)


def _newest_of_lists(steps: int | None) -> Callable[[object], Iterable[Any]]:
    """Return what of a nested value counts: of a list with a tensor for each of so many timesteps, only the newest."""

    def within(value: Any) -> Iterable[Any]:  # noqa: ANN401  (whatever a model returns)
        if isinstance(value, Distribution):
            return [mean_of(value)]
        if isinstance(value, list | tuple) and len(value) == steps and _alike(value):
            return [value[-1]]
        return parts(value)

    return within


def _alike(values: Sequence[Any]) -> bool:
    return all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values)


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a graph'}"
