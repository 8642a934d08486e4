"""The cure, tried: each remedy that an alert names, on a copy of the model, beside a twin that is left as it is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.checks.batch import arguments, refuse
from gradwatch.checks.cures.changes import NotTried
from gradwatch.checks.cures.copies import copied, generators_of, own
from gradwatch.checks.cures.outcome import Cure, Cures, long_enough
from gradwatch.checks.cures.trial import OF_THE_MODEL, Outcome, Ward
from gradwatch.checks.horizon import shortfall
from gradwatch.checks.trains import batches
from gradwatch.detectors.remedies import Remedy, remedies
from gradwatch.detectors.time_words import explain_short, too_short_to_judge
from gradwatch.model.layers import named_modules
from gradwatch.model.rerun import as_it_was, torch_generators
from gradwatch.values.report import Alert, Severity
from gradwatch.values.sequences import whose
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.options import Options
from gradwatch.watcher.watch import its_optimizers


def cure(  # noqa: PLR0913  (what trains, and how it is judged)
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Any = None,  # noqa: ANN401  (or several, or what makes one)
    data: Iterable[Any] | None = None,
    steps: int = 60,
    horizon: int | None = None,
    thresholds: Thresholds | None = None,
    ignore: Sequence[str] = (),
) -> Cures:
    """Try the remedies that alerts name: each on a copy of the model, which is measured again, and trained.

    The model, its optimizer and all random states stay as they were. With `loss` the alerts are those of a short
    training, and each copy is trained on the same batches as an untouched twin; without, they are those of
    `gradwatch.check`, copies are only measured again, and remedies of the training loop are not tried. In both cases
    the model's horizon is measured first, as `gradwatch.horizon` does, where it has sequences.

    Args:
        model: one that `copy.deepcopy` can copy.
        batch: what the model takes, as for `gradwatch.check`; or, with a loss of two arguments, what that takes.
        loss: a function of what the model returned, as for `gradwatch.check`, or of the model and a batch, as for
            `gradwatch.assert_trains`.
        optimizer: that of the model, or several; or a function of parameters that makes one, such as
            `lambda parameters: torch.optim.SGD(parameters, 0.1)`. Default: Adam as torch makes it.
        data: batches to train on, gone through again from the beginning where there are fewer than `steps`. Default:
            `batch` alone.
        steps: how many each copy is trained.
        horizon: how many of the newest timesteps matter. Default: all of the batch, where the horizon is at most half
            of it.
        thresholds: as for `gradwatch.watch`.
        ignore: as for `gradwatch.watch`.

    Returns:
        The alerts, and for each remedy what came of it: `print(cures)`, `cures.best`, `cures.best.apply(model)`.

    Raises:
        TypeError, ValueError: an argument is not what it should be; or as `gradwatch.check` and
            `gradwatch.assert_trains`.

    """
    refuse(model, None)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, got {steps!r}")
    if horizon is not None and (isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1):
        raise ValueError(f"horizon must be a whole number of timesteps from 1 on, or None, got {horizon!r}")
    if loss is None and (optimizer is not None or data is not None):
        raise ValueError("loss must be given where optimizer or data are: without it nothing is trained")
    if isinstance(data, Tensor | str | bytes | Mapping) or not isinstance(data, Iterable | None):
        raise TypeError(f"data must be batches (a list of them, a DataLoader), got {type(data).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have parameters that need a gradient (requires_grad), and has none")
    options = Options(
        every_n_steps=1,
        thresholds=Thresholds() if thresholds is None else thresholds,
        ignore=ignore,
        on_alert=lambda _: None,
    )
    trains = None if loss is None else loss if _takes_the_model(loss) else _of_output(loss)
    optimizers = _optimizers(model, optimizer) if loss is not None else ()
    generators = [*torch_generators(), *generators_of(data, loss)]
    with torch.inference_mode(mode=False), torch.enable_grad(), as_it_was(model, generators):
        batches_ = list(batches([batch] if data is None else data, steps)) if loss is not None else ()
        ward = Ward(model, batch, trains, optimizers, batches_, options, generators)
        with ward.at_rest():
            if trains is not None:
                _try_loss(ward)
            return _tried(ward, horizon, steps)


def _tried(ward: Ward, need: int | None, steps: int) -> Cures:
    before = ward.untouched()
    if need is not None:
        _judgeable(ward, before, need)
    wrong = [alert for alert in before.alerts if alert.finding.code != "GW301"]
    if (short := _too_short(ward, before, need)) is not None:
        wrong.insert(0, short)
    alerts = list({alert.finding.code: alert for alert in reversed(wrong)}.values())[::-1]
    results: dict[Remedy, _Result] = {}
    cures = []
    for alert in alerts:
        for remedy in _named(wrong, alert.finding.code):
            if remedy not in results:
                results[remedy] = _result(ward, remedy)
            cures.append(Cure(alert, remedy, before=before, **results[remedy]._asdict()))
    return Cures(tuple(alerts), tuple(cures), steps if ward.loss is not None else None)


def _judgeable(ward: Ward, before: Outcome, need: int) -> None:
    """Refuse a need by which nothing can be judged.

    Raises:
        ValueError: with the reason.

    """
    stats, found = before.sequences, before.horizon
    if stats is None:
        try:
            ward.measured(ward.model, ward.loss)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"horizon= is given, and how far back the model learns cannot be measured: {error}"
            ) from error
        raise ValueError("horizon= is given, and how far back the model learns cannot be measured")
    if found is not None and found.censored and stats.length < need:
        raise ValueError(too_short_to_judge(stats.length, whose(stats), need))


def _named(wrong: Iterable[Alert], code: str) -> Iterable[Remedy]:
    """Return the remedies that alerts of a code name; what is found at several layers is treated at all of them."""
    known: dict[tuple[str, str], Remedy] = {}
    for remedy in (r for alert in wrong if alert.finding.code == code for r in remedies(alert.finding)):
        key = (remedy.action, remedy.until)
        old = known.setdefault(key, remedy)
        if old.places and remedy.places and not remedy.until:
            known[key] = dataclasses.replace(old, places=tuple(dict.fromkeys(old.places + remedy.places)))
    return known.values()


class _Result(NamedTuple):
    """What came of one remedy, as fields of a `Cure`."""

    lines: tuple[str, ...]
    after: Outcome | None = None
    why_not: str = ""
    change: Callable[[nn.Module], object] | None = None


def _result(ward: Ward, remedy: Remedy) -> _Result:
    try:
        lines, outcome = ward.treated(remedy)
    except NotTried as reason:
        return _Result(tuple(reason.lines), why_not=str(reason))
    of_the_model = remedy.action in OF_THE_MODEL
    return _Result(tuple(lines), outcome, change=(lambda model: ward.change(model, remedy)) if of_the_model else None)


def _too_short(ward: Ward, before: Outcome, need: int | None) -> Alert | None:
    """Return the alert that the model's horizon is too short; None where it is long enough, or not known."""
    stats, found = before.sequences, before.horizon
    if stats is None or found is None or found.censored or not found.sure:
        return None
    if need is None:
        if found.timesteps > ward.options.thresholds.horizon_share * stats.length:
            return None
    elif long_enough(found, need):
        return None
    call, module = ward.call(ward.model, ward.loss), named_modules(ward.model)[before.place]
    assert call is not None  # its horizon was measured
    finding = shortfall(dataclasses.replace(stats, need=need), need, call, before.place, module)
    if need is None and not remedies(finding):
        return None
    severity = Severity.WARNING if need is not None else Severity.INFO
    words = explain_short(finding)
    finding = dataclasses.replace(finding, severity=severity)
    return Alert(finding, 0, 0, None, words.message, words.cause, words.remedy, severity)


def _takes_the_model(loss: Callable[..., Tensor]) -> bool:
    """Tell whether a loss takes the model and a batch, or what the model returned."""
    if not callable(loss):
        raise TypeError(
            f"loss must be a function of what the model returned, or of the model and a batch, got {loss!r:.80}"
        )
    try:
        inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).bind(None)
    except TypeError:
        return True
    except ValueError:  # it does not tell
        return False
    return False


def _of_output(loss: Callable[..., Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    def of_both(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        args, kwargs = arguments(model, batch)
        return loss(model(*args, **kwargs))

    return of_both


def _try_loss(ward: Ward) -> None:
    """Call the loss once, with a copy of the model.

    Raises:
        TypeError: it cannot be called with the model and a batch.
        ValueError: it gives no scalar, or does not use the model that it is given.

    """
    model, _, loss = copied(ward.model, (), ward.loss)
    assert loss is not None  # the caller has looked
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        with as_it_was(model), ward.at_rest():
            value = loss(model, own(ward.data[0]))
            one = isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad
            found = torch.autograd.grad(value, parameters, allow_unused=True) if one else ()
    except (TypeError, AttributeError) as error:  # the usual outcome where it takes an output and a target
        raise TypeError(
            f"loss must be a function of what the model returned, or of the model and a batch: {error}"
        ) from error
    if all(gradient is None for gradient in found):
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss must give a scalar that depends on the parameters of the model that it is given, got {given}"
        )


def _optimizers(model: nn.Module, optimizer: Any) -> Any:  # noqa: ANN401
    """Return the optimizers of a model, or what makes one.

    Raises:
        TypeError, ValueError: it is neither.

    """
    if optimizer is None:
        return torch.optim.Adam
    if callable(optimizer) and not hasattr(optimizer, "param_groups"):
        return optimizer
    return its_optimizers(model, optimizer)
