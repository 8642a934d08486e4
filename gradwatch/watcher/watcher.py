"""The step: measure, detect, emit."""

from __future__ import annotations

import contextlib
import functools
import logging
import numbers
import operator
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, Self

from torch import Tensor, nn

from gradwatch.measurement import loss_scale
from gradwatch.measurement.measurement import Measurement
from gradwatch.measurement.parameters import undisturbed
from gradwatch.measurement.processes import Processes
from gradwatch.measurement.transfer import Transfer
from gradwatch.model.attempts import Attempts
from gradwatch.model.forward_hooks import ForwardTrace, Part
from gradwatch.model.optimizer_hooks import StepHooks, unwrap
from gradwatch.sinks.run_directory import RunDirectory
from gradwatch.timesteps.sequences import Need, Sequences, Timesteps
from gradwatch.values.history import Detector, History
from gradwatch.values.report import Report, Sink
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Snapshot, Stage
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.cadence import Cadence
from gradwatch.watcher.inventory import Inventory, Slot
from gradwatch.watcher.judge import Judge, OnAlert
from gradwatch.watcher.probes import Probes
from gradwatch.watcher.warn_once import Once, said

_log = logging.getLogger("gradwatch")
P = ParamSpec("P")

_PATIENCE = 3
"""Measurements in a row that may fail before measuring is switched off."""
_LOSSES = 10_000
"""Losses that are remembered between two steps."""


def _guarded(method: Callable[P, None]) -> Callable[P, None]:
    """Keep every failure of gradwatch out of the training that calls it."""

    @functools.wraps(method)
    def inside(*args: P.args, **kwargs: P.kwargs) -> None:
        watcher: Watcher = args[0]  # type: ignore[assignment]
        if watcher._off or os.getpid() != watcher._pid:
            return
        try:
            method(*args, **kwargs)
        except Exception as error:
            if watcher._strict:
                raise
            watcher._failed(error)  # diagnostics never kill training
        if watcher._judge.error is not None:  # unless they are asked to
            wanted, watcher._judge.error = watcher._judge.error, None
            raise wanted

    return inside


class Watcher:
    """Measures the gradients of a model at each step of its optimizers and reports what is wrong with them.

    Made by `gradwatch.watch`, which documents the options. Its repr is the table of layers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        *,
        cadence: Cadence,
        thresholds: Thresholds,
        ignore: Sequence[str],
        detectors: Sequence[Detector],
        sinks: Sequence[Sink],
        on_alert: OnAlert,
        directory: RunDirectory | None = None,
        scaler: Any = None,  # noqa: ANN401  (torch has several scalers and no common type)
        timesteps: Timesteps = "auto",
        horizon: Need = None,
        clock: Callable[[], int] | None = None,
        strict: bool = False,
    ) -> None:
        """Attach to the optimizers.

        `clock` numbers the steps where the loop has an axis of its own; `strict` raises what goes wrong instead of
        warning, for a caller that is not a training.
        """
        self._pid = os.getpid()
        self._off = False
        self._strict = strict
        self._failures = 0
        self._warn = Once()
        self._cadence, self._clock, self._scaler = cadence, clock, scaler
        self._losses: deque[float | Tensor] = deque(maxlen=_LOSSES)
        self._taken: set[int] = set()
        """Optimizers that have stepped since a loss was recorded, and have had it."""
        self._explicit = False
        self._slots = [Slot(i, o) for i, o in enumerate(optimizers)] or [Slot(0, None)]
        attempts = Attempts()
        sequences = Sequences(timesteps, horizon, thresholds.horizon_gain, attempts) if timesteps is not False else None
        self._probes = Probes(sequences, attempts, self._warn, strict=strict)
        self._inventory = Inventory(model, self._slots, ForwardTrace(self._probes.all(), self._probes.failed, attempts))
        info = self._inventory.info
        self._processes = Processes((p.name for p in info.parameters), alone=strict)
        self._judge = Judge(
            History(thresholds),
            Snapshot(step=0, wall_time=time.time(), model=info, norm=(None,) * len(info.parameters)),
            detectors=detectors,
            ignore=ignore,
            sinks=[*(directory.sinks if directory is not None else ()), *sinks],
            on_alert=on_alert,
            warn=self._warn,
            strict=strict,
        )
        # Sinks are also closed when the process ends, and files when the watcher goes. Only files are held for that: another
        # sink may know the watcher, and would keep it and the optimizer alive.
        files: list[object] = [s for s in sinks if getattr(s, "outlives_watcher", False)]
        others = [weakref.ref(s) for s in sinks if s not in files and hasattr(s, "close")]
        if directory is not None:
            files.insert(0, directory)
        self._close_sinks = weakref.finalize(self, _close, self._pid, files, others)
        for slot in self._slots:
            if slot.optimizer is not None:
                slot.hooks = StepHooks(slot.optimizer, slot.index, self)

    # --- what users call ---

    @property
    def report(self) -> Report:
        """The newest report; before the first measured step, one without numbers."""
        return self._judge.report

    @property
    def orphaned(self) -> bool:
        """Whether the model is gone, so that there is nothing to measure any more."""
        return self._inventory.model() is None

    def step(self, step: int | None = None, *, loss: float | Tensor | None = None, optimizer: object = None) -> None:
        """Read the gradients now: after `backward()`, before clipping.

        Args:
            step: number of the step; by default steps are counted from 0.
            loss: the unscaled loss, as for `record`.
            optimizer: read only the parameters of this one, of several.

        Raises:
            GradientHealthError: an alert of severity error began, and `on_alert="raise"`.
            ValueError: `optimizer` is not one of those that are watched.

        """
        chosen = self._slots if optimizer is None else [s for s in self._slots if s.optimizer is unwrap(optimizer)]
        if not chosen:
            raise ValueError(f"optimizer must be one of the {len(self._slots)} that are watched, got {optimizer!r:.80}")
        if loss is not None:
            self.record(loss)
        if step is not None and not isinstance(step, numbers.Integral):
            self._warn(
                "step", f"the number of a step must be a whole number, got {step!r:.80}; steps are counted instead"
            )
            step = None
        self._step(chosen, None if step is None else operator.index(step))

    def record(self, loss: float | Tensor) -> None:
        """Tell the unscaled loss of the coming optimizer step; several calls before one step are averaged.

        Of several optimizers, each that steps before the next loss is recorded has it. A tensor is held detached and copied with the rest at a measured
        step; at others it is dropped.
        """
        if self._off:
            return
        try:
            told = loss.detach() if isinstance(loss, Tensor) else float(loss)
        except Exception:  # noqa: BLE001  (whatever it is that somebody takes for a loss)
            self._warn("loss", f"the loss must be a number or a tensor, got {loss!r:.80}, and is left out")
            return
        if self._taken:
            self._losses.clear()
            self._taken.clear()
        self._losses.append(told)

    def close(self) -> Report:
        """Take everything off, finish the files, and give the last report; a second call does nothing.

        Raises:
            GradientHealthError: the last step was skipped, with it an alert of severity error began, and `on_alert="raise"`.

        """
        try:
            self._finish()
        finally:
            if not self._off and os.getpid() == self._pid:
                self._judge.end()
            self._detach()
        return self.report

    def _detach(self) -> None:
        self._off = True
        self._processes.leave()
        self._inventory.trace.disarm()
        self._losses.clear()
        for slot in self._slots:
            slot.reading = None
            slot.spare.clear()
            if slot.hooks is not None:
                slot.hooks.detach()
                slot.hooks = None
            slot.optimizer = None
        self._close_sinks()

    def __enter__(self) -> Self:
        """Watch within a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Return the table of layers as text."""
        from gradwatch.sinks.terminal.page import text  # with rich, which no training needs

        return text(self.report, sequences=self._last_sequences())

    def _repr_html_(self) -> str:
        from gradwatch.sinks.terminal.page import html

        return html(self.report, sequences=self._last_sequences())

    def _last_sequences(self) -> tuple[SequenceStats, ...]:
        """Return what the last probe saw of time; between probes the report has nothing of it."""
        probes = self._judge.history.sequences(1)
        return (probes[-1].sequences or ()) if probes else ()

    def state_dict(self) -> dict[str, Any]:
        """Return the history, the open alerts and the step as dicts, lists, numbers and strings."""
        return {
            "format": 1,
            **self._inventory.state_dict(),
            **self._judge.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            TypeError: the state is no mapping.
            ValueError: it is of another format or of another number of optimizers, or not what `state_dict` gives; the watcher is then as it was.

        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() gave, got {state!r:.80}")
        counts = state.get("counts")
        if state.get("format") != 1 or not isinstance(counts, list | tuple) or len(counts) != len(self._slots):
            given = f"format {state.get('format')!r} for {counts!r:.80}"
            raise ValueError(
                f"state must be of format 1 with a count of steps for each of {len(self._slots)} optimizers, got {given}"
            )
        try:
            go_on = self._inventory.reading_state(state)
            self._judge.load_state_dict(state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"state must be what state_dict() gave, and could not be read: {said(error)}") from error
        go_on()
        self._arm_probes()

    # --- what the hooks call ---

    @_guarded
    def on_look(self, slot: int) -> None:
        """Read the gradients, or if `step` has done so, see what clipping made of them; and copy weights at a probe."""
        mine, had = self._slots[slot], slot in self._taken
        if mine.reading is not None and mine.reading.stage == "before_clip" and not mine.reading.applied:
            with undisturbed():
                mine.reading.as_applied(*self._inventory.gradients(mine), mine.optimizer)
                mine.reading.found_inf(mine.optimizer)
                mine.reading.losses(() if had else self._losses)
        elif not self._explicit:
            if had:  # what was told is of its step before
                self._losses.clear()
            if self._clock is not None:
                self._set_count(mine, self._clock())
            mine.reading = self._read(mine, "applied") if self._due(mine) else None
        if mine.reading is not None:
            mine.reading.applied = True
            if mine.reading.probe:
                mine.turn = mine.reading.parameters.copy(
                    mine.columns, self._inventory.parameters(mine), mine.turn, mine.spare
                )
        self._taken.add(slot)

    @_guarded
    def on_loss(self, slot: int, loss: object) -> None:
        """Take what a closure returned for the loss, unless the loop has told it."""
        reading = self._slots[slot].reading
        told = bool(self._losses and not self._taken) or (reading is not None and reading.told and not reading.applied)
        if not told and (isinstance(loss, int | float) or (isinstance(loss, Tensor) and loss.numel() == 1)):
            self.record(loss)

    @_guarded
    def on_stepped(self, slot: int) -> None:
        """Finish the reading of this step."""
        mine = self._slots[slot]
        reading, mine.reading = mine.reading, None
        if slot not in self._taken:  # a closure was evaluated again, and told again
            self._losses.clear()
        if not self._explicit:
            self._count_on(mine)
        if reading is not None and not reading.empty:  # a step without any gradient moves nothing, and says nothing
            with undisturbed():
                reading.parameters.updates(mine.spare)
            self._emit(mine, reading)

    # --- the step ---

    @_guarded
    def _step(self, chosen: Sequence[Slot], step: int | None) -> None:
        if any(s.hooks is not None and s.hooks.looked for s in chosen):
            return  # a further evaluation of a closure whose first one was measured
        self._explicit = True
        self._flush_skipped(chosen)
        if not self._taken.isdisjoint(s.index for s in chosen):
            self._losses.clear()
        for slot in chosen:
            if step is not None:
                self._set_count(slot, step)
            reading = self._read(slot, "before_clip") if self._due(slot) else None
            self._count_on(slot)
            if slot.optimizer is not None:
                slot.reading = reading
            elif reading is not None and not reading.empty:
                self._emit(slot, reading)
        self._taken.update(s.index for s in chosen)

    @_guarded
    def _finish(self) -> None:
        self._flush_skipped(self._slots)

    def _flush_skipped(self, chosen: Sequence[Slot]) -> None:
        """Emit what was read before clipping and no optimizer has come for: a scaler skipped it."""
        waiting = [
            s for s in chosen if s.reading is not None and s.reading.stage == "before_clip" and not s.reading.applied
        ]
        for slot in waiting:
            reading, slot.reading = slot.reading, None
            # Of several optimizers read together, those that did not step were just not their turn.
            if reading is not None and not reading.empty and len(waiting) == len(chosen):
                self._emit(slot, reading, skipped=True)

    @staticmethod
    def _set_count(slot: Slot, step: int) -> None:
        slot.stride = max(step - (slot.count - slot.stride), 1)
        slot.count = step

    def _count_on(self, slot: Slot) -> None:
        """Count a step, and look at the forward pass of the next one if it is a probe."""
        slot.count += slot.stride
        if self._cadence.probed(slot.count) and not self._processes.silent:
            self._arm(slot)

    @_guarded
    def _arm_probes(self) -> None:
        """Look at the forward pass before steps that are to be probes, as the steps before them would have done."""
        for slot in self._slots:
            if (slot.extra or self._cadence.probed(slot.count)) and slot.count and not self._processes.silent:
                self._arm(slot)

    def _due(self, slot: Slot) -> bool:
        return slot.extra or self._cadence.measured(slot.count)

    def look_ahead(self) -> None:
        """Look at the next forward pass, as at a probe."""
        for slot in self._slots:
            self._arm(slot)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep what runs now from the other watchers' look at the forward pass."""
        return self._inventory.trace.alone()

    def _arm(self, slot: Slot) -> None:
        self._probes.suspect(self._judge.suspects())
        if not self._inventory.look_ahead(slot):
            self._warn(
                "compiled",
                "the forward pass is not measured: torch.compile is in use, and compiled code calls no hooks",
            )

    def _read(self, slot: Slot, stage: Stage) -> Measurement:
        """Begin a reading: norms of the gradients, and at a probe of the weights, all left on the device."""
        slot.owed = f"{slot.index}-{slot.count}"
        with undisturbed():
            probe, slot.extra = slot.extra or self._cadence.probed(slot.count), False
            transfer = Transfer()
            parts = self._seen(slot, transfer)
            ran = self._inventory.take_trace(slot)
            parameters = self._inventory.parameters(slot)
            reading = Measurement(slot.count, self._inventory.info, stage, transfer, parts, probe=probe)
            reading.parameters.holders = {
                c: self._inventory.spread[c] for c in slot.columns if c in self._inventory.spread
            }
            gradients = [p.grad for p in parameters]
            columns = [c for c, g in zip(slot.columns, gradients, strict=True) if g is not None]
            if len(columns) < len(parameters) or ran is not None or slot.absent or self._inventory.frozen:
                reading.absent = self._inventory.absent(slot, parameters, ran)
            factor = loss_scale.at_step(self._scaler, slot.optimizer, stage)
            reading.gradients(columns, [g for g in gradients if g is not None], factor, half=self._inventory.trace.half)
            reading.found_inf(slot.optimizer)
            if probe or not slot.weighed:
                reading.parameters.weights(slot.columns, parameters)
                slot.weighed = True
            reading.losses(self._losses)
            return reading

    def _seen(self, slot: Slot, transfer: Transfer) -> list[Part]:
        """Return what was seen of the forward pass of this step, and of what came back through it."""
        model = self._inventory.model()
        if not slot.tracing or model is None:
            return []
        factor = loss_scale.of_backward(self._scaler, slot.optimizer)
        mine = set(map(id, self._inventory.parameters(slot)))
        others = {id(p) for s in self._slots if s is not slot for p in self._inventory.parameters(s)}
        return self._probes.collect(model, factor, mine, others, transfer)

    def _emit(self, slot: Slot, reading: Measurement, *, skipped: bool = False) -> None:
        """Judge what was read; after a first finding the next step is a probe, so that what is wrong is looked at more closely at once."""
        snapshot = reading.snapshot(
            slot.index if slot.optimizer is not None else None, slot.owed or "", self._processes, skipped=skipped
        )
        slot.owed, self._failures = None, 0
        began = snapshot is not None and bool(self._judge(snapshot).began)
        if self._processes.alone:
            self._warn("processes", f"{self._processes.alone}; the gradients of those parameters are not measured")
        # Of a probe out of turn, the processes that hold the other pieces know nothing.
        alone = not reading.parameters.holders
        if began and alone and not slot.extra and not self._cadence.probed(slot.count):
            slot.extra = True
            self._arm(slot)
        elif slot.tracing:
            self._probes.suspect(self._judge.suspects())

    # --- failures ---

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        for slot in self._slots:
            slot.reading = None
            if slot.owed is not None:
                with contextlib.suppress(Exception):
                    self._processes.send(slot.owed, None)
        self._off = self._failures >= _PATIENCE
        if self._off:
            self._processes.leave()
            self._warn("off", f"{_PATIENCE} measurements in a row failed, and measuring is switched off: {said(error)}")
        else:
            self._warn("failed", f"a measurement failed and is left out: {said(error)}")
        _log.debug("a measurement failed", exc_info=error)


def _close(pid: int, files: Sequence[object], others: Sequence[weakref.ref[Any]]) -> None:
    if os.getpid() != pid:  # a forked child that ends; the files are its parent's
        return
    for sink in (*files, *(ref() for ref in others)):
        with contextlib.suppress(
            Exception
        ):  # what cannot be closed has said so at its last report, or has nothing to lose
            getattr(sink, "close", lambda: None)()
