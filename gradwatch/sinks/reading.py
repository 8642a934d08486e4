"""Records -> runs: what a file says of a training that is over, or that still goes on."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from gradwatch.values.plain import (
    FORMAT,
    FORMATS,
    alert_from_plain,
    from_json,
    model_from_plain,
    snapshot_from_plain,
)
from gradwatch.values.report import Alert, Severity
from gradwatch.values.snapshot import ModelInfo, Snapshot

NAME = "record.jsonl"
_LONGEST = 16 * 2**20
"""Characters of a line that is read, but for one that describes the model."""
_MODEL, _LONGEST_MODEL = '{"model":', 256 * 2**20
"""How that begins, and how long it may be: a million parameter tensors need about 220 million characters."""
MOST = 65_000
"""Snapshots of a run that are kept in memory, 150 MiB where there are ten layers; past them every second of the older
ones is dropped, as in a record that is written."""

_MOST_ALERTS = 100_000
"""Alerts of a run that are read; a line with one more counts as one that could not be. A rule at each of 10,000 layers
would have to begin ten times."""
_MOST_MODELS = 10_000
"""The same of descriptions of the model, which are written when it changes."""

_TAIL, _AT_ONCE = 256, 512 * 2**20
"""Bytes before the place up to which a record was read, by which it is known again, and that are read at once."""


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        """Return how much it holds, in a line."""
        measured = [snapshot.step for snapshot in self.snapshots]
        steps = f", steps {min(measured)} to {max(measured)}" if measured else ""
        still = sum(alert.cleared is None for alert in self.alerts)
        return f"Run {self.path}: snapshots {len(self.snapshots)}{steps}; alerts {len(self.alerts)}, open {still}"

    @property
    def ruined(self) -> bool:
        """Whether there is nothing to judge, or more is lost than the last line."""
        return not self.snapshots or self.broken > self.truncated

    def worst(self) -> Severity | None:
        """Return the gravest severity of any alert, open or cleared; None if there was none."""
        return max((a.severity for a in self.alerts), default=None)


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
    found = records(top)
    if not found:
        raise FileNotFoundError(f"no {NAME} in or below {top}: was it written by gradwatch.watch(..., logdir=...)?")
    return {name: read_file(file, most) for name, file in found.items()}


def records(top: Path) -> dict[str, Path]:
    """Return every record in or below a folder by its folder as seen from there; of a file, that by its own name."""
    if top.is_file():
        return {top.name: top}
    # os.walk passes over what vanishes meanwhile; to open a pipe would wait for ever.
    found = (Path(folder, NAME) for folder, _, names in os.walk(top) if NAME in names)
    files = sorted(file for file in found if file.is_file())
    return {file.parent.relative_to(top).as_posix(): file for file in files}


def dropped(count: int) -> slice:
    """Return which of so many snapshots are dropped where there are too many: every second of the older 3/4."""
    return slice(1, max(count * 3 // 4, 2), 2)


@dataclass
class _Draft:
    """What has been read so far."""

    file: Path
    most: int
    written: int = FORMAT
    """The format of the record."""
    models: list[ModelInfo] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    alerts: dict[tuple[object, ...], Alert] = field(default_factory=dict)
    lines: int = 0
    thinned: int = 0
    broken: int = 0
    truncated: bool = False

    def take(self, line: str) -> None:
        """Take one line.

        Raises:
            ValueError: it is the first, and that of no record.

        """
        try:
            content = from_json(line)
            if not self.lines:
                self.written, self.thinned = _begun(content)
            _take(self, content)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
            if not self.lines:
                raise ValueError(f"{self.file} is not a record of format 1 to {FORMAT}: {error!r:.80}") from error
            self.broken, self.truncated = self.broken + 1, not line.endswith("\n")  # which only the last one can lack
        self.lines += 1
        if len(self.snapshots) > self.most:
            older = dropped(self.most)
            self.thinned += len(self.snapshots[older])
            del self.snapshots[older]

    def run(self) -> Run:
        """Return what has been read."""
        return Run(
            tuple(self.models),
            tuple(self.snapshots),
            tuple(self.alerts.values()),
            str(self.file),
            self.thinned,
            self.broken,
            self.truncated,
        )


def read_file(file: Path, most: int = MOST) -> Run:
    """Read one record.

    Raises:
        OSError: there is none.
        ValueError: it is no record.

    """
    draft = _Draft(file, most)
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in _lines(stream):
            draft.take(line)
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is not a record of format 1 to {FORMAT}: it is empty")
    return draft.run()


class Following:
    """A record that is still written: each look reads what is new."""

    def __init__(self, file: Path, *, most: int = MOST) -> None:
        """Take the record, which need not be there yet."""
        self._file, self._most = file, most
        self._draft = _Draft(file, most)
        self._at, self._tail = 0, b""
        self._known: Run | None = None

    def run(self) -> Run:
        """Return the run as it is now; the same object where nothing has come since.

        Raises:
            OSError: there is none.
            ValueError: it is no record.

        """
        with self._file.open("rb") as stream:
            stream.seek(self._at - len(self._tail))
            if stream.read(len(self._tail)) != self._tail:  # written anew: thinned, or another run
                self._draft, self._at, self._known = _Draft(self._file, self._most), 0, None
                stream.seek(0)
            text = stream.read(_AT_ONCE)
        whole = text.rfind(b"\n") + 1
        if not whole and len(text) == _AT_ONCE:
            raise ValueError(f"{self._file} has a line of more than {_AT_ONCE} bytes")
        if whole or self._known is None:
            for line in _lines(io.StringIO(text[:whole].decode("utf-8", errors="replace"))):
                self._draft.take(line)
            self._at, self._tail = self._at + whole, text[max(whole - _TAIL, 0) : whole]
            self._known = self._draft.run()
        return self.run() if len(text) == _AT_ONCE else self._known


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
        key = (*alert.finding.key, alert.began)
        if len(draft.alerts) == _MOST_ALERTS and key not in draft.alerts:
            raise ValueError(f"more than {_MOST_ALERTS} alerts")
        draft.alerts[key] = alert
