"""The run's own record, one JSON object a line: written and read here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, TextIO

from gradwatch.sinks.deletion import refuse_deleted
from gradwatch.sinks.reading import NAME, dropped, read_file
from gradwatch.values.plain import (
    FORMAT,
    alert_from_plain,
    from_json,
    snapshot_to_plain,
    to_json,
    to_plain,
)
from gradwatch.values.report import Alert, Report
from gradwatch.values.snapshot import ModelInfo

BOUND = 64 * 2**20
"""Bytes of a record; past them every second of the older snapshots is dropped, never an alert. About 25,000 measured
steps of a model with 100 parameter tensors."""


class Record:
    """A sink that writes `record.jsonl` into a directory, which it makes at the first report."""

    outlives_watcher: ClassVar[bool] = True
    """It refers to no watcher, model or optimizer, so it may be kept until it is closed even if the watcher is gone."""

    def __init__(self, directory: str | os.PathLike[str], *, bound: int = BOUND) -> None:
        """Write into `directory`; a record that is there already is replaced.

        Args:
            directory: the folder to write into.
            bound: bytes that the record may take.

        Raises:
            TypeError, ValueError: `bound` is not a whole number above 0.

        """
        if isinstance(bound, bool) or not isinstance(bound, int):
            raise TypeError(f"bound must be a whole number of bytes, got {bound!r}")
        if bound < 1:
            raise ValueError(f"bound must be at least 1 byte, got {bound}")
        self._path = Path(directory) / NAME
        self._bound = self._limit = bound
        self._file: TextIO | None = None
        self._size = 0
        self._thinned = 0
        self._resumed = False
        self._model: ModelInfo | None = None
        self._models = 0
        self._open: dict[tuple[object, ...], Alert] = {}

    def __call__(self, report: Report) -> None:
        """Append what the report adds.

        Raises:
            OSError: it cannot be written, or somebody has deleted it.

        """
        file = self._file or self._begin()
        refuse_deleted(file)
        snapshot = report.snapshot
        if self._model is not snapshot.model:
            self._model, self._models = snapshot.model, self._models + 1
            self._write({"model": to_plain(snapshot.model)})
        self._write({"snapshot": snapshot_to_plain(snapshot)})
        for alert in report.cleared:
            self._open.pop(alert.finding.key, None)
            self._write({"alert": to_plain(alert)})
        for alert in report.open:
            known = self._open.get(alert.finding.key)
            if known is None or known.severity is not alert.severity or _doubled(known, alert):
                self._write({"alert": to_plain(alert)})
            self._open[alert.finding.key] = alert
        file.flush()
        if self._size > self._limit:
            self._thin()

    def resume(self) -> None:
        """Append to the record that is there, instead of replacing it."""
        self._resumed = True

    def close(self) -> None:
        """Write the alerts that are open as they are now, and close the file."""
        try:
            for alert in self._open.values():
                self._write({"alert": to_plain(alert)})
            if self._size > self._limit:
                self._thin()
        finally:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def _begin(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._resumed and self._path.exists() and self._whole_lines():
            run = read_file(self._path)
            self._models, self._thinned, self._size = len(run.models), run.thinned, self._path.stat().st_size
            self._file = self._path.open("a", encoding="utf-8")
        else:
            self._file = self._path.open("w", encoding="utf-8")
            self._write({"format": FORMAT})
        return self._file

    def _whole_lines(self) -> bool:
        """Cut off the half line of a killed process, which would spoil the next; return whether anything is left."""
        with self._path.open("rb+") as file:
            return file.truncate(file.read().rfind(b"\n") + 1) > 0

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            text = to_json(line) + "\n"
            self._file.write(text)
            self._size += len(text)

    def _thin(self) -> None:
        """Replace the file by one without every second snapshot of the older three quarters."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        written = from_json(lines[0])["format"]
        snapshots = [i for i, line in enumerate(lines) if line.startswith('{"snapshot"')]
        drop = set(snapshots[dropped(len(snapshots))])
        self._thinned += len(drop)
        drop |= _fold_alerts(lines, written)
        kept = [line for i, line in enumerate(lines) if i not in drop and not line.startswith('{"format"')]
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_text(
                "".join([to_json({"format": written, "thinned": self._thinned}) + "\n", *kept]), encoding="utf-8"
            )
            fresh.replace(self._path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        self._size = self._path.stat().st_size
        # Where alerts alone fill the bound, the record outgrows it: better than to write it anew at every step.
        self._limit = max(self._bound, self._size * 4 // 3)
        self._file = self._path.open("a", encoding="utf-8")


def _doubled(known: Alert, now: Alert) -> bool:
    """Tell whether an alert is twice as old as when it was written, for who follows the run or finds it killed."""
    return (now.last - now.began).bit_length() != (known.last - known.began).bit_length()


def _fold_alerts(lines: list[str], written: int) -> set[int]:
    """Move the newest line of each alert to its first one's place; return the numbers of those then of no use."""
    first: dict[tuple[object, ...], int] = {}
    later = set()
    for number, line in enumerate(lines):
        if line.startswith('{"alert"'):
            alert = alert_from_plain(from_json(line)["alert"], written)
            place = first.setdefault((*alert.finding.key, alert.began), number)
            if place != number:
                lines[place] = line
                later.add(number)
    return later
