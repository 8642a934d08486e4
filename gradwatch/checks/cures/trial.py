"""One remedy at a time: a copy of the model is changed, measured again, and trained beside an untouched twin."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.checks.batch import Call, arguments, outermost_calls
from gradwatch.checks.check import check
from gradwatch.checks.cures import structure, weights
from gradwatch.checks.cures.changes import NotTried, Patient
from gradwatch.checks.cures.copies import copied, modules_of, own
from gradwatch.checks.horizon import of_call
from gradwatch.checks.trains import Training, trained
from gradwatch.detectors.remedies import Action, Remedy
from gradwatch.model.nested import mapped
from gradwatch.model.optimizers import parameters_of
from gradwatch.model.rerun import as_it_was
from gradwatch.sinks.reading import Run
from gradwatch.values.report import Alert, Severity
from gradwatch.values.sequences import Horizon, SequenceStats
from gradwatch.watcher.options import Options
from gradwatch.watcher.watch import its_optimizers
from gradwatch.watcher.watcher import Watcher

Loss = Callable[[nn.Module, Any], Tensor]
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
    batch: Any
    """What the model takes, or where there is a loss, what that takes beside the model."""
    loss: Loss | None
    optimizers: Sequence[Any] | Callable[[Any], Any]
    """Of this model, or what makes one for parameters."""
    data: Sequence[Any]
    options: Options
    generators: Sequence[torch.Generator]
    """That the data and the loss draw from: they are put back where they were."""

    def untouched(self) -> Outcome:
        """Measure the model as it is, and train its copy."""
        with self.at_rest():
            return self._outcome(*self._copy(), None)

    def treated(self, remedy: Remedy) -> tuple[list[str], Outcome]:
        """Do the same with a remedy; return the lines of code that do it beside that.

        Raises:
            NotTried: it cannot be done to this model, or what was changed does not run.

        """
        if self.loss is None and remedy.action not in OF_THE_MODEL:
            raise NotTried("without loss= nothing is trained", self._lines(remedy))
        model, optimizers, loss = self._copy()
        lines = self._lines(remedy)
        if remedy.action in OF_THE_MODEL:
            with as_it_was(nn.Identity()):
                lines, patient = self.change(model, remedy)
            for optimizer in optimizers:
                _tell(optimizer, patient)
        try:
            with self.at_rest():
                return lines, self._outcome(model, optimizers, loss, remedy)
        except Exception as error:
            why = f"changed in this way the model does not run: {type(error).__name__}: {error}"
            raise NotTried(why, lines) from error

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Put back what is not copied: random states, and modules that the loss knows (a discriminator, a teacher)."""
        with contextlib.ExitStack() as all_of_it:
            for module in modules_of(self.loss, self.model):
                all_of_it.enter_context(as_it_was(module))
            all_of_it.enter_context(as_it_was(nn.Identity(), self.generators))
            yield

    def change(self, model: nn.Module, remedy: Remedy) -> tuple[list[str], Patient]:
        """Change a model in place; return the lines of code that do the same, and what was changed.

        Raises:
            NotTried: it cannot be done.

        """

        def run() -> None:
            call = self.call(model, self.loss)
            with as_it_was(model), torch.no_grad():
                if call is not None:
                    call.module(*call.args, **call.kwargs)

        patient = Patient(model, run)
        return OF_THE_MODEL[remedy.action](patient, remedy), patient

    def call(self, model: nn.Module, loss: Loss | None) -> Call | None:
        """Return the call of a model, or of the one network in it, that is made for a batch; None where none is."""
        if loss is None:
            return Call(model, *arguments(model, own(self.batch)))
        probe = own(loss, model)  # which may count its calls
        calls = outermost_calls(model, lambda: probe(model, own(self.data[0])))
        several = any(call.module is not calls[0].module for call in calls)
        return None if not calls or (several and calls[0].module is not model) else calls[0]

    def measured(self, model: nn.Module, loss: Loss | None) -> tuple[SequenceStats, str]:
        """Return the horizon of a model, and its sequence module.

        Raises:
            TypeError, ValueError, RuntimeError: it has none.

        """
        call = self.call(model, loss)
        if call is None:
            raise ValueError("several networks are called for a batch, or none")
        return of_call(call, model)

    def _copy(self) -> tuple[nn.Module, Sequence[Any], Loss | None]:
        """Copy the model, its optimizers where they are not made anew, and a loss that is an object."""
        return copied(self.model, () if callable(self.optimizers) else self.optimizers, self.loss)

    def _outcome(
        self, model: nn.Module, optimizers: Sequence[Any], loss: Loss | None, remedy: Remedy | None
    ) -> Outcome:
        low = remedy is not None and remedy.action in ("float32", "bfloat16")
        to = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) if low else None
        ward = self if to is None else self._in_format(to)
        sequences, place = None, ""
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # it has no sequences
            sequences, place = ward.measured(model, loss)
        if loss is None:
            report = check(model, own(ward.batch), thresholds=self.options.thresholds, ignore=self.options.ignore)
            return Outcome(_wrong(report.open), sequences=sequences, place=place)
        if callable(self.optimizers):
            optimizers = its_optimizers(model, self.optimizers(list(model.parameters())))
            if not optimizers:
                raise ValueError("optimizer must make an optimizer of parameters, and has made none")
        run, losses = ward._trained(model, optimizers, loss, remedy)
        return Outcome(_wrong(run.alerts), losses[0], statistics.median(losses[-_EDGE:]), sequences, place)

    def _in_format(self, to: torch.dtype) -> Ward:
        """Return the same with all numbers of its batches in another format."""

        def cast(value: Any) -> Any:  # noqa: ANN401  (a batch)
            return mapped(value, lambda tensor: tensor.to(to) if tensor.is_floating_point() else tensor)

        return dataclasses.replace(self, batch=cast(self.batch), data=[cast(batch) for batch in self.data])

    def _trained(
        self, model: nn.Module, optimizers: Sequence[Any], loss: Loss, remedy: Remedy | None
    ) -> tuple[Run, list[float]]:
        """Train, with what a remedy does to that; return the loss of each step too, before it is scaled."""
        action, value = (None, 0.0) if remedy is None else (remedy.action, remedy.value or 1.0)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [group.get("lr", 0.0) for group in groups]
        for group in groups:
            group.update(
                {"rate": {"lr": group.get("lr", 0.0) * value}, "epsilon": {"eps": value}}.get(action or "", {})
            )

        def before_step(step: int, watcher: Watcher) -> None:
            if action == "clip":
                watcher.step()  # so that it sees what was there before
                nn.utils.clip_grad_norm_([p for one in optimizers for p in parameters_of(one)], value)
            if action == "warm_up":
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * min(1.0, (step + 1) / self._warm)

        losses: list[Tensor] = []

        def noted(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
            found = loss(model, batch)
            if isinstance(found, Tensor):
                losses.append(found.detach())
            return found * value if action == "scale_loss" else found

        batches = [own(batch) for batch in self.data]
        run = trained(Training(model, optimizers, noted), batches, len(batches), self.options, before_step)
        return run, [float(found) for found in losses]

    @property
    def _warm(self) -> int:
        """Steps over which a learning rate is warmed up."""
        return max(len(self.data) // _WARM, 1)

    def _lines(self, remedy: Remedy) -> list[str]:
        """Return the lines that a training loop gets; none for what changes the model."""
        value = remedy.value or 1.0
        first, count = f"{1 / self._warm:.4g}", max(self._warm - 1, 1)
        return {
            "clip": [f"+ torch.nn.utils.clip_grad_norm_(model.parameters(), {value:g})  # before optimizer.step()"],
            "warm_up": [
                f"+ scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, {first}, total_iters={count})",
                "+ scheduler.step()  # after optimizer.step()",
            ],
            "rate": [f"+ for group in optimizer.param_groups: group['lr'] *= {value:.2g}"],
            "epsilon": [f"+ for group in optimizer.param_groups: group['eps'] = {value:.1g}"],
            "scale_loss": [f"+ loss = loss * {value:.2g}"],
        }.get(remedy.action, [])


def _tell(optimizer: Any, patient: Patient) -> None:  # noqa: ANN401
    """Let an optimizer forget what begins anew, and step what is new as it steps what that stands beside."""
    for parameter in patient.changed:
        getattr(optimizer, "state", {}).pop(parameter, None)
    for new, beside in patient.added:
        mine = {id(p) for p in beside.parameters()}
        for group in list(optimizer.param_groups):
            if any(id(p) in mine for p in group["params"]):
                options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                named: list[Any] = list(new.parameters())
                if "param_names" in group:  # then all of them have names
                    named = [(f"{id(new)}.{name}", p) for name, p in new.named_parameters()]
                optimizer.add_param_group({**options, "params": named})
                break


def _wrong(alerts: Sequence[Alert]) -> tuple[Alert, ...]:
    return tuple(alert for alert in alerts if max(alert.worst, alert.severity) >= Severity.WARNING)
