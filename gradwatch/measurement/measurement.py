"""One step under way: its gradients, its loss and what probes saw, copied once, and made a snapshot."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradwatch.measurement import loss_scale, norms
from gradwatch.measurement.columns import APPLIED, NORM, WEIGHT, Numbers, columns
from gradwatch.measurement.parameters import Parameters
from gradwatch.measurement.processes import Processes
from gradwatch.measurement.transfer import Pending, Transfer
from gradwatch.model.forward_hooks import Part, ProbeValues
from gradwatch.values.snapshot import Absent, ActivationStats, ModelInfo, Silence, Snapshot, Stage


class Measurement:
    """The numbers of one step, on their way from the device to a `Snapshot`.

    Begun where the gradients are complete, finished when the optimizer's step is done. Until then every number stays on
    its device, and `snapshot` copies once per device.
    """

    def __init__(
        self,
        step: int,
        model: ModelInfo,
        stage: Stage,
        transfer: Transfer | None = None,
        parts: Sequence[Part] = (),
        *,
        probe: bool,
    ) -> None:
        """Begin with nothing measured of the parameters.

        Args:
            step: number of the step.
            model: as it is now.
            stage: at which the gradients are read.
            transfer: copies the numbers of the step; those of the `parts` travel with it already.
            parts: what probes have seen.
            probe: whether more than the gradients is measured.

        """
        self.step, self.model, self.stage, self.probe = step, model, stage, probe
        self._transfer = transfer or Transfer()
        self._parts = parts
        self.parameters = Parameters(model, self._transfer, probe=probe)
        self.empty = True
        """Whether no gradient was there."""
        self.silence: Silence | None = None
        """Put there where none was, for several steps in a row."""
        self.absent: Sequence[Absent | None] = ()
        self.first_of_step = True
        """Whether the optimizer has stepped since gradients were read before; else this is a further micro-batch."""
        self.notes: list[str] = []
        self._half = False
        self._factor: float | Tensor | None = None
        self._scale: Pending | None = None
        self._late_scale: Pending | None = None
        self._loss_scale: Pending | None = None
        self._rates: list[Pending] = []
        self._came: Pending | None = None
        self._found_inf: list[Pending] = []
        self.told: Sequence[float | Tensor] = ()
        """The losses of the step, where the loop has told them."""
        self._losses: list[Pending] = []
        self._raw_loss = False

    @property
    def finite(self) -> bool:
        """Whether the gradients are, as they were read first; asking copies what was measured so far."""
        self._transfer.run()
        return all(map(math.isfinite, self.parameters.numbers().get(NORM, {}).values()))

    def weights(self) -> Mapping[int, float]:
        """Return the norms of the parameters by column, where they were measured; asking copies what was so far."""
        self._transfer.run()
        return self.parameters.numbers().get(WEIGHT, {})

    def gradients(
        self, columns: Sequence[int], gradients: Sequence[Tensor], scale: float | Tensor | None, *, half: bool
    ) -> None:
        """Measure the gradients as they are now; see `Parameters.gradients`."""
        self.empty = not gradients and not self.parameters.holders
        self._half, self._factor = half and self.probe, scale
        if scale is not None:
            self._scale = self._transfer.add(norms.number(scale))
        self.parameters.gradients(columns, gradients, scale, half=half)

    def more_gradients(self, columns: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Measure those of a further part of the same step."""
        self.empty = self.empty and not gradients
        self.parameters.gradients(columns, gradients, self._factor, half=self._half)

    def came(self, far: Tensor | None) -> None:
        """Take how far weights have come since the probe before; None: nobody knows."""
        self._came = self._transfer.add(far) if far is not None else None

    def explain(self, absent: Sequence[Absent | None]) -> None:
        """Say of every column why it has no gradient; what `outside` has said stays."""
        stays = list(self.absent) or [None] * len(absent)
        self.absent = ["unstepped" if was == "unstepped" else now for was, now in zip(stays, absent, strict=True)]

    def outside(
        self, columns: Sequence[int], parameters: Sequence[Tensor], there: Sequence[bool], *, weigh: bool
    ) -> None:
        """Take note of what no optimizer steps: whether gradients are there, and what it weighs."""
        if not columns:
            return
        reasons = list(self.absent) or [None] * len(self.model.parameters)
        for column, arrives in zip(columns, there, strict=True):
            if arrives:
                reasons[column] = "unstepped"
        self.absent = reasons
        if weigh:
            self.parameters.weights(columns, parameters)

    def as_applied(self, columns: Sequence[int], gradients: Sequence[Tensor], optimizer: object) -> None:
        """Measure the gradients once more, as the optimizer takes them: after clipping."""
        self.parameters.applied(columns, gradients)
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):  # a fused optimizer divides inside of its kernel, and nothing has divided before
            self._late_scale = self._transfer.add(scale)

    def found_inf(self, optimizer: object) -> None:
        """Note whether a fused optimizer is told to skip this step."""
        found = getattr(optimizer, "found_inf", None)
        if isinstance(found, Tensor):
            self._found_inf.append(self._transfer.add(found))

    def of_optimizer(self, optimizer: Any, scaler: Any) -> None:  # noqa: ANN401  (whatever steps and scales)
        """Note the loss scale that is in force, and at a probe the optimizer's learning rates."""
        if (scale := loss_scale.of_scaler(scaler)) is not None:
            self._loss_scale = self._transfer.add(norms.number(scale))
        if self.probe:
            rates = [rate for g in getattr(optimizer, "param_groups", ()) if (rate := g.get("lr")) is not None]
            told = [rate for rate in rates if not isinstance(rate, Tensor)]
            largest = [*(rate for rate in rates if isinstance(rate, Tensor)), *([max(told)] if told else [])]
            self._rates = [self._transfer.add(norms.number(rate)) for rate in largest]

    def losses(self, losses: Sequence[float | Tensor], *, raw: bool = False) -> None:
        """Take the losses of the step, whose mean is that of the step; what is told later takes the place of it.

        Args:
            losses: all that were told of it.
            raw: whether the loss scale is in them.

        """
        if not losses:
            return
        self.told, self._losses, self._raw_loss = losses, [], raw
        for loss in losses:  # averaged after the copy: arithmetic on single numbers is dear on any device
            if not isinstance(loss, Tensor):
                self._losses.append(Pending((float(loss),)))
            elif type(loss) is Tensor and loss.numel() == 1 and loss.device.type == "cpu":  # where nothing is copied
                self._losses.append(Pending((loss.item(),)))
            else:
                self._losses.append(self._transfer.add(loss if loss.numel() == 1 else loss.double().mean()))

    def snapshot(
        self, optimizer: int | None, key: str, processes: Processes, *, skipped: bool = False
    ) -> Snapshot | None:
        """Copy what was measured, put what other processes measured to it, and make it a snapshot.

        Args:
            optimizer: index of the one that steps.
            key: of this step among those of the watcher.
            processes: that watch the model.
            skipped: whether a scaler skipped the step.

        Returns:
            None where another process speaks for this one.

        """
        self._transfer.run()
        numbers, holders = self.parameters.numbers(), self.parameters.holders
        if processes.silent:
            if holders:
                processes.send(key, numbers, holders)
            return None
        if holders and (missing := processes.join(key, numbers, holders)):
            self.notes.append(missing)
        seen = _together([part() for part in self._parts]) if self._parts else _NOTHING
        scale, factor = self._unscale(numbers)
        skipped = skipped or any(found.value for found in self._found_inf)
        norm, absent = numbers.get(NORM, {}), self.absent
        if any(absent):  # a norm may have come from another process
            absent = tuple(None if norm.get(c) else reason for c, reason in enumerate(absent))
        return Snapshot(
            step=self.step,
            wall_time=round(time.time(), 3),
            model=self.model,
            optimizer=optimizer,
            stage=self.stage,
            loss=self._loss(scale),
            scale=scale,
            clip_factor=factor,
            skipped=skipped,
            **columns(numbers, self.model, skipped=skipped),
            absent=tuple(absent) if any(absent) else None,
            activations=seen.activations or None,
            sequences=seen.sequences or None,
            facts=seen.facts or None,
            cuts=seen.cuts or None,
            flows=seen.flows or None,
            strays=seen.strays or None,
            squashed=seen.squashed,
            crossed=seen.crossed,
            computed_in="float16" if self._half else None,
            origin=seen.origin,
            notes=(*self.parameters.notes, *self.notes),
            silence=self.silence,
            loss_scale=self._loss_scale.value if self._loss_scale is not None else scale,
            rate=max((rate.value for rate in self._rates), default=None),
            left_over=seen.left_over if self.first_of_step else None,
            came=self._came.value if self._came is not None and math.isfinite(self._came.value) else None,
        )

    def _loss(self, scale: float | None) -> float | None:
        """Return the loss of the step, without the loss scale; `scale` is the one that was in the gradients."""
        if not self._losses:
            return None
        known = self._loss_scale.value if self._loss_scale is not None else scale
        return statistics.fmean(loss.value for loss in self._losses) / ((known if self._raw_loss else None) or 1.0)

    def _unscale(self, numbers: Numbers) -> tuple[float | None, float | None]:
        """Divide out a loss scale that came to light late, and return the loss scale and the factor of clipping."""
        scale = self._scale.value if self._scale is not None else None
        if self._late_scale is not None:
            late = self._late_scale.value
            if late:  # one that has fallen to 0 has left nothing to divide
                numbers[APPLIED] = {c: n / late for c, n in numbers.get(APPLIED, {}).items()}
            if scale is None and late:
                scale, numbers[NORM] = late, {c: n / late for c, n in numbers.get(NORM, {}).items()}
        if APPLIED not in numbers:
            return scale, None
        before = math.hypot(*numbers.get(NORM, {}).values())
        return scale, math.hypot(*numbers[APPLIED].values()) / before if before > 0 else None


_NOTHING = ProbeValues()


def _together(parts: Iterable[ProbeValues]) -> ProbeValues:
    """Put what several probes have seen together; what they have seen of one module becomes one."""
    activations: dict[str, ActivationStats] = {}
    found = ProbeValues()
    for part in parts:
        for stats in part.activations:
            known = activations.get(stats.module)
            if known is not None:
                news = {
                    f.name: value for f in dataclasses.fields(stats) if (value := getattr(stats, f.name)) != f.default
                }
                stats = dataclasses.replace(known, **news)  # noqa: PLW2901
            activations[stats.module] = stats
        found = ProbeValues(
            (),
            (*found.sequences, *part.sequences),
            (*found.facts, *part.facts),
            (*found.cuts, *part.cuts),
            found.origin or part.origin,
            found.left_over if part.left_over is None else part.left_over,
            (*found.flows, *part.flows),
            (*found.strays, *part.strays),
            found.squashed or part.squashed,
            found.crossed or part.crossed,
        )
    return dataclasses.replace(found, activations=tuple(activations.values()))
