"""What a watcher knows as plain values, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradwatch.measurement.model_map import ModelMap
from gradwatch.watcher.judge import Judge
from gradwatch.watcher.optimizer_steps import OptimizerSteps
from gradwatch.watcher.warn_once import said


def state_of(every: Sequence[OptimizerSteps], model_map: ModelMap, judge: Judge) -> dict[str, Any]:
    """Return the history, the open alerts and the steps."""
    names = [parameter.name for parameter in model_map.info.parameters]
    return {
        "format": 1,
        "counts": [steps.count for steps in every],
        "slots": [steps.state_dict(names) for steps in every],
        "order": dict(model_map.order),
        **judge.state_dict(),
    }


def take_up(state: Mapping[str, Any], every: Sequence[OptimizerSteps], model_map: ModelMap, judge: Judge) -> None:
    """Go on where a state was taken; where it cannot be read, nothing is changed.

    Raises:
        TypeError: the state is no mapping.
        ValueError: it is of another format or of another number of optimizers, or not what `state_of` gives.

    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict() gave, got {state!r:.80}")
    counts = state.get("counts")
    if state.get("format") != 1 or not isinstance(counts, list | tuple) or len(counts) != len(every):
        given = f"format {state.get('format')!r} for {counts!r:.80}"
        raise ValueError(
            f"state must be of format 1 with a count of steps for each of {len(every)} optimizers, got {given}"
        )
    names = [parameter.name for parameter in model_map.info.parameters]
    try:
        order = {str(name): int(position) for name, position in state["order"].items()}
        kept = zip(every, counts, state["slots"], strict=True)
        take = [steps.reading_state(count, its, names) for steps, count, its in kept]
        judge.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"state must be what state_dict() gave, and could not be read: {said(error)}") from error
    model_map.resume(order)
    for apply in take:
        apply()
