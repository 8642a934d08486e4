"""The engine: attaches to a model and its optimizers, and at each step measures, detects and emits."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from gradwatch.detectors import DETECTORS
from gradwatch.history import Detector
from gradwatch.hooks import unwrap
from gradwatch.record import Record, claim
from gradwatch.report import Sink
from gradwatch.tensorboard import TensorBoardSink
from gradwatch.thresholds import Thresholds
from gradwatch.watcher.cadence import Cadence
from gradwatch.watcher.judge import OnAlert
from gradwatch.watcher.watcher import Watcher

__all__ = ["Cadence", "OnAlert", "Watcher", "check_options", "watch"]

_watched: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watcher]] = weakref.WeakKeyDictionary()


def watch(
    model: nn.Module,
    optimizer: Any = None,  # noqa: ANN401  (one optimizer or several, of torch or what acts like it)
    *,
    logdir: str | os.PathLike[str] | None = None,
    name: str | None = None,
    every_n_steps: int | None = None,
    probe_every_n_steps: int | None = None,
    timesteps: Literal["auto", False] = "auto",
    horizon: None = None,
    scaler: Any = None,  # noqa: ANN401  (torch has several scalers and no common type)
    thresholds: Thresholds | None = None,
    ignore: Sequence[str] = (),
    detectors: Sequence[Detector] = DETECTORS,
    sinks: Sequence[Sink] = (),
    on_alert: OnAlert = "warn",
) -> Watcher:
    """Watch the gradients of a model while it trains.

    With an optimizer nothing else is needed: each executed `optimizer.step()` is one snapshot. Or call `watcher.step()`
    after `backward()`, which sees the gradients before clipping; without an optimizer that is the only way.
    Watching a model again closes its earlier watcher.

    Args:
        model: the model that trains.
        optimizer: one `torch.optim.Optimizer` or several; what wraps one is unwrapped, what merely acts like one is fine.
        logdir: folder for the record and the TensorBoard events, which go to `<logdir>/gradwatch`; a run that was
            recorded there before is replaced.
        name: goes into the folder's name, `gradwatch-<name>`, to tell several watchers of one logdir apart.
        every_n_steps: read the gradients at every n-th step. Default: the first 200 steps, then every 10th.
        probe_every_n_steps: look also at weights, updates and the forward pass. Default: steps 1, 10, 20, ... 200, then
            every 50th.
        timesteps: gradients through time are not measured yet in this version: "auto" and False do the same.
        horizon: not available yet in this version: only None is accepted.
        scaler: the GradScaler, if `watcher.step()` is called before `scaler.unscale_()`.
        thresholds: the numbers behind the verdicts.
        ignore: mutes alerts: "GW101", or "GW101:encoder.*" for the layers that match.
        detectors: functions from a `History` to findings.
        sinks: functions that take each `Report`; one with a `close` method is closed with the watcher.
        on_alert: "warn" (to the logger `gradwatch`), "raise" (`GradientHealthError`, at severity error), or a function
            that takes each new `Alert`.

    Returns:
        The watcher: a context manager with `step`, `record`, `report` and `close`.

    Raises:
        TypeError, ValueError: an argument is not what it should be; the text says what is allowed.
        OSError: `logdir` is a file, or cannot be written.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_options(
        name=name,
        every_n_steps=every_n_steps,
        probe_every_n_steps=probe_every_n_steps,
        timesteps=timesteps,
        horizon=horizon,
        thresholds=thresholds,
        ignore=ignore,
        detectors=detectors,
        sinks=sinks,
        on_alert=on_alert,
    )
    optimizers = _optimizers(model, optimizer)
    earlier = _watched.get(model)
    if earlier is not None and (watcher := earlier()) is not None:
        watcher.close()
    files: list[Sink] = []
    if logdir is not None:
        directory = claim(logdir, name)
        files = [Record(directory), TensorBoardSink(directory)]
    watcher = Watcher(
        model,
        optimizers,
        cadence=Cadence(every_n_steps, probe_every_n_steps),
        thresholds=thresholds or Thresholds(),
        ignore=ignore,
        detectors=detectors,
        sinks=[*files, *sinks],
        on_alert=on_alert,
        scaler=scaler,
    )
    _watched[model] = weakref.ref(watcher)
    return watcher


def check_options(
    *,
    name: object,
    every_n_steps: object,
    probe_every_n_steps: object,
    timesteps: object,
    horizon: object,
    thresholds: object,
    ignore: object,
    detectors: object,
    sinks: object,
    on_alert: object,
) -> None:
    """Raise a TypeError or a ValueError that says what is allowed, where an option of `watch` is not."""
    _check_count("every_n_steps", every_n_steps)
    _check_count("probe_every_n_steps", probe_every_n_steps)
    _check_functions("detectors", detectors)
    _check_functions("sinks", sinks)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a text or None, got {name!r}")
    if timesteps not in ("auto", False):
        raise ValueError(f'timesteps must be "auto" or False in this version, got {timesteps!r}')
    if horizon is not None:
        raise ValueError(f"horizon is not available in this version and must be None, got {horizon!r}")
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(f"thresholds must be a gradwatch.Thresholds or None, got {thresholds!r}")
    if not isinstance(ignore, list | tuple) or not all(isinstance(rule, str) for rule in ignore):
        raise TypeError(f'ignore must be a list of texts such as ["GW101:encoder.*"], got {ignore!r}')
    if not callable(on_alert) and on_alert not in ("warn", "raise"):
        raise ValueError(f'on_alert must be "warn", "raise" or a function that takes an Alert, got {on_alert!r}')


def _check_count(argument: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be a whole number or None, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")


def _check_functions(argument: str, functions: object) -> None:
    if not isinstance(functions, list | tuple) or not all(map(callable, functions)):
        raise TypeError(f"{argument} must be a list of functions, got {functions!r:.80}")


def _optimizers(model: nn.Module, given: Any) -> list[Any]:  # noqa: ANN401
    every = [] if given is None else [unwrap(o) for o in (given if isinstance(given, list | tuple) else [given])]
    mine = {id(p) for p in model.parameters()}
    for optimizer in every:
        if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
            raise TypeError(f"optimizer must have param_groups and step(), as torch.optim.Optimizer has, got {type(optimizer).__name__}")
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if stepped and not any(id(p) in mine for p in stepped):
            raise ValueError(f"optimizer must step parameters of the model, and none of the {len(stepped)} of this {type(optimizer).__name__} is one of them")
    return every
