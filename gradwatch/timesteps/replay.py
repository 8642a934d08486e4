"""The forward pass of a recurrent module once more, from what was kept of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradwatch.timesteps.adjoint import Cell, LayerWeights, flip
from gradwatch.timesteps.call_records import CallRecord


class Replay:
    """The recomputed states of all layers, and how well the last layer's agree with what the module gave."""

    def __init__(
        self, records: Sequence[CallRecord], x: Tensor, y: Tensor, lengths: Tensor | None, wide: torch.dtype
    ) -> None:
        """Run the module again.

        Args:
            records: of the calls that make one sequence, oldest first.
            x: inputs of all calls, (T, R, inputs), in the format `wide`.
            y: outputs of all calls, (T, R, directions x width), in the format `wide`.
            lengths: of the rows as far as the module ran, (R,); None: all T.
            wide: the format to compute in.

        """
        first = records[0]
        self._recurrence, self._lengths = first.recurrence, lengths
        weights = [w.to(wide) for w in first.weights]
        self.cells: list[Cell] = []
        """Of each layer and direction."""
        self.masks = [torch.cat(parts).to(wide) for parts in zip(*(r.masks() for r in records), strict=True)]
        """What dropout multiplied with between the layers, (T, R, directions x width) each."""
        layers, directions = self._recurrence.layers, self._recurrence.directions
        width = y.shape[-1] // directions
        residuals = []
        for layer in range(layers):
            last = layer == layers - 1
            outputs = []
            for direction in range(directions):
                number = layer * directions + direction
                own = self._recurrence.of_part(weights, number)
                inputs = flip(x, lengths) if direction else x
                h0 = first.h0[number].to(wide)
                c0 = first.c0[number].to(wide) if first.c0 is not None else None
                if last:
                    given = y[..., direction * width : (direction + 1) * width]
                    h = flip(given, lengths) if direction else given
                else:
                    h = self._kernel(inputs, h0, c0, own)
                cell = self._recurrence.kind.equations(inputs, torch.cat([h0.unsqueeze(0), h[:-1]]), own)
                again = cell.run(c0)
                self.cells.append(cell)
                if last:
                    residuals.append(self._difference(again, h))
                outputs.append(flip(h, lengths) if direction else h)
            if not last:
                x = torch.cat(outputs, -1)
                if self.masks:
                    x = x * self.masks[layer]
        self.residual = torch.stack(residuals).max()
        """The largest difference of an output, as a share of the largest output."""

    def _kernel(self, x: Tensor, h0: Tensor, c0: Tensor | None, weights: LayerWeights) -> Tensor:
        """Run one layer and direction through torch's own kernel."""
        h = h0.unsqueeze(0)
        state: Any = h if c0 is None else (h, c0.unsqueeze(0))
        own = [w for w in weights if w is not None]
        bias = self._recurrence.bias
        # Of one layer, without dropout, not in training, in one direction, time first.
        y: Tensor = self._recurrence.kind.kernel(x.contiguous(), state, own, bias, 1, 0.0, False, False, False)[0]
        return y

    def _difference(self, again: Tensor, h: Tensor) -> Tensor:
        if self._lengths is not None:  # beyond the ends there is nothing to agree with
            there = (torch.arange(len(h), device=h.device).unsqueeze(1) < self._lengths).unsqueeze(-1)
            again = again * there
        return (again - h).abs().max() / h.abs().max().clamp(min=torch.finfo(h.dtype).tiny)
