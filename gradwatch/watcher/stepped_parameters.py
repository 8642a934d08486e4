"""The parameters that an optimizer steps, and the columns of the snapshot that are theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from gradwatch.measurement.measurement import Measurement
from gradwatch.measurement.model_map import ModelMap
from gradwatch.model import zero
from gradwatch.values.snapshot import Absent, ModelInfo


class SteppedParameters:
    """Knows which parameters one optimizer steps, and describes the model anew where they are others than before."""

    def __init__(self, model_map: ModelMap) -> None:
        """Begin with none."""
        self._model_map = model_map
        self._ids: list[int] = []
        self._described: ModelInfo | None = None
        """The description that `columns` belongs to."""
        self.columns: list[int] = []
        """In line with what `now` returned last."""
        self.absent: dict[int, Absent] = {}
        """What the last look at a forward pass said of columns that have no gradient or may have zeros in its place."""
        self.weighed = False
        """Whether the weights were measured since `columns` was made."""

    def now(self, optimizer: Any) -> list[Tensor]:  # noqa: ANN401  (None: the loop has none)
        """Return those of the model that an optimizer steps now."""
        every = self._model_map.parameters(optimizer)
        ids = list(map(id, every))
        if ids != self._ids:  # some have come, gone or been replaced
            self._model_map.describe()
            self._ids, self._described = ids, None
        if self._described is not self._model_map.info:
            self._described, self.weighed = self._model_map.info, False
            self.columns = self._model_map.columns(ids)
        return every if len(self.columns) == len(ids) else [p for p in every if p in self._model_map]

    def gradients(
        self, parameters: Sequence[Tensor], part: Sequence[Tensor] | None = None
    ) -> tuple[list[int], list[Tensor]]:
        """Return the gradients that there are of what `now` returned, or of a part of it, each with its column."""
        if part is not None:
            parameters = [p for p in part if p in self._model_map]
        columns = self.columns if part is None else self._model_map.columns(map(id, parameters))
        gradients = [g for p in parameters if (g := p.grad) is not None]
        if len(gradients) == len(parameters):  # nearly always
            return columns, gradients
        found = [(c, g) for c, p in zip(columns, parameters, strict=True) if (g := zero.gradient_of(p)) is not None]
        return [c for c, _ in found], [g for _, g in found]

    def explain(
        self,
        measurement: Measurement,
        optimizer: Any,  # noqa: ANN401
        there: Collection[int],
        ran: frozenset[str] | None,
    ) -> None:
        """Say why columns have no gradient: `there` are those that have one, `ran` the modules that ran, if known."""
        parameters = self.now(optimizer)
        if ran is not None:
            self.absent = self._model_map.without_gradient(self.columns, parameters, there, ran)
        if len(there) < len(parameters) or ran is not None or self.absent or self._model_map.has_frozen:
            measurement.explain(self._model_map.absent(self.columns, parameters, there, self.absent))

    def forget(self) -> None:
        """Describe the model anew at the next look: for its order, and for parameters replaced under the same id."""
        self._ids = []
