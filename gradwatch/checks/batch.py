"""What a caller hands over as a batch -> arguments of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.arguments import takes
from gradwatch.model.forward_hooks import listening
from gradwatch.model.layers import named_modules
from gradwatch.model.rerun import as_it_was, without_hooks


def refuse(model: object, output: object) -> None:
    """Refuse what is no model, and what cannot choose an output.

    Raises:
        TypeError: it is one of these.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if output is not None and not callable(output):
        raise TypeError(
            f"output must be a function from what the model returned to a tensor, or None, got {output!r:.80}"
        )


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


class Call(NamedTuple):
    """A call of a module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def outermost_calls(model: nn.Module, run: Callable[[], object]) -> list[Call]:
    """Run something, and return the calls of modules of a model that have parameters and are in no other one's call.

    The model is left as it was.
    """
    calls, depth = list[Call](), 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal depth
        if not depth and next(module.parameters(), None) is not None:
            calls.append(Call(module, args, kwargs))
        depth += 1

    def after(*_: object) -> None:
        nonlocal depth
        depth -= 1

    with as_it_was(model), without_hooks(model), listening(named_modules(model).values(), before, after):
        run()
    return calls


def call_in_training_step(model: Any, batch: Any) -> Call | None:  # noqa: ANN401  (Lightning's, or another's that has it)
    """Run the `training_step` of a LightningModule on a batch, and return the call of a network that it makes.

    The model is left as it was. What the step logs without a trainer, Lightning drops with a warning.

    Returns:
        None where the model has no `training_step`, or that calls nothing that has parameters.

    Raises:
        ValueError: it calls several networks, one after the other.

    """
    if not callable(getattr(model, "training_step", None)):
        return None
    with torch.enable_grad():
        calls = outermost_calls(model, lambda: model.training_step(batch, 0))
    names = {id(module): name for name, module in named_modules(model).items()}
    called = list(dict.fromkeys(names[id(call.module)] for call in calls))
    if len(called) > 1:
        raise ValueError(
            f"training_step calls several networks one after the other ({', '.join(called)}): give the one whose"
            " horizon is meant and what it takes, or a module that calls them in its forward"
        )
    return calls[0] if calls else None
