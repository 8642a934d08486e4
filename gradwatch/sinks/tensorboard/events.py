"""Events -> a file in the format that TensorBoard reads."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from pathlib import Path
from typing import Any, BinaryIO

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

    def write(self, event: Any) -> None:  # noqa: ANN401  (a protobuf message)
        """Append an event.

        Raises:
            OSError: it cannot be written, or somebody has deleted the file.

        """
        if self._file is None:
            self._file = self._begin(event.wall_time)
        else:
            refuse_deleted(self._file)
        _frame(self._file, event.SerializeToString())
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


def _frame(file: BinaryIO, content: bytes) -> None:
    header = struct.pack("<Q", len(content))
    file.write(header + _masked_crc(header) + content + _masked_crc(content))


def _masked_crc(content: bytes) -> bytes:
    """Return the checksum of the TFRecord format: CRC-32C, rotated and shifted by a constant."""
    import google_crc32c  # tensorboard's own is pure Python, and costs more than all the rest together

    crc = google_crc32c.value(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
