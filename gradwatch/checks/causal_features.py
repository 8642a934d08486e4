"""A data frame and a function that makes features of it: does a feature of a row depend on later rows."""

from __future__ import annotations

import bisect
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gradwatch.sinks.terminal.errors import causality_error
from gradwatch.values.causality import Causality, Leak
from gradwatch.values.report import GradientHealthError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ALL, _POSITIONS = 256, 64
"""Rows up to which each is cut off at; of more, how many cuts there are."""
_ROUNDING = 1e-9
"""Share of the largest value of a feature up to which a difference is rounding: sums over windows may be taken in
another order."""
_LOOK = (
    "look in it for a mean, a deviation, a rank or a fit over all rows, shift(-n), bfill, a centred or reversed rolling"
    " window, an interpolation, resampling labelled with the beginning of a bar, and joins on a later time"
)


class _Table:
    """The rows of a frame or of features, of pandas, polars or numpy."""

    def __init__(self, values: Any) -> None:  # noqa: ANN401  (one of three)
        self.values = values
        self.kind = type(values).__module__.partition(".")[0]
        if self.kind not in ("pandas", "polars", "numpy") or not hasattr(values, "__len__"):
            raise TypeError(
                "frame, and what function makes of it, must be a DataFrame or Series of pandas or polars or an array of"
                f" numpy, with a row for each timestep; got {type(values).__name__}"
            )

    def __len__(self) -> int:
        return len(self.values)

    def first(self, count: int) -> Any:  # noqa: ANN401
        """Return a copy of the first rows: of a view a function could still reach what comes after it."""
        if self.kind == "pandas":
            return self.values.iloc[:count].copy(deep=True)
        if self.kind == "polars":
            return self.values.head(count).clone()
        return self.values[:count].copy()

    def keys(self) -> Sequence[Hashable] | None:
        """Return what names each row; None where rows are known by their place."""
        return list(self.values.index) if self.kind == "pandas" else None

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns by name; of several that are called the same, each has a number."""
        found: dict[str, NDArray[Any]] = {}
        for name, values in self._named():
            several = sum(key == name or key.startswith(f"{name} (") for key in found)
            found[f"{name} ({several + 1})" if several else name] = values
        return found

    def _named(self) -> Iterator[tuple[str, NDArray[Any]]]:
        import numpy as np

        if self.kind == "numpy":
            flat = self.values.reshape(len(self.values), -1)
            names = [""] if self.values.ndim == 1 else [f"column {i}" for i in range(flat.shape[1])]
            yield from zip(names, flat.T, strict=True)
        elif self.values.ndim == 1 if self.kind == "pandas" else not hasattr(self.values, "columns"):
            yield str(self.values.name or ""), np.asarray(self.values.to_numpy())
        elif self.kind == "polars":
            yield from ((name, np.asarray(self.values[name].to_numpy())) for name in self.values.columns)
        else:
            yield from ((str(n), np.asarray(self.values.iloc[:, at])) for at, n in enumerate(self.values.columns))


def assert_causal_features(
    function: Callable[[Any], Any],
    frame: Any,  # noqa: ANN401  (one of three)
    *,
    offset: int = 0,
) -> Causality:
    """Raise if a feature of a row depends on later rows: with them gone, the features up to there must be the same.

    The function is called with all rows twice, and with the first n of them: for each n up to 256 rows, for 64 of more;
    each time with a copy. In pandas rows are matched by their index (what lies between two of the frame's belongs to
    the row before it), else by their place. A row of features that is there only while later rows are is a leak too.

    Args:
        function: takes a frame, and returns features of its rows: a DataFrame or Series of pandas or polars, or an
            array of numpy.
        frame: of the same kinds, a row for each timestep, the oldest first.
        offset: how many rows ahead a feature may look: those of row t are used only once row t + offset is known.

    Returns:
        What was looked at.

    Raises:
        GradientHealthError: with the row and the feature that change, and the first row without which they do.
        TypeError: the frame, or what the function gives, is of another kind.
        ValueError: there are too few rows; the function gives other features for the same rows when it is called twice,
            or always fails where there are fewer; or which row it belongs to cannot be told.

    """
    __tracebackhide__ = True
    if not callable(function):
        raise TypeError(f"function must take a frame and return features of its rows, got {function!r:.80}")
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"offset must be a whole number of rows from 0 on, got {offset!r}")
    table = _Table(frame)
    if len(table) < offset + 3:
        raise ValueError(f"frame must have at least {offset + 3} rows, got {len(table)}")
    found = _Features(function, table, offset).result()
    if not found.causal:
        raise GradientHealthError(causality_error(found))
    return found


class _Refused(Exception):  # noqa: N818  (the function's own failure)
    """The function fails with fewer rows."""


class _Features:
    """One function, one frame."""

    def __init__(self, function: Callable[[Any], Any], table: _Table, offset: int) -> None:
        self._function, self._table, self._offset = function, table, offset
        self._name = getattr(function, "__name__", type(function).__name__)
        self._whole = self._made(len(table))
        self._scale = {name: _largest(values) for name, values in self._whole.columns().items()}

    def _made(self, count: int) -> _Table:
        """Return the features of the first rows, with all that draws numbers in the same state."""
        numpy = sys.modules.get("numpy")
        state, other = random.getstate(), numpy.random.get_state() if numpy is not None else None
        try:
            made = _Table(self._given(count))
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(other)
        if made.keys() is None and len(made) != count:
            raise ValueError(
                f"{self._name} gives {len(made)} rows for {count}, and which of them belong together cannot be told:"
                " give each its row, with NaN or null where nothing is known"
            )
        return made

    def _given(self, count: int) -> Any:  # noqa: ANN401  (whatever the function gives)
        rows = self._table.first(count)
        if count == len(self._table):
            return self._function(rows)
        try:
            return self._function(rows)
        except Exception as error:
            raise _Refused(error) from error

    def result(self) -> Causality:
        """Look for a row that changes when later ones are gone."""
        rows = len(self._table)
        if (change := self._change(rows)) is not None:
            raise ValueError(
                f"{self._name} gives other features for the same rows when it is called again (row {change.row}): it"
                " draws numbers, or remembers what it was called with"
            )
        tried: list[int] = []
        refused: _Refused | None = None
        for count in _counts(rows, self._offset):
            try:
                change = self._change(count)
            except _Refused as error:  # it may need more rows than these
                refused = error
                continue
            tried.append(count - 1)
            if change is not None:
                return Causality(rows, (), tuple(sorted(tried)), self._offset, leak=self._leak(count, change))
        if not tried and refused is not None:
            raise ValueError(f"{self._name} fails with fewer rows than {rows}: {refused}") from refused.__cause__
        return Causality(rows, (), tuple(sorted(tried)), self._offset)

    def _change(self, count: int) -> _Change | None:
        """Return the first row that changes when only so many are there."""
        made, stays = self._made(count), count - (self._offset if count < len(self._table) else 0)
        mine, theirs = self._rows(self._whole), self._rows(made)
        before, after = self._whole.columns(), made.columns()
        found = [_Change(row, "", math.inf) for row in mine if row < stays and row not in theirs]
        found += [_Change(0, name, math.inf) for name in before.keys() ^ after.keys()]
        both = [row for row in mine if row < stays and row in theirs]
        places = [mine[row] for row in both], [theirs[row] for row in both]
        for name in before.keys() & after.keys():
            apart = _apart(before[name][places[0]], after[name][places[1]], self._scale[name])
            if (at := _first(apart)) is not None:
                found.append(_Change(both[at], name, float(apart[at])))
        return min(found, key=lambda change: (change.row, change.feature), default=None)

    def _rows(self, features: _Table) -> dict[int, int]:
        """Return, by row of the frame, where its features are, in the order of the rows."""
        keys, known = features.keys(), self._table.keys()
        if keys is None or known is None:
            return {at: at for at in range(len(features))}
        places: dict[Hashable, deque[int]] = {}
        for at, key in enumerate(known):
            places.setdefault(key, deque()).append(at)
        try:
            rows = [places[key].popleft() if places.get(key) else _row_before(known, key) for key in keys]
        except TypeError as error:
            raise ValueError(
                f"{self._name} gives an index that is not the frame's ({keys[0]!r}, and not {known[0]!r})"
            ) from error
        return dict(sorted((row, at) for at, row in enumerate(rows)))

    def _leak(self, count: int, change: _Change) -> Leak:
        """Find the last row on which the changed one depends."""
        low, high = count, len(self._table)  # with `low` rows it changes, with `high` it does not
        while high - low > 1:
            middle = (low + high) // 2
            try:
                other = self._change(middle)
            except _Refused:
                other = None
            if other is not None and other.row <= change.row:
                low = middle
            else:
                high = middle
        gone = "is there only while later rows are" if math.isinf(change.size) else "changes when later rows are gone"
        feature = f"feature {change.feature!r}" if change.feature else "a feature"
        cause = f"{feature} of row {change.row} {gone}, by what {self._name} computes"
        return Leak(
            change.row, "", low, change.size, kind=self._name, cause=cause, remedy=_LOOK, feature=change.feature
        )


def _row_before(known: Sequence[Any], key: Any) -> int:  # noqa: ANN401  (numbers, times, ...)
    """Return the last row whose index is not above a key; -1: there is none."""
    return bisect.bisect_right(known, key) - 1


class _Change(NamedTuple):
    """A feature of a row that is not the same with fewer rows."""

    row: int
    feature: str
    size: float
    """Over the largest value of the feature; infinite where it is not there."""


def _counts(rows: int, offset: int) -> list[int]:
    """Choose how many rows to keep: nearly all, half, and others; always the same."""
    if rows <= _ALL:
        return list(range(rows - 1, max(offset, 0), -1))
    drawn = random.Random(0).sample(  # noqa: S311  (always the same)
        range(2, rows), min(_POSITIONS - 3, rows - 2)
    )
    chosen = {rows - 1, max(rows - 1 - offset, 1), max(rows // 2, 1), *drawn}
    return sorted((count for count in chosen if count > offset), reverse=True)


def _apart(mine: NDArray[Any], theirs: NDArray[Any], scale: float) -> NDArray[np.floating]:
    """Return by row how far two columns are apart, over their largest value; 0 where that is rounding."""
    import numpy as np

    try:
        one, other = _inexact(mine), _inexact(theirs)
    except (TypeError, ValueError):  # words, times, whole numbers
        return np.array([not _same(a, b) for a, b in zip(mine, theirs, strict=True)], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        found = np.abs(one - other) / (scale or 1.0)
    found = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, np.where(np.isnan(found), np.inf, found))
    return np.where(found <= _ROUNDING, 0.0, found)


def _same(one: object, other: object) -> bool:
    """Tell whether two entries are the same; what is missing is not itself, be it NaN, NaT or NA."""
    if one is other or repr(one) == repr(other):
        return True
    try:
        return bool(one == other)
    except (TypeError, ValueError):  # a missing value, or several in one: of these the texts differ
        return False


def _inexact(values: NDArray[Any]) -> NDArray[np.complexfloating]:
    """Return numbers that may be rounded.

    Raises:
        TypeError, ValueError: they are whole, or none.

    """
    import numpy as np

    if values.dtype.kind not in "fcO":
        raise TypeError("whole numbers are compared exactly")
    return values.astype(np.complex128)


def _first(apart: NDArray[np.floating]) -> int | None:
    found = apart.nonzero()[0]
    return int(found[0]) if len(found) else None


def _largest(values: NDArray[Any]) -> float:
    import numpy as np

    try:
        sizes = np.abs(values.astype(np.complex128))
    except (TypeError, ValueError):
        return 1.0
    finite = sizes[np.isfinite(sizes)]
    return float(finite.max()) if len(finite) else 0.0
