"""Values <-> dicts, lists, numbers and strings, with an exact JSON form."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from gradwatch.values.format_1 import alert_from_1, model_from_1, snapshot_from_1
from gradwatch.values.report import Alert
from gradwatch.values.snapshot import Absent, Column, ModelInfo, Snapshot

FORMAT = 2
"""The format of what is written here; 1 is read too. A field that is added and optional does not raise it."""

# --- JSON: floats by repr, which is exact; NaN and the infinities, which JSON lacks, as {"float": "nan"}. ---

T = TypeVar("T")


def to_plain(value: Any) -> Any:  # noqa: ANN401  (any value of this package, and what JSON can hold)
    """Return `value` as dicts, lists, numbers and strings; fields that hold their default are left out.

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
    """Return a snapshot as `to_plain` does, with a number in place of the model, which many snapshots share."""
    fields = [(name, default) for name, default in _fields(Snapshot) if name != "model"]
    return {
        "model": model,
        **{name: to_plain(v) for name, default in fields if (v := getattr(snapshot, name)) is not default},
    }


def snapshot_from_plain(plain: Mapping[str, Any], models: Sequence[ModelInfo], written: int = FORMAT) -> Snapshot:
    """Return the snapshot that `snapshot_to_plain` took apart when the format was `written`.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError: `plain` is no snapshot, or its model is not among
            `models`.

    """
    if written == 1:
        plain = snapshot_from_1(plain, models)
    snapshot = from_plain(Snapshot, {**plain, "model": models[plain["model"]]})
    for column in (getattr(snapshot, name) for name in _columns()):
        if column and len(column) != len(snapshot.model.parameters):
            raise ValueError(
                f"expected {len(snapshot.model.parameters)} entries, one for each parameter, got {len(column)}"
            )
    return snapshot


@functools.cache
def _columns() -> tuple[str, ...]:
    """Return the names of the fields of a snapshot that run along its parameters: by their types."""
    kinds = (Column, Column | None, tuple[Absent | None, ...] | None)
    return tuple(name for name, hint in _hints(Snapshot).items() if hint in kinds)


def model_from_plain(plain: Any, written: int = FORMAT) -> ModelInfo:  # noqa: ANN401  (what `json.loads` gives)
    """Return the model that `to_plain` took apart when the format was `written`.

    Raises:
        KeyError, TypeError, ValueError: `plain` is no model.

    """
    return from_plain(ModelInfo, model_from_1(plain) if written == 1 else plain)


def alert_from_plain(plain: Any, written: int = FORMAT) -> Alert:  # noqa: ANN401
    """Return the alert that `to_plain` took apart when the format was `written`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: `plain` is no alert.

    """
    return from_plain(Alert, alert_from_1(plain) if written == 1 else plain)


def from_plain(kind: type[T], plain: Any) -> T:  # noqa: ANN401  (what `json.loads` gives)
    """Return the `kind` that `to_plain` took apart.

    Raises:
        TypeError, ValueError: `plain` is not a `kind`.

    """
    return typing.cast("T", _read(kind, plain))


def to_json(plain: Any) -> str:  # noqa: ANN401  (what `to_plain` gives)
    """Return one line of JSON; numbers of numpy become Python's."""
    try:
        return json.dumps(plain, allow_nan=False, separators=(",", ":"), default=_pythonic)
    except ValueError:  # somewhere there is a NaN or an infinity
        return json.dumps(_spell(plain), allow_nan=False, separators=(",", ":"))


def from_json(line: str) -> Any:  # noqa: ANN401  (what `to_json` took)
    """Read one line of JSON as `to_json` writes it."""
    return json.loads(
        line, object_hook=lambda d: float(d["float"]) if d.keys() == {"float"} and d["float"] in _SPELT else d
    )


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
    """Return a number of numpy, or an array of them, as Python's."""
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
_ENTRIES: Mapping[Any, frozenset[type]] = {
    int: frozenset({int}),
    float: _NUMBERS,
    float | None: _NUMBERS,
    str: frozenset({str}),
}


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
