"""Pictures, levels and alerts -> the parts of a Summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradwatch.sinks.tensorboard.scalars import FLOOR
from gradwatch.values.report import Alert, Report


def image(tag: str, picture: tuple[int, int, bytes]) -> Any:  # noqa: ANN401  (a protobuf message)
    """Return a PNG, with its width and height in pixels, as an image."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height, png = picture
    return Summary.Value(
        tag=tag, image=Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    )


def profile(tag: str, levels: Sequence[float | None], width: int = 1) -> Any:  # noqa: ANN401
    """Return a histogram whose bucket i is layer i, or `width` lags, as high as its log10 above -12.

    TensorBoard draws one ridge a step.
    """
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    heights = [
        min(max((level if level is not None and math.isfinite(level) else FLOOR) + 12, 0.0), 100.0) for level in levels
    ]
    total = sum(heights)
    histogram = HistogramProto(
        min=-0.5,
        max=len(heights) * width - 0.5,
        num=total,
        sum=sum(i * width * h for i, h in enumerate(heights)),
        sum_squares=sum((i * width) ** 2 * h for i, h in enumerate(heights)),
        bucket_limit=[(i + 1) * width - 0.5 for i in range(len(heights))],
        bucket=heights,
    )
    return Summary.Value(tag=tag, histo=histogram)


def text(report: Report) -> Any:  # noqa: ANN401
    """Return the alerts that began, worsened or cleared as Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    events = {"began": report.began, "worsened": report.worsened, "cleared": report.cleared}
    said = [_told(event, alert) for event, alerts in events.items() for alert in alerts]
    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=["\n\n".join(said).encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag="gradwatch/alerts/text_summary", metadata=metadata, tensor=tensor)


def _told(event: str, alert: Alert) -> str:
    """Return an alert as Markdown: a list, because the page makes the columns of a table too narrow to read."""
    finding = alert.finding
    since = f"since step {alert.since}"
    when = "" if since in alert.message else f", {since}"
    place = f"`{finding.place}`" if finding.place else "the whole model"
    cause = ("likely cause", alert.cause)
    if alert.cause.startswith("cause not "):
        cause = ("", alert.cause[0].upper() + alert.cause[1:])
    items = [("what", alert.message), cause, ("try", alert.remedy)]
    told = [f"- {f'**{name}**: ' if name else ''}{' '.join(words.split())}" for name, words in items if words]
    return "\n".join(
        [f"**{finding.code} {finding.kind}** ({finding.severity.value}) {event} at {place}{when}", "", *told]
    )
