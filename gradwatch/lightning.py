"""A callback for the Trainers of `lightning.pytorch` and `pytorch_lightning`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gradwatch.detectors import DETECTORS
from gradwatch.measurement.processes import own_name
from gradwatch.sinks.log import log_alert
from gradwatch.sinks.run_directory import RunDirectory
from gradwatch.sinks.tensorboard import TensorBoardSink, scalars
from gradwatch.timesteps.sequences import Need, Timesteps
from gradwatch.values.history import Detector
from gradwatch.values.report import Alert, Report, Severity, Sink
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.options import Options, check_of_trainer
from gradwatch.watcher.warn_once import WarnOnce
from gradwatch.watcher.watch import close_earlier, close_orphans, remember
from gradwatch.watcher.watcher import Watcher

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
else:

    def _both() -> type:
        """Make one base of the two classes called Callback: a Trainer of either package accepts only its own."""
        found = []
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                found.append(importlib.import_module(package).Callback)
            except ModuleNotFoundError:
                continue
        if not found:
            raise ModuleNotFoundError('gradwatch.lightning needs Lightning: pip install "torch-gradwatch[lightning]"')
        bases = [
            c
            for i, c in enumerate(found)
            if not any(other is not c and issubclass(other, c) for other in found) and c not in found[:i]
        ]
        return type("_Callback", tuple(bases), {})

    _Callback = _both()


class GradientMonitor(_Callback):
    """Watches the gradients of the LightningModule while it is fitted.

    Under automatic optimization the numbers are those before clipping; under manual optimization those that the
    optimizer gets. The x axis is that of `self.log`: batches that stepped. TensorBoard loggers get everything (tags as
    in `TensorBoardSink`), other loggers the scalars, and the record goes to `gradwatch/` in the logger's directory, or
    in `logdir`; without a logger, alerts still go where `on_alert` says. Fitting a model again closes the watcher that
    an earlier fit, or `gradwatch.watch`, has left on it. A fit of another model, and one whose steps begin anew, begins
    with nothing remembered, unless it resumes from a checkpoint.

    Args:
        logdir: folder for the record, which goes to `<logdir>/gradwatch`. Default: the logger's directory; without a
            logger there is no record.
        name: goes into the folder's name, `gradwatch-<name>`, and tells two of these callbacks apart.
        every_n_steps: see `gradwatch.watch`, as for the arguments that follow.
        probe_every_n_steps: see `gradwatch.watch`.
        timesteps: see `gradwatch.watch`.
        horizon: see `gradwatch.watch`.
        thresholds: see `gradwatch.watch`.
        ignore: see `gradwatch.watch`.
        detectors: see `gradwatch.watch`.
        sinks: see `gradwatch.watch`.
        on_alert: "warn", "raise", "stop" (the fit ends after the batch, at severity error), or a function that takes an
            Alert.

    """

    def __init__(  # noqa: PLR0913  (the options of `gradwatch.watch`: a user names them here)
        self,
        *,
        logdir: str | os.PathLike[str] | None = None,
        name: str | None = None,
        every_n_steps: int | None = None,
        probe_every_n_steps: int | None = None,
        timesteps: Timesteps = "auto",
        horizon: Need = None,
        thresholds: Thresholds | None = None,
        ignore: Sequence[str] = (),
        detectors: Sequence[Detector] = DETECTORS,
        sinks: Sequence[Sink] = (),
        on_alert: Literal["warn", "raise", "stop"] | Callable[[Alert], object] = "warn",
    ) -> None:
        """Check and keep the options; nothing is attached before the fit."""
        super().__init__()
        check_of_trainer(logdir, on_alert)
        self._logdir = logdir
        self._options = Options(
            name=name,
            every_n_steps=every_n_steps,
            probe_every_n_steps=probe_every_n_steps,
            timesteps=timesteps,
            horizon=horizon,
            thresholds=Thresholds() if thresholds is None else thresholds,
            ignore=ignore,
            detectors=detectors,
            sinks=sinks,
            on_alert="raise" if on_alert == "stop" else on_alert,
        )
        self._on_alert = on_alert
        self._watcher: Watcher | None = None
        self._state: Mapping[str, Any] | None = None
        """That of the last fit, which the next one takes up where it is one of the same module and goes on from it."""
        self._fitted: weakref.ref[Any] | None = None
        self._last_step = 0
        self._loaded: Mapping[str, Any] | None = None
        """That of a checkpoint, which the fit takes up that it was loaded for."""
        self._stop_wanted = False

    @property
    def state_key(self) -> str:
        """Tell two of these callbacks apart in a checkpoint."""
        return f"GradientMonitor{{'name': {self._options.name!r}}}"

    @property
    def report(self) -> Report | None:
        """The newest report; None outside of a fit."""
        return self._watcher.report if self._watcher is not None else None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401  (of either package)
        """Attach: here the model is final, and the optimizers are there."""
        self._stop_wanted = False
        self._close()  # what an interrupted fit has left
        close_earlier(pl_module, keep=[its._watcher for its in _others(trainer, self) if its._watcher is not None])
        with contextlib.ExitStack() as undo:
            directory = _directory(trainer, self._logdir, self._options.name)
            if directory is not None:
                undo.callback(directory.close)
            self._watcher = Watcher(
                pl_module,
                list(trainer.optimizers),
                dataclasses.replace(
                    self._options,
                    sinks=[*map(_sink, trainer.loggers), *self._options.sinks],
                    on_alert=self._on_stop if self._on_alert == "stop" else self._options.on_alert,
                ),
                directory=directory,
                scaler=getattr(trainer.precision_plugin, "scaler", None),
                clock=lambda: _step(trainer),
            )
            undo.pop_all()
        remember(self._watcher)
        goes_on = self._fitted is not None and self._fitted() is pl_module and _step(trainer) > self._last_step
        if (state := self._loaded or (self._state if goes_on else None)) is not None:
            try:
                self._watcher.load_state_dict(state)
            except ValueError as error:  # of another model, perhaps: no reason to end a fit
                WarnOnce()("state", f"what was remembered of an earlier fit is left out: {error}")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:  # noqa: ANN401
        """Note the loss, without the factors that the Trainer has put in."""
        if self._watcher is None:
            return
        self._watcher.look_at(loss)
        loss = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones((), device=loss.device))  # the scale, without a synchronisation
        if pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches
        self._watcher.record(loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ANN401
        """Read the gradients before clipping; manual optimization clips where it likes, and is read at the step."""
        if self._watcher is not None and pl_module.automatic_optimization:
            self._watcher.step(_step(trainer), optimizer=optimizer)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Stop the fit if an alert wants it; of several processes one has it, and all must stop together."""
        if self._on_alert == "stop" and trainer.world_size > 1:
            if not self._options.cadence.measured(_step(trainer)):  # a probe out of turn, of which one alone knows
                return
            self._stop_wanted = bool(trainer.strategy.reduce_boolean_decision(self._stop_wanted, all=False))
        if self._stop_wanted:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, ARG002  (Lightning's signature)
        """Take everything off."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ANN401, ARG002
        """Take everything off: after an exception Lightning calls nothing else."""
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ANN401, ARG002
        """Take everything off."""
        self._close()
        self._loaded = None  # a test loads its checkpoint too, and is no reason for a later fit to go on from there

    def state_dict(self) -> dict[str, Any]:
        """Return the history, the open alerts and the step, as plain as `torch.load(weights_only=True)` wants it."""
        return self._watcher.state_dict() if self._watcher is not None else dict(self._loaded or self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the next fit where the checkpoint was written."""
        self._loaded = state_dict or None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies the live watcher, and the methods of the model that Lightning hangs on callbacks."""
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")} | {
            "_watcher": None,
            "_fitted": None,
        }

    def _close(self) -> None:
        if self._watcher is not None:
            self._state, self._loaded = self._watcher.state_dict(), None
            module, self._last_step = self._watcher.model, self._watcher.report.snapshot.step
            self._fitted = None if module is None else weakref.ref(module)
            self._watcher.close()
            self._watcher = None

    def _on_stop(self, alert: Alert) -> None:
        log_alert(alert)
        self._stop_wanted = self._stop_wanted or alert.severity is Severity.ERROR


def _step(trainer: Any) -> int:  # noqa: ANN401
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _others(trainer: Any, monitor: GradientMonitor) -> list[GradientMonitor]:  # noqa: ANN401
    """Return the other callbacks of this kind, which watch the same fit with other options."""
    return [c for c in trainer.callbacks if isinstance(c, GradientMonitor) and c is not monitor]


def _directory(
    trainer: Any,  # noqa: ANN401
    logdir: str | os.PathLike[str] | None,
    name: str | None,
) -> RunDirectory | None:
    """Return the run directory, for the record alone: in the logger's if no other is named; None without both."""
    if logdir is None and trainer.loggers:
        logdir = trainer.log_dir
    return None if logdir is None else RunDirectory(logdir, own_name(name), events=False, free=close_orphans)


def _sink(logger: Any) -> Sink:  # noqa: ANN401
    # Asked of the class: the experiment of a dry run, and of a rank that does not log, has every attribute.
    if hasattr(type(getattr(logger, "experiment", None)), "_get_file_writer"):
        return TensorBoardSink(logger.experiment)
    return _LoggerSink(logger)


class _LoggerSink:
    """Sends the scalars to a logger that knows only numbers."""

    def __init__(self, logger: Any) -> None:  # noqa: ANN401
        self._logger = logger

    def __call__(self, report: Report) -> None:
        self._logger.log_metrics(scalars(report), step=report.snapshot.step)
