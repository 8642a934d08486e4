"""The run's own record, one JSON object a line: written and read here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TextIO

from gradwatch.sinks.deletion import refuse_deleted
from gradwatch.values.plain import (
    FORMAT,
    FORMATS,
    alert_from_plain,
    from_json,
    model_from_plain,
    snapshot_from_plain,
    snapshot_to_plain,
    to_json,
    to_plain,
)
from gradwatch.values.report import Alert, Report, Severity
from gradwatch.values.snapshot import ModelInfo, Snapshot

NAME = "record.jsonl"
BOUND = 64 * 2**20
"""Bytes of a record; past them every second of the older snapshots is dropped, never an alert. About 25,000 measured
steps of a model with 100 parameter tensors."""

_LONGEST = 16 * 2**20
"""Characters of a line that is read, but for one that describes the model."""
_MODEL, _LONGEST_MODEL = '{"model":', 256 * 2**20
"""How that begins, and how long it may be: a million parameter tensors need about 220 million characters."""
MOST = 100_000
"""Snapshots of a run that are kept in memory; past them every second of the older ones is dropped, as in a record that
is written. No record of the usual bound has so many."""

_MOST_ALERTS = 100_000
"""Alerts of a run that are read; a line with one more counts as one that could not be. A rule at each of 10,000 layers
would have to begin ten times."""
_MOST_MODELS = 10_000
"""The same of descriptions of the model, which are written when it changes."""


@dataclass(frozen=True)
class Run:
    """What a record holds."""

    models: tuple[ModelInfo, ...]
    snapshots: tuple[Snapshot, ...]
    alerts: tuple[Alert, ...]
    """Every alert of the run as it was last, in the order in which they began."""
    path: str = ""
    thinned: int = 0
    """How many snapshots were dropped to keep the bound."""
    broken: int = 0
    """How many lines could not be read."""
    truncated: bool = False
    """Whether one of them is the last, and only half there, as a process leaves it that was killed."""

    @property
    def ruined(self) -> bool:
        """Whether there is nothing to judge, or more is lost than the last line."""
        return not self.snapshots or self.broken > self.truncated

    def worst(self) -> Severity | None:
        """Return the gravest severity of any alert, open or cleared; None if there was none."""
        return max((a.severity for a in self.alerts), default=None)


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
            self._open.pop(_key(alert), None)
            self._write({"alert": to_plain(alert)})
        for alert in report.open:
            known = self._open.get(_key(alert))
            if known is None or known.severity is not alert.severity:
                self._write({"alert": to_plain(alert)})
            self._open[_key(alert)] = alert
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
            run = _read(self._path)
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
        drop = set(snapshots[1 : max(len(snapshots) * 3 // 4, 2) : 2])
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


def _fold_alerts(lines: list[str], written: int) -> set[int]:
    """Move the newest line of each alert to its first one's place; return the numbers of those then of no use."""
    first: dict[tuple[object, ...], int] = {}
    later = set()
    for number, line in enumerate(lines):
        if line.startswith('{"alert"'):
            alert = alert_from_plain(from_json(line)["alert"], written)
            place = first.setdefault((*_key(alert), alert.began), number)
            if place != number:
                lines[place] = line
                later.add(number)
    return later


def read_run(path: str | os.PathLike[str], *, most: int = MOST) -> Run:
    """Read the record of a run.

    Args:
        path: the record, its folder, or a log directory with one run in or below it.
        most: snapshots to keep in memory; past them every second of the older ones is dropped and counted as `thinned`.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: there are several runs (use `read_runs`), or this is not a record of this format; `most` is below 2.

    """
    runs = read_runs(path, most=most)
    if len(runs) > 1:
        raise ValueError(f"{path} holds {len(runs)} runs, and one is wanted: {', '.join(runs)}")
    return next(iter(runs.values()))


def read_runs(path: str | os.PathLike[str], *, most: int = MOST) -> dict[str, Run]:
    """Read every record in or below `path`, each under the name of its folder as seen from there.

    Args:
        path: a record, its folder, or a log directory.
        most: snapshots of each to keep in memory; past them every second of the older ones is dropped.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: a file is not a record of this format; `most` is below 2.

    """
    if most < 2:
        raise ValueError(f"most must be at least 2, got {most}")
    top = Path(path)
    found = (
        [top] if top.is_file() else sorted(p for p in top.rglob(NAME) if p.is_file())
    )  # to open a pipe would wait for ever
    if not found:
        raise FileNotFoundError(f"no {NAME} in or below {top}: was it written by gradwatch.watch(..., logdir=...)?")
    return {file.parent.relative_to(top).as_posix() if top.is_dir() else file.name: _read(file, most) for file in found}


@dataclass
class _Draft:
    written: int = FORMAT
    """The format of the record."""
    models: list[ModelInfo] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    alerts: dict[tuple[object, ...], Alert] = field(default_factory=dict)


def _read(file: Path, most: int = MOST) -> Run:
    draft, thinned, broken, truncated = _Draft(), 0, 0, False
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(_lines(stream)):
            try:
                content = from_json(line)
                if number == 0:
                    draft.written, thinned = _begun(content)
                _take(draft, content)
            except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
                if number == 0:
                    raise ValueError(f"{file} is not a record of format 1 to {FORMAT}: {error!r:.80}") from error
                broken, truncated = broken + 1, not line.endswith("\n")  # which only the last one can lack
            if len(draft.snapshots) > most:
                older = slice(1, max(most * 3 // 4, 2), 2)
                thinned += len(draft.snapshots[older])
                del draft.snapshots[older]
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is not a record of format 1 to {FORMAT}: it is empty")
    return Run(
        tuple(draft.models), tuple(draft.snapshots), tuple(draft.alerts.values()), str(file), thinned, broken, truncated
    )


def _lines(stream: TextIO) -> Iterator[str]:
    """Return the lines of a file, of one that is too long its beginning."""
    while line := stream.readline(_LONGEST):
        most = _LONGEST
        if len(line) == most and line.startswith(_MODEL):
            most = _LONGEST_MODEL
            line += stream.readline(most - _LONGEST)
        if len(line) < most or line.endswith("\n"):
            yield line
            continue
        while len(end := stream.readline(_LONGEST)) == _LONGEST and not end.endswith("\n"):
            pass
        yield line[:80] + "\n"


def _begun(content: dict[str, Any]) -> tuple[int, int]:
    """Check the first line, and return the format and the number of snapshots that were dropped."""
    if content["format"] not in FORMATS:
        raise ValueError(f"format {content['format']!r}")
    return content["format"], int(content.get("thinned", 0))


def _take(draft: _Draft, content: dict[str, Any]) -> None:
    if not isinstance(content, dict):
        raise TypeError(f"expected an object, got {content!r:.80}")
    if "model" in content:
        if len(draft.models) == _MOST_MODELS:
            raise ValueError(f"more than {_MOST_MODELS} descriptions of a model")
        draft.models.append(model_from_plain(content["model"], draft.written))
    elif "snapshot" in content:
        plain = content["snapshot"]
        draft.snapshots.append(snapshot_from_plain(plain, draft.models, draft.written))
    elif "alert" in content:
        alert = alert_from_plain(content["alert"], draft.written)
        key = (*_key(alert), alert.began)
        if len(draft.alerts) == _MOST_ALERTS and key not in draft.alerts:
            raise ValueError(f"more than {_MOST_ALERTS} alerts")
        draft.alerts[key] = alert


def _key(alert: Alert) -> tuple[object, ...]:
    return alert.finding.key
