"""Parameters and their gradients -> raw columns, on the device until the transfer runs."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gradwatch.measurement import norms
from gradwatch.measurement.columns import APPLIED, LOST, NONFINITE, NONZERO, NORM, TINY, UPDATE, WEIGHT, Numbers, Raw
from gradwatch.measurement.transfer import Pending, Transfer
from gradwatch.values.snapshot import ModelInfo

BUDGET = 256 * 2**20
"""Bytes of weights that a probe copies to see their update; beyond it the parameters take turns."""
_SPARE = 32 * 2**20
"""Bytes of such copies whose memory is kept from probe to probe."""
_PLAIN = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_DEVICE = operator.attrgetter("device")
_KIND = operator.attrgetter("__class__", "layout", "dtype")
_PLAIN_KINDS = frozenset((Tensor, torch.strided, dtype) for dtype in _PLAIN)


class Parameters:
    """What one step measures of the parameters: in groups of columns, each with one tensor of numbers."""

    def __init__(self, model: ModelInfo, transfer: Transfer, *, probe: bool) -> None:
        """Begin with nothing measured."""
        self.holders: dict[int, tuple[int, ...]] = {}
        """By column, the ranks of the processes that each hold a piece of the parameter."""
        self.notes: list[str] = []
        self._model, self._transfer, self._probe, self._budget = model, transfer, probe, BUDGET
        self._measured: list[tuple[Raw, Sequence[int], Pending]] = []
        self._copies: list[tuple[int, Tensor, Tensor]] = []
        self._refused: set[tuple[str, int]] = set()
        """What has a note already, by kind and column."""

    def numbers(self) -> Numbers:
        """Return what was measured, once the transfer has run; what was measured again replaces what was before."""
        found: Numbers = {}
        for raw, columns, pending in self._measured:
            found.setdefault(raw, {}).update(zip(columns, pending.values, strict=True))
        return found

    def _add(self, raw: Raw, columns: Sequence[int], tensor: Tensor) -> None:
        self._measured.append((raw, columns, self._transfer.add(tensor)))

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
        measure = functools.partial(self._gradients, scale=scale, half=half)
        if set(map(_KIND, gradients)) <= _PLAIN_KINDS:
            measure(columns, gradients)
        else:
            columns, gradients = self._whole_or_pieces(columns, gradients)
            self._each("gradient", columns, gradients, lambda few, their: measure(few, _plain(their)))

    def _gradients(
        self, columns: Sequence[int], tensors: Sequence[Tensor], *, scale: float | Tensor | None, half: bool
    ) -> None:
        for mine, here in by_device(columns, tensors):
            device, sizes = here[0].device, norms.norms(here)
            # On CPU looking is free. Elsewhere it would be a second synchronisation, so at probes all are counted.
            bad = _not_finite(sizes.tolist()) if device.type == "cpu" else [*range(len(here))] if self._probe else []
            if bad:
                self._add(NONFINITE, [mine[k] for k in bad], torch.stack([norms.nonfinite(here[k]) for k in bad]))
            unscaled = sizes if scale is None else sizes / torch.as_tensor(scale, dtype=sizes.dtype, device=device)
            self._add(NORM, mine, unscaled)
            if self._probe:
                limits = [_smallest(t, scale) if half else torch.finfo(t.dtype).smallest_normal for t in here]
                zeros, tiny = norms.small(here, limits)
                stored = torch.tensor([t.numel() for t in here], device=device)
                self._add(NONZERO, mine, stored - zeros)
                self._add(TINY, mine, tiny)

    def _whole_or_pieces(self, columns: Sequence[int], gradients: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """Take note of which are spread over processes, and leave out those of which that does not help."""
        kept = []
        for column, gradient in zip(columns, gradients, strict=True):
            try:
                ranks = norms.holders(gradient)
            except ValueError as error:
                self.notes.append(f"the gradient of {self._name(column)} is not measured: {error}")
                continue
            if ranks is not None:
                self.holders[column] = ranks
            kept.append((column, gradient))
        return [c for c, _ in kept], [g for _, g in kept]

    def applied(self, columns: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Measure the norms once more, of the gradients as the optimizer takes them: after clipping."""
        self._each("gradient", columns, gradients, self._applied)

    def _applied(self, columns: Sequence[int], gradients: Sequence[Tensor]) -> None:
        for mine, here in by_device(columns, [norms.plain(g) for g in gradients]):
            self._add(APPLIED, mine, norms.norms(here))

    def weights(self, columns: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Measure the norms of the parameters."""
        known = [
            (c, p)
            for c, p in zip(columns, parameters, strict=True)
            if p.device.type != "meta" and not nn.parameter.is_lazy(p)
        ]
        self.holders |= {
            c: ranks for c, p in known if hasattr(p, "placements") and (ranks := norms.holders(p)) is not None
        }
        self._each("weight", [c for c, _ in known], [p.detach() for _, p in known], self._weights)

    def _weights(self, columns: Sequence[int], weights: Sequence[Tensor]) -> None:
        tensors = [norms.piece(w) if w.dtype in _PLAIN else norms.plain(w) for w in weights]
        for mine, here in by_device(columns, tensors):
            self._add(WEIGHT, mine, norms.norms(here))

    def _each(
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
            plain = [k for k, t in enumerate(tensors) if _KIND(t) in _PLAIN_KINDS or columns[k] in self.holders]
            if len(plain) == len(tensors):
                raise
            if len(tensors) == 1:
                if (what, columns[0]) not in self._refused:
                    self._refused.add((what, columns[0]))
                    name = self._name(columns[0])
                    self.notes.append(f"the {what} of {name} is not measured: {type(error).__name__}: {error}")
                return
            if plain:
                measure([columns[k] for k in plain], [tensors[k] for k in plain])
            for k in sorted({*range(len(tensors))}.difference(plain)):
                self._each(what, [columns[k]], [tensors[k]], measure)

    def copy(self, columns: Sequence[int], parameters: Sequence[Tensor], turn: int, spare: dict[int, Tensor]) -> int:
        """Copy the parameters that are about to move, beginning with number `turn`, as many as the budget allows.

        `spare` holds the memory of the last probe's copies, where they were small: fresh memory costs more than
        copying.

        Returns:
            The number to begin with the next time.

        """
        left = self._budget
        turn = min(turn, len(parameters))  # some may have gone since
        self._copies = []
        for i in (*range(turn, len(parameters)), *range(turn)):
            if parameters[i].grad is None or parameters[i].dtype not in _PLAIN:
                continue
            parameter = norms.piece(parameters[i].detach())
            wide = torch.float32 if parameter.element_size() < 4 else parameter.dtype
            size = parameter.numel() * wide.itemsize
            limit = f"more than {self._budget >> 20} MiB"
            if size > self._budget:  # its turn never comes
                self.notes.append(f"the update of {self._name(columns[i])} is not measured: a copy of it takes {limit}")
                continue
            left -= size
            if left < 0:
                self.notes.append(f"updates are measured in turns: copies of all parameters take {limit}")
                return int(i)
            memory = spare.pop(columns[i], None)
            fits = (
                memory is not None
                and memory.shape == parameter.shape
                and memory.dtype is wide
                and memory.device == parameter.device
            )
            copy = memory.copy_(parameter) if memory is not None and fits else parameter.to(wide, copy=True)
            self._copies.append((columns[i], parameters[i], copy))
        return 0

    def updates(self, spare: dict[int, Tensor]) -> None:
        """Measure how far the parameters have moved from their copies; memory of small ones goes to `spare`."""
        copies, self._copies = self._copies, []
        now = {column: norms.piece(parameter.detach()) for column, parameter, _ in copies}
        olds = {column: copy for column, _, copy in copies}
        plain = [column for column, copy in olds.items() if _KIND(copy) in _PLAIN_KINDS]
        # In place there is no second try: what may refuse goes by itself.
        for together in (plain, *([column] for column in sorted(olds.keys() - set(plain)))):
            self._each("update", together, [olds[c] for c in together], functools.partial(self._moved, now))
        for column, parameter, moved in copies if self._probe else ():
            gradient = parameter.grad
            if parameter.element_size() < 4 and gradient is not None and gradient.layout is torch.strided:
                self._each("gradient", [column], [gradient], functools.partial(self._lost, moved))
        if sum(copy.numel() * copy.element_size() for _, _, copy in copies) <= _SPARE:
            spare.update((column, copy) for column, _, copy in copies)

    def _moved(self, now: Mapping[int, Tensor], columns: Sequence[int], olds: Sequence[Tensor]) -> None:
        """Turn copies into updates, in place: half of the memory and two thirds of the time."""
        for mine, here in by_device(columns, olds):
            torch._foreach_sub_(list(here), [now[column] for column in mine])
            self._add(UPDATE, mine, norms.norms(here))

    def _lost(self, moved: Tensor, columns: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Count the entries that did not move although they had a gradient."""
        lost = (moved == 0) & (norms.piece(gradients[0]) != 0)
        self._add(LOST, columns, torch.count_nonzero(lost).double())

    def _name(self, column: int) -> str:
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
    return [g if _KIND(g) in _PLAIN_KINDS else norms.plain(g) for g in gradients]


def _not_finite(norms: list[float]) -> list[int]:
    return [] if math.isfinite(sum(norms)) else [k for k, n in enumerate(norms) if not math.isfinite(n)]
