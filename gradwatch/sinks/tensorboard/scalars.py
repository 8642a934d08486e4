"""Reports -> numbers by tag."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from gradwatch.values.layer_columns import group_norms, sensitivities
from gradwatch.values.report import Report, Severity
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Column, LayerInfo, ModelInfo, Snapshot

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLOOR = -45.0
"""log10 at which a size of exactly 0 is drawn: the smallest float32 above 0 is 1.4e-45."""
GROUPS = 64
"""Above so many layers there is one chart a block: layers whose names begin with the same parts, as many as fit."""


class Groups:
    """Which parameters go into which chart."""

    def __init__(self, model: ModelInfo, *, parameters: bool = False, most: int = GROUPS) -> None:
        """Group by layer, in the order of the forward pass; by block if there are more than `most`; or not at all."""
        self.model = model
        self._asked: Column | None = None
        self._levels: dict[str, float] = {}
        self._blocked = not parameters and len(model.layers) > most
        if parameters:
            self.of = [tag_safe(p.name) for p in model.parameters]
            """The group of each parameter."""
            self.rows = list(self.of)
            """All groups, in the order of the forward pass."""
        else:
            block = _blocks(model.layers, most)
            top = "model" if "model" not in block.values() else "(model)"
            name_of = {layer: tag_safe(name or top) for layer, name in block.items()}
            self.of = [name_of[p.layer] for p in model.parameters]
            self.rows = list(dict.fromkeys(name_of[model.layers[i].name] for i in model.forward_order))

    def levels(self, column: Column) -> dict[str, float]:
        """Return log10 of the norm of each group, as `norms` gives it; asked again of the same column, the same."""
        if self._asked is not column:
            self._asked, known = column, self._above_zero(column)
            if known is None:
                self._levels = {name: log10(value) for name, value in self.norms(column).items()}
            else:
                self._levels = dict(zip(self.rows, known, strict=True))
        return self._levels

    def _above_zero(self, column: Column) -> list[float] | None:
        """Return these levels in the order of the rows; None where a norm is missing, 0, NaN or infinite."""
        import numpy as np

        if not all(column) or not math.isfinite(sum(column)):  # type: ignore[arg-type]  # none is None
            return None
        order, starts = self._places
        values = np.array(column)[order]
        if len(starts) < len(values):
            values = np.hypot.reduceat(values, starts)
        return np.log10(values).tolist()  # type: ignore[no-any-return]

    @functools.cached_property
    def _places(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The parameters in the order of their rows, and where each row begins among them."""
        import numpy as np

        number = {row: i for i, row in enumerate(self.rows)}
        mine = np.array([number[row] for row in self.of], dtype=np.intp)
        order = np.argsort(mine, kind="stable")
        return order, np.unique(mine[order], return_index=True)[1]

    @functools.cached_property
    def _tags(self) -> list[str]:
        return [f"gradwatch_norm/{row}" for row in self.rows]

    def unblocked(self) -> Groups:
        """Return the groups of the pictures, which have room for every layer."""
        return Groups(self.model, most=len(self.model.layers)) if self._blocked else self

    def tags_of_norms(self, names: Collection[str]) -> Sequence[str]:
        """Return the tags of the norms of some of the groups, in the order of `rows`."""
        return self._tags if len(names) == len(self._tags) else [f"gradwatch_norm/{name}" for name in names]

    def norms(self, column: Column) -> dict[str, float]:
        """Return the root of the sum of squares over each group; what has no number is left out."""
        found = group_norms(column, self.of)
        return {row: found[row] for row in self.rows if row in found}

    def largest(self, column: Column) -> dict[str, float]:
        """Return the largest number of each group; what has none is left out."""
        found: dict[str, float] = {}
        for row, value in zip(self.of, column, strict=True):
            if value is not None:
                found[row] = max(found.get(row, value), value)
        return {row: found[row] for row in self.rows if row in found}


def scalars(report: Report) -> dict[str, float]:
    """Return what TensorBoard shows as scalars, by tag: for loggers that know only numbers."""
    return scalars_of(report, Groups(report.snapshot.model))


def scalars_of(report: Report, groups: Groups) -> dict[str, float]:
    """Return the same, with the layers grouped."""
    snapshot = report.snapshot
    found: dict[str, float] = {}
    levels = groups.levels(snapshot.norm)
    if levels:
        known = [*levels.values()]
        if any(map(math.isnan, known)):
            known = [level for level in known if not math.isnan(level)] or [math.nan]
        found = {
            "gradwatch/norm_global": log10(snapshot.norm_global or 0.0),
            "gradwatch/norm_min": min(known),
            "gradwatch/norm_median": statistics.median(known),
            "gradwatch/norm_max": max(known),
            "gradwatch/zero_norms": float(known.count(FLOOR)),
        }
    found["gradwatch/alerts_open"] = float(sum(alert.severity > Severity.INFO for alert in report.open))
    if snapshot.loss is not None:
        found["gradwatch/loss"] = snapshot.loss
    if snapshot.clip_factor is not None:
        found["gradwatch/clip_factor"] = snapshot.clip_factor
    found.update(zip(groups.tags_of_norms(levels), levels.values(), strict=True))
    if snapshot.weight_norm is not None:
        found.update(
            (f"gradwatch_sensitivity/{name}", log10(value))
            for name, value in groups.norms(sensitivities(snapshot)).items()
        )
    if snapshot.update_ratio is not None:
        largest = groups.largest(snapshot.update_ratio)
        found.update((f"gradwatch_update/{name}", log10(ratio)) for name, ratio in largest.items())
    found.update(_through_time(snapshot))
    return found


def _through_time(snapshot: Snapshot) -> Iterator[tuple[str, float]]:
    """Return the horizons, the gain over its maximum at a few lags, and the gradients there."""
    for name, stats in gains(snapshot).items():
        yield from _in_timesteps(name, stats)
        levels = gain_levels(stats)
        yield from ((f"gradwatch_time/{name}/lag_{lag:05d}", levels[lag]) for lag in _few(len(levels)))
    for stats in snapshot.sequences or ():
        if stats.mixing in ("attention", "convolution"):  # there may be many, and they forget nothing
            continue
        if stats.scaled:  # by a factor that nobody knows: what looks like a fall may be the loss scale
            continue
        for part, series in (("input", stats.grad_input), (stats.part, stats.grad_hidden)):
            if series:
                tag = f"gradwatch_time_grad/{_name(stats.module)}/{part or 'hidden'}"
                yield from ((f"{tag}/lag_{lag:05d}", log10(series[-1 - lag])) for lag in _few(len(series)))


def _in_timesteps(name: str, stats: SequenceStats) -> Iterator[tuple[str, float]]:
    """Return how far back it learns, with the ends of the interval, and how much of that it uses.

    What is of the model stands with the summary, what is of modules has groups of its own. A half-life is at most the
    length of the sequences: beyond that it says no more, and would tear the axis.
    """
    whole = stats.part == "model" and not stats.module

    def tag(what: str) -> str:
        return f"gradwatch/{what}" if whole else f"gradwatch_{what}/{name}"

    reach = stats.reach
    if reach is not None:
        yield tag("horizon"), float(reach.timesteps)
        if reach.low < reach.high:
            yield tag("horizon_low"), float(reach.low)
            yield tag("horizon_high"), float(reach.high)
        if reach.half_life is not None:
            yield tag("half_life"), min(reach.half_life, float(stats.length))
    if stats.used is not None:
        yield tag("used"), float(stats.used)
    for other in stats.beside:
        if other.input and other.horizon is not None:
            yield f"gradwatch_horizon/{name}/{tag_safe(other.input)}", float(other.horizon)


def _few(length: int) -> Iterator[int]:
    """Return the lags 0, 1, 2, 4, ... of a sequence."""
    lag = 0
    while lag < length:
        yield lag
        lag = lag * 2 or 1


def gains(snapshot: Snapshot) -> dict[str, SequenceStats]:
    """Return what has a gain by lag, by its name in tags; "model" is the model, its own horizon before its input's."""
    with_gain = [s for s in snapshot.sequences or () if s.lag_gain and s.part in ("", "model")]
    return {_name(s.module if s.part != "model" else ""): s for s in sorted(with_gain, key=lambda s: s.part == "model")}


def _name(module: str) -> str:
    # A module called "model" must not be taken for the model itself, and keeps its tag whether that is measured or not.
    return f"model-{_mark('model')}" if module == "model" else tag_safe(module) or "model"


def gain_levels(stats: SequenceStats) -> list[float]:
    """Return log10 of a gain by lag over its maximum; what is not finite stays what it is."""
    gain = stats.lag_gain or ()
    top = max((g for g in gain if math.isfinite(g)), default=0.0)
    return [log10(g / top) if top > 0 else log10(g) for g in gain]


def log10(value: float) -> float:
    """Return log10 of a size, -45 for exactly 0, and NaN and infinity for themselves."""
    return math.log10(value) if 0 < value < math.inf else FLOOR if value == 0 else value


_UNSAFE = re.compile(r"[^A-Za-z0-9_./-]")


def tag_safe(name: str) -> str:
    """Return the name as a tag; one that has to change gets a hash, so that no two become the same."""
    safe = _UNSAFE.sub("_", name)
    return name if safe == name else f"{safe}-{_mark(name)}"


def _mark(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:4]


def _blocks(layers: Sequence[LayerInfo], most: int) -> dict[str, str]:
    deepest = max((layer.name.count(".") + 1 for layer in layers), default=1)
    for parts in range(deepest, -1, -1):
        block = {layer.name: ".".join(layer.name.split(".")[:parts]) for layer in layers}
        if len(set(block.values())) <= most or parts == 0:
            break
    return block
