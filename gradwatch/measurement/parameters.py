"""Parameters and their gradients -> raw columns, on the device until the transfer runs."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradwatch.measurement import norms
from gradwatch.measurement.columns import APPLIED, NONFINITE, NONZERO, NORM, TINY, WEIGHT, Numbers, Raw
from gradwatch.measurement.norms import CLASSES, PLAIN
from gradwatch.measurement.transfer import Pending, Transfer
from gradwatch.values.snapshot import ModelInfo

_SMALLEST = {dtype: torch.finfo(dtype).smallest_normal for dtype in PLAIN}
_DEVICE = operator.attrgetter("device")
kind_of = operator.attrgetter("__class__", "layout", "dtype")
_WHOLE = operator.attrgetter("__class__", "layout", "dtype", "is_meta")
_WHOLE_KINDS = frozenset((its, torch.strided, dtype, False) for dtype in PLAIN for its in CLASSES)
PLAIN_KINDS = frozenset((Tensor, torch.strided, dtype) for dtype in PLAIN)


class Parameters:
    """What one step measures of the parameters: in groups of columns, each with one tensor of numbers."""

    def __init__(self, model: ModelInfo, transfer: Transfer, *, probe: bool) -> None:
        """Begin with nothing measured."""
        self.holders: dict[int, tuple[int, ...]] = {}
        """By column, the ranks of the processes that each hold a piece of the parameter."""
        self.notes: list[str] = []
        self._model, self._transfer, self._probe = model, transfer, probe
        self._measured: list[tuple[Raw, Sequence[int], Pending]] = []
        self.read: set[int] = set()
        """Columns that have a gradient."""
        self._refused: set[tuple[str, int]] = set()
        """What has a note already, by kind and column."""

    def numbers(self) -> Numbers:
        """Return what was measured, once the transfer has run; what was measured again replaces what was before."""
        found: Numbers = {}
        for raw, columns, pending in self._measured:
            found.setdefault(raw, {}).update(zip(columns, pending.values, strict=True))
        return found

    def add(self, raw: Raw, columns: Sequence[int], numbers: Tensor | Sequence[float]) -> None:
        """Take along a number of each of these columns, be they still on a device or here already."""
        pending = self._transfer.add(numbers) if isinstance(numbers, Tensor) else Pending(numbers)
        self._measured.append((raw, columns, pending))

    def gradients(
        self, columns: Sequence[int], gradients: Sequence[Tensor], scale: float | Tensor | None, *, half: bool
    ) -> None:
        """Measure the gradients, and at a probe count their small entries.

        Args:
            columns: the column of each gradient.
            gradients: as they are, of any layout and format.
            scale: the loss scale that is still in them.
            half: whether they were computed in float16, whatever they are kept in.

        """
        self.read.update(columns)
        measure = functools.partial(self._gradients, scale=scale, half=half)
        if set(map(kind_of, gradients)) <= PLAIN_KINDS:
            measure(columns, gradients)
        else:
            columns, gradients = self._whole_or_pieces(columns, gradients)
            self.each("gradient", columns, gradients, lambda few, their: measure(few, _plain(their)))

    def _gradients(
        self, columns: Sequence[int], tensors: Sequence[Tensor], *, scale: float | Tensor | None, half: bool
    ) -> None:
        for mine, here in by_device(columns, tensors):
            sizes = norms.measured(here)
            # On CPU looking is free. Elsewhere it would be a second synchronisation, so at probes all are counted.
            bad = [*range(len(here))] if self._probe else []
            if not isinstance(sizes, Tensor):
                bad = _not_finite(sizes)
            if bad:
                self.add(NONFINITE, [mine[k] for k in bad], torch.stack([norms.nonfinite(here[k]) for k in bad]))
            self.add(NORM, mine, sizes if scale is None else norms.divided(sizes, scale))
            if self._probe:
                limits = [_smallest(t, scale) if half else _SMALLEST[t.dtype] for t in here]
                nonzero, tiny = norms.small(here, limits)
                self.add(NONZERO, mine, nonzero)
                self.add(TINY, mine, tiny)

    def _whole_or_pieces(self, columns: Sequence[int], gradients: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """Take note of which are spread over processes, and leave out those of which that does not help."""
        kept = []
        for column, gradient in zip(columns, gradients, strict=True):
            try:
                ranks = norms.holders(gradient)
            except ValueError as error:
                self.notes.append(f"the gradient of {self.name(column)} is not measured: {error}")
                continue
            if ranks is not None:
                self.holders[column] = ranks
            kept.append((column, gradient))
        return [c for c, _ in kept], [g for _, g in kept]

    def applied(self, columns: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Measure the norms once more, of the gradients as the optimizer takes them: after clipping."""
        self.each("gradient", columns, gradients, self._applied)

    def _applied(self, columns: Sequence[int], gradients: Sequence[Tensor]) -> None:
        for mine, here in by_device(columns, [norms.plain(g) for g in gradients]):
            self.add(APPLIED, mine, norms.measured(here))

    def weights(self, columns: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Measure the norms of the parameters."""
        if set(map(_WHOLE, parameters)) <= _WHOLE_KINDS:  # nearly always
            self._weights(columns, parameters)
            return
        known = [
            (c, p)
            for c, p in zip(columns, parameters, strict=True)
            if p.device.type != "meta" and not nn.parameter.is_lazy(p)
        ]
        self.holders |= {
            c: ranks for c, p in known if hasattr(p, "placements") and (ranks := norms.holders(p)) is not None
        }
        self.each("weight", [c for c, _ in known], [p.detach() for _, p in known], self._weights)

    def _weights(self, columns: Sequence[int], weights: Sequence[Tensor]) -> None:
        tensors = [w if type(w) in CLASSES else norms.piece(w) if w.dtype in PLAIN else norms.plain(w) for w in weights]
        for mine, here in by_device(columns, tensors):
            self.add(WEIGHT, mine, norms.measured(here))

    def each(
        self,
        what: str,
        columns: Sequence[int],
        tensors: Sequence[Tensor],
        measure: Callable[[Sequence[int], Sequence[Tensor]], None],
    ) -> None:
        """Measure all at once; where a class of tensors refuses, one by one those not plain, and note which."""
        before = len(self._measured)
        try:
            measure(columns, tensors)
        except Exception as error:
            del self._measured[before:]  # what was handed over already is copied, and nobody asks for it
            # Of what is spread over processes a missing piece would pass for the whole: there, all of it fails.
            plain = [k for k, t in enumerate(tensors) if kind_of(t) in PLAIN_KINDS or columns[k] in self.holders]
            if len(plain) == len(tensors):
                raise
            if len(tensors) == 1:
                if (what, columns[0]) not in self._refused:
                    self._refused.add((what, columns[0]))
                    name = self.name(columns[0])
                    self.notes.append(f"the {what} of {name} is not measured: {type(error).__name__}: {error}")
                return
            if plain:
                measure([columns[k] for k in plain], [tensors[k] for k in plain])
            for k in sorted({*range(len(tensors))}.difference(plain)):
                self.each(what, [columns[k]], [tensors[k]], measure)

    def name(self, column: int) -> str:
        """Return the name of the parameter of a column."""
        return self._model.parameters[column].name


def undisturbed() -> contextlib.AbstractContextManager[object]:
    """Compute outside of the graph, and in the formats that are asked for."""
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return torch.no_grad()  # nearly always, and at a fifth of the price of a stack
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def by_device(columns: Sequence[int], tensors: Sequence[Tensor]) -> list[tuple[Sequence[int], Sequence[Tensor]]]:
    """Return the columns and tensors of each device."""
    if len(set(map(_DEVICE, tensors))) == 1:  # nearly always
        return [(columns, tensors)]
    found: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for column, tensor in zip(columns, tensors, strict=True):
        mine, here = found.setdefault(tensor.device, ([], []))
        mine.append(column)
        here.append(tensor)
    return list(found.values())


def _smallest(gradient: Tensor, scale: float | Tensor | None) -> float:
    """Return the smallest normal number of a gradient that float16 has computed and that is kept in another format.

    The loss scale is in it. Where nobody said what the scale was, it was 1 if all entries are multiples of the smallest
    number of float16.
    """
    own, half = torch.finfo(gradient.dtype).smallest_normal, torch.finfo(torch.float16)
    if scale is not None:
        return max(own, half.smallest_normal / float(scale)) if scale else own
    steps = gradient.double() * 2.0**24
    return max(own, half.smallest_normal) if bool((steps == steps.round()).all()) else own


def _plain(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [g if kind_of(g) in PLAIN_KINDS else norms.plain(g) for g in gradients]


def _not_finite(norms: Sequence[float]) -> list[int]:
    return [] if math.isfinite(sum(norms)) else [k for k, n in enumerate(norms) if not math.isfinite(n)]
