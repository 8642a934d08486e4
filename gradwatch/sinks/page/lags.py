"""Gains by lag of all probes -> what a page shows of them."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from gradwatch.sinks.page.columns import grouped
from gradwatch.values.sequences import SequenceStats, sentence, sentences, subject, whose
from gradwatch.values.snapshot import Snapshot

_ROWS = 160
"""Rows of a heatmap of lags; where there are more lags, a row is the largest of several."""
_MOST = 12
"""Modules that have one."""
_FLOOR, _STEPS = -12.0, 20
"""log10 of the share of the maximum that the lowest code stands for, and codes from one power of ten to the next."""
_ZERO, _NOT_FINITE, _NONE = 253, 254, 255


def series(snapshots: Sequence[Snapshot], most: int) -> list[dict[str, Any]]:
    """Return, of the model and of each module whose gain by lag was measured, that by column of a picture.

    The model itself comes first.
    """
    probes = [s for s in snapshots if s.sequences]
    found: dict[tuple[str, str], list[tuple[int, SequenceStats]]] = {}
    for group in grouped(probes, most):
        for snapshot in group[-1:]:
            for stats in snapshot.sequences or ():
                if stats.lag_gain is not None and stats.part in ("", "model"):
                    found.setdefault((stats.module, stats.part), []).append((snapshot.step, stats))
    order = sorted(found, key=lambda key: key[1] != "model")
    return [_of_one(found[key]) for key in order[:_MOST]]


def _of_one(measured: Sequence[tuple[int, SequenceStats]]) -> dict[str, Any]:
    newest = measured[-1][1]
    length = max(len(stats.lag_gain or ()) for _, stats in measured)
    width = math.ceil(length / _ROWS)
    horizons = [stats.reach for _, stats in measured]
    said = next((words for stats, words in sentences([newest]) if stats is newest), "")
    if not said and newest.reach is not None:
        said = sentence(subject(newest), newest.reach, newest.length, whose(newest))
    return {
        "module": newest.module,
        "model": newest.part == "model",
        "of": newest.input,
        "length": length,
        "width": width,
        "need": newest.need,
        "sentence": said,
        "steps": [step for step, _ in measured],
        "horizon": [None if h is None else h.timesteps for h in horizons],
        "low": [None if h is None else h.low for h in horizons],
        "high": [None if h is None else h.high for h in horizons],
        "censored": [h is not None and h.censored for h in horizons],
        "used": [stats.used for _, stats in measured],
        "gain": [_packed(stats.lag_gain or (), width, math.ceil(length / width)) for _, stats in measured],
    }


def _packed(gain: Sequence[float], width: int, rows: int) -> str:
    """Return log10 of a gain over its maximum, a byte for each row, in base64."""
    top = max((g for g in gain if math.isfinite(g)), default=0.0)
    codes = bytearray()
    for row in range(rows):
        part = gain[row * width : (row + 1) * width]
        if not part:
            codes.append(_NONE)
        elif not all(map(math.isfinite, part)):
            codes.append(_NOT_FINITE)
        else:
            share = max(part) / top if top > 0 else 0.0
            codes.append(round((max(math.log10(share), _FLOOR) - _FLOOR) * _STEPS) if share > 0 else _ZERO)
    return base64.b64encode(bytes(codes)).decode("ascii")


def unpacked(text: str) -> list[float | None]:
    """Return what was packed, each to a twentieth of a power of ten, -inf for exactly 0: for those who test it."""
    special: dict[int, float | None] = {_NONE: None, _NOT_FINITE: math.inf, _ZERO: -math.inf}
    return [special[code] if code in special else code / _STEPS + _FLOOR for code in base64.b64decode(text)]
