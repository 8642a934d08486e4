"""A measurement under way: device tensors by name and column, copied once, and made a snapshot."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import statistics
import time
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from gradwatch.measurement import norms as stats
from gradwatch.values.snapshot import Absent, Column, ModelInfo, Snapshot, Stage
from gradwatch.watcher.forward import Forward
from gradwatch.watcher.processes import Processes

_BUDGET = 256 * 2**20
"""Bytes of weights that a probe copies to see their update; beyond it the parameters take turns."""
_SPARE = 32 * 2**20
"""Bytes of such copies whose memory is kept from probe to probe."""
_PLAIN = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_DEVICE = operator.attrgetter("device")
_KIND = operator.attrgetter("__class__", "layout", "dtype")
_PLAIN_KINDS = frozenset((Tensor, torch.strided, dtype) for dtype in _PLAIN)


class Reading:
    """The numbers of one step, on their way from the device to a `Snapshot`.

    Begun where the gradients are complete, finished when the optimizer's step is done. Until then every number stays on
    its device, and `snapshot` copies once per device.
    """

    def __init__(self, step: int, model: ModelInfo, stage: Stage, *, probe: bool) -> None:
        """Begin with nothing measured."""
        self.empty = True
        """Whether no gradient was there."""
        self.step, self.model, self.stage, self.probe = step, model, stage, probe
        self.absent: Sequence[Absent | None] = ()
        self.applied = False
        """Whether the optimizer has come to take the gradients."""
        self.told = False
        """Whether the loss is known."""
        self._tensors: dict[torch.device, list[Tensor]] = {}
        self._places: dict[torch.device, list[tuple[Hashable, Sequence[int]]]] = {}
        self._forward = Forward()
        self._computed_in: str | None = None
        self._copies: list[tuple[int, Tensor, Tensor]] = []
        self.holders: dict[int, tuple[int, ...]] = {}
        """By column, the ranks of the processes that each hold a piece of the parameter."""
        self.notes: list[str] = []

    def add(self, name: Hashable, columns: Sequence[int], tensor: Tensor) -> None:
        """Pack a tensor of `len(columns)` numbers; what is added later under the same name and column replaces it."""
        self._tensors.setdefault(tensor.device, []).append(tensor.reshape(-1))
        self._places.setdefault(tensor.device, []).append((name, columns))

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
        self.empty = not gradients and not self.holders
        tensors = gradients
        if not set(map(_KIND, gradients)) <= _PLAIN_KINDS:
            columns, gradients = self._whole_or_pieces(columns, gradients)
            tensors = [g if _KIND(g) in _PLAIN_KINDS else stats.plain(g) for g in gradients]
        if scale is not None:
            self.add("scale", [0], stats.number(scale))
        for mine, here in by_device(columns, tensors):
            device, norms = here[0].device, stats.norms(here)
            # On CPU looking is free. Elsewhere it would be a second synchronisation, so all are counted, at probes only.
            bad = _not_finite(norms.tolist()) if device.type == "cpu" else [*range(len(here))] * self.probe
            if bad:
                self.add("nonfinite", [mine[k] for k in bad], torch.stack([stats.nonfinite(here[k]) for k in bad]))
            self.add(
                "norm",
                mine,
                norms if scale is None else norms / torch.as_tensor(scale, dtype=norms.dtype, device=device),
            )
            if self.probe:
                zeros, tiny = stats.small(
                    here, [self._smallest(t, scale) if half else torch.finfo(t.dtype).smallest_normal for t in here]
                )
                stored = torch.tensor([t.numel() for t in here], device=device)
                self.add("nonzero", mine, stored - zeros)
                self.add("tiny", mine, tiny)
        if half and self.probe:
            self._computed_in = "float16"

    @staticmethod
    def _smallest(gradient: Tensor, scale: float | Tensor | None) -> float:
        """Return the smallest normal number of a gradient that float16 has computed, with the loss scale in it, and that is kept in another format.

        Where nobody said what the scale was, it was 1 if all entries are multiples of the smallest number of float16.
        """
        own, half = torch.finfo(gradient.dtype).smallest_normal, torch.finfo(torch.float16)
        if scale is not None:
            return max(own, half.smallest_normal / float(scale))
        steps = gradient.double() * 2.0**24
        return max(own, half.smallest_normal) if bool((steps == steps.round()).all()) else own

    def _whole_or_pieces(self, columns: Sequence[int], gradients: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """Take note of which are spread over processes, and leave out those of which that does not help."""
        kept = []
        for column, gradient in zip(columns, gradients, strict=True):
            try:
                ranks = stats.holders(gradient)
            except ValueError as error:
                self.notes.append(f"the gradient of {self.model.parameters[column].name} is not measured: {error}")
                continue
            if ranks is not None:
                self.holders[column] = ranks
            kept.append((column, gradient))
        return [c for c, _ in kept], [g for _, g in kept]

    def weights(self, columns: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Measure the norms of the parameters."""
        known = [
            (c, p)
            for c, p in zip(columns, parameters, strict=True)
            if p.device.type != "meta" and not nn.parameter.is_lazy(p)
        ]
        tensors = [stats.piece(p.detach()) if p.dtype in _PLAIN else stats.plain(p) for _, p in known]
        self.holders |= {
            c: ranks for c, p in known if hasattr(p, "placements") and (ranks := stats.holders(p)) is not None
        }
        for mine, here in by_device([c for c, _ in known], tensors):
            self.add("weight_norm", mine, stats.norms(here))

    def losses(self, losses: Sequence[float | Tensor]) -> None:
        """Average the losses of the step."""
        if not losses:
            return
        self.told = True
        for number, loss in enumerate(
            losses
        ):  # averaged behind the copy: arithmetic on single numbers is dear on any device
            tensor = loss if isinstance(loss, Tensor) else stats.number(loss)
            self.add("loss", [number], tensor if tensor.numel() == 1 else tensor.double().mean())

    def as_applied(self, columns: Sequence[int], gradients: Sequence[Tensor], optimizer: object) -> None:
        """Measure the norms once more, of the gradients as the optimizer takes them: after clipping."""
        for mine, here in by_device(columns, [stats.plain(g) for g in gradients]):
            self.add("applied", mine, stats.norms(here))
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):  # a fused optimizer divides inside of its kernel, and nothing has divided before
            self.add("late_scale", [0], scale)

    def forward(self, forward: Forward) -> None:
        """Take along what was seen of modules."""
        self._forward = forward
        for key, tensor in forward.tensors().items():
            self.add(key, range(tensor.numel()), tensor)

    def found_inf(self, optimizer: object) -> None:
        """Note whether a fused optimizer is told to skip this step."""
        found = getattr(optimizer, "found_inf", None)
        if isinstance(found, Tensor):
            self.add("found_inf", [0], found)

    def copy_weights(
        self, columns: Sequence[int], parameters: Sequence[Tensor], turn: int, spare: dict[int, Tensor]
    ) -> int:
        """Copy the parameters that are about to move, beginning with number `turn`, as many as the budget allows.

        `spare` holds the memory of the last probe's copies, where they were small: fresh memory costs more than copying.

        Returns:
            The number to begin with the next time.

        """
        left: int = _BUDGET
        turn = min(turn, len(parameters))  # some may have gone since
        self._copies = []
        for i in (*range(turn, len(parameters)), *range(turn)):
            if parameters[i].grad is None or parameters[i].dtype not in _PLAIN:
                continue
            parameter = stats.piece(parameters[i].detach())
            wide = torch.float32 if parameter.element_size() < 4 else parameter.dtype
            size = parameter.numel() * wide.itemsize
            if size > _BUDGET:  # its turn never comes
                self.notes.append(
                    f"the update of {self.model.parameters[columns[i]].name} is not measured: a copy of it takes more than {_BUDGET >> 20} MiB"
                )
                continue
            left -= size
            if left < 0:
                self.notes.append(
                    f"updates are measured in turns: copies of all parameters take more than {_BUDGET >> 20} MiB"
                )
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
        """Measure how far the parameters have moved from their copies, whose memory goes to `spare` if there is not much of it."""
        copies, self._copies = self._copies, []
        for numbers, olds in by_device(range(len(copies)), [copy for _, _, copy in copies]):
            torch._foreach_sub_(
                list(olds), [stats.piece(copies[i][1].detach()) for i in numbers]
            )  # in place: half of the memory and two thirds of the time
            self.add("update", [copies[i][0] for i in numbers], stats.norms(olds))
            for i, moved in zip(numbers, olds, strict=True):
                if (
                    copies[i][1].element_size() < 4
                    and (gradient := copies[i][1].grad) is not None
                    and gradient.layout is torch.strided
                ):
                    self.add(
                        "lost",
                        [copies[i][0]],
                        torch.count_nonzero((moved == 0) & (stats.piece(gradient) != 0)).double(),
                    )
        if sum(copy.numel() * copy.element_size() for _, _, copy in copies) <= _SPARE:
            spare.update((column, copy) for column, _, copy in copies)

    def snapshot(
        self, optimizer: int | None, key: str, processes: Processes, *, skipped: bool = False
    ) -> Snapshot | None:
        """Copy what was measured, put what other processes measured to it, and make it a snapshot; None where one of those speaks for this one.

        Args:
            optimizer: index of the one that steps.
            key: of this step among those of the watcher.
            processes: that watch the model.
            skipped: whether a scaler skipped the step.

        """
        values = self._take()
        if processes.silent:
            if self.holders:
                processes.send(key, values, self.holders)
            return None
        if self.holders and (missing := processes.join(key, values, self.holders)):
            self.notes.append(missing)
        activations, sequences, facts, cuts = self._forward.values(
            {key: list(values.get(key, {}).values()) for key in self._forward.tensors()}
        )
        norm, weight = values.get("norm", {}), values.get("weight_norm", {})
        scale = values.get("scale", {}).get(0)
        late = values.get("late_scale", {}).get(0)
        if late is not None:
            values["applied"] = {c: n / late for c, n in values["applied"].items()}
            if scale is None:
                scale, norm = late, {c: n / late for c, n in norm.items()}
        factor = None
        if "applied" in values:
            before = math.hypot(*norm.values())
            factor = math.hypot(*values["applied"].values()) / before if before > 0 else None
        skipped = skipped or any(values.get("found_inf", {}).values())
        losses = values.get("loss", {})
        nonzero, tiny = values.get("nonzero", {}), values.get("tiny", {})
        absent = tuple(None if norm.get(c) else reason for c, reason in enumerate(self.absent))
        elements = {
            c: max(p.elements * (1 + p.dtype.startswith("complex")), 1)
            for c in nonzero
            for p in [self.model.parameters[c]]
        }
        return Snapshot(
            step=self.step,
            wall_time=time.time(),
            model=self.model,
            optimizer=optimizer,
            stage=self.stage,
            loss=statistics.fmean(losses.values()) if losses else None,
            scale=scale,
            clip_factor=factor,
            skipped=skipped,
            norm=self._column(norm),
            nonfinite=self._column(values["nonfinite"]) if "nonfinite" in values else None,
            weight_norm=self._column(weight) if weight else None,
            zeros=self._column({c: 1.0 - n / elements[c] for c, n in nonzero.items()}) if nonzero else None,
            subnormal=self._column({c: n / max(nonzero[c], 1.0) for c, n in tiny.items()}) if tiny else None,
            update_ratio=self._column({c: _ratio(n, weight[c]) for c, n in values["update"].items()})
            if "update" in values and not skipped
            else None,
            lost=self._column({c: n / max(nonzero.get(c, 0.0), 1.0) for c, n in values["lost"].items()})
            if "lost" in values and not skipped
            else None,
            absent=absent if any(absent) else None,
            activations=activations or None,
            sequences=sequences or None,
            facts=facts or None,
            cuts=cuts or None,
            computed_in=self._computed_in,
            notes=tuple(self.notes),
        )

    def _column(self, values: dict[int, float]) -> Column:
        return tuple(map(values.get, range(len(self.model.parameters))))

    def _take(self) -> dict[Hashable, dict[int, float]]:
        values: dict[Hashable, dict[int, float]] = {}
        for device, tensors in self._tensors.items():
            wide = torch.float32 if device.type == "mps" else torch.float64
            # On CPU there is nothing to copy.
            packed = tensors if device.type == "cpu" else [torch.cat([t.to(wide) for t in tensors])]
            numbers = itertools.chain.from_iterable(t.tolist() for t in packed)
            for name, columns in self._places[device]:
                values.setdefault(name, {}).update(zip(columns, itertools.islice(numbers, len(columns)), strict=True))
        return values


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


def _not_finite(norms: list[float]) -> list[int]:
    return [] if math.isfinite(sum(norms)) else [k for k, n in enumerate(norms) if not math.isfinite(n)]


def _ratio(change: float, weight: float) -> float:
    return change / weight if weight else math.inf if change else 0.0
