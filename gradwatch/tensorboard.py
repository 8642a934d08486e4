"""Reports -> TensorBoard: scalars, a heatmap, a ridge plot, and the text of alerts, one Summary a step."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import re
import socket
import statistics
import struct
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gradwatch.report import Alert, Report, Severity
from gradwatch.snapshot import Column, LayerInfo, ModelInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLOOR = -45.0
"""log10 at which a norm of exactly 0 is drawn: the smallest float32 above 0 is 1.4e-45."""
GROUPS = 64
"""Above so many layers the charts are of blocks: their names cut after as many parts as keeps them below."""
_COLUMNS = 240
"""Steps that the heatmap shows; when there are more, every second is dropped."""
_SUFFIX = ".gradwatch"


class TensorBoardSink:
    """A sink that writes into its own event file in a directory, or through a user's SummaryWriter.

    Tags: `gradwatch/norm_global`, `norm_min`, `norm_median`, `norm_max`, `zero_norms`, `alerts_open`, `clip_factor`;
    `gradwatch_norm/<layer>` at measured steps; `gradwatch_sensitivity/<layer>`, `gradwatch_update/<layer>`,
    `gradwatch_profile/layers` at probes; `gradwatch_heatmap/layers` now and then and at the end; `gradwatch/alerts`.
    Norms, sensitivities and updates are log10; exactly 0 is drawn at -45.
    """

    def __init__(self, target: str | os.PathLike[str] | Any, *, parameters: bool = False) -> None:  # noqa: ANN401  (torch's writer, or another's)
        """Write to `target`, a directory or a SummaryWriter; with `parameters`, charts are of each parameter, not of each layer."""
        if isinstance(target, str | os.PathLike):
            self._events: _EventFile | None = _EventFile(Path(target))
            self._write: Callable[[Any], None] = self._events.write
        elif hasattr(target, "_get_file_writer"):
            self._events = None
            self._write = target._get_file_writer().event_writer.add_event
        else:
            raise TypeError(f"target must be a directory or a torch.utils.tensorboard.SummaryWriter, got {type(target).__name__}")
        self._parameters = parameters
        self._event: Any = None
        self._tags: list[str] = []
        self._picture = _Picture()
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
        scalars = _scalars(report, self._groups)
        event = self._fill(scalars)
        event.wall_time, event.step = report.snapshot.wall_time, report.snapshot.step
        levels = {name: log10(norm) for name, norm in rows.norms(report.snapshot.norm).items()}
        self._picture.add(report.snapshot.step, levels, rows.rows)
        extra = []
        if report.snapshot.weight_norm is not None and levels:
            extra.append(_profile([levels.get(row) for row in rows.rows]))
        if report.began or report.cleared:
            extra.append(_text(report))
        if self._picture.due():
            extra.append(_image(self._picture.png()))
        if extra:
            from tensorboard.compat.proto.event_pb2 import Event

            full = Event()
            full.CopyFrom(event)
            full.summary.value.extend(extra)
            event = full
        self._write(event)

    def resume(self) -> None:
        """Leave the events of an earlier run where they are, because this one goes on with it."""
        if self._events is not None:
            self._events.resumed = True

    def close(self) -> None:
        """Draw the heatmap of the whole run, and close the file if it is ours."""
        last, self._last = self._last, None
        try:
            if last is not None and not self._picture.fresh:
                from tensorboard.compat.proto.event_pb2 import Event

                event = Event(wall_time=time.time(), step=last.snapshot.step)
                event.summary.value.append(_image(self._picture.png()))
                self._write(event)
        finally:
            if self._events is not None:
                self._events.close()

    def _fill(self, scalars: Mapping[str, float]) -> Any:  # noqa: ANN401  (a protobuf message)
        """Put the numbers into an event that is kept from step to step: making the tags anew costs more than all else."""
        from tensorboard.compat.proto.event_pb2 import Event

        tags = list(scalars)
        if tags != self._tags or self._event is None:
            self._tags, self._event = tags, Event()
            for tag in tags:
                self._event.summary.value.add(tag=tag)
        for value, number in zip(self._event.summary.value, scalars.values(), strict=True):
            value.simple_value = number
        return self._event


class Groups:
    """Which parameters go into which chart."""

    def __init__(self, model: ModelInfo, *, parameters: bool = False, most: int = GROUPS) -> None:
        """Group by layer (in the order of the forward pass), by block where there are more than `most`, or not at all."""
        self.model = model
        self._blocked = not parameters and len(model.layers) > most
        if parameters:
            self.members: dict[str, list[int]] = {tag_safe(p.name): [i] for i, p in enumerate(model.parameters)}
        else:
            block = _blocks(model.layers, most)
            top = "model" if "model" not in block.values() else "(model)"
            self.members = {tag_safe(block[model.layers[i].name] or top): [] for i in model.forward_order}
            for i, p in enumerate(model.parameters):
                self.members[tag_safe(block[p.layer] or top)].append(i)
        self.rows = list(self.members)

    def unblocked(self) -> Groups:
        """Give the groups of the pictures, which have room for every layer."""
        return Groups(self.model, most=len(self.model.layers)) if self._blocked else self

    def norms(self, column: Column) -> dict[str, float]:
        """Give the root of the sum of squares over each group; what has no number is left out."""
        return {name: math.hypot(*values) for name, members in self.members.items() if (values := [v for i in members if (v := column[i]) is not None])}


def scalars(report: Report) -> dict[str, float]:
    """Give what TensorBoard shows as scalars, by tag: for loggers that know only numbers."""
    return _scalars(report, Groups(report.snapshot.model))


def _scalars(report: Report, groups: Groups) -> dict[str, float]:
    snapshot = report.snapshot
    norms = groups.norms(snapshot.norm)
    levels = {name: log10(value) for name, value in norms.items()}
    found: dict[str, float] = {}
    if levels:
        known = [level for level in levels.values() if not math.isnan(level)] or [math.nan]
        found = {
            "gradwatch/norm_global": log10(math.hypot(*norms.values())),
            "gradwatch/norm_min": min(known),
            "gradwatch/norm_median": statistics.median(known),
            "gradwatch/norm_max": max(known),
            "gradwatch/zero_norms": float(sum(n == 0 for n in norms.values())),
        }
    found["gradwatch/alerts_open"] = float(sum(alert.severity > Severity.INFO for alert in report.open))
    if snapshot.clip_factor is not None:
        found["gradwatch/clip_factor"] = snapshot.clip_factor
    found.update((f"gradwatch_norm/{name}", level) for name, level in levels.items())
    if snapshot.weight_norm is not None:
        products = tuple(
            None if n is None or w is None or p.role == "bias" else n * w
            for n, w, p in zip(snapshot.norm, snapshot.weight_norm, snapshot.model.parameters, strict=True)
        )
        found.update((f"gradwatch_sensitivity/{name}", log10(value)) for name, value in groups.norms(products).items())
    if snapshot.update_ratio is not None:
        ratios = snapshot.update_ratio
        for name, members in groups.members.items():
            moved = [r for i in members if (r := ratios[i]) is not None]
            if moved:
                found[f"gradwatch_update/{name}"] = log10(max(moved))
    return found


def log10(value: float) -> float:
    """Give log10 of a size, -45 for exactly 0, and NaN and infinity for themselves."""
    return math.log10(value) if 0 < value < math.inf else FLOOR if value == 0 else value


_UNSAFE = re.compile(r"[^A-Za-z0-9_./-]")


def tag_safe(name: str) -> str:
    """Give the name as a tag; one that has to change gets a hash, so that no two become the same."""
    safe = _UNSAFE.sub("_", name)
    return name if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"


def _blocks(layers: Sequence[LayerInfo], most: int) -> dict[str, str]:
    deepest = max((layer.name.count(".") + 1 for layer in layers), default=1)
    for parts in range(deepest, -1, -1):
        block = {layer.name: ".".join(layer.name.split(".")[:parts]) for layer in layers}
        if len(set(block.values())) <= most or parts == 0:
            break
    return block


# --- pictures and text ---


class _Picture:
    """The heatmap of layers by steps: bounded, and drawn ever more rarely as the run goes on."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._columns: list[tuple[int, array[float]]] = []
        """Steps, and the levels along `_names`."""
        self._rows: list[str] = []
        self._stride = 1
        self._count = 0
        self._next = 20
        self.fresh = True
        """Whether what was drawn last shows all."""

    def add(self, step: int, levels: Mapping[str, float], rows: Sequence[str]) -> None:
        if set(rows) != set(self._names):  # another model, and another picture
            self._names, self._columns = list(rows), []
        self._rows = list(rows)
        if self._count % self._stride == 0:
            # What is not finite is not what is not there, which is NaN from here on.
            column = (math.nan if name not in levels else math.inf if math.isnan(levels[name]) else levels[name] for name in self._names)
            self._columns.append((step, array("d", column)))
            if len(self._columns) > _COLUMNS:
                self._columns, self._stride = self._columns[::2], self._stride * 2
        self._count += 1
        self.fresh = False

    def due(self) -> bool:
        if self._count < self._next or not self._columns:
            return False
        self._next = max(self._count + 80, self._count * 5 // 4)
        self.fresh = True
        return True

    def png(self) -> tuple[int, int, bytes]:
        import numpy as np

        place = {name: i for i, name in enumerate(self._names)}
        values = np.array([column for _, column in self._columns]).T[[place[row] for row in self._rows]]
        return heatmap(values, self._rows, [step for step, _ in self._columns], title="log10 of the gradient norm")


def heatmap(values: NDArray[np.float64], rows: Sequence[str], steps: Sequence[int], *, title: str) -> tuple[int, int, bytes]:
    """Draw a matrix of log10 values, one row per layer from the input (top) to the output.

    Args:
        values: shape (rows, steps); NaN (no gradient) is grey, infinity (a gradient that is not finite) red, and what is
            exactly at `FLOOR` (a norm of exactly 0) black.
        rows: their names; the first and the last are written.
        steps: the numbers of the columns; the first, the middle and the last are written.
        title: written on top.

    Returns:
        Width and height in pixels, and the PNG.

    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=18)
    width, left, right, top, bottom = 480, 8, 74, 56, 32
    body = min(max(24 * len(rows), 160), 560) if len(rows) <= 560 else len(rows)  # no row may fall between two pixels
    inside = width - left - right
    special = {
        "black: exactly 0": (values == FLOOR, (0, 0, 0)),
        "grey: none": (np.isnan(values), (150, 150, 150)),
        "red: NaN or inf": (np.isinf(values), (220, 0, 0)),
    }
    drawn = values[np.isfinite(values) & (values != FLOOR)]
    low, high = (float(drawn.min()), float(drawn.max())) if drawn.size else (-1.0, 0.0)
    low = min(low, high - 3)  # a span of at least three decades: noise must not look like a fault
    pixels = _viridis(np.clip((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low), 0, 1))
    legend = []
    for name, (where, colour) in special.items():
        pixels[where] = colour
        legend += [name] * bool(where.any())
    picture = Image.new("RGB", (width, top + body + bottom + 24 * bool(legend)), "white")
    picture.paste(Image.fromarray(pixels).resize((inside, body), Image.Resampling.NEAREST), (left, top))
    bar = _viridis(np.linspace(1, 0, body)[:, None])
    picture.paste(Image.fromarray(bar).resize((14, body), Image.Resampling.NEAREST), (width - right + 8, top))
    pen = ImageDraw.Draw(picture)

    def write(x: float, y: float, text: str, anchor: str) -> None:
        pen.text((x, y), text, fill="black", font=font, anchor=anchor)

    write(left, 20, title, "ls")
    write(left, top - 8, f"top: {_short(rows[0])}, bottom: {_short(rows[-1])}", "ls")
    for share, level, anchor in ((0.0, high, "la"), (0.5, (low + high) / 2, "lm"), (1.0, low, "ld")):
        write(width - right + 26, top + share * body, f"{round(level)}", anchor)
    below = top + body + 22
    write(left, below, f"step {steps[0]}", "ls")
    if len(steps) > 2:
        write(left + inside / 2, below, f"{steps[len(steps) // 2]}", "ms")
    if len(steps) > 1:
        write(left + inside, below, f"{steps[-1]}", "rs")
    write(left, below + 24, ", ".join(legend), "ls")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=6)
    return picture.width, picture.height, buffer.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"...{name[-17:].lstrip('.')}"


def _viridis(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours by linear interpolation between nine anchors of matplotlib's map of that name (CC0)."""
    import numpy as np

    anchors = np.array(
        [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)]
    )
    at = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, at, anchors[:, k]) for k in range(3)], axis=-1).astype(np.uint8)


def _image(picture: tuple[int, int, bytes]) -> Any:  # noqa: ANN401
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height, png = picture
    return Summary.Value(tag="gradwatch_heatmap/layers", image=Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png))


def _profile(levels: Sequence[float | None]) -> Any:  # noqa: ANN401
    """Give a histogram whose bucket i is layer i, as high as its level above 1e-12: TensorBoard draws it as a ridge over the steps."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    heights = [min(max((level if level is not None and math.isfinite(level) else FLOOR) + 12, 0.0), 100.0) for level in levels]
    total = sum(heights)
    histogram = HistogramProto(
        min=-0.5,
        max=len(heights) - 0.5,
        num=total,
        sum=sum(i * h for i, h in enumerate(heights)),
        sum_squares=sum(i * i * h for i, h in enumerate(heights)),
        bucket_limit=[i + 0.5 for i in range(len(heights))],
        bucket=heights,
    )
    return Summary.Value(tag="gradwatch_profile/layers", histo=histogram)


def _text(report: Report) -> Any:  # noqa: ANN401
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    said = [_told("began", alert) for alert in report.began] + [_told("cleared", alert) for alert in report.cleared]
    tensor = TensorProto(dtype="DT_STRING", string_val=["\n\n".join(said).encode()], tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]))
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag="gradwatch/alerts/text_summary", metadata=metadata, tensor=tensor)


def _told(event: str, alert: Alert) -> str:
    """Give an alert as Markdown: a list, because the page makes the columns of a table too narrow to read."""
    finding = alert.finding
    since = finding.onset if finding.onset is not None else alert.began
    place = f"`{finding.place}`" if finding.place else "the whole model"
    items = [("what", alert.message), ("likely cause", alert.cause), ("try", alert.remedy)]
    told = [f"- **{name}**: {' '.join(text.split())}" for name, text in items if text]
    return "\n".join([f"**{finding.code} {finding.kind}** ({finding.severity.value}) {event} at {place}, since step {since}", "", *told])


# --- the file ---


_files = itertools.count()
"""Tells files apart that one process begins in one second."""


class _EventFile:
    """An event file in TFRecord framing, written at once: no thread, so nothing hangs when the disk is full or the process forks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None
        self.resumed = False

    def write(self, event: Any) -> None:  # noqa: ANN401
        if self._file is None:
            self._file = self._begin(event.wall_time)
        elif os.fstat(self._file.fileno()).st_nlink == 0 and not Path(self._file.name).exists():
            raise FileNotFoundError(f"{self._file.name} was deleted while it was written")
        _frame(self._file, event.SerializeToString())
        self._file.flush()

    def _begin(self, wall_time: float) -> BinaryIO:
        from tensorboard.compat.proto.event_pb2 import Event

        self._directory.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            for old in self._directory.glob(f"events.out.tfevents.*{_SUFFIX}"):  # an earlier run, whose record is replaced too
                old.unlink()
        file = (self._directory.absolute() / f"events.out.tfevents.{int(wall_time)}.{socket.gethostname()}.{os.getpid()}.{next(_files)}{_SUFFIX}").open("wb")
        _frame(file, Event(wall_time=wall_time, file_version="brain.Event:2").SerializeToString())
        return file

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _frame(file: BinaryIO, content: bytes) -> None:
    header = struct.pack("<Q", len(content))
    file.write(header + _masked_crc(header) + content + _masked_crc(content))


def _masked_crc(content: bytes) -> bytes:
    """Give the checksum of the TFRecord format: CRC-32C, rotated and shifted by a constant."""
    import google_crc32c  # tensorboard's own is pure Python, and costs more than all the rest together

    crc = google_crc32c.value(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
