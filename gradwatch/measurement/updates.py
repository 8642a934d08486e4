"""How far a step moves the parameters: copies of them before it, and the differences after it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gradwatch.measurement import norms
from gradwatch.measurement.columns import LOST, UPDATE
from gradwatch.measurement.norms import CLASSES, PLAIN
from gradwatch.measurement.parameters import PLAIN_KINDS, Parameters, by_device, kind_of

BUDGET = 256 * 2**20
"""Bytes of weights that a probe copies to see their update; beyond it the parameters take turns."""
_SPARE = 32 * 2**20
"""Bytes of such copies whose memory is kept from probe to probe: fresh memory costs more than copying."""


class Updates:
    """The updates of one optimizer. Parameters are kept from `copy` to `measure` or `drop`, and no longer."""

    def __init__(self) -> None:
        """Begin without copies."""
        self.turn = 0
        """The parameter with which the next copying begins, where not all of them fit the budget."""
        self._copies: list[tuple[int, Tensor, Tensor]] = []
        """Columns, parameters, and what these were."""
        self._notes: list[tuple[str, int | None]] = []
        """What is to be noted, with the column whose name belongs into it."""
        self._budget = BUDGET
        self._spare: dict[int, Tensor] = {}
        """By column, memory of the copies before."""
        self._copied: int | None = None
        """A hash of column, class, format, shape and device of all that was copied before, where that memory is kept:
        of many parameters the list itself takes as much memory as their norms."""

    def copy(self, columns: Sequence[int], parameters: Sequence[Tensor], *, complete: bool) -> None:
        """Copy the parameters that are about to move, as many as the budget allows.

        Args:
            columns: of the parameters.
            parameters: what an optimizer steps.
            complete: whether the gradients are there; else those may move that can have one.

        """
        self.drop()
        if self._copy_again(columns, parameters, complete=complete):
            return
        left, turn = self._budget, min(self.turn, len(parameters))  # some may have gone since
        old: list[Tensor] = []
        new: list[Tensor] = []
        for i in (*range(turn, len(parameters)), *range(turn)):
            moves = parameters[i].grad is not None if complete else parameters[i].requires_grad
            if not moves or parameters[i].dtype not in PLAIN:
                continue
            parameter = norms.piece(parameters[i].detach())
            wide = torch.float32 if parameter.element_size() < 4 else parameter.dtype
            size = parameter.numel() * wide.itemsize
            limit = f"more than {self._budget >> 20} MiB"
            if size > self._budget:  # its turn never comes
                self._notes.append((f"the update of {{}} is not measured: a copy of it takes {limit}", columns[i]))
                continue
            left -= size
            if left < 0:
                self._notes.append((f"updates are measured in turns: copies of all parameters take {limit}", None))
                self.turn = i
                break
            again = self._memory(columns[i], parameter, wide)
            if again is not None:
                old.append(parameter)
                new.append(again)
            self._copies.append((columns[i], parameters[i], parameter.to(wide, copy=True) if again is None else again))
        else:
            self.turn = 0
        if new:
            torch._foreach_copy_(new, old)

    def _copy_again(self, columns: Sequence[int], parameters: Sequence[Tensor], *, complete: bool) -> bool:
        """Copy into the memory of the copies before, and tell whether that was done: nothing may have changed since."""
        moving = [
            (c, p)
            for c, p in zip(columns, parameters, strict=True)
            if (p.grad is not None if complete else p.requires_grad)
        ]
        if not moving or _hash(moving) != self._copied:
            return False
        self._copied = None  # until they are measured
        memory = [self._spare.pop(c) for c, _ in moving]
        torch._foreach_copy_(memory, [p for _, p in moving])
        self._copies = [(c, p, was) for (c, p), was in zip(moving, memory, strict=True)]
        return True

    def _memory(self, column: int, parameter: Tensor, wide: torch.dtype) -> Tensor | None:
        """Return memory for a copy, where it was kept at the probe before and fits."""
        memory = self._spare.pop(column, None)
        fits = (
            memory is not None
            and memory.shape == parameter.shape
            and memory.dtype is wide
            and memory.device == parameter.device
        )
        return memory if fits else None

    def before(self, columns: Sequence[int], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters as they were when they were copied, where they are whole; the others as they are."""
        were = {column: copy for column, p, copy in self._copies if kind_of(p.detach()) in PLAIN_KINDS}
        return [were.get(column, p) for column, p in zip(columns, parameters, strict=True)]

    def moved(self) -> bool:
        """Tell whether any of them is not as it was when it was copied."""
        return any(not torch.equal(norms.piece(p.detach()).to(was.dtype), was) for _, p, was in self._copies)

    def measure(self, into: Parameters, columns: Collection[int], *, probe: bool) -> None:
        """Measure how far the parameters have moved from their copies, whose memory is kept where it is small.

        Args:
            into: takes the numbers.
            columns: those that had a gradient.
            probe: whether entries that were to move and did not are counted.

        """
        if not self._copies and not self._notes:  # nearly always
            return
        for text, column in self._notes:
            into.notes.append(text.format(into.name(column) if column is not None else ""))
        copies = [(column, p, was) for column, p, was in self._copies if column in columns]
        self.drop()
        now = {column: norms.piece(p.detach()) for column, p, _ in copies}
        olds = {column: was for column, _, was in copies}
        plain = [column for column, was in olds.items() if kind_of(was) in PLAIN_KINDS]
        # In place there is no second try: what may refuse goes by itself.
        for together in (plain, *([column] for column in sorted(olds.keys() - set(plain)))):
            into.each("update", together, [olds[c] for c in together], functools.partial(_moved, into, now))
        for column, parameter, moved in copies if probe else ():
            gradient = parameter.grad
            if parameter.element_size() < 4 and gradient is not None and gradient.layout is torch.strided:
                into.each("gradient", [column], [gradient], functools.partial(_lost, into, moved))
        self._copied = None
        if sum(was.numel() * was.element_size() for was in olds.values()) <= _SPARE:
            self._spare.update(olds)
            if all(type(p) in CLASSES for _, p, _ in copies):
                self._copied = _hash((column, p) for column, p, _ in copies)

    def drop(self) -> None:
        """Let go of the copies."""
        self._copies, self._notes = [], []

    def clear(self) -> None:
        """Let go of their memory too."""
        self.drop()
        self._spare.clear()
        self._copied = None


_kind = operator.attrgetter("__class__", "dtype", "shape", "device")


def _hash(moving: Iterable[tuple[int, Tensor]]) -> int:
    return hash(tuple(hash((column, *_kind(p))) for column, p in moving))


def _moved(into: Parameters, now: Mapping[int, Tensor], columns: Sequence[int], olds: Sequence[Tensor]) -> None:
    """Turn copies into updates, in place: half of the memory and two thirds of the time."""
    for mine, here in by_device(columns, olds):
        torch._foreach_sub_(list(here), [now[column] for column in mine])
        into.add(UPDATE, mine, norms.measured(here))


def _lost(into: Parameters, moved: Tensor, columns: Sequence[int], gradients: Sequence[Tensor]) -> None:
    """Count the entries that did not move although they had a gradient."""
    lost = (moved == 0) & (norms.piece(gradients[0]) != 0)
    into.add(LOST, columns, torch.count_nonzero(lost).double())
