"""The watcher: what users call, and what keeps a failure of gradwatch out of their training."""

from __future__ import annotations

import contextlib
import logging
import numbers
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVarTuple

from torch import Tensor, nn

from gradwatch.measurement.model_map import ModelMap
from gradwatch.measurement.processes import Processes
from gradwatch.model.attempts import Attempts
from gradwatch.model.optimizers import all_of, swept, unwrap
from gradwatch.sinks.log import log_left_out
from gradwatch.sinks.run_directory import RunDirectory
from gradwatch.timesteps.sequences import Sequences
from gradwatch.values.report import GradientHealthError, Report
from gradwatch.values.snapshot import Snapshot
from gradwatch.watcher.closing import closing_with
from gradwatch.watcher.forward_pass import ForwardPass
from gradwatch.watcher.judge import Judge
from gradwatch.watcher.losses import Losses
from gradwatch.watcher.optimizer_steps import OptimizerSteps
from gradwatch.watcher.options import Options
from gradwatch.watcher.probes import Probes
from gradwatch.watcher.resting import Resting
from gradwatch.watcher.resuming import state_of, take_up
from gradwatch.watcher.training import Training
from gradwatch.watcher.unheard import Unheard
from gradwatch.watcher.warn_once import WarnOnce, said

if TYPE_CHECKING:
    from gradwatch.sinks.page.notebook import Page

_log = logging.getLogger("gradwatch")
A = TypeVarTuple("A")

_PATIENCE = 3
"""Measurements in a row that may fail before measuring is switched off."""


class Watcher:
    """Measures the gradients of a model at each step of its optimizers and reports what is wrong with them.

    Made by `gradwatch.watch`, which documents the options. Its repr is the table of layers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        options: Options,
        *,
        directory: RunDirectory | None = None,
        scaler: Any = None,  # noqa: ANN401  (torch has several scalers and no common type)
        clock: Callable[[], int] | None = None,
        losses: Losses | None = None,
        strict: bool = False,
    ) -> None:
        """Attach to the optimizers.

        Args:
            model: as for `gradwatch.watch`.
            optimizers: with what wraps them; none where the loop calls `step`.
            options: checked already.
            directory: takes the reports before the sinks do, and is closed with the watcher.
            scaler: as for `gradwatch.watch`.
            clock: numbers the steps where the loop has an axis of its own.
            losses: told to several watchers at once.
            strict: raise what goes wrong instead of warning, for a caller that is not a training.

        """
        self._pid = os.getpid()
        self._off = False
        self._strict = strict
        self._failures = 0
        self._wanted: GradientHealthError | None = None
        """What `on_alert="raise"` wants to be raised, once what is under way is whole."""
        self._warn = WarnOnce()
        self._losses = Losses() if losses is None else losses
        optimizers = swept(optimizers, sum(p.requires_grad for p in model.parameters()))
        inner = list(map(unwrap, optimizers))
        self._model_map = ModelMap(model, inner)
        info = self._model_map.info
        log_left_out(info)
        self._processes = Processes((p.name for p in info.parameters), alone=strict)
        self._judge = Judge(
            Snapshot(step=0, wall_time=time.time(), model=info, norm=(None,) * len(info.parameters)),
            options,
            [*(directory.sinks if directory is not None else ()), *options.sinks],
            self._warn,
            strict=strict,
        )
        attempts = Attempts()
        probes = Probes(_sequences(options, attempts), attempts, self._warn, strict=strict)
        self._forward_pass = ForwardPass(self._model_map, probes, self._judge.suspects, self._warn)
        patience = options.thresholds.disconnected_steps
        own = [one for optimizer in optimizers for one in all_of(optimizer)]
        self._unheard = Unheard(self._model_map, own, patience, self._guarded, self._tell_unheard)
        self._training = training = Training(
            self._model_map,
            self._forward_pass,
            self._losses,
            self._unheard,
            self._processes,
            options.cadence,
            patience,
            scaler,
            clock,
        )
        self._steps = [OptimizerSteps(index, optimizer, training) for index, optimizer in enumerate(inner or [None])]
        self._resting = Resting(self._model_map)
        self._close_sinks = closing_with(self, directory, options.sinks)
        self._directory = None if directory is None else directory.path
        self._name = type(model).__name__ if directory is None else directory.path.parent.name or "run"
        for steps, optimizer in zip(self._steps, optimizers, strict=False):  # none where the loop has none
            steps.attach(optimizer, self._guarded, self._emit)
        if strict:
            self._unheard.end()

    # --- what users call ---

    @property
    def report(self) -> Report:
        """The newest report; before the first measured step, one without numbers."""
        return self._judge.report

    @property
    def model(self) -> nn.Module | None:
        """The watched model, which a watcher does not keep; None once it is gone."""
        return self._model_map.model

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
        if self._off:
            return
        wanted = None if optimizer is None else unwrap(optimizer)
        chosen = [s for s in self._steps if wanted is None or any(wanted is one for one in all_of(s.optimizer))]
        if not chosen:
            raise ValueError(f"optimizer must be one of the {len(self._steps)} that are watched, got {optimizer!r:.80}")
        if loss is not None:
            self.record(loss)
        if step is not None and not isinstance(step, numbers.Integral):
            self._warn(
                "step", f"the number of a step must be a whole number, got {step!r:.80}; steps are counted instead"
            )
            step = None
        self._guarded(self._read, chosen, None if step is None else operator.index(step))

    def _read(self, chosen: Sequence[OptimizerSteps], step: int | None) -> None:
        if any(steps.reevaluates for steps in chosen):
            return  # a further evaluation of a closure whose first one was measured
        for steps in self._steps:
            steps.leave_to_reads()
        self._end_unstepped(chosen)
        for steps in chosen:
            self._losses.begin(steps.taker)
        if self._unheard.hooked:
            self._unheard.told(read=True)
        for steps in chosen:
            if self._off:  # closed by who was told of the step before
                return
            steps.read(step, self._emit)
        for steps in chosen:
            self._losses.taken(steps.taker)

    def _end_unstepped(self, chosen: Sequence[OptimizerSteps]) -> None:
        """End what was read before clipping and no optimizer has come for."""
        waiting = [steps for steps in chosen if steps.waits]
        for steps in waiting:
            if len(waiting) == len(chosen):
                steps.end_unstepped(self._emit)
            else:  # of several optimizers read together, those that did not step were just not their turn
                steps.drop()

    def record(self, loss: float | Tensor) -> None:
        """Tell the unscaled loss of the coming optimizer step; several calls before one step are averaged.

        Of several optimizers, each that steps before the next loss is recorded has it. A tensor is held detached and
        copied with the rest at a measured step; at others it is dropped.
        """
        if self._off:
            return
        try:
            self._losses.record(loss)
        except Exception:  # noqa: BLE001  (whatever it is that somebody takes for a loss)
            self._warn("loss", f"the loss must be a number or a tensor, got {loss!r:.80}, and is left out")
        self.look_at(loss)
        if self._unheard.listening:
            self._guarded(self._unheard.told)

    def look_at(self, loss: float | Tensor) -> None:
        """At a probe, look at how a loss with its graph is made; `record` does so, unless it is told another tensor."""
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            self._guarded(self._forward_pass.made, loss)

    def close(self) -> Report:
        """Take everything off, finish the files, and return the last report; a second call does nothing.

        Raises:
            GradientHealthError: the last step was skipped, with it an alert of severity error began, and
                `on_alert="raise"`.

        """
        try:
            self.end_sweeps()
            self._guarded(self._end_unstepped, self._steps)
            self._guarded(self._unheard.close)
            self._guarded(self._emit_all, self._resting.at_the_end(self._steps))
        finally:
            if not self._off and os.getpid() == self._pid:
                self._judge.end()
            self._detach()
        return self.report

    def _detach(self) -> None:
        self._off = True
        if os.getpid() == self._pid:  # a forked child speaks to the store as its parent
            self._processes.leave()
        self._forward_pass.close()
        self._losses.clear()
        self._unheard.end()
        for steps in self._steps:
            steps.detach()
        self._model_map.release()
        self._close_sinks()

    def _emit_all(self, snapshots: Iterator[Snapshot]) -> None:
        for snapshot in snapshots:
            self._emit(snapshot)

    def _tell_unheard(self) -> None:
        if self._model_map.model is None or self._processes.silent:
            return
        info, first = self._model_map.info, self._steps[0]
        self._emit(
            Snapshot(
                step=first.count,
                wall_time=time.time(),
                model=info,
                optimizer=None if first.optimizer is None else first.index,
                norm=(None,) * len(info.parameters),
                silence=self._unheard.silence,
            )
        )

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Look at the forward pass that runs within the block, as before a probe, and let no other watcher see it."""
        with self._forward_pass.alone():
            for steps in self._steps:
                steps.look_ahead()
            yield

    def wait_for_others(self) -> None:
        """Wait a while until the other processes are there, where all begin to watch in one and the same step."""
        self._guarded(self._processes.wait)

    def join(self, optimizer: Any) -> None:  # noqa: ANN401  (as for `gradwatch.watch`)
        """Watch one more optimizer, which has come to step parameters of the model."""
        if self._off:
            return
        self._unheard.join(all_of(optimizer))
        if any(steps.takes_in(optimizer) for steps in self._steps):  # its next look describes the model anew
            return
        inner = unwrap(optimizer)
        self._model_map.join(inner)
        self._steps.append(steps := OptimizerSteps(len(self._steps), inner, self._training))
        steps.attach(optimizer, self._guarded, self._emit)

    def hears(self, optimizer: object) -> bool:
        """Tell whether this optimizer, or what it wraps, is watched."""
        inner = unwrap(optimizer)
        return not self._off and any(one is inner for steps in self._steps for one in all_of(steps.optimizer))

    def end_sweeps(self) -> None:
        """End the steps that are made in parts: a new backward pass begins, or none comes any more."""
        for steps in self._steps:
            steps.end_sweep()

    def __enter__(self) -> Self:
        """Watch within a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Return the table of layers as text."""
        from gradwatch.sinks.terminal.page import text  # with rich, which no training needs

        return text(self.report, sequences=self._judge.history.last_sequences)

    def _repr_html_(self) -> str:
        from gradwatch.sinks.page.notebook import still

        return still(self._name, self._judge.run(self._directory))

    def page(self) -> Page:
        """Return the run up to now as a page: it shows itself in a notebook, and `save(path)` writes it into a file.

        With `logdir` it shows the whole run, without it the newest steps, as many as verdicts remember.
        """
        from gradwatch import __version__
        from gradwatch.sinks.page.notebook import Page

        return Page(self._name, self._judge.run(self._directory), __version__)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as the last report: hooks and files are of this process, and of these objects."""
        return _itself, (self.report,)

    def state_dict(self) -> dict[str, Any]:
        """Return the history, the open alerts and the step as dicts, lists, numbers and strings."""
        return state_of(self._steps, self._model_map, self._judge)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            TypeError: the state is no mapping.
            ValueError: it is of another format or of another number of optimizers, or not what `state_dict` gives; the
                watcher is then as it was.

        """
        take_up(state, self._steps, self._model_map, self._judge)
        self._guarded(self._take_up)

    def _take_up(self) -> None:
        for steps in self._steps:
            steps.take_up()

    # --- what the steps of the optimizers call ---

    def _guarded(self, act: Callable[[*A], None], *args: *A) -> None:
        """Keep every failure of gradwatch out of the training, and raise only what `on_alert` wants raised."""
        if self._off or os.getpid() != self._pid:
            return
        try:
            act(*args)
        except Exception as error:
            if self._strict:
                raise
            self._failed(error)  # diagnostics never kill training
        if self._wanted is not None:  # unless they are asked to
            wanted, self._wanted = self._wanted, None
            raise wanted

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        for steps in self._steps:
            steps.give_up()
        self._off = self._failures >= _PATIENCE
        if self._off:
            self._processes.leave()
            self._warn("off", f"{_PATIENCE} measurements in a row failed, and measuring is switched off: {said(error)}")
        else:
            self._warn("failed", f"a measurement failed and is left out: {said(error)}")
        _log.debug("a measurement failed", exc_info=error)

    def _emit(self, snapshot: Snapshot | None) -> bool:
        """Judge a measured step (None: another process speaks for this one), and tell whether an alert has begun."""
        self._failures = 0
        began = False
        if snapshot is not None:
            report, wanted = self._judge(snapshot)
            began, self._wanted = bool(report.began), wanted or self._wanted
            if len(self._steps) > 1 and snapshot.silence is None:
                self._emit_all(self._resting.while_stepped(snapshot, self._steps))
        if self._processes.alone:
            self._warn("processes", f"{self._processes.alone}; the gradients of those parameters are not measured")
        return began


def _itself(report: Report) -> Report:
    return report


def _sequences(options: Options, attempts: Attempts) -> Sequences | None:
    if options.timesteps is False:
        return None
    return Sequences(options.timesteps, options.horizon, options.thresholds.horizon_gain, attempts)
