"""Which weights a forward pass computes with, called by their module or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwatch.model.nested import floats, storage_of
from gradwatch.model.rerun import once_more


def computed_with(model: nn.Module, loss: Callable[[], Tensor]) -> frozenset[str]:
    """Run a model and its loss once more, and return the names of the parameters that an operation makes numbers of.

    The model and all random states stay as they were. Where the pass cannot be followed, there are none.

    Args:
        model: what runs.
        loss: runs the model and returns the loss.

    """
    uses = _Uses(model)
    with once_more(model), uses:
        loss()
    return frozenset(uses.found)


class _Uses(TorchFunctionMode):
    """Sees which parameters operations take, as they are or by another name (`.data`, `detach()`, a part)."""

    def __init__(self, model: nn.Module) -> None:
        """Begin with nothing found."""
        super().__init__()
        self._names = {storage_of(p): name for name, p in model.named_parameters()}
        self.found: set[str] = set()

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401  (any operation of torch)
        types: Any,  # noqa: ANN401
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Do the operation, and look at it."""
        kwargs = kwargs or {}
        given = func(*args, **kwargs)
        with contextlib.suppress(Exception):  # what has no storage
            taken = {storage_of(t) for t in floats((*args, *kwargs.values()))} & self._names.keys()
            if taken and any(storage_of(t) not in taken for t in floats(given)):  # and not only looked at
                self.found |= {self._names[place] for place in taken}
        return given
