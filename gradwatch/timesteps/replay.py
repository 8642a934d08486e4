"""The forward pass of a recurrent module once more, from what was kept of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradwatch.timesteps.adjoint import Cell, Gru, Lstm, Plain, flip
from gradwatch.timesteps.kinds import Spec
from gradwatch.timesteps.layout import Layout
from gradwatch.values.snapshot import FactName


@dataclass
class Call:
    """One call of the module: rows of what it took and gave, and what its backward pass brought."""

    spec: Spec
    layout: Layout
    weights: list[Tensor]
    x: Tensor
    """(T, R, inputs)"""
    y: Tensor
    """(T, R, directions x width)"""
    h0: Tensor
    """(layers x directions, R, width)"""
    c0: Tensor | None
    """The same of an LSTM's cell state."""
    random: Tensor | None = None
    """State of the CPU's generator before the call, where dropout draws from it."""
    narrow: bool = False
    """Whether it ran under autocast: then some of it was computed in a format narrower than that of what it gave."""
    alone: bool = False
    """Whether nothing else uses its input: it is a leaf that was put in."""
    carried: bool = False
    """Whether the first call of a sequence was given a state without a graph."""
    total: bool = False
    """Whether the gradient of its cell state includes what comes through its hidden state: an LSTMCell that is not one fused kernel."""
    joined: bool | None = None
    """Whether its state came from the call before: True along the graph, False detached; None: it did not."""
    changed: bool = False
    """Whether that of a cell came from something else in the graph: what became of the state that the call before gave, probably."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Like x ("x"), y ("y"), h0 ("h") and c0 ("c"): what arrived at the input, the outputs and the last states."""

    def masks(self) -> list[Tensor]:
        """Draw once more which entries dropout kept between the layers, (T, R, width x directions) each, scaled as dropout scales."""
        if self.random is None:
            return []
        generator = torch.Generator(device="cpu")
        generator.set_state(self.random)
        shape = self.layout.inner(self.y.shape[-1])
        keep = 1 - self.spec.dropout
        # What the kernels draw does not depend on the format that it is stored in.
        blanks = (torch.empty(shape, dtype=torch.uint8, device="cpu") for _ in range(self.spec.layers - 1))
        drawn = (blank.bernoulli_(keep, generator=generator) for blank in blanks)
        return [self.layout.from_inner(mask).to(self.y.dtype) / (keep or 1.0) for mask in drawn]


class Replay:
    """The forward pass once more: the states of all layers, recomputed, and how well the last layer's agree with what the module gave."""

    def __init__(self, chain: Sequence[Call], x: Tensor, y: Tensor, lengths: Tensor | None, wide: torch.dtype) -> None:
        """Run it, in the format `wide`, over the inputs x and the outputs y of all calls, rows ending at `lengths`."""
        first = chain[0]
        self._spec, self._wide = first.spec, wide
        self._weights = [w.to(wide) for w in first.weights]
        self._lengths = lengths
        self.cells: list[Cell] = []
        self.facts: dict[tuple[FactName, str], Tensor] = {}
        """By name and part."""
        self.masks = [torch.cat(parts).to(wide) for parts in zip(*(c.masks() for c in chain), strict=True)]
        width = y.shape[-1] // first.spec.directions
        residuals = []
        for layer in range(first.spec.layers):
            last = layer == first.spec.layers - 1
            outputs = []
            for direction in range(first.spec.directions):
                number = layer * first.spec.directions + direction
                own = flip(x, lengths) if direction else x
                h0 = first.h0[number].to(wide)
                c0 = first.c0[number].to(wide) if first.c0 is not None else h0
                given = y[..., direction * width : (direction + 1) * width] if last else None
                h = self._kernel(own, h0, c0, number) if given is None else flip(given, lengths) if direction else given
                again = self._replay(own, torch.cat([h0.unsqueeze(0), h[:-1]]), c0, number)
                if last:
                    residuals.append(self._differ(again, h))
                outputs.append(flip(h, lengths) if direction else h)
            if not last:
                x = torch.cat(outputs, -1)
                if self.masks:
                    x = x * self.masks[layer]
        self.residual = torch.stack(residuals).max()

    def _own(self, number: int) -> list[Tensor]:
        per = 2 + 2 * self._spec.bias + self._spec.projected
        return self._weights[number * per : (number + 1) * per]

    def _kernel(self, x: Tensor, h0: Tensor, c0: Tensor, number: int) -> Tensor:
        """Run one layer and direction through torch's own kernel."""
        spec = self._spec
        run: Any = {
            "LSTM": torch._VF.lstm,
            "GRU": torch._VF.gru,
            "RNN": torch._VF.rnn_relu if spec.relu else torch._VF.rnn_tanh,
        }[spec.kind]
        state: Any = h0.unsqueeze(0)
        if spec.kind == "LSTM":
            state = (state, c0.unsqueeze(0))
        result: Tensor = run(x.contiguous(), state, self._own(number), spec.bias, 1, 0.0, False, False, False)[0]
        return result

    def _replay(self, x: Tensor, before: Tensor, c0: Tensor, number: int) -> Tensor:
        """Recompute the states from those before them, and keep what the way back needs."""
        weights = self._own(number)
        bias = (weights[2], weights[3]) if self._spec.bias else (None, None)
        common = (x, before, weights[0], weights[1], *bias)
        part = self._spec.part(number)
        if self._spec.kind == "LSTM":
            lstm = Lstm(*common)
            h = lstm.run(c0, weights[-1] if self._spec.projected else None)
            self.cells.append(lstm)
            self.facts["forget_gate", part] = lstm.kept.mean()
        elif self._spec.kind == "GRU":
            gru = Gru(*common)
            h = gru.run()
            self.cells.append(gru)
            self.facts["update_gate", part] = gru.kept.mean()
        else:
            plain = Plain(*common)
            h = plain.run(relu=self._spec.relu)
            self.cells.append(plain)
        return h

    def _differ(self, again: Tensor, h: Tensor) -> Tensor:
        if self._lengths is not None:  # beyond the ends there is nothing to agree with
            there = (torch.arange(len(h), device=h.device).unsqueeze(1) < self._lengths).unsqueeze(-1)
            again = again * there
        return (again - h).abs().max() / h.abs().max().clamp(min=torch.finfo(h.dtype).tiny)
