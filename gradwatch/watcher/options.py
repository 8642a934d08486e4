"""The options of a watcher, checked where they are made."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gradwatch.detectors import DETECTORS, rules_of
from gradwatch.timesteps.sequences import Need, Timesteps
from gradwatch.values.history import Detector
from gradwatch.values.report import Alert, Sink
from gradwatch.values.thresholds import Thresholds
from gradwatch.watcher.cadence import Cadence

OnAlert = Literal["warn", "raise"] | Callable[[Alert], object]

_LONGEST = 200
"""Characters of a name, which goes into that of a folder."""


@dataclass(frozen=True)
class Options:
    """What `gradwatch.watch` documents, but for the model, its optimizers and its scaler, and where the record goes.

    Raises:
        TypeError, ValueError: an option is not what it should be; the text says what is allowed.

    """

    name: str | None = None
    every_n_steps: int | None = None
    probe_every_n_steps: int | None = None
    timesteps: Timesteps = "auto"
    horizon: Need = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    ignore: Sequence[str] = ()
    detectors: Sequence[Detector] = DETECTORS
    sinks: Sequence[Sink] = ()
    on_alert: OnAlert = "warn"

    def __post_init__(self) -> None:
        """Check every option."""
        _check_count("every_n_steps", self.every_n_steps)
        _check_count("probe_every_n_steps", self.probe_every_n_steps)
        _check_functions("sinks", self.sinks)
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"name must be a string or None, got {self.name!r}")
        if self.name is not None and not 0 < len(self.name) <= _LONGEST:
            raise ValueError(f"name must have 1 to {_LONGEST} characters, got {len(self.name)}")
        _check_timesteps(self.timesteps)
        _check_horizon(self.horizon, self.timesteps)
        if not isinstance(self.thresholds, Thresholds):
            raise TypeError(f"thresholds must be a gradwatch.Thresholds or None, got {self.thresholds!r}")
        if not isinstance(self.ignore, list | tuple) or not all(isinstance(rule, str) for rule in self.ignore):
            raise TypeError(f'ignore must be a list of strings such as ["GW101:encoder.*"], got {self.ignore!r}')
        _check_functions("detectors", self.detectors)
        rules_of(self.detectors)
        if not callable(self.on_alert) and self.on_alert not in ("warn", "raise"):
            raise ValueError(
                f'on_alert must be "warn", "raise" or a function that takes an Alert, got {self.on_alert!r}'
            )
        for name in ("ignore", "detectors", "sinks"):  # a list that is changed afterwards changes nothing
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def cadence(self) -> Cadence:
        """Which steps are measured."""
        return Cadence(self.every_n_steps, self.probe_every_n_steps)


def check_of_trainer(logdir: object, on_alert: object) -> None:
    """Check what the faces of Trainers take beside the options, or may be given in an option.

    Raises:
        TypeError, ValueError: it is not what it should be; the text says what is allowed.

    """
    if not callable(on_alert) and on_alert not in ("warn", "raise", "stop"):
        raise ValueError(
            f'on_alert must be "warn", "raise", "stop" or a function that takes an Alert, got {on_alert!r}'
        )
    if logdir is not None and not isinstance(logdir, str | os.PathLike):
        raise TypeError(f"logdir must be a path or None, got {logdir!r:.80}")


def _check_timesteps(timesteps: object) -> None:
    if timesteps is False or timesteps == "auto":
        return
    if not isinstance(timesteps, Mapping):
        raise TypeError(
            'timesteps must be "auto", False, or a mapping from names of modules to their dimension of time,'
            f" got {timesteps!r}"
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


def _check_count(argument: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be a whole number or None, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")


def _check_functions(argument: str, functions: object) -> None:
    if not isinstance(functions, list | tuple) or not all(map(callable, functions)):
        raise TypeError(f"{argument} must be a list or tuple of callables, got {functions!r:.80}")
