"""A column of numbers: in eight bytes each, as a history of many keeps it, and in seven letters each, as a record."""

from __future__ import annotations

import binascii
import math
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NONE_BITS = 0x7FF8_6E6F_6E00_0000
"""What stands where there is no number: a NaN that no arithmetic gives."""
_NONE_BYTES = struct.pack("<Q", _NONE_BITS)
(_NONE,) = struct.unpack("<d", _NONE_BYTES)
_KEPT = 5
"""Bytes of a double that `rounded` leaves: sign, exponent and 28 bits of the fraction."""
_DROPPED = 8 - _KEPT


def rounded(numbers: Sequence[float]) -> list[float]:
    """Return measured numbers rounded to 28 bits after the leading one: to 2e-9 of their size.

    That is far below the error of a norm, and takes three bytes of eight off a record.
    """
    import numpy as np

    found = np.array(numbers, np.float64)
    bits = found.view(np.int64)
    half, kept = 1 << 8 * _DROPPED - 1, -1 << 8 * _DROPPED
    if math.isfinite(sum(numbers)):  # nearly always
        bits += half
        bits &= kept
    else:  # a NaN of whatever bits must not become another number
        finite = np.isfinite(found)
        bits[finite] = (bits[finite] + half) & kept
    return list(found.tolist())


class CompactColumn(Sequence["float | None"]):
    """Numbers of the parameters of a model, in the order of `ModelInfo.parameters`; None where there is none.

    It cannot be changed, and equals a tuple of the same entries. `numpy.asarray` gives them without a copy, NaN where
    there is none.
    """

    __slots__ = ("_gaps", "_values")

    def __init__(self, entries: Iterable[float | None]) -> None:
        """Take the entries as they are."""
        known = list(entries)
        self._gaps = None in known
        self._values = array("d", [_NONE if n is None else n for n in known])

    @classmethod
    def _of(cls, values: array[float], *, gaps: bool) -> CompactColumn:
        column = cls.__new__(cls)
        column._values, column._gaps = values, gaps
        return column

    # --- as a sequence ---

    def tolist(self) -> list[float | None]:
        """Return the entries as a list."""
        if not self._gaps:
            return self._values.tolist()  # type: ignore[return-value]  # a list of numbers is one of numbers and None
        bits = memoryview(self._values).cast("B").cast("q").tolist()
        return [None if b == _NONE_BITS else n for n, b in zip(self._values, bits, strict=True)]

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._values)

    def __iter__(self) -> Iterator[float | None]:
        """Go through the entries."""
        return iter(self.tolist()) if self._gaps else iter(self._values)

    @overload
    def __getitem__(self, index: int) -> float | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float | None]: ...

    def __getitem__(self, index: int | slice) -> float | Sequence[float | None] | None:
        """Return an entry, or several as a column."""
        if isinstance(index, slice):
            return CompactColumn._of(self._values[index], gaps=self._gaps)
        number = self._values[index]
        return None if self._gaps and struct.pack("<d", number) == _NONE_BYTES else number

    def __contains__(self, entry: object) -> bool:
        """Tell whether an entry is this number, or None."""
        return self._gaps if entry is None else entry in self._values

    def __eq__(self, other: object) -> bool:
        """Tell whether the other is a sequence of the same entries."""
        if isinstance(other, CompactColumn | tuple | list):
            return self.tolist() == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        """Return the hash of a tuple of the entries."""
        return hash(tuple(self))

    def __repr__(self) -> str:
        """Show the entries as those of a tuple."""
        return repr(tuple(self))

    def __reduce__(self) -> tuple[type[CompactColumn], tuple[list[float | None]]]:
        """Pickle and copy as the entries."""
        return CompactColumn, (self.tolist(),)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.float64]:  # noqa: FBT001  (numpy's protocol)
        """Return the entries as an array that cannot be written to, or a copy."""
        import numpy as np

        found = np.frombuffer(self._values, np.float64)
        found.flags.writeable = False
        return np.array(found, dtype) if copy or dtype not in (None, np.float64, float) else found  # type: ignore[call-overload]


def is_zero(column: Sequence[float | None]) -> bool:
    """Tell whether no entry is a number other than 0, as of gradients where nothing arrives."""
    if not isinstance(column, CompactColumn) or not column._gaps:
        return not any(column)
    import numpy as np

    bits = np.frombuffer(column._values, np.int64)
    return bool(((bits << 1 == 0) | (bits == _NONE_BITS)).all())


def encode(column: Sequence[float | None]) -> str:
    """Return the entries of a column, exactly, as text: base64 of doubles, least byte first.

    Where the three least bytes of all are 0, as `rounded` leaves them, they are left out; else "=" stands before.
    """
    values = column._values if isinstance(column, CompactColumn) else CompactColumn(column)._values
    raw = _little(values).tobytes()
    if any(any(raw[byte::8]) for byte in range(_DROPPED)):
        return "=" + binascii.b2a_base64(raw, newline=False).decode()
    short = bytearray(len(values) * _KEPT)
    for byte in range(_KEPT):
        short[byte::_KEPT] = raw[_DROPPED + byte :: 8]
    return binascii.b2a_base64(short, newline=False).decode()


def decode(text: str) -> tuple[float | None, ...]:
    """Return the column that `encode` made this text of.

    Raises:
        ValueError: the text is none of a column.

    """
    whole = text.startswith("=")
    raw = binascii.a2b_base64(text[whole:])
    if len(raw) % (8 if whole else _KEPT):
        raise ValueError(f"expected {8 if whole else _KEPT} bytes for each entry, got {len(raw)}")
    if not whole:
        long = bytearray(len(raw) // _KEPT * 8)
        for byte in range(_KEPT):
            long[_DROPPED + byte :: 8] = raw[byte::_KEPT]
        raw = bytes(long)
    values = array("d", raw)
    if _NONE_BYTES not in raw and sys.byteorder == "little":  # nearly always
        return tuple(values)
    return tuple(CompactColumn._of(_little(values), gaps=True).tolist())


def _little(values: array[float]) -> array[float]:
    """Return the numbers with the least byte first, or from there as this machine has them."""
    if sys.byteorder == "little":
        return values
    swapped = values[:]
    swapped.byteswap()
    return swapped
