"""One remedy at a time: a copy of the model is changed, measured again, and trained beside an untouched twin."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gradwatch.checks.batch import arguments
from gradwatch.checks.check import check
from gradwatch.checks.cures import structure, weights
from gradwatch.checks.cures.changes import NotTried, Patient
from gradwatch.checks.horizon import measured
from gradwatch.checks.trains import Training, trained
from gradwatch.detectors.remedies import Action, Remedy
from gradwatch.model.nested import mapped
from gradwatch.model.optimizers import parameters_of
from gradwatch.model.rerun import as_it_was
from gradwatch.sinks.record import Run
from gradwatch.values.report import Alert, Severity
from gradwatch.values.sequences import Horizon, SequenceStats
from gradwatch.watcher.options import Options
from gradwatch.watcher.watcher import Watcher

T = TypeVar("T")
Change = Callable[[Patient, Remedy], list[str]]

OF_THE_MODEL: Mapping[Action, Change] = {
    "forget_and_input_bias": weights.gate_biases,
    "input_bias": weights.gate_biases,
    "update_bias": weights.gate_biases,
    "orthogonal": weights.recurrent_matrix,
    "identity": weights.recurrent_matrix,
    "initialize": weights.initialize,
    "begin_small": weights.begin_small,
    "zero_bias": weights.zero_bias,
    "relu": structure.activation,
    "leaky_relu": structure.activation,
    "smooth_bound": structure.activation,
    "normalize": structure.normalize,
    "drop_normalization": structure.drop_normalization,
    "skip": structure.skip,
    "pre_norm": structure.pre_norm,
    "standardize": structure.standardize,
    "gru": structure.gru,
    "fewer_layers": structure.fewer_layers,
    "float32": structure.number_format,
    "bfloat16": structure.number_format,
}
"""What changes the model; all other actions change how it is trained."""
_EDGE = 5
"""Losses at the end of a training over whose median it is judged."""
_WARM = 3
"""Part of the steps, one over this, over which a learning rate is warmed up."""


class Outcome(NamedTuple):
    """What was measured of a model, untouched or changed."""

    alerts: tuple[Alert, ...]
    """Of severity warning or higher."""
    first: float | None = None
    """The loss of the first step; None where nothing was trained."""
    loss: float | None = None
    """The median loss of the last steps."""
    sequences: SequenceStats | None = None
    """How far back the model can see, before it was trained; None where it has no sequences."""
    place: str = ""
    """The sequence module that this rests on."""

    @property
    def horizon(self) -> Horizon | None:
        """How far back it can see."""
        return None if self.sequences is None else self.sequences.reach


@dataclasses.dataclass(frozen=True)
class Ward:
    """A model, what trains it, and on what."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor] | None
    optimizers: Sequence[Any] | Callable[[Any], Any]
    """Of this model, or what makes one for parameters."""
    data: Sequence[Any]
    options: Options
    given: Any
    """What the model takes: a tuple is positional arguments, a mapping keyword arguments; None where it is not called,
    but parts of it are."""

    def untouched(self) -> Outcome:
        """Measure the model as it is, and train its copy."""
        model, optimizers = self._copy()
        return self._outcome(model, optimizers, None)

    def treated(self, remedy: Remedy) -> tuple[list[str], Outcome]:
        """Do the same with a remedy; return the lines of code that do it beside that.

        Raises:
            NotTried: it cannot be done to this model, or what was changed does not run.

        """
        if self.loss is None and remedy.action not in OF_THE_MODEL:
            raise NotTried("without loss= nothing is trained", lines_of_training(remedy))
        model, optimizers = self._copy()
        lines = lines_of_training(remedy)
        if remedy.action in OF_THE_MODEL:
            known = {id(p) for p in model.parameters()}
            with as_it_was(nn.Identity()):  # the random states are: all copies are trained with the same numbers
                lines, changed = self.change(model, remedy)
            for optimizer in optimizers:
                for parameter in changed:
                    getattr(optimizer, "state", {}).pop(parameter, None)
            new = [p for p in model.parameters() if id(p) not in known]
            if optimizers and new:
                last = optimizers[-1]
                options = {k: v for k, v in last.param_groups[-1].items() if k != "params"}
                last.add_param_group({**options, "params": new})
        try:
            return lines, self._outcome(model, optimizers, remedy)
        except Exception as error:
            raise NotTried(
                f"changed in this way the model does not run: {type(error).__name__}: {error}", lines
            ) from error

    def change(self, model: nn.Module, remedy: Remedy) -> tuple[list[str], list[nn.Parameter]]:
        """Change a model in place; return the lines of code that do the same, and the parameters that begin anew.

        Raises:
            NotTried: it cannot be done.

        """

        def run() -> None:
            with as_it_was(model), torch.no_grad():
                if self.loss is not None:
                    self.loss(model, self.data[0])
                else:
                    args, kwargs = arguments(model, self.given)
                    model(*args, **kwargs)

        patient = Patient(model, run)
        return OF_THE_MODEL[remedy.action](patient, remedy), patient.changed

    def _copy(self) -> tuple[nn.Module, Sequence[Any]]:
        """Copy the model, together with its optimizers, where they are not made anew."""
        return (copied(self.model), ()) if callable(self.optimizers) else copied((self.model, list(self.optimizers)))

    def _outcome(self, model: nn.Module, optimizers: Sequence[Any], remedy: Remedy | None) -> Outcome:
        low = remedy is not None and remedy.action in ("float32", "bfloat16")
        to = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) if low else None

        def cast(value: Any) -> Any:  # noqa: ANN401  (a batch)
            return value if to is None else mapped(value, lambda t: t.to(to) if t.is_floating_point() else t)

        given, (sequences, place) = cast(self.given), (None, "")
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # it has no sequences
            if given is not None:
                sequences, place, _ = measured(model, given)
        if self.loss is None:
            report = check(model, given, thresholds=self.options.thresholds, ignore=self.options.ignore)
            return Outcome(_wrong(report.open), sequences=sequences, place=place)
        if callable(self.optimizers):
            optimizers = [self.optimizers(model.parameters())]
        run, losses = self._trained(model, optimizers, remedy, [cast(batch) for batch in self.data])
        return Outcome(_wrong(run.alerts), losses[0], statistics.median(losses[-_EDGE:]), sequences, place)

    def _trained(
        self, model: nn.Module, optimizers: Sequence[Any], remedy: Remedy | None, data: Sequence[Any]
    ) -> tuple[Run, list[float]]:
        """Train, with what a remedy does to that; return the loss of each step too, before it is scaled."""
        action, value = (None, 0.0) if remedy is None else (remedy.action, remedy.value or 1.0)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [group.get("lr", 0.0) for group in groups]
        loss = self.loss
        assert loss is not None  # the caller has looked
        for group in groups:
            if action == "rate":
                group["lr"] = group["lr"] * value
            if action == "epsilon" and "eps" in group:
                group["eps"] = value

        def before_step(step: int, watcher: Watcher) -> None:
            if action == "clip":
                watcher.step()  # so that it sees what was there before
                nn.utils.clip_grad_norm_([p for one in optimizers for p in parameters_of(one)], value)
            if action == "warm_up":
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * min(1.0, (step + 1) * _WARM / len(data))

        losses: list[Tensor] = []

        def noted(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
            found = loss(model, batch)
            losses.append(found.detach())
            return found * value if action == "scale_loss" else found

        run = trained(Training(model, optimizers, noted), data, len(data), self.options, before_step)
        return run, [float(found) for found in losses]


def copied(what: T) -> T:
    """Copy a model, or a model and its optimizers.

    Raises:
        ValueError: it cannot be copied.

    """
    try:
        return copy.deepcopy(what)
    except Exception as error:
        raise ValueError(f"model must be one that copy.deepcopy can copy, with its optimizer: {error}") from error


def _wrong(alerts: Sequence[Alert]) -> tuple[Alert, ...]:
    return tuple(alert for alert in alerts if max(alert.worst, alert.severity) >= Severity.WARNING)


def lines_of_training(remedy: Remedy) -> list[str]:
    """Return the lines that a training loop gets; none for what changes the model."""
    value = remedy.value or 1.0
    return {
        "clip": [f"+ torch.nn.utils.clip_grad_norm_(model.parameters(), {value:g})  # before optimizer.step()"],
        "warm_up": [
            "+ scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)",
            "+ scheduler.step()  # after optimizer.step()",
        ],
        "rate": [f"+ for group in optimizer.param_groups: group['lr'] *= {value:.2g}"],
        "epsilon": [f"+ for group in optimizer.param_groups: group['eps'] = {value:.1g}"],
        "scale_loss": [f"+ loss = loss * {value:.2g}"],
    }.get(remedy.action, [])
