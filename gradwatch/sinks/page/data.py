"""Runs -> what a page shows of them: plain values, which JSON can hold. Nothing here is drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from gradwatch.sinks.log import printable
from gradwatch.sinks.page.columns import COLUMNS, grouped, looked_at, packed, typical
from gradwatch.sinks.page.headline import headline
from gradwatch.sinks.page.lags import series
from gradwatch.values.layer_columns import LayerColumns
from gradwatch.values.report import Alert
from gradwatch.values.snapshot import ModelInfo, Snapshot

if TYPE_CHECKING:
    from gradwatch.sinks.page.columns import Floats
    from gradwatch.sinks.reading import Run

FORMAT = 1
"""Of the data of a page: raised where a script of an earlier one would misread it."""
COLUMN_NAMES = ("norm", "sensitivity", "update", "weight", "zeros")
"""What is shown of each layer."""


def page_data(runs: Mapping[str, Run], version: str, *, columns: int = COLUMNS) -> dict[str, Any]:
    """Return all that a page shows.

    Args:
        runs: by name, as `read_runs` gives them.
        version: of gradwatch.
        columns: most columns of a picture.

    """
    return {
        "format": FORMAT,
        "gradwatch": version,
        "runs": [run_data(_named(name, run), run, columns=columns) for name, run in runs.items()],
    }


def _named(name: str, run: Run) -> str:
    """Return the name of a run without that of the folder in it that gradwatch writes into."""
    name = name.removesuffix("record.jsonl").rstrip("/").removesuffix("/gradwatch")
    if name not in ("", ".", "gradwatch"):
        return name
    parts = [part for part in PurePath(run.path).parts[:-1] if part not in ("gradwatch", "/")]
    return parts[-1] if parts else "run"


def run_data(name: str, run: Run, *, columns: int = COLUMNS) -> dict[str, Any]:
    """Return what a page shows of one run."""
    model, place, rows_by_alert = _placed(run)
    counts: dict[str, int] = {}
    for parameter in model.parameters:
        counts[parameter.layer] = counts.get(parameter.layer, 0) + parameter.elements
    steps = {s.step for s in run.snapshots}
    shown: dict[str, Any] = _shown(
        {
            "name": name,
            "headline": headline(run, list(place), rows_by_alert),
            "layers": [
                {"name": layer.name, "kind": layer.kind, "parameters": counts.get(layer.name, 0), "at": layer.location}
                for layer in (model.layers[i] for i in model.forward_order)
            ],
            "measured": len(steps),
            "first": min(steps, default=None),
            "last": max(steps, default=None),
            "thinned": run.thinned,
            "broken": run.broken,
            **_of_layers(run.snapshots, place, columns),
            "sequences": series(run.snapshots, columns),
            "alerts": [alert_data(alert, rows_by_alert[id(alert)]) for alert in run.alerts],
        }
    )
    return shown


def headline_of(run: Run) -> list[dict[str, str]]:
    """Return the sentences on top of the page of a run."""
    _, place, rows_by_alert = _placed(run)
    return headline(run, list(place), rows_by_alert)


def _placed(run: Run) -> tuple[ModelInfo, dict[str, int], dict[int, list[int]]]:
    """Return the model, the row of each of its layers, in order, and by the id of each alert the rows it is about."""
    model = _whole(run.models)
    place = {model.layers[i].name: row for row, i in enumerate(model.forward_order)}
    return model, place, {id(alert): list(rows_of(alert, model, place)) for alert in run.alerts}


def _shown(value: Any) -> Any:  # noqa: ANN401
    """Make visible, in all texts, what would turn a line around, end it, or be obeyed."""
    if isinstance(value, str):
        return printable(value).replace("\n", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, dict):
        return {key: _shown(part) for key, part in value.items()}
    return [_shown(part) for part in value] if isinstance(value, list) else value


def _whole(models: Sequence[ModelInfo]) -> ModelInfo:
    """Return the newest description of the model, with layers and parameters that only earlier ones have at its end."""
    if not models:
        return ModelInfo((), ())
    layers, parameters = list(models[-1].layers), list(models[-1].parameters)
    known, named = {layer.name for layer in layers}, {p.name for p in parameters}
    for model in models[:-1]:
        layers += [dataclasses.replace(layer, order=None) for layer in model.layers if layer.name not in known]
        parameters += [p for p in model.parameters if p.name not in named]
        known |= {layer.name for layer in layers}
        named |= {p.name for p in parameters}
    return ModelInfo(tuple(layers), tuple(parameters), models[-1].optimizers)


def _of_layers(snapshots: Sequence[Snapshot], place: Mapping[str, int], most: int) -> dict[str, Any]:
    """Return the columns of all layers, the loss and the global norm, by column of a picture."""
    import numpy as np

    table = _Tables(place)
    steps, ends = list[int](), list[int]()
    found: dict[str, list[Floats]] = {name: [] for name in COLUMN_NAMES}
    losses: list[list[float]] = [[], [], []]
    norms: list[list[float]] = [[], [], []]
    for group in grouped(snapshots, most):
        chosen = looked_at(group)
        steps.append(group[0].step)
        ends.append(group[-1].step)
        rows = [table.row(s) for s in group if s.weight_norm is not None or s in chosen]
        for name in COLUMN_NAMES:
            known = [row[name] for row in rows if name in row]
            found[name].append(typical(np.stack(known)) if known else np.full(len(place), np.nan))
        for kept, numbers in ((losses, [s.loss for s in group if s.loss is not None]), (norms, _global(chosen))):
            for band, value in zip(kept, _band(numbers), strict=True):
                band.append(value)
    return {
        "steps": steps,
        "ends": ends,
        "columns": {
            name: [packed(row) for row in np.stack(columns).T] if columns else [] for name, columns in found.items()
        },
        "loss": [[_plain(value) for value in band] for band in losses],
        "norm": [packed(band) for band in norms],
    }


def _global(snapshots: Sequence[Snapshot]) -> list[float]:
    """Return the norm of the whole gradient at each step, over all optimizers that stepped then."""
    found: dict[int, list[float]] = {}
    for snapshot in snapshots:
        if (norm := snapshot.norm_global) is not None:
            found.setdefault(snapshot.step, []).append(norm)
    return [math.hypot(*norms) for norms in found.values()]


def _band(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Return the least, the median and the largest of some numbers; NaN of none, infinity where one is not finite."""
    import statistics

    if not numbers:
        return math.nan, math.nan, math.nan
    finite = [n for n in numbers if math.isfinite(n)]
    if not finite:
        return math.inf, math.inf, math.inf
    top = max(finite) if len(finite) == len(numbers) else math.inf
    return min(finite), statistics.median(finite), top


def _plain(value: float) -> float | str | None:
    """Return a number as JSON can hold it: none, or "inf" for what is not finite; six digits."""
    if math.isnan(value):
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else "inf"


class _Tables:
    """Columns of parameters -> rows of layers, in the order of the page."""

    def __init__(self, place: Mapping[str, int]) -> None:
        """Take where each layer stands."""
        self._place = place
        self._known: dict[int, tuple[ModelInfo, LayerColumns, list[int]]] = {}
        self._weights: dict[str, float] = {}

    def row(self, snapshot: Snapshot) -> dict[str, Floats]:
        """Return what a snapshot has of each layer; NaN is no number, infinity what is not finite."""
        _, columns, _ = self._of(snapshot.model)
        if snapshot.weight_norm is not None:
            named = zip(snapshot.model.parameters, snapshot.weight_norm, strict=True)
            self._weights |= {p.name: weight for p, weight in named if weight is not None}
        found = {"norm": self._folded(snapshot, snapshot.norm)}
        found["sensitivity"] = self._placed(
            snapshot.model, columns.sensitivity(_floats(snapshot.norm), columns.weights(self._weights))
        )
        if snapshot.weight_norm is not None:
            found["weight"] = self._folded(snapshot, snapshot.weight_norm)
        if snapshot.update_ratio is not None:
            found["update"] = self._largest(snapshot, snapshot.update_ratio)
        if snapshot.zeros is not None:
            found["zeros"] = self._largest(snapshot, snapshot.zeros)
        return found

    def _of(self, model: ModelInfo) -> tuple[ModelInfo, LayerColumns, list[int]]:
        if id(model) not in self._known:
            self._known[id(model)] = model, LayerColumns(model), [self._place[layer.name] for layer in model.layers]
        return self._known[id(model)]

    def _folded(self, snapshot: Snapshot, column: Sequence[float | None]) -> Floats:
        """Return the norm of each layer."""
        _, columns, _ = self._of(snapshot.model)
        return self._placed(snapshot.model, columns.norms(tuple(_floats(column))))

    def _largest(self, snapshot: Snapshot, column: Sequence[float | None]) -> Floats:
        """Return the largest entry of each layer."""
        import numpy as np

        _, columns, _ = self._of(snapshot.model)
        found = np.full(len(snapshot.model.layers), np.nan)
        for parameter, value in zip(snapshot.model.parameters, column, strict=True):
            if value is not None:
                number = columns.numbers[parameter.layer]
                found[number] = np.fmax(found[number], value if math.isfinite(value) else np.inf)
        return self._placed(snapshot.model, found)

    def _placed(self, model: ModelInfo, values: Floats) -> Floats:
        import numpy as np

        found = np.full(len(self._place), np.nan)
        found[self._of(model)[2]] = values
        return found


def _floats(column: Sequence[float | None]) -> Floats:
    import numpy as np

    return np.array([np.nan if value is None else np.inf if math.isnan(value) else value for value in column])


def alert_data(alert: Alert, rows: Sequence[int]) -> dict[str, Any]:
    """Return what a page shows of an alert; `rows` are the layers that it is about."""
    finding = alert.finding
    return {
        "code": finding.code,
        "kind": finding.kind,
        "severity": alert.worst.value,
        "place": finding.place,
        "parameter": finding.parameter,
        "since": alert.since,
        "began": alert.began,
        "last": alert.last,
        "cleared": alert.cleared,
        "message": alert.message,
        "cause": alert.cause,
        "remedy": alert.remedy,
        "rows": list(rows),
    }


_OF_ALL, _BY_PARAMETERS = ("GW102",), ("GW901",)
"""Codes of what is found of the whole model (no layer learns), and of a range that two names end."""


def rows_of(alert: Alert, model: ModelInfo, place: Mapping[str, int]) -> Iterator[int]:
    """Yield the rows of the layers that an alert is about: those of its place, or from there to the last it names."""
    finding = alert.finding
    if finding.code in _OF_ALL:
        yield from range(len(place))
        return
    parameters_too = finding.code in _BY_PARAMETERS
    begins = finding.names.get("first", finding.place) if parameters_too else finding.place
    if not begins:
        return
    mine = [
        place[layer.name]
        for layer in model.layers
        if begins in (layer.name, layer.module) or layer.name.startswith(f"{begins}.")
    ]
    if not mine:
        return
    several = finding.evidence.get("layers", 1.0) > 1 or parameters_too
    last = place.get(finding.names.get("last", ""), mine[-1]) if several else mine[-1]
    yield from range(min(*mine, last), max(*mine, last) + 1)
