"""What a model's gradients look like, in a few numbers for each layer, and as a file that reads well in a diff."""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwatch.values.layer_columns import norms, sensitivities
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Column, Snapshot

FORMAT = 1
_HEAD = "# gradwatch profile: log10 of the gradients' norms and sensitivities of each layer, dead units, and horizons."
_LAST = 20
"""Measured steps, and of what only probes see as many probes as lie in them, over whose median a run is described."""


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """A layer in numbers; None where one is not known."""

    kind: str
    norm: float | None = None
    """log10 of the norm of its gradient; minus infinity where that is 0."""
    sensitivity: float | None = None
    """log10 of the norm of its gradient times that of its weights."""
    dead: float | None = None
    """Share of units that are silent for every input."""


@dataclass(frozen=True, slots=True)
class HorizonProfile:
    """How far back a module, or the model, learns."""

    horizon: int
    low: int
    high: int
    of: int
    """Timesteps of the sequences."""

    @property
    def censored(self) -> bool:
        """Whether it may go back further than the sequences do."""
        return self.high >= self.of


@dataclass(frozen=True)
class Profile:
    """A model in numbers."""

    layers: Mapping[str, LayerProfile]
    """In the order of the forward pass."""
    horizons: Mapping[str, HorizonProfile] = field(default_factory=dict)
    """By module; "" is the model."""
    versions: Mapping[str, str] = field(default_factory=dict)


def profile_of(
    snapshots: Sequence[Snapshot], sequences: Iterable[SequenceStats] = (), versions: Mapping[str, str] | None = None
) -> Profile:
    """Describe a run by its last snapshots, or a batch by its one.

    Args:
        snapshots: at least one.
        sequences: horizons beside those of the snapshots.
        versions: of what measured them.

    Raises:
        ValueError: there is no snapshot.

    """
    if not snapshots:
        raise ValueError("there is no snapshot to describe")
    last = snapshots[-_LAST:]
    probed = [s for s in snapshots if s.weight_norm is not None][-_LAST:]
    norm_of = _medians(last, lambda s: s.norm)
    sensitivity_of = _medians(probed, sensitivities)
    dead_of = {a.module: a.dead for s in probed[-1:] for a in s.activations or () if a.dead is not None}
    layers: dict[str, LayerProfile] = {}
    for snapshot in {s.optimizer: s for s in last}.values():  # of several optimizers each has layers of its own
        for i in snapshot.model.forward_order:
            layer = snapshot.model.layers[i]
            known = norm_of.get(layer.name), sensitivity_of.get(layer.name), dead_of.get(layer.module)
            layers.setdefault(layer.name, LayerProfile(layer.kind, *known))
    found = [*next((s.sequences for s in reversed(snapshots) if s.sequences), ()), *sequences]
    horizons = {
        s.module: HorizonProfile(s.horizon, *s.interval, s.length)
        for s in found
        if s.part in ("", "model") and s.horizon is not None and s.interval is not None
    }
    return Profile(layers, horizons, versions or {})


def _medians(snapshots: Iterable[Snapshot], column: Any) -> dict[str, float]:  # noqa: ANN401  (a snapshot's column)
    """Return by layer the median of log10 of a norm."""
    found: dict[str, list[float]] = {}
    for snapshot in snapshots:
        values: Column = column(snapshot)
        for name, value in norms(snapshot.model, values).items():
            if value is not None:
                found.setdefault(name, []).append(-math.inf if value == 0 else math.log10(value))
    return {name: statistics.median(values) for name, values in found.items()}


# --- as a file ---


def to_toml(profile: Profile) -> str:
    """Return a profile as TOML, a line for each layer."""
    lines = [_HEAD, f"format = {FORMAT}", "", "[versions]"]
    lines += [f"{_text(name)} = {_text(version)}" for name, version in profile.versions.items()]
    lines += ["", "[horizons]"]
    lines += [
        f"{_text(name)} = {{ horizon = {h.horizon}, low = {h.low}, high = {h.high}, of = {h.of} }}"
        for name, h in profile.horizons.items()
    ]
    lines += ["", "[layers]"]
    for name, layer in profile.layers.items():
        numbers = {"norm": layer.norm, "sensitivity": layer.sensitivity, "dead": layer.dead}
        known = "".join(f", {key} = {_number(value)}" for key, value in numbers.items() if value is not None)
        lines.append(f"{_text(name)} = {{ kind = {_text(layer.kind)}{known} }}")
    return "\n".join([*lines, ""])


def from_toml(text: str) -> Profile:
    """Read a profile.

    Raises:
        ValueError: it is none, or of another format; the text says which.

    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is not TOML: {error}") from error
    if content.get("format") != FORMAT:
        raise ValueError(f"it must be a profile of format {FORMAT}, got format {content.get('format')!r:.40}")
    try:
        layers = {name: LayerProfile(**its) for name, its in content["layers"].items()}
        horizons = {name: HorizonProfile(**its) for name, its in content["horizons"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it is no profile: {error}") from error
    for layer in layers.values():
        if not all(value is None or isinstance(value, float) for value in (layer.norm, layer.sensitivity, layer.dead)):
            raise ValueError(f"it is no profile: {layer}")
    return Profile(layers, horizons, {str(k): str(v) for k, v in content.get("versions", {}).items()})


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else str(value)


def _text(text: str) -> str:
    """Return a basic string of TOML."""
    signs = {'"': '\\"', "\\": "\\\\"}
    shown = "".join(signs.get(c, c if c.isprintable() else _code(c)) for c in text)
    return f'"{shown}"'


def _code(sign: str) -> str:
    number = ord(sign)
    if 0xD800 <= number <= 0xDFFF:  # half of a pair, which no text has
        return "\N{REPLACEMENT CHARACTER}"
    return f"\\u{number:04X}" if number < 0x10000 else f"\\U{number:08X}"
