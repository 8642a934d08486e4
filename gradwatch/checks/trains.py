"""A few steps of training under watch: does what is set up train, before a machine is rented for it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.checks.batch import arguments
from gradwatch.detectors import DETECTORS
from gradwatch.model.optimizers import unwrap
from gradwatch.model.rerun import as_it_was
from gradwatch.sinks.reading import Run
from gradwatch.sinks.terminal.errors import training_error
from gradwatch.timesteps.sequences import Need
from gradwatch.values.history import Detector
from gradwatch.values.report import Alert, GradientHealthError, Report, Severity
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.options import Options
from gradwatch.watcher.watch import its_optimizers
from gradwatch.watcher.watcher import Watcher

Loss = Callable[[nn.Module, Any], Tensor]
Setup = nn.Module | tuple[Any, ...]


def assert_trains(
    setup: Callable[[], Setup] | Setup,
    data: Iterable[Any],
    *,
    steps: int = 60,
    horizon: Need = None,
    thresholds: Thresholds | None = None,
    ignore: Sequence[str] = (),
    detectors: Sequence[Detector] = DETECTORS,
) -> Run:
    """Train for a few steps under watch, and raise if there was an alert of severity warning or higher.

    What one batch cannot show is seen here: units that die, layers that stop moving, gradients that explode after some
    steps. The model, the optimizer's state and all random states are put back as they were.

    Args:
        setup: what trains, or a function that makes it: a model and its optimizer (or several), and a function that
            takes the model and a batch and returns the loss; or a LightningModule alone. Without that function the loss
            is what the model returns for the batch, or its "loss".
        data: batches; gone through again from the beginning where there are fewer than `steps`.
        steps: how many are trained.
        horizon: as for `gradwatch.watch`.
        thresholds: as for `gradwatch.watch`.
        ignore: as for `gradwatch.watch`.
        detectors: as for `gradwatch.watch`.

    Returns:
        The run: all snapshots, and the alerts of severity info.

    Raises:
        GradientHealthError: with the layers, the numbers, causes and remedies, as `gradwatch report` shows them.
        TypeError, ValueError: an argument is not what it should be, the loss is not a scalar with a graph, or the data
            end early and cannot be gone through again.

    """
    __tracebackhide__ = True
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, got {steps!r}")
    options = Options(
        every_n_steps=1,
        horizon=horizon,
        thresholds=Thresholds() if thresholds is None else thresholds,
        ignore=ignore,
        detectors=detectors,
        on_alert=lambda _: None,
    )
    run = trained(_made(setup), data, steps, options)
    wrong = [alert for alert in run.alerts if alert.worst >= Severity.WARNING]
    if wrong:
        raise GradientHealthError(training_error(run, wrong), wrong)
    return run


class Training(NamedTuple):
    """What trains."""

    model: nn.Module
    optimizers: Sequence[Any]
    loss: Loss


def trained(
    training: Training,
    data: Iterable[Any],
    steps: int,
    options: Options,
    before_step: Callable[[int, Watcher], None] = lambda *_: None,
) -> Run:
    """Train so many steps under watch, put all back, and return what was measured.

    Args:
        training: what trains.
        data: as for `assert_trains`.
        steps: as for `assert_trains`.
        options: of the watcher.
        before_step: called with the number of each step when its gradients are complete.

    Raises:
        ValueError: the loss is not a scalar with a graph, or the data end early.

    """
    model, optimizers, loss = training
    optimizers = [_without_trainer(optimizer) for optimizer in optimizers]
    for optimizer in optimizers:
        needed = inspect.signature(optimizer.step).parameters.get("closure")
        if needed is not None and needed.default is needed.empty:
            raise TypeError(f"optimizer must step without a closure, which {type(optimizer).__name__} does not")
    reports: list[Report] = []
    with (
        as_it_was(model),
        _state_kept(optimizers),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        Watcher(model, optimizers, dataclasses.replace(options, sinks=[reports.append])) as watcher,
    ):
        for step, batch in enumerate(batches(data, steps)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the loss must be a scalar tensor that depends on the parameters, got {given}")
            value.backward()  # type: ignore[no-untyped-call]  # torch's
            watcher.record(value)
            before_step(step, watcher)
            for optimizer in optimizers:
                optimizer.step()
    return _run_of(reports)


def _without_trainer(optimizer: Any) -> Any:  # noqa: ANN401
    """Return what a LightningOptimizer wraps: its own `step` asks its Trainer's strategy, which is not there."""
    return unwrap(optimizer) if type(optimizer).__name__ == "LightningOptimizer" else optimizer


def _run_of(reports: Sequence[Report]) -> Run:
    """Return what reports say, as a record of them would."""
    alerts: dict[tuple[object, ...], Alert] = {}
    for report in reports:
        alerts |= {(*a.finding.key, a.began): a for a in (*report.began, *report.open, *report.cleared)}
    models = dict.fromkeys(id(report.snapshot.model) for report in reports)
    known = {id(report.snapshot.model): report.snapshot.model for report in reports}
    return Run(tuple(known[key] for key in models), tuple(r.snapshot for r in reports), tuple(alerts.values()))


def _made(setup: Any) -> Training:  # noqa: ANN401  (whatever a user hands over)
    """Return what a user has set up.

    Raises:
        TypeError: it is none of what is allowed.

    """
    made = setup if isinstance(setup, nn.Module | tuple | list) else setup() if callable(setup) else None
    parts = list(made) if isinstance(made, tuple | list) else [made]
    if not parts or not isinstance(parts[0], nn.Module) or len(parts) > 3:
        raise TypeError(
            "setup must be (model, optimizer), (model, optimizer, loss) with a function loss(model, batch), a"
            " LightningModule, or a function that returns one of these;"
            f" got {_shown(setup if made is None else made)}"
        )
    model: Any = parts[0]
    if len(parts) == 1:
        if not (
            callable(getattr(model, "training_step", None)) and callable(getattr(model, "configure_optimizers", None))
        ):
            raise TypeError(
                f"setup must hold an optimizer beside the model ({type(model).__name__}), or a LightningModule"
            )
        return Training(model, _configured(model), _of_step)
    loss = parts[2] if len(parts) == 3 else _own_loss
    if not callable(loss):
        raise TypeError(f"loss must be a function of the model and a batch, got {type(loss).__name__}")
    return Training(model, its_optimizers(model, parts[1]), loss)


def _configured(model: Any) -> list[Any]:  # noqa: ANN401  (a LightningModule)
    """Return the optimizers that a LightningModule makes for itself."""
    if not getattr(model, "automatic_optimization", True):
        raise TypeError(f"{type(model).__name__} steps its optimizers itself: give (model, optimizer, loss)")
    made = model.configure_optimizers()
    if isinstance(made, tuple) and made and isinstance(made[0], list):  # optimizers and schedulers
        made = made[0]
    every = list(made) if isinstance(made, list | tuple) else [made]
    return its_optimizers(model, [one["optimizer"] if isinstance(one, Mapping) else one for one in every])


def _of_step(model: Any, batch: Any) -> Tensor:  # noqa: ANN401  (a LightningModule, and what it takes)
    return _scalar(model.training_step(batch, 0))


def _own_loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    args, kwargs = arguments(model, batch)
    return _scalar(model(*args, **kwargs))


def _scalar(returned: Any) -> Tensor:  # noqa: ANN401  (a tensor, or what has one as its loss)
    if isinstance(returned, Mapping):
        return returned["loss"]  # type: ignore[no-any-return]
    loss: Tensor = getattr(returned, "loss", returned)
    return loss


def batches(data: Iterable[Any], steps: int) -> Iterator[Any]:
    """Yield so many batches.

    Raises:
        ValueError: there are fewer, and the data cannot be gone through again.

    """
    count = 0
    while count < steps:
        before = count
        for batch in data:
            yield batch
            count += 1
            if count == steps:
                return
        if count == before:
            again = "no batch" if not count else f"{count} batches, and cannot be gone through again,"
            raise ValueError(f"data must give {steps} batches, and gave {again}")


@contextlib.contextmanager
def _state_kept(optimizers: Sequence[Any]) -> Iterator[None]:
    """Put back what optimizers keep: their options, and their state of each parameter."""
    groups = [
        [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers
    ]
    states = [{p: _copied(state) for p, state in getattr(o, "state", {}).items()} for o in optimizers]
    try:
        yield
    finally:
        for optimizer, its, state in zip(optimizers, groups, states, strict=True):
            for group, options in zip(optimizer.param_groups, its, strict=True):
                group.update(options)
            if hasattr(optimizer, "state"):
                optimizer.state.clear()
                optimizer.state.update(state)


def _copied(state: Any) -> Any:  # noqa: ANN401
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__
