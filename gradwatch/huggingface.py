"""A callback for the Trainer of `transformers`, and for those of trl, sentence-transformers and others made of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from gradwatch.detectors import DETECTORS
from gradwatch.measurement.processes import own_name
from gradwatch.model.method_hooks import before_call
from gradwatch.sinks.log import log_alert
from gradwatch.sinks.run_directory import RunDirectory
from gradwatch.sinks.tensorboard import TensorBoardSink, scalars
from gradwatch.timesteps.sequences import Need, Timesteps
from gradwatch.values.history import Detector
from gradwatch.values.report import Alert, GradientHealthError, Report, Severity, Sink
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.options import Options, check_of_trainer
from gradwatch.watcher.warn_once import WarnOnce, said
from gradwatch.watcher.watch import close_earlier, close_orphans, remember
from gradwatch.watcher.watcher import Watcher

_asked: weakref.WeakValueDictionary[tuple[type, str | None], GradientCallback] = weakref.WeakValueDictionary()
"""The callbacks that a Trainer has asked for their state last, as it does right before it may replace them."""


class GradientCallback(TrainerCallback, ExportableState):
    """Watches the gradients of the model while a Trainer trains it.

    Where the Trainer clips (`max_grad_norm` above 0), the numbers are those before clipping; else those that the
    optimizer gets. The loss of a step is the one whose gradient it takes: the sum over its micro-batches of what the
    Trainer has divided already, on this process. Steps are numbered from 0, as everywhere in gradwatch, which is
    `state.global_step` while the step is made; the Trainer counts before it logs, so its own line of the same step says
    one more.

    The record goes to `gradwatch/` in the output directory. TensorBoard events go through the writer of the Trainer's
    TensorBoardCallback if it has one (tags as in `TensorBoardSink`); other trackers of `report_to` get the scalars at
    measured steps. Checkpoints carry the state, and a training that resumes from one goes on with it and with its
    record, under the options of this program; any other begins with nothing remembered. Training a model again closes
    the watcher that an earlier training, or `gradwatch.watch`, has left on it. What goes wrong in here is a warning,
    and ends no training.

    Args:
        logdir: folder for the record, which goes to `<logdir>/gradwatch`. Default: the Trainer's output directory.
        name: goes into the folder's name, `gradwatch-<name>`, and tells two of these callbacks apart.
        every_n_steps: see `gradwatch.watch`, as for the arguments that follow.
        probe_every_n_steps: see `gradwatch.watch`.
        timesteps: see `gradwatch.watch`.
        horizon: see `gradwatch.watch`.
        thresholds: see `gradwatch.watch`.
        ignore: see `gradwatch.watch`.
        detectors: see `gradwatch.watch`.
        sinks: see `gradwatch.watch`.
        on_alert: "warn", "raise", "stop" (the training ends after the step, at severity error, in all processes
            together), or a function that takes an Alert.

    Raises:
        TypeError, ValueError: an option is not what it should be; the text says what is allowed.

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
        """Check and keep the options; nothing is attached before the training."""
        check_of_trainer(logdir, on_alert)
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
        self._on_alert, self._logdir = on_alert, logdir
        self._watcher: Watcher | None = None
        self._detach = contextlib.ExitStack()
        """Takes off the Trainer what listens to it."""
        self._loss: Tensor | None = None
        """The sum of the step's micro-batches so far, on their device."""
        self._remembered: Mapping[str, Any] | None = None
        self._stop_wanted = False
        self._warn = WarnOnce()

    @property
    def report(self) -> Report | None:
        """The newest report; None outside of a training."""
        return self._watcher.report if self._watcher is not None else None

    # --- what the Trainer calls ---

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401  (the Trainer's)
    ) -> None:
        """Attach: here the model is final, and the optimizer is there."""
        self._stop_wanted = False
        self._close()  # what an interrupted training has left
        self._remembered = None
        with self._harmless():
            self._attach(_Training(_trainer(), args, state, control), kwargs["model"], kwargs["optimizer"])

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Tell the loss, where no clipping came before."""
        self._tell_loss()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stop the training if an alert wants it; of several processes one has it, and all must stop together."""
        if self._on_alert != "stop":
            return
        wanted = self._stop_wanted
        if args.world_size > 1 and dist.is_initialized():
            if not self._options.cadence.measured(state.global_step - 1):
                return
            flag = torch.tensor(float(wanted), device=args.device)
            dist.all_reduce(flag)
            wanted = bool(flag.item())
        if wanted:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:  # noqa: ARG002
        """Forget the states that were saved of several callbacks, to which the Trainer would append the next ones."""
        saved: Any = state.stateful_callbacks
        if isinstance(states := saved.get(type(self).__name__), list):
            states.clear()

    def on_log(self, *_: object, logs: Mapping[str, Any] | None = None, **__: object) -> None:
        """Take everything off at the Trainer's last words, after which its trackers close."""
        if "train_runtime" in (logs or {}):
            self._close()

    def on_train_end(self, *_: object, **__: object) -> None:
        """Take everything off."""
        self._close()

    # --- checkpoints and copies ---

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint carries: the name, and the history, the open alerts and the step, plain as JSON."""
        _asked[type(self), self._options.name] = self
        return {"args": {"name": self._options.name}, "attributes": {"remembered": self.remembered}}

    @property
    def remembered(self) -> Mapping[str, Any] | None:
        """The history, the open alerts and the step, of the training that is under way or was the last.

        The Trainer sets it on a callback that it makes anew under `restore_callback_states_from_checkpoint`, which then
        has the options of the one that it replaces: a checkpoint holds no functions.
        """
        return self._watcher.state_dict() if self._watcher is not None else self._remembered

    @remembered.setter
    def remembered(self, state: Mapping[str, Any] | None) -> None:
        self._remembered = state
        if (replaced := _asked.get((type(self), self._options.name))) is not None:
            self._options, self._on_alert, self._logdir = replaced._options, replaced._on_alert, replaced._logdir

    def __getstate__(self) -> dict[str, Any]:
        """Leave the live watcher out of copies, and what hangs on the Trainer."""
        return vars(self) | {"_watcher": None, "_detach": contextlib.ExitStack(), "_loss": None}

    # --- one training ---

    def _attach(self, training: _Training, model: nn.Module, optimizer: object) -> None:
        trainer, state = training.trainer, training.state
        others = [c for c in training.callbacks if isinstance(c, GradientCallback) and c is not self]
        close_earlier(model, keep=[c._watcher for c in others if c._watcher is not None])
        if trainer is None:
            self._warn("trainer", "on_train_begin was not called by a transformers.Trainer: clipping is not seen")
        logdir = self._logdir if self._logdir is not None else training.output_directory
        with contextlib.ExitStack() as undo:
            directory = RunDirectory(logdir, own_name(self._options.name), events=False, free=close_orphans)
            undo.callback(directory.close)
            watcher = Watcher(
                model,
                [optimizer],
                dataclasses.replace(
                    self._options,
                    sinks=[*training.sinks(), *self._options.sinks],
                    on_alert=self._on_stop if self._on_alert == "stop" else self._options.on_alert,
                ),
                directory=directory,
                scaler=getattr(getattr(trainer, "accelerator", None), "scaler", None),
                clock=lambda: state.global_step,
            )
            undo.pop_all()
        remember(watcher)
        self._watcher = watcher
        if state.global_step and (saved := self._saved(state)) is not None:
            try:
                watcher.load_state_dict(saved)
            except (TypeError, ValueError) as error:  # of another model, perhaps: no reason to end a training
                self._warn("state", f"what was remembered in the checkpoint is left out: {error}")
        if trainer is None:
            return
        accelerator = trainer.accelerator
        self._detach.callback(
            before_call(
                accelerator,
                "backward",
                lambda loss, *_, **__: self._hear(loss, accelerator.gradient_accumulation_steps),
            )
        )
        # Called only to clip; what it calls in turn, one of transformers 5 calls for the norm alone too.
        home, name = (
            (trainer, "_clip_grad_norm") if hasattr(trainer, "_clip_grad_norm") else (accelerator, "clip_grad_norm_")
        )
        self._detach.callback(before_call(home, name, lambda *_, **__: self._read(state.global_step)))

    def _hear(self, loss: Tensor, parts: int) -> None:
        """Add the loss of a micro-batch, of which backward takes one of so many parts; no scaler has scaled it yet."""
        if self._watcher is not None:
            with self._harmless():
                self._watcher.look_at(loss)
                part = loss.detach() / parts
                self._loss = part if self._loss is None else self._loss + part

    def _tell_loss(self) -> None:
        loss, self._loss = self._loss, None
        if self._watcher is not None and loss is not None:
            self._watcher.record(loss)

    def _read(self, step: int) -> None:
        self._tell_loss()
        if self._watcher is not None:
            with self._harmless():
                self._watcher.step(step)

    def _saved(self, state: TrainerState) -> Mapping[str, Any] | None:
        """Return what the checkpoint has of this callback, whether or not the Trainer restores callbacks."""
        every: Any = state.stateful_callbacks
        saved = (every or {}).get(type(self).__name__, [])
        mine = [
            one["attributes"]["remembered"]
            for one in (saved if isinstance(saved, list) else [saved])
            if one.get("args", {}).get("name") == self._options.name
        ]
        return mine[-1] if mine else None

    def _close(self) -> None:
        with self._harmless():
            self._detach.close()
            self._loss = None
            if self._watcher is not None:
                watcher, self._watcher = self._watcher, None
                try:
                    self._remembered = watcher.state_dict()
                finally:
                    watcher.close()

    def _on_stop(self, alert: Alert) -> None:
        log_alert(alert)
        self._stop_wanted = self._stop_wanted or alert.severity is Severity.ERROR

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Keep what goes wrong out of the training, but for what `on_alert="raise"` raises."""
        try:
            yield
        except GradientHealthError:
            raise
        except Exception as error:  # noqa: BLE001  (diagnostics never end a training)
            self._warn("failed", f"the callback failed, and the training goes on: {said(error)}")


@dataclasses.dataclass(frozen=True)
class _Training:
    """What a Trainer says of the training that begins."""

    trainer: Trainer | None
    args: TrainingArguments
    state: TrainerState
    control: TrainerControl

    @property
    def callbacks(self) -> list[TrainerCallback]:
        return self.trainer.callback_handler.callbacks if self.trainer is not None else []

    @property
    def output_directory(self) -> str:
        """That of the checkpoints: of a search for hyperparameters, each trial has its own."""
        if self.trainer is None:
            return str(self.args.output_dir)
        return str(self.trainer._get_output_dir(getattr(self.trainer, "_trial", None)))

    def sinks(self) -> list[Sink]:
        boards = [_Board(c) for c in self.callbacks if isinstance(c, TensorBoardCallback)]
        return [*boards, *(_Tracker(c, self) for c in self.callbacks if _tracks(c))]


class _Board:
    """Writes through the SummaryWriter of a TensorBoardCallback, which may not have made it yet."""

    def __init__(self, callback: Any) -> None:  # noqa: ANN401
        self._callback = callback
        self._sink: TensorBoardSink | None = None

    def __call__(self, report: Report) -> None:
        if self._sink is None and self._callback.tb_writer is not None:
            self._sink = TensorBoardSink(self._callback.tb_writer)
        if self._sink is not None:
            self._sink(report)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()


class _Tracker:
    """Sends the scalars to a tracker as the Trainer sends its own."""

    def __init__(self, callback: TrainerCallback, training: _Training) -> None:
        # Not the Trainer: a watcher that is forgotten keeps no model.
        self._callback, self._told = callback, (training.args, training.state, training.control)

    def __call__(self, report: Report) -> None:
        self._callback.on_log(*self._told, logs=scalars(report))


def _tracks(callback: TrainerCallback) -> bool:
    """Tell whether it is one of `report_to` that takes numbers, TensorBoard apart; or a user's class made of one."""
    if isinstance(callback, TensorBoardCallback):
        return False
    homes = [c for c in type(callback).__mro__ if c.__module__.startswith("transformers.integrations")]
    return any("on_log" in vars(c) for c in homes)


def _trainer() -> Trainer | None:
    """Return the Trainer that calls this, by way of a callback: it gives callbacks everything but itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), Trainer):
            return caller
        frame = frame.f_back
    return None
