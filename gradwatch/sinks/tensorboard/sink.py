"""A sink that writes one Summary a step."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from gradwatch.sinks.tensorboard import messages as parts
from gradwatch.sinks.tensorboard.events import EventFile, ScalarEvents
from gradwatch.sinks.tensorboard.heatmaps import LagPicture, LayerPicture, depth_picture
from gradwatch.sinks.tensorboard.scalars import Groups, gain_levels, gains, scalars_of
from gradwatch.values.chain import places
from gradwatch.values.report import Report
from gradwatch.values.sequences import SequenceStats

_BUCKETS = 128
"""Buckets of a ridge plot of lags: more than TensorBoard draws."""


def _depth(name: str, stats: SequenceStats) -> list[Any]:
    """Return the picture of a horizon on its way through a model, where one was measured."""
    if not places(stats) or not stats.horizon:
        return []
    return [parts.image(f"gradwatch_heatmap/depth/{name}", depth_picture(stats))]


class TensorBoardSink:
    """A sink that writes into its own event file in a directory, or through a user's SummaryWriter.

    Tags at measured steps: `gradwatch/norm_global`, `norm_min`, `norm_median`, `norm_max`, `zero_norms`, `alerts_open`,
    `clip_factor`, `loss`, and `gradwatch_norm/<layer>`; `gradwatch/alerts` when one begins or clears.
    At probes: `gradwatch_sensitivity/<layer>`, `gradwatch_update/<layer>`, `gradwatch_profile/layers`.
    Through time, at probes, in timesteps: of the model `gradwatch/horizon`, and where it is not exact `horizon_low` and
    `horizon_high`, `gradwatch/half_life` (at most the length of the sequences), `gradwatch/used`; of modules in
    `gradwatch_horizon/<module>` and `gradwatch_half_life/<module>`, and `gradwatch_horizon/model/<input>` of the
    model's other inputs;
    `gradwatch_time/<module>/lag_00064`, the gain by lag over its maximum; `gradwatch_profile/lags/<module>`;
    `gradwatch_time_grad/<module>/<part>/lag_00064`, the gradients of input and hidden state, left out while the loss
    scale is unknown.
    Now and then, and at the end: `gradwatch_heatmap/layers`, `gradwatch_heatmap/lags/<module>`, and where the model's
    own horizon is measured `gradwatch_heatmap/depth/model`.
    The module is "model" where it is the model itself. Norms, sensitivities, updates, gains and gradients are log10;
    exactly 0 is drawn at -45.
    """

    outlives_watcher: ClassVar[bool] = True
    """It refers to no watcher, model or optimizer, so it may be kept until it is closed even if the watcher is gone."""

    def __init__(
        self,
        target: str | os.PathLike[str] | Any,  # noqa: ANN401  (torch's writer, or another's)
        *,
        parameters: bool = False,
    ) -> None:
        """Write to `target`, a directory or a SummaryWriter; with `parameters`, a chart is of a parameter, not a layer.

        Raises:
            TypeError: `target` is neither.

        """
        if isinstance(target, str | os.PathLike):
            self._events: EventFile | None = EventFile(Path(target))
        elif hasattr(target, "_get_file_writer"):
            self._events, self._add = None, target._get_file_writer().event_writer.add_event
        else:
            raise TypeError(
                f"target must be a directory or a torch.utils.tensorboard.SummaryWriter, got {type(target).__name__}"
            )
        self._parameters = parameters
        self._scalars = ScalarEvents()
        self._picture = LayerPicture()
        self._lags: dict[str, LagPicture] = {}
        self._seen: dict[str, SequenceStats] = {}
        """What was last seen of each."""
        self._groups: Groups | None = None
        self._rows: Groups | None = None
        self._last: Report | None = None

    def __call__(self, report: Report) -> None:
        """Write one Summary."""
        if self._groups is None or self._rows is None or self._groups.model is not report.snapshot.model:
            self._groups = Groups(report.snapshot.model, parameters=self._parameters)
            self._rows = self._groups.unblocked()
        rows = self._rows
        self._last = report
        wall_time, step = report.snapshot.wall_time, report.snapshot.step
        event = self._scalars.encode(scalars_of(report, self._groups), wall_time, step)
        levels = rows.levels(report.snapshot.norm)
        self._picture.add(step, levels, rows.rows)
        extra = []
        if report.snapshot.weight_norm is not None and levels:
            extra.append(parts.profile("gradwatch_profile/layers", [levels.get(row) for row in rows.rows]))
        if report.began or report.worsened or report.cleared:
            extra.append(parts.text(report))
        if self._picture.columns.due():
            extra.append(parts.image("gradwatch_heatmap/layers", self._picture.png()))
        extra += self._through_time(report)
        self._write(event, extra, wall_time)

    def _write(self, event: bytes, extra: Sequence[Any], wall_time: float) -> None:
        """Write an event, with what else belongs into its summary."""
        if extra or self._events is None:
            from tensorboard.compat.proto.event_pb2 import Event

            full = Event.FromString(event)
            full.summary.value.extend(extra)
            if self._events is None:
                self._add(full)
                return
            event = full.SerializeToString()
        self._events.write(event, wall_time)

    def resume(self) -> None:
        """Leave the events of an earlier run where they are, because this one continues it."""
        if self._events is not None:
            self._events.resumed = True

    def _through_time(self, report: Report) -> list[Any]:
        """Return the ridge of each gain by lag, and the heatmaps that are due."""
        values = []
        for name, stats in gains(report.snapshot).items():
            levels, self._seen[name] = gain_levels(stats), stats
            picture = self._lags.setdefault(name, LagPicture())
            picture.add(report.snapshot.step, levels, stats.horizon)
            width = -(-len(levels) // _BUCKETS)
            values.append(
                parts.profile(
                    f"gradwatch_profile/lags/{name}",
                    [max(levels[i : i + width]) for i in range(0, len(levels), width)],
                    width,
                )
            )
            if picture.columns.due():
                values.append(parts.image(f"gradwatch_heatmap/lags/{name}", picture.png()))
                values += _depth(name, stats)
        return values

    def close(self) -> None:
        """Draw the heatmaps of the whole run, and close the file if it is ours."""
        last, self._last = self._last, None
        try:
            pictures: dict[str, LayerPicture | LagPicture] = {
                "layers": self._picture,
                **{f"lags/{name}": picture for name, picture in self._lags.items()},
            }
            stale = {name: picture for name, picture in pictures.items() if not picture.columns.fresh}
            if last is not None and stale:
                images = [parts.image(f"gradwatch_heatmap/{name}", picture.png()) for name, picture in stale.items()]
                for name, stats in self._seen.items():
                    images += _depth(name, stats) if f"lags/{name}" in stale else []
                now = time.time()
                self._write(ScalarEvents().encode({}, now, last.snapshot.step), images, now)
        finally:
            if self._events is not None:
                self._events.close()
