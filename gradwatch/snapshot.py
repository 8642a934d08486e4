"""What one training step measured, as frozen plain values with an exact JSON form."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

Role = Literal["weight", "bias", "normalization", "embedding", "scale"]
"""What a parameter does: a matrix or kernel, an added vector, the gain of a normalization, a lookup table, or any other gain."""

Stage = Literal["before_clip", "applied"]
"""Whether the gradients were read before clipping, or as the optimizer consumed them."""

Absent = Literal["frozen", "unused", "disconnected"]
"""Why a parameter has no gradient: `requires_grad` is False; no forward pass that was seen used its
layer; its layer ran in the forward pass of this step and still nothing arrived."""

Column = tuple[float | None, ...]
"""One number per entry of `ModelInfo.parameters`; None where there is no gradient, which is never 0."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter of the watched model; tied parameters stand once, under their first name."""

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    optimizer: int | None
    """Index into `ModelInfo.optimizers`; None if no watched optimizer steps it."""
    role: Role

    @property
    def elements(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A module that owns parameters."""

    name: str
    kind: str
    """Class name of the module."""
    order: int | None = None
    """Position in the forward pass; None until a probe has seen the layer run."""
    location: str | None = None
    """`file:line` of the user's class that holds the layer; None if it and all around it are of installed libraries."""


@dataclass(frozen=True, slots=True)
class OptimizerInfo:
    """An optimizer that steps parameters of the model."""

    kind: str
    adaptive: bool
    """Whether it divides the gradient by a running measure of its size, as Adam does."""
    eps: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What does not change from step to step; a new one is made when it does."""

    layers: tuple[LayerInfo, ...]
    parameters: tuple[ParameterInfo, ...]
    optimizers: tuple[OptimizerInfo, ...] = ()

    @property
    def forward_order(self) -> tuple[int, ...]:
        """Numbers of the layers in the order of the forward pass; those that never ran come last."""
        return tuple(sorted(range(len(self.layers)), key=lambda i: math.inf if (at := self.layers[i].order) is None else at))


@dataclass(frozen=True, slots=True)
class ActivationStats:
    """A module that gave something in a probe."""

    module: str
    grad_norm: float | None = None
    """L2 norm of the gradient of what it gave; None where none came, or several backward passes brought parts of it."""
    dead: float | None = None
    """Share of its units that a ReLU-like activation behind it left at 0 for every input of many probes, for longer than chance explains."""
    saturated: float | None = None
    """Share of its entries that a bounded activation behind it put into the outer 1 % of its range, at either end."""
    units: int | None = None
    """Features, or channels."""
    scaled: bool = False
    """Whether an unknown factor (a loss scale) is on the norm, or cannot be excluded."""


HORIZON_GAIN = 1e-3
"""Share of its maximum below which a lag gain counts as gone: 60 dB, where a gradient is lost beside the noise of the newest timesteps'."""


class Memory(NamedTuple):
    """How far back a gain by lag reaches, and how it shrinks on the way."""

    horizon: int
    """The smallest n such that the gain stays below its share of the maximum for every lag >= n: the newest n timesteps are within reach."""
    censored: bool
    """Whether the sequence ends before the gain is gone; the horizon is then the sequence's length, and the true one may be longer."""
    decay_rate: float | None
    """The factor per timestep; None where fewer than two gains are there to tell."""
    half_life: float | None
    """Timesteps in which the gain halves, `ln 0.5 / ln decay_rate`; None where it does not shrink."""


def memory(lag_gain: Sequence[float], share: float = HORIZON_GAIN) -> Memory | None:
    """Give the horizon of a gain by lag and the rate at which it decays.

    The decay rate is that of a line fitted by least squares through the logarithm of the gain, over the lags from its maximum to the horizon, gains of
    exactly 0 left out. Its logarithm is the finite-time Lyapunov exponent of the backward pass.

    Args:
        lag_gain: gains from lag 0, the newest timestep, back; any unit.
        share: of the maximum, below which the gain counts as gone.

    Returns:
        None where there are no gains, or one of them is not finite. Where all are 0 the horizon is 0, and not censored.

    """
    if not lag_gain or not all(map(math.isfinite, lag_gain)):
        return None
    top = max(lag_gain)
    if top <= 0:
        return Memory(0, censored=False, decay_rate=None, half_life=None)
    limit = share * top
    horizon = next((lag for lag in range(len(lag_gain), 0, -1) if lag_gain[lag - 1] >= limit), 0)
    peak = lag_gain.index(top)
    law = slope([(lag, math.log(gain)) for lag, gain in enumerate(lag_gain[peak : horizon + 1], peak) if gain > 0])
    half_life = math.log(0.5) / law if law is not None and law < 0 else None
    return Memory(horizon, horizon == len(lag_gain), None if law is None else math.exp(law), half_life)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Give the slope of the line that a least-squares fit puts through the points; None below two of them."""
    if len(points) < 2:
        return None
    x, y = (math.fsum(axis) / len(points) for axis in zip(*points, strict=True))
    return math.fsum((a - x) * (b - y) for a, b in points) / math.fsum((a - x) ** 2 for a, _ in points)


@dataclass(frozen=True, slots=True)
class SequenceStats:
    """Gradients through the time of one sequence module, or of one layer and direction of it, or of the whole model.

    Series run from the oldest timestep to the newest, `length` entries; lag gains from lag 0, the newest timestep, back. Norms are Frobenius over the
    features and over rows of the batch: all of them for `grad_input`, and for the gradients at the states of a cell; else `rows` of them.
    """

    module: str
    """Name of the module; "" is the model itself."""
    part: str = ""
    """"" is the module as a whole; "l0", "l0_reverse", ... a layer and direction of it; "model" the memory of the model as a whole."""
    length: int = 0
    """Timesteps of the longest sequence."""
    rows: int = 0
    """Rows of the batch over which the lag gains and the hidden series are taken."""
    grad_input: tuple[float, ...] | None = None
    """Norm of dL/dx_t."""
    grad_hidden: tuple[float, ...] | None = None
    """Norm of the total dL/dh_t, through the recurrence."""
    grad_hidden_direct: tuple[float, ...] | None = None
    """Norm of the part of dL/dh_t that does not come from later timesteps of this layer."""
    grad_cell: tuple[float, ...] | None = None
    """Norm of the total dL/dc_t of an LSTM."""
    carry_ratio: tuple[float, ...] | None = None
    """`length - 1` entries; entry t is the norm of the state's gradient carried from t+1 back to t, over that of the state's gradient at t+1 (Pascanu, 2013)."""
    lag_gain: tuple[float, ...] | None = None
    """`||d out_T / d x_{T-lag}||`, root mean square over random cotangents and rows; on parts "" and "model"."""
    lag_gain_hidden: tuple[float, ...] | None = None
    """The same from the module's newest output to this layer's h."""
    lag_gain_cell: tuple[float, ...] | None = None
    """The same to this layer's c."""
    censored: bool | None = None
    """Whether the sequence ends before `lag_gain` falls below `HORIZON_GAIN` of its maximum."""
    replay_residual: float | None = None
    """Largest difference of the recomputed hidden states from the module's own, over their largest entry."""
    adjoint_residual: float | None = None
    """Largest difference of the recomputed dL/dx_t from autograd's, over its largest entry."""
    scaled: bool = False
    """Whether an unknown factor (a loss scale) is on the gradients, or cannot be excluded: only their ratios mean something.

    Lag gains are free of it.
    """
    note: str | None = None
    """Why something is missing."""
    need: int | None = None
    """How many of the newest timesteps matter, as `horizon=` declares; on part "model" (one number) or on part "" (a need of the module)."""
    reached: int | None = None
    """How many of the newest timesteps a gradient can reach from the newest output, where the state that is carried on is detached; `length`
    where it is the state that was carried into the sequence. None where it is not detached, or that is not known.

    On part "". GW303 is judged by this alone; a record that was written before the field was there replays without it.
    """

    @property
    def memory(self) -> Memory | None:
        """What `memory` says of `lag_gain`; None where there is none."""
        return None if self.lag_gain is None else memory(self.lag_gain)

    @property
    def horizon(self) -> int | None:
        """How many of the newest timesteps are within reach; `length` where the sequence ends before the gain is gone."""
        return None if (found := self.memory) is None else found.horizon

    @property
    def decay_rate(self) -> float | None:
        """Factor per timestep by which the gain shrinks on the way to the horizon."""
        return None if (found := self.memory) is None else found.decay_rate

    @property
    def half_life(self) -> float | None:
        """Timesteps in which the gain halves; None where it does not shrink."""
        return None if (found := self.memory) is None else found.half_life


@dataclass(frozen=True, slots=True)
class Fact:
    """A measured cause: a number called `name` (saturation, spectral_radius, ...) at a module."""

    place: str
    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The numbers of one executed optimizer step. Columns run along `model.parameters`.

    A column that is None was not taken in this step. An entry that is None has no gradient, or belongs
    to a parameter that this optimizer does not step; None is never 0.
    """

    step: int
    wall_time: float
    """Seconds since the epoch."""
    model: ModelInfo
    optimizer: int | None = None
    """Index into `model.optimizers`; None if the loop has no optimizer object."""
    stage: Stage = "applied"
    loss: float | None = None
    """Mean unscaled loss of the step; None if the loop did not tell."""
    scale: float | None = None
    """The loss scale that was divided out of the gradients."""
    clip_factor: float | None = None
    """Global norm as applied over global norm before clipping."""
    skipped: bool = False
    """Whether a GradScaler skipped the update."""
    norm: Column = ()
    """L2 norm of the gradient, exact to 1e-6 over the range of its format."""
    nonfinite: Column | None = None
    """Number of NaN and infinite entries, counted where the norm is not finite."""
    weight_norm: Column | None = None
    """L2 norm of the parameter before the update."""
    zeros: Column | None = None
    """Share of entries of the gradient that are exactly 0."""
    subnormal: Column | None = None
    """Share of the non-zero entries below the smallest normal number of the computing dtype."""
    update_ratio: Column | None = None
    """`||after - before|| / ||before||` of the parameter in this step; infinite if it was 0 and moved."""
    absent: tuple[Absent | None, ...] | None = None
    """Why there is no gradient. An entry also stands beside a norm of exactly 0, which `zero_grad(set_to_none=False)` leaves to a layer that did not run."""
    activations: tuple[ActivationStats, ...] | None = None
    sequences: tuple[SequenceStats, ...] | None = None
    facts: tuple[Fact, ...] | None = None
    notes: tuple[str, ...] = ()
    lost: Column | None = None
    """Share of the entries with a gradient that the step left as they were; of parameters in a format of less than 32 bits."""

    @property
    def norm_global(self) -> float | None:
        """L2 norm over all gradients together; None if there is none."""
        norms = [n for n in self.norm if n is not None]
        return math.hypot(*norms) if norms else None

    @property
    def rms(self) -> Column:
        """Norm over the root of the number of entries: the size of a typical entry."""
        return tuple(None if n is None else n / math.sqrt(max(p.elements, 1)) for n, p in zip(self.norm, self.model.parameters, strict=True))


# --- JSON: floats by repr, which is exact; NaN and the infinities, which JSON lacks, as {"float": "nan"}. ---

T = TypeVar("T")


def to_plain(value: Any) -> Any:  # noqa: ANN401  (any value of this package, and what JSON can hold)
    """Give `value` as dicts, lists, numbers and strings; fields that hold their default are left out.

    Columns of numbers are passed on as they are (a tuple is a list to JSON), so that this costs little.
    """
    if dataclasses.is_dataclass(value):
        fields = _fields(typing.cast("Any", type(value)))
        return {name: to_plain(v) for name, default in fields if (v := getattr(value, name)) is not default}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value] if value and dataclasses.is_dataclass(value[0]) else list(value)
    return value


def snapshot_to_plain(snapshot: Snapshot, model: int) -> dict[str, Any]:
    """Give a snapshot as `to_plain` does, with a number in place of the model, which many snapshots share."""
    fields = [(name, default) for name, default in _fields(Snapshot) if name != "model"]
    return {"model": model, **{name: to_plain(v) for name, default in fields if (v := getattr(snapshot, name)) is not default}}


def snapshot_from_plain(plain: Mapping[str, Any], models: Sequence[ModelInfo]) -> Snapshot:
    """Give back the snapshot that `snapshot_to_plain` took apart.

    Raises:
        KeyError, IndexError, TypeError, ValueError: `plain` is no snapshot, or its model is not among `models`.

    """
    snapshot = from_plain(Snapshot, {**plain, "model": models[plain["model"]]})
    for column in (
        snapshot.norm,
        snapshot.nonfinite,
        snapshot.weight_norm,
        snapshot.zeros,
        snapshot.subnormal,
        snapshot.update_ratio,
        snapshot.lost,
        snapshot.absent,
    ):
        if column and len(column) != len(snapshot.model.parameters):
            raise ValueError(f"expected {len(snapshot.model.parameters)} entries, one for each parameter, got {len(column)}")
    return snapshot


def from_plain(kind: type[T], plain: Any) -> T:  # noqa: ANN401  (what `json.loads` gives)
    """Give back the `kind` that `to_plain` took apart.

    Raises:
        TypeError, ValueError: `plain` is not a `kind`.

    """
    return typing.cast("T", _read(kind, plain))


def to_json(plain: Any) -> str:  # noqa: ANN401  (what `to_plain` gives)
    """Give one line of JSON; numbers of numpy become Python's."""
    try:
        return json.dumps(plain, allow_nan=False, separators=(",", ":"), default=_pythonic)
    except ValueError:  # somewhere there is a NaN or an infinity
        return json.dumps(_spell(plain), allow_nan=False, separators=(",", ":"))


def from_json(line: str) -> Any:  # noqa: ANN401  (what `to_json` took)
    """Read one line of JSON as `to_json` writes it."""
    return json.loads(line, object_hook=lambda d: float(d["float"]) if d.keys() == {"float"} and d["float"] in _SPELT else d)


_SPELT = ("nan", "inf", "-inf")


def _spell(plain: Any) -> Any:  # noqa: ANN401
    if isinstance(plain, float) and not math.isfinite(plain):
        return {"float": str(float(plain))}
    if isinstance(plain, Mapping):
        return {k: _spell(v) for k, v in plain.items()}
    if isinstance(plain, tuple | list):
        return [_spell(v) for v in plain]
    return plain if isinstance(plain, str | int | float | None) else _spell(_pythonic(plain))


def _pythonic(number: Any) -> Any:  # noqa: ANN401
    """Give a number of numpy, or an array of them, as Python's."""
    if hasattr(number, "tolist"):
        return number.tolist()
    raise TypeError(f"{type(number).__name__} is not a number")


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, object], ...]:
    return tuple((f.name, f.default) for f in dataclasses.fields(kind))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


_SCALARS: Mapping[Any, Any] = {int: int, float: (int, float), str: str, bool: bool}
_NUMBERS: frozenset[type] = frozenset({int, float, type(None)})
_ANY: frozenset[type] = frozenset({int, float, str, bool, type(None)})
_ENTRIES: Mapping[Any, frozenset[type]] = {int: frozenset({int}), float: _NUMBERS, float | None: _NUMBERS, str: frozenset({str})}


def _read(hint: Any, plain: Any) -> Any:  # noqa: ANN401, PLR0911  (one line for each shape of a type)
    if plain is None or (isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(plain, hint)):
        return plain
    if dataclasses.is_dataclass(hint):
        hints = _hints(typing.cast("type", hint))
        if not isinstance(plain, Mapping):
            raise TypeError(f"expected the fields of a {getattr(hint, '__name__', hint)}, got {plain!r:.80}")
        return typing.cast("type", hint)(**{name: _read(hints.get(name), v) for name, v in plain.items()})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _read(next((a for a in arguments if a is not type(None)), None), plain)
    if origin is tuple:
        if dataclasses.is_dataclass(arguments[0]):
            return tuple(_read(arguments[0], v) for v in plain)
        if isinstance(plain, str) or not set(map(type, plain)) <= _ENTRIES.get(arguments[0], _ANY):
            raise TypeError(f"expected a row of {arguments[0]}, got {plain!r:.80}")
        return tuple(plain)
    if hint in _SCALARS and not isinstance(plain, _SCALARS[hint]):
        raise TypeError(f"expected a {hint.__name__}, got {plain!r:.80}")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(plain)
    return plain
