"""Snapshots -> columns of a picture: few enough to be drawn, and numbers packed to be read by a script."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from gradwatch.values.snapshot import Snapshot

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

COLUMNS = 300
"""Columns of a picture; where there are more measured steps, a column stands for several."""
_LOOKED_AT = 24
"""Snapshots of one column that are looked at, evenly spread, beside those that are not finite."""

LOWEST, STEPS_A_DECADE = -46.0, 700
"""log10 of what the first code stands for, and codes from one power of ten to the next: 0.3 % of a number."""
NONE, NOT_FINITE, ZERO, MOST = 65535, 65534, 0, 65000
"""Codes of no number, NaN and infinity, exactly 0, and the last one of a number."""


def grouped(snapshots: Sequence[Snapshot], most: int = COLUMNS) -> Iterator[list[Snapshot]]:
    """Yield the snapshots of each column: those of one step, or where there are too many, of equally many steps."""
    steps = sorted({s.step for s in snapshots})
    apart = math.ceil(len(steps) / most) if steps else 1
    column_of = {step: number // apart for number, step in enumerate(steps)}
    ordered = sorted(snapshots, key=lambda s: s.step)
    for _, group in itertools.groupby(ordered, key=lambda s: column_of[s.step]):
        yield list(group)


def looked_at(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Return some of the snapshots of a column, the first and the last among them, and all that are not finite."""
    if len(snapshots) <= _LOOKED_AT:
        return list(snapshots)
    apart = (len(snapshots) - 1) / (_LOOKED_AT - 1)
    chosen = {round(i * apart) for i in range(_LOOKED_AT)}
    return [s for i, s in enumerate(snapshots) if i in chosen or not s.finite]


def typical(rows: Floats) -> Floats:
    """Return the median of each column of (snapshots, layers), where NaN is no number and infinity is not finite.

    What is not finite once is so as a whole: it must not be lost among many.
    """
    import warnings

    import numpy as np

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")  # a layer without any number
        found: Floats = np.nanmedian(rows, axis=0)
    found[np.isinf(rows).any(axis=0)] = np.inf
    return found


def packed(values: Iterable[float]) -> str:
    """Return sizes as 16 bits each, in base64: a code by log10; NaN is no number, infinity what is not finite."""
    import numpy as np

    numbers = np.asarray(list(values), dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(np.rint((np.log10(numbers) - LOWEST) * STEPS_A_DECADE), 1, MOST)
    codes[numbers == 0] = ZERO
    codes[np.isnan(numbers)] = NONE
    codes[np.isinf(numbers) | (numbers < 0)] = NOT_FINITE
    return base64.b64encode(codes.astype("<u2").tobytes()).decode("ascii")


def unpacked(text: str) -> list[float | None]:
    """Return what was packed, each to 0.3 %."""
    import numpy as np

    codes = np.frombuffer(base64.b64decode(text), dtype="<u2").tolist()
    special: dict[int, float | None] = {NONE: None, NOT_FINITE: math.inf, ZERO: 0.0}
    return [special[c] if c in special else 10 ** (c / STEPS_A_DECADE + LOWEST) for c in codes]
