"""Events -> a file in the format that TensorBoard reads."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gradwatch.sinks.deletion import refuse_deleted

_SUFFIX = ".gradwatch"

_files = itertools.count()
"""Tells files apart that one process begins in one second."""


class EventFile:
    """An event file in TFRecord framing, written at once.

    There is no thread, so nothing hangs when the disk is full or the process forks.
    """

    def __init__(self, directory: Path) -> None:
        """Write into a new file in `directory`, which is made at the first event."""
        self._directory = directory
        self._file: BinaryIO | None = None
        self.resumed = False
        """Whether the events of an earlier run stay where they are."""

    def write(self, event: bytes, wall_time: float) -> None:
        """Append an event, as protobuf encodes it.

        Raises:
            OSError: it cannot be written, or somebody has deleted the file.

        """
        if self._file is None:
            self._file = self._begin(wall_time)
        else:
            refuse_deleted(self._file)
        _frame(self._file, event)
        self._file.flush()

    def _begin(self, wall_time: float) -> BinaryIO:
        from tensorboard.compat.proto.event_pb2 import Event

        self._directory.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            for old in self._directory.glob(f"events.out.tfevents.*{_SUFFIX}"):
                old.unlink()  # of an earlier run, whose record is replaced too
        name = f"events.out.tfevents.{int(wall_time)}.{socket.gethostname()}.{os.getpid()}.{next(_files)}{_SUFFIX}"
        file = (self._directory.absolute() / name).open("wb")
        _frame(file, Event(wall_time=wall_time, file_version="brain.Event:2").SerializeToString())
        return file

    def close(self) -> None:
        """Close the file, if there is one."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class ScalarEvents:
    """Encodes events of many scalars: what does not change from step to step is encoded once."""

    def __init__(self) -> None:
        """Begin with no tags."""
        self._tags: list[str] = []
        self._encoded = np.zeros(0, np.uint8)
        self._places = np.zeros(0, np.intp)

    def encode(self, scalars: Mapping[str, float], wall_time: float, step: int) -> bytes:
        """Return an event with these numbers, by tag."""
        from tensorboard.compat.proto.event_pb2 import Event

        tags = list(scalars)
        if tags != self._tags:
            self._begin(tags)
        with np.errstate(over="ignore"):
            numbers = np.array([*scalars.values()], "<f4")
        self._encoded[self._places] = numbers.view(np.uint8)
        # Two encoded messages of a kind one after the other are one with the fields of both.
        head: bytes = Event(wall_time=wall_time, step=step).SerializeToString()
        return head + self._encoded.tobytes()

    def _begin(self, tags: list[str]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        # The number is the last field of a scalar, in four bytes.
        each = [len(Summary(value=[Summary.Value(tag=tag, simple_value=0.0)]).SerializeToString()) for tag in tags]
        whole = Event(summary=Summary(value=[Summary.Value(tag=tag, simple_value=0.0) for tag in tags]))
        self._tags, self._encoded = tags, np.frombuffer(whole.SerializeToString(), np.uint8).copy()
        ends = len(self._encoded) - sum(each) + np.cumsum(each)
        self._places = (ends[:, None] + np.arange(-4, 0)).ravel() if tags else np.zeros(0, np.intp)


def _frame(file: BinaryIO, content: bytes) -> None:
    header = struct.pack("<Q", len(content))
    file.write(header + _masked_crc(header) + content + _masked_crc(content))


def _masked_crc(content: bytes) -> bytes:
    """Return the checksum of the TFRecord format: CRC-32C, rotated and shifted by a constant."""
    import google_crc32c  # tensorboard's own is pure Python, and costs more than all the rest together

    crc = google_crc32c.value(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
