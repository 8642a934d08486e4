"""Values <-> dicts, lists, numbers and strings, with an exact JSON form."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from gradwatch.values.column import CompactColumn, decode, encode
from gradwatch.values.format_1 import alert_from_1, model_from_1, snapshot_from_1
from gradwatch.values.report import Alert
from gradwatch.values.snapshot import Absent, Column, ModelInfo, Snapshot

FORMAT = 3
"""The format of what is written here. A field that is added and optional does not raise it.

2 is read too, in which columns were lists and every snapshot named its model; and 1, as `format_1` tells.
"""
FORMATS = (1, 2, FORMAT)
"""Those that are read."""

# --- JSON: floats by repr, which is exact; NaN and the infinities, which JSON lacks, as {"float": "nan"}. ---

T = TypeVar("T")
_MANY = 1000


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


def snapshot_to_plain(snapshot: Snapshot, model: int | None = None) -> dict[str, Any]:
    """Return a snapshot as `to_plain` does, its columns as text, and the number of its model, which many share.

    Without a number, the model is the newest one.
    """
    found: dict[str, Any] = {} if model is None else {"model": model}
    for name, default, is_column in _fields_of_snapshot():
        if (value := getattr(snapshot, name)) is default:
            continue
        if is_column:
            found[name] = encode(value)
        else:
            found[name] = value if isinstance(value, int | float | str) else to_plain(value)
    return found


def compact(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot of a large model with its columns in a quarter of the memory, to be kept with many others.

    Below `_MANY` parameters it is little, and packing would cost more.
    """
    if len(snapshot.norm) < _MANY:
        return snapshot
    numbers = {name: column for name, its in _along_parameters().items() if its and (column := getattr(snapshot, name))}
    packed: dict[str, Any] = {name: CompactColumn(column) for name, column in numbers.items()}
    return dataclasses.replace(snapshot, **packed)


def snapshot_from_plain(plain: Mapping[str, Any], models: Sequence[ModelInfo], written: int = FORMAT) -> Snapshot:
    """Return the snapshot that `snapshot_to_plain` took apart when the format was `written`.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError: `plain` is no snapshot, or its model is not among
            `models`.

    """
    if written == 1:
        plain = snapshot_from_1(plain, models)
    model = models[plain.get("model", -1)]
    found: dict[str, Any] = {"model": model}
    readers, along, count = _readers_of_snapshot(), _along_parameters(), len(model.parameters)
    for name, value in plain.items():
        if name == "model":
            continue
        found[name] = read = readers[name](value) if name in readers else value
        if name in along and read and len(read) != count:
            raise ValueError(f"expected {count} entries, one for each parameter, got {len(read)}")
    return Snapshot(**found)


@functools.cache
def _readers_of_snapshot() -> dict[str, Reader]:
    """Return what reads each field: a column may be text or, as it was in formats 1 and 2, a list."""
    row = _reader(_ROW)
    readers = {name: _reader(hint) for name, hint in _hints(Snapshot).items()}
    numbers = [name for name, its in _along_parameters().items() if its]
    return readers | dict.fromkeys(numbers, lambda plain: decode(plain) if isinstance(plain, str) else row(plain))


@functools.cache
def _along_parameters() -> dict[str, bool]:
    """Return the fields of a snapshot that run along its parameters, by their types, and of each whether of numbers."""
    kinds = {Column: True, Column | None: True, tuple[Absent | None, ...] | None: False}
    return {name: kinds[hint] for name, hint in _hints(Snapshot).items() if hint in kinds}


@functools.cache
def _fields_of_snapshot() -> tuple[tuple[str, object, bool], ...]:
    """Return name and default of each but the model, and whether it is a column of numbers."""
    along = _along_parameters()
    return tuple((name, default, along.get(name, False)) for name, default in _fields(Snapshot) if name != "model")


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


def from_json(line: str | bytes) -> Any:  # noqa: ANN401  (what `to_json` took)
    """Read one line of JSON as `to_json` writes it."""
    line = line if isinstance(line, str) else line.decode()
    if _SPELLED not in line:  # nearly always, and a call for each object takes longer than all else
        return json.loads(line)
    return json.loads(
        line, object_hook=lambda d: float(d["float"]) if d.keys() == {"float"} and d["float"] in _SPELT else d
    )


_SPELLED = '{"float":'
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


_ROW = tuple[float | None, ...]
_SCALARS: Mapping[Any, Any] = {int: int, float: (int, float), str: str, bool: bool}
_NUMBERS: frozenset[type] = frozenset({int, float, type(None)})
_ANY: frozenset[type] = frozenset({int, float, str, bool, type(None)})
_ENTRIES: Mapping[Any, frozenset[type]] = {
    int: frozenset({int}),
    float: _NUMBERS,
    float | None: _NUMBERS,
    str: frozenset({str}),
}


Reader = Callable[[Any], Any]
"""Makes of what `json.loads` gives a value of one type."""


def _read(hint: Any, plain: Any) -> Any:  # noqa: ANN401
    return _reader(hint)(plain)


@functools.cache
def _reader(hint: typing.Hashable) -> Reader:
    """Return what reads a type: worked out once, for a record has a million values of a few."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _fields_reader(typing.cast("type", hint))
    if origin in (typing.Union, types.UnionType):
        return _reader(next((a for a in arguments if a is not type(None)), None))
    if origin is tuple:
        entry = arguments[0]
        each = _reader(typing.cast("typing.Hashable", entry)) if dataclasses.is_dataclass(entry) else None
        return _row_reader(entry) if each is None else _objects_reader(each)
    if hint in _SCALARS:
        return _scalar_reader(typing.cast("type", hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return lambda plain: plain if plain is None else hint(plain)
    return lambda plain: plain


def _fields_reader(kind: type) -> Reader:
    readers: dict[str, Reader] = {}

    def read(plain: Any) -> Any:  # noqa: ANN401
        if plain is None or isinstance(plain, kind):
            return plain
        if not isinstance(plain, Mapping):
            raise TypeError(f"expected the fields of a {kind.__name__}, got {plain!r:.80}")
        if not readers:
            readers.update((name, _reader(hint)) for name, hint in _hints(kind).items())
        return kind(**{name: readers[name](v) if name in readers else v for name, v in plain.items()})

    return read


def _objects_reader(each: Reader) -> Reader:
    return lambda plain: plain if plain is None else tuple(map(each, plain))


def _row_reader(entry: Any) -> Reader:  # noqa: ANN401
    allowed = _ENTRIES.get(entry, _ANY)

    def read(plain: Any) -> Any:  # noqa: ANN401
        if plain is None:
            return plain
        if isinstance(plain, str) or not allowed.issuperset(map(type, plain)):
            raise TypeError(f"expected a row of {entry}, got {plain!r:.80}")
        return tuple(plain)

    return read


def _scalar_reader(kind: type) -> Reader:
    allowed = _SCALARS[kind]

    def read(plain: Any) -> Any:  # noqa: ANN401
        if plain is not None and not isinstance(plain, allowed):
            raise TypeError(f"expected a {kind.__name__}, got {plain!r:.80}")
        return sys.intern(plain) if type(plain) is str else plain  # names of layers come again with every probe

    return read
