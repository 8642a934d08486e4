"""The steps of one optimizer: from its hooks, or `Watcher.step`, to the snapshot that is emitted."""

from __future__ import annotations

import contextlib
import enum
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from gradwatch.measurement import loss_scale
from gradwatch.measurement.measurement import Measurement
from gradwatch.measurement.parameters import undisturbed
from gradwatch.measurement.transfer import Transfer
from gradwatch.model.forward_hooks import Part
from gradwatch.model.optimizer_hooks import StepHooks
from gradwatch.model.optimizers import Sweep
from gradwatch.values.snapshot import Absent, Snapshot, Stage
from gradwatch.values.thresholds import STEPLESS
from gradwatch.watcher.silent_steps import SilentSteps
from gradwatch.watcher.step_count import StepCount
from gradwatch.watcher.stepped_parameters import SteppedParameters
from gradwatch.watcher.training import Training
from gradwatch.watcher.weight_copies import WeightCopies

Guard = Callable[..., None]
"""Calls its first argument with the others, and keeps every failure out of the training."""
Emit = Callable[[Snapshot | None], bool]
"""Takes what was measured (None: another process speaks for this one), and tells whether an alert has begun."""


class State(enum.Enum):
    """Where an optimizer stands in a step that is measured."""

    IDLE = "idle"
    """Nothing has been measured, or it was let go of."""
    READ = "read"
    """`Watcher.step` has read the gradients, and the optimizer has not come for them."""
    APPLIED = "applied"
    """The optimizer has come for the gradients, and moves the weights."""
    DONE = "done"
    """The step that was measured last is done."""
    SKIPPED = "skipped"
    """The optimizer never came for what is not finite: a scaler skipped the step."""


class OptimizerSteps:
    """Hears each step of one optimizer (None: the loop has none), measures it if it is due, and emits a snapshot of it.

    A step that the hooks alone tell of is IDLE, then APPLIED, then DONE. One that `Watcher.step` reads before clipping
    is READ first; if its optimizer never comes for it, it ends SKIPPED where it is not finite, and else it was a
    micro-batch of the step to come, and no step. Without an optimizer it is DONE at once.
    """

    _guard: Guard  # these two while the hooks are on, so that who hears them lives as long as the optimizer
    _emit: Emit
    _ran: frozenset[str] | None = None  # before a step in parts, where somebody looked

    def __init__(self, index: int, optimizer: Any, training: Training) -> None:  # noqa: ANN401  (any with step())
        """Begin at step 0, without hooks."""
        self.index, self.optimizer, self._training = index, optimizer, training
        self.taker = id(self)  # of losses, which several watchers may share
        self._losses, self._model_map = training.losses, training.model_map
        self._count = StepCount(training.cadence, training.clock)
        self._hooks: StepHooks | None = None
        self._by_hooks = True  # whether the hooks begin the measurement and count the steps; else `read` does
        self._scaler = training.scaler
        """What scales the loss; one that nobody told is seen when it calls the optimizer."""
        self.state = State.IDLE
        self.waits = 0
        """How often `read` was called since the optimizer came last."""
        self._accumulates = False  # whether micro-batches are read
        self._earlier: list[float | Tensor] = []
        """Losses of the step's micro-batches before this one, those of a measured step."""
        self._measurement: Measurement | None = None
        """There while the state is READ or APPLIED."""
        self._silent = SilentSteps(training.patience)
        self._owed: str | None = None
        """The step for which the process that speaks for this one waits."""
        self._stepped = SteppedParameters(training.model_map)
        self._in_parts = False  # whether the step that is under way is made in parts
        self._copies = WeightCopies(self._stepped)

    def attach(self, optimizer: Any, guard: Guard, emit: Emit) -> None:  # noqa: ANN401
        """Hang hooks on the optimizer and what wraps it; they speak through `guard`, and what comes goes to `emit`."""
        self._guard, self._emit = guard, emit
        self._hooks = StepHooks(optimizer, self)

    def takes_in(self, optimizer: object) -> bool:
        """Let one more optimizer be a part of this sweep; False if this is none, or not of its kind."""
        taken = isinstance(self.optimizer, Sweep) and self.optimizer.takes_in(optimizer)
        if taken and self._hooks is not None:
            self._hooks.join(optimizer)
        return taken

    def end_sweep(self) -> None:
        """End a step that is made in parts: no further part comes."""
        if self._hooks is not None:
            self._hooks.end()

    def detach(self) -> None:
        """Take the hooks off, and let go of everything but the counts."""
        self.drop()
        self._copies.updates.clear()
        if self._hooks is not None:
            self._hooks.detach()
            self._hooks = None
            del self._guard, self._emit
        self.optimizer = self._scaler = None

    # --- a step as the hooks tell of it ---

    def on_begin(self, *, early: bool) -> None:
        """Take note: a step has been called; `early`: it may do anything before its gradients are looked at."""
        self._copies.drop()  # of a step that raised
        if early and self._copies.wanted_early:
            self._guard(self._copy_first)

    def _copy_first(self) -> None:
        waiting = self._measurement if self.state is State.READ else None
        number, probe = (waiting.step, waiting.probe) if waiting is not None else (self.count, self._count.probed)
        if probe or not number:
            self._copies.begin(self.optimizer)

    def on_look(self, part: Sequence[Tensor] | None = None) -> None:
        """Take note: the gradients of a step are complete, and those weights have not moved; of a `part`, or of all."""
        self._guard(self._look, part)

    def _look(self, part: Sequence[Tensor] | None) -> None:
        if self._measurement is not None and self.state is State.READ:
            self._compare(self._measurement)
        elif self._by_hooks:
            self._losses.begin(self.taker)
            self._count.tell()
            self._begin("applied", part)
        if self._measurement is not None:
            self._training.unheard.end()
            self.state = State.APPLIED
            if self._training.scaler is None:
                self._scaler = loss_scale.stepping() or self._scaler
            self._measurement.of_optimizer(self.optimizer, self._scaler)
            if self._measurement.probe or self._measurement.step == 0:  # the first update may throw the weights
                self._copies.look(self.optimizer, complete=part is None)
        self._in_parts = part is not None
        self._losses.taken(self.taker)

    def on_more(self, part: Sequence[Tensor]) -> None:
        """Take note: those of a further part of the same step are complete, and these weights have not moved."""
        self._guard(self._look_at_more, part)

    def _look_at_more(self, part: Sequence[Tensor]) -> None:
        if self._measurement is not None:
            with undisturbed():
                self._measurement.more_gradients(*self._stepped.gradients((), part))

    def on_loss(self, loss: object) -> None:
        """Take what a closure returned for the loss, unless the loop has told it."""
        self._guard(self._hear, loss)

    def _hear(self, loss: object) -> None:
        waiting = self._measurement if self.state is State.READ else None
        told = self._losses.fresh or (waiting is not None and waiting.told)
        if not told and (isinstance(loss, int | float) or (isinstance(loss, Tensor) and loss.numel() == 1)):
            self._losses.record(loss)

    def on_stepped(self) -> None:
        """Take note: the step is done."""
        self._guard(self._finish, self._emit)

    def _finish(self, emit: Emit) -> None:
        self._losses.end(self.taker)
        self.waits = 0
        if self._by_hooks:
            self._count_on()
        if self._measurement is not None:
            if self._in_parts:
                read = self._measurement.parameters.read
                self._stepped.explain(self._measurement, self.optimizer, read, self._ran)
            self._copies.end(self._measurement, self.optimizer)
            self._end(State.DONE, emit)
            if self._accumulates and not self._count.probed:
                self._training.forward_pass.release(self.index)  # no further micro-batch has come

    # --- a step that `Watcher.step` reads ---

    @property
    def reevaluates(self) -> bool:
        """Whether a closure is evaluated again, for a step whose gradients have been read."""
        return self._hooks is not None and self._hooks.looked

    def leave_to_reads(self) -> None:
        """From now on leave it to `read` to begin a measurement and to count."""
        self._by_hooks = False

    def read(self, step: int | None, emit: Emit) -> None:
        """Read the gradients before clipping, if the step is due; None: the steps are counted."""
        if step is not None:
            self._count.tell(step)
        self._begin("before_clip")
        if self._measurement is not None:
            self._measurement.of_optimizer(self.optimizer, self._scaler)
            self._measurement.first_of_step = self.optimizer is not None and not self.waits
        self._count_on()
        self.waits += self.optimizer is not None
        if self.optimizer is None or self.waits > STEPLESS:
            self._end(State.DONE, emit)
            return
        if self._accumulates and self._measurement is not None and self._measurement.probe:
            self.look_ahead()

    def end_unstepped(self, emit: Emit) -> None:
        """End what was read and its optimizer has not come for: emit it, as skipped, where it is not finite.

        What is finite no scaler skips: it was a micro-batch, and the next reading is one of the same step. A process
        that holds pieces does not see that alone.
        """
        measurement, waits = self._measurement, self.waits
        if waits > STEPLESS:  # it never comes, and the readings are the steps
            return
        if measurement is not None and measurement.parameters.holders:
            skipped = self._training.scaler is not None
        else:
            skipped = measurement is not None and not measurement.finite
        if skipped:
            self.waits = 0
            self._end(State.SKIPPED, emit)
            return
        if measurement is not None:
            self._earlier = list(measurement.told)
            if measurement.probe and not self._count.is_turn(measurement.step):
                self._count.probe_next()
        self.drop()
        self._count.take_back()
        self.waits, self._accumulates = waits, True

    def drop(self) -> None:
        """Let go of what is being measured."""
        self._measurement, self.state, self.waits = None, State.IDLE, 0
        self._copies.drop()

    def give_up(self) -> None:
        """Let go of what is being measured, which has failed, and tell the process that waits for it."""
        self.drop()
        if self._owed is not None:
            with contextlib.suppress(Exception):
                self._training.processes.send(self._owed, None)

    # --- the measurement ---

    def _begin(self, stage: Stage, part: Sequence[Tensor] | None = None) -> None:
        """Measure the gradients of the step if it is due, and at a probe more."""
        if self._measurement is not None:
            self._measurement, self.state, self.waits = None, State.IDLE, 0
        if self._count.measured:
            self._owed = f"{self.index}-{self.count}"
            with undisturbed():
                self._measurement = self._measure(stage, part)
            if stage == "before_clip":
                self.state = State.READ

    def _measure(self, stage: Stage, part: Sequence[Tensor] | None) -> Measurement:
        """Return the norms of the gradients, and at a probe of the weights, all left on the device."""
        probe = self._count.begin()
        transfer = Transfer()
        parts, ran = self._seen(transfer)
        parameters = self._stepped.now(self.optimizer)
        measurement = Measurement(self.count, self._model_map.info, stage, transfer, parts, probe=probe)
        measurement.parameters.holders = self._model_map.holders(self._stepped.columns)
        columns, gradients = self._stepped.gradients(parameters, part)
        if part is None:
            self._stepped.explain(measurement, self.optimizer, columns, ran)
        else:  # what has a gradient is known at the end
            self._ran = ran
        if self.index == 0:  # the first speaks for what none steps
            measurement.outside(*self._model_map.outside(), weigh=probe or not self._stepped.weighed)
        factor = loss_scale.at_step(self._scaler, self.optimizer, stage)
        measurement.gradients(columns, gradients, factor, half=self._training.forward_pass.half)
        measurement.found_inf(self.optimizer)
        if probe or not self._stepped.weighed or measurement.empty:
            weights = self._copies.updates.before(self._stepped.columns, parameters)
            if self._model_map.whole and self._training.processes.silent:  # who speaks has them, and would add up ours
                weights = []
            measurement.parameters.weights(self._stepped.columns[: len(weights)], weights)
            self._stepped.weighed = True
        measurement.losses(self._losses_now(), raw=self._losses.raw)
        return measurement

    def _losses_now(self) -> list[float | Tensor]:
        """Return what was told of the step, with the losses of its micro-batches before; nothing where nothing was."""
        told = self._losses.of(self.taker)
        return [*self._earlier, *told] if told else []

    def _seen(self, transfer: Transfer) -> tuple[list[Part], frozenset[str] | None]:
        """Return what the probes saw of this step, and the modules that ran; nothing and None where nobody looked."""
        look = self._training.forward_pass
        parts: list[Part] = []
        if look.awaited_by(self.index) and self._model_map.model is not None:
            scale = loss_scale.of_backward(self._training.scaler, self.optimizer)
            mine = set(map(id, self._stepped.now(self.optimizer)))
            parts = look.seen(scale, mine, self._model_map.stepped_by_others(self.optimizer), transfer)
        ran = look.release(self.index)
        if ran is None:
            return parts, None
        self._model_map.learn_order(ran, look.applied)
        self._stepped.forget()
        return parts, frozenset(ran)

    def _compare(self, measurement: Measurement) -> None:
        """See what clipping has made of the gradients that were read before it."""
        with undisturbed():
            columns, gradients = self._stepped.gradients(self._stepped.now(self.optimizer))
            measurement.as_applied(columns, gradients, self.optimizer)
            measurement.found_inf(self.optimizer)
            measurement.losses(self._losses_now(), raw=self._losses.raw)

    # --- the end of a step ---

    def _end(self, end: State, emit: Emit) -> None:
        """Emit what was measured; once an alert has begun, the next step is a probe, which looks more closely."""
        measurement, self._measurement, self._earlier = self._measurement, None, []
        if measurement is None:
            return
        self.state = end
        if not measurement.empty:
            self._silent.end()
        elif not self._stepped.columns or not self._silent.add(measurement, self._stepped.columns):
            if self._silent.due and not self._training.processes.silent:
                self._count.probe_next()
                self._training.forward_pass.look_ahead(self.index, self._model_map.last_layer(self._stepped.columns))
            return
        optimizer = self.index if self.optimizer is not None else None
        key = self._owed or ""
        snapshot = measurement.snapshot(optimizer, key, self._training.processes, skipped=end is State.SKIPPED)
        self._owed = None
        began = emit(snapshot)
        # Of a probe out of turn, the processes that hold the other pieces know nothing.
        alone = not measurement.parameters.holders
        wanted = began or (snapshot is not None and self._count.may_show_origin(snapshot))
        if wanted and alone and end is State.SKIPPED:  # the next forward pass has been made by now
            self._count.probe_after_next()
        elif wanted and alone and not self._count.probed:
            self._count.probe_next()
            self.look_ahead()
        else:
            self._training.forward_pass.look_closer(self.index)

    # --- the count ---

    @property
    def count(self) -> int:
        """The number of the next step."""
        return self._count.number

    def _count_on(self) -> None:
        """Count a step, and look at the forward pass of the next one if it is a probe."""
        self._count.advance()
        if self._count.probed and not self._training.processes.silent:
            self.look_ahead()

    def take_up(self) -> None:
        """Look at the forward pass of the next step if it is a probe: the step before was of another process."""
        if self._count.probed and self.count and not self._training.processes.silent:
            self.look_ahead()

    def look_ahead(self) -> None:
        """Look at the forward pass of the next step."""
        self._training.forward_pass.look_ahead(self.index)

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return where it stands, but for the count, as plain values; `names` are those of the columns."""
        absent = {names[c]: reason for c, reason in self._stepped.absent.items() if c < len(names)}
        silent = [self._silent.since, self._silent.count]
        where = {"stride": self._count.stride, "turn": self._copies.updates.turn, "extra": self._count.extra}
        return {**where, "absent": absent, "silent": silent}

    def reading_state(self, count: int, state: Mapping[str, Any], names: Sequence[str]) -> Callable[[], None]:
        """Read what `state_dict` gave, and change nothing before the function that is returned is called.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is not what that gives.

        """
        if not set(state["absent"].values()) <= set(get_args(Absent)):
            raise ValueError(f"absent must be of {get_args(Absent)}, got {state['absent']!r:.80}")
        columns = {name: c for c, name in enumerate(names)}
        absent = {columns[name]: reason for name, reason in state["absent"].items() if name in columns}
        number, stride = max(operator.index(count), 0), max(operator.index(state["stride"]), 1)
        turn, extra = max(operator.index(state["turn"]), 0), bool(state["extra"])
        since, silent = map(operator.index, state.get("silent", (0, 0)))

        def apply() -> None:
            self._count.resume(number, stride, extra=extra)
            self._copies.updates.turn, self._stepped.absent = turn, absent
            self._silent.resume(since, silent)

        return apply
