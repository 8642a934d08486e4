"""`watch`: checks what it is given, claims the run directory, and attaches a watcher."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import re
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from gradwatch.detectors import DETECTORS
from gradwatch.measurement.processes import own_name
from gradwatch.model.layers import named_modules
from gradwatch.model.optimizers import parameters_of, steps, unwrap
from gradwatch.sinks.run_directory import RunDirectory
from gradwatch.timesteps.sequences import Need, Timesteps
from gradwatch.values.history import Detector
from gradwatch.values.report import Sink
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.options import OnAlert, Options
from gradwatch.watcher.warn_once import WarnOnce
from gradwatch.watcher.watcher import Watcher

_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
"""Those that `watch` and the faces of Trainers have made."""


def watch(  # noqa: PLR0913  (the options of DESIGN's public surface: a user names them here)
    model: nn.Module,
    optimizer: Any = None,  # noqa: ANN401  (one optimizer or several, of torch or what acts like it)
    *,
    logdir: str | os.PathLike[str] | None = None,
    name: str | None = None,
    every_n_steps: int | None = None,
    probe_every_n_steps: int | None = None,
    timesteps: Timesteps = "auto",
    horizon: Need = None,
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
        optimizer: one `torch.optim.Optimizer` or several; what wraps one is unwrapped, what merely acts like one is
            fine.
        logdir: folder for the record and the TensorBoard events, which go to `<logdir>/gradwatch`; a run that was
            recorded there before is replaced.
        name: goes into the folder's name, `gradwatch-<name>`, to tell several watchers of one logdir apart.
        every_n_steps: read the gradients at every n-th step. Default: the first 200 steps, then every 10th.
        probe_every_n_steps: look also at weights, updates and the forward pass. Default: steps 1, 10, 20, ... 200, then
            every 50th.
        timesteps: gradients through time, at probes. "auto": of every nn.RNN, nn.LSTM, nn.GRU and of their cells. A
            mapping adds other modules, by name ("" is the model itself), each with the dimension of time of its input,
            counted from 0; None where each call is one timestep (a cell of your own). A name of one of the model's
            inputs says which dimension of it is time, for the model's own horizon. False: none.
        horizon: how many of the newest timesteps matter, to the model, or to modules by name. The model's own is then
            measured at probes by one more forward pass and one vector-Jacobian product, which change nothing, and
            judged.
        scaler: the GradScaler, if `watcher.step()` is called before `scaler.unscale_()`.
        thresholds: the numbers behind the verdicts.
        ignore: mutes alerts: "GW101", or "GW101:encoder.*" for the layers that match.
        detectors: functions from a `History` to findings.
        sinks: functions that take each `Report`; one with a `close` method is closed with the watcher.
        on_alert: "warn" (to the logger `gradwatch`), "raise" (`GradientHealthError`, at severity error), or a function
            that takes each new `Alert`, and again each that has become graver than it was.

    Returns:
        The watcher: a context manager with `step`, `record`, `report` and `close`.

    Raises:
        TypeError, ValueError: an argument is not what it should be; the text says what is allowed.
        OSError: `logdir` is a file, or cannot be written.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(True for _ in model.parameters()):
        raise ValueError(
            f"model must have parameters, got a {type(model).__name__} without any"
            " (modules in a plain list or dict are not registered: nn.ModuleList, nn.ModuleDict)"
        )
    options = Options(
        name=name,
        every_n_steps=every_n_steps,
        probe_every_n_steps=probe_every_n_steps,
        timesteps=timesteps,
        horizon=horizon,
        thresholds=Thresholds() if thresholds is None else thresholds,
        ignore=ignore,
        detectors=detectors,
        sinks=sinks,
        on_alert=on_alert,
    )
    _check_names(model, "timesteps", timesteps)
    _check_names(model, "horizon", horizon)
    optimizers = its_optimizers(model, optimizer)
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("is_enabled", "get_scale")):
        raise TypeError(
            "scaler must have is_enabled() and get_scale(), as torch.amp.GradScaler has, or be None,"
            f" got {type(scaler).__name__}"
        )
    close_earlier(model)
    with contextlib.ExitStack() as undo:
        directory = None
        if logdir is not None:
            directory = RunDirectory(logdir, own_name(name), free=close_orphans)
            undo.callback(directory.close)
        watcher = Watcher(model, optimizers, options, directory=directory, scaler=scaler)
        undo.pop_all()
    remember(watcher)
    return watcher


def watched(optimizer: object) -> bool:
    """Tell whether a watcher hears this optimizer."""
    return any(watcher.hears(optimizer) for watcher in tuple(_watchers))


def remember(watcher: Watcher) -> None:
    """Let this watcher be closed when its model is watched again, or is gone and its directory wanted."""
    _watchers.add(watcher)


def close_earlier(model: nn.Module, keep: Collection[Watcher] = ()) -> None:
    """Close the watchers of a model that is to be watched again, but for those to `keep`."""
    for watcher in tuple(_watchers):
        if watcher.model is model and watcher not in keep:
            watcher.close()


def close_orphans() -> None:
    """Close the watchers whose model is gone, as a notebook's cell that runs again leaves one."""
    gc.collect()
    for watcher in tuple(_watchers):
        if watcher.model is None:
            with contextlib.suppress(Exception):  # of its last alerts
                watcher.close()


def _check_names(model: nn.Module, argument: str, names: object) -> None:
    """Refuse modules that are not there; of `timesteps` also inputs of the model."""
    known = list(named_modules(model))
    inputs = set(inspect.signature(model.forward).parameters) if argument == "timesteps" else set()
    called = {name: re.split(r"[.\[]", name)[0] for name in names} if isinstance(names, Mapping) else {}
    unknown = [name for name, first in called.items() if name not in known and first not in inputs]
    if unknown:
        some = ", ".join(map(repr, known[:20])) + ", ..." * (len(known) > 20)
        raise ValueError(f"{argument} must name modules of the model ({some}), got {', '.join(map(repr, unknown))}")


def its_optimizers(model: nn.Module, given: Any) -> list[Any]:  # noqa: ANN401
    """Return those that step parameters of the model, with what wraps them."""
    if isinstance(given, list | tuple) and not given:
        raise ValueError("optimizer must be an optimizer, several of them, or None, got an empty list")
    every = [] if given is None else list(given if isinstance(given, list | tuple) else [given])
    mine = {id(p) for p in model.parameters()}
    kept: dict[int, Any] = {}
    strange = ""
    for optimizer in every:
        inner = unwrap(optimizer)
        if not steps(inner):
            raise TypeError(
                f"optimizer must have param_groups and step(), as torch.optim.Optimizer has, got {type(inner).__name__}"
            )
        stepped = parameters_of(inner)
        if stepped and not any(id(p) in mine for p in stepped):
            strange = (
                f"optimizer must step parameters of the model, and none of the {len(stepped)}"
                f" of this {type(inner).__name__} is one of them: it was made of another model, or before the"
                " parameters were replaced, or it keeps copies (master weights; of DeepSpeed's ZeRO, watch the model"
                " without it, and call watcher.step() after engine.backward())"
            )
        else:
            kept.setdefault(id(inner), optimizer)
    if strange and not kept:
        raise ValueError(strange)
    if strange:  # that of a temperature, perhaps, which is in no module
        WarnOnce()("optimizer", f"one of {len(every)} is left out: {strange}")
    return list(kept.values())
