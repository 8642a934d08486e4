"""`watch`: checks what it is given, claims the run directory, and attaches a watcher."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradwatch.detectors import DETECTORS
from gradwatch.measurement.processes import own_name
from gradwatch.model.layers import named_modules
from gradwatch.model.optimizer_hooks import unwrap
from gradwatch.sinks.run_directory import RunDirectory
from gradwatch.timesteps.sequences import Need, Timesteps
from gradwatch.values.history import Detector
from gradwatch.values.report import Sink
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.cadence import Cadence
from gradwatch.watcher.judge import OnAlert
from gradwatch.watcher.watcher import Watcher

_LONGEST = 200
"""Characters of a name, which goes into that of a folder."""

_watched: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watcher]] = weakref.WeakKeyDictionary()
_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


def watch(
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
        optimizer: one `torch.optim.Optimizer` or several; what wraps one is unwrapped, what merely acts like one is fine.
        logdir: folder for the record and the TensorBoard events, which go to `<logdir>/gradwatch`; a run that was
            recorded there before is replaced.
        name: goes into the folder's name, `gradwatch-<name>`, to tell several watchers of one logdir apart.
        every_n_steps: read the gradients at every n-th step. Default: the first 200 steps, then every 10th.
        probe_every_n_steps: look also at weights, updates and the forward pass. Default: steps 1, 10, 20, ... 200, then
            every 50th.
        timesteps: gradients through time, at probes. "auto": of every nn.RNN, nn.LSTM, nn.GRU and of their cells. A mapping adds
            other modules, by name ("" is the model itself), each with the dimension of time of its input, counted from 0;
            None where each call is one timestep (a cell of your own). False: none.
        horizon: how many of the newest timesteps matter, to the model, or to modules by name. The model's own memory is then
            measured at probes by one more forward pass and one vector-Jacobian product, which change nothing, and judged.
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
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model must have parameters, got a {type(model).__name__} without any")
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
    _check_names(model, "timesteps", timesteps)
    _check_names(model, "horizon", horizon)
    optimizers = _optimizers(model, optimizer)
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("is_enabled", "get_scale")):
        raise TypeError(
            f"scaler must have is_enabled() and get_scale(), as torch.amp.GradScaler has, or be None, got {type(scaler).__name__}"
        )
    earlier = _watched.get(model)
    if earlier is not None and (watcher := earlier()) is not None:
        watcher.close()
    with contextlib.ExitStack() as undo:
        directory = None
        if logdir is not None:
            directory = RunDirectory(logdir, own_name(name), free=_close_orphans)
            undo.callback(directory.close)
        watcher = Watcher(
            model,
            optimizers,
            cadence=Cadence(every_n_steps, probe_every_n_steps),
            thresholds=thresholds or Thresholds(),
            ignore=ignore,
            detectors=detectors,
            directory=directory,
            sinks=sinks,
            on_alert=on_alert,
            scaler=scaler,
            timesteps=timesteps,
            horizon=horizon,
        )
        undo.pop_all()
    _watched[model] = weakref.ref(watcher)
    _watchers.add(watcher)
    return watcher


def _close_orphans() -> None:
    """Close the watchers whose model is gone: a cell of a notebook that runs again makes a new one, and leaves the old watcher."""
    gc.collect()
    for watcher in tuple(_watchers):
        if watcher.orphaned:
            with contextlib.suppress(Exception):  # of its last alerts
                watcher.close()


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
    _check_functions("sinks", sinks)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a text or None, got {name!r}")
    if name is not None and not 0 < len(name) <= _LONGEST:
        raise ValueError(f"name must have 1 to {_LONGEST} characters, got {len(name)}")
    _check_timesteps(timesteps)
    _check_horizon(horizon, timesteps)
    check_verdicts(thresholds, ignore, detectors)
    if not callable(on_alert) and on_alert not in ("warn", "raise"):
        raise ValueError(f'on_alert must be "warn", "raise" or a function that takes an Alert, got {on_alert!r}')


def check_verdicts(thresholds: object, ignore: object, detectors: object) -> None:
    """Raise a TypeError that says what is allowed, where an option that verdicts depend on is not."""
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(f"thresholds must be a gradwatch.Thresholds or None, got {thresholds!r}")
    if not isinstance(ignore, list | tuple) or not all(isinstance(rule, str) for rule in ignore):
        raise TypeError(f'ignore must be a list of texts such as ["GW101:encoder.*"], got {ignore!r}')
    _check_functions("detectors", detectors)


def _check_timesteps(timesteps: object) -> None:
    if timesteps is False or timesteps == "auto":
        return
    if not isinstance(timesteps, Mapping):
        raise TypeError(
            f'timesteps must be "auto", False, or a mapping from names of modules to their dimension of time, got {timesteps!r}'
        )
    for name, time in timesteps.items():
        whole = isinstance(time, int) and not isinstance(time, bool)
        if not isinstance(name, str) or not (time is None or whole):
            raise TypeError(
                f"timesteps must map names of modules to a dimension (a whole number) or None, got {name!r}: {time!r}"
            )
        if time is not None and time < 0:
            raise ValueError(f"timesteps[{name!r}] must be at least 0, got {time}")


def _check_horizon(horizon: object, timesteps: object) -> None:
    if horizon is None:
        return
    if timesteps is False:
        raise ValueError(f"horizon needs gradients through time, and timesteps is False; got horizon={horizon!r}")
    if not isinstance(horizon, Mapping):
        _check_count("horizon", horizon)
        return
    if not horizon:
        raise ValueError("horizon must name at least one module, got an empty mapping")
    for name, need in horizon.items():
        if not isinstance(name, str) or need is None:
            raise TypeError(f"horizon must map names of modules to numbers of timesteps, got {name!r}: {need!r}")
        _check_count(f"horizon[{name!r}]", need)


def _check_names(model: nn.Module, argument: str, names: object) -> None:
    """Refuse modules that are not there."""
    known = list(named_modules(model))
    unknown = [name for name in names if name not in known] if isinstance(names, Mapping) else []
    if unknown:
        some = ", ".join(map(repr, known[:20])) + ", ..." * (len(known) > 20)
        raise ValueError(f"{argument} must name modules of the model ({some}), got {', '.join(map(repr, unknown))}")


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
    if isinstance(given, list | tuple) and not given:
        raise ValueError("optimizer must be an optimizer, several of them, or None, got an empty list")
    every = [] if given is None else [unwrap(o) for o in (given if isinstance(given, list | tuple) else [given])]
    mine = {id(p) for p in model.parameters()}
    for optimizer in every:
        if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
            raise TypeError(
                f"optimizer must have param_groups and step(), as torch.optim.Optimizer has, got {type(optimizer).__name__}"
            )
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if stepped and not any(id(p) in mine for p in stepped):
            raise ValueError(
                f"optimizer must step parameters of the model, and none of the {len(stepped)} of this {type(optimizer).__name__} is one of them"
            )
    return list({id(o): o for o in every}.values())
