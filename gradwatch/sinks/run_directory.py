"""The directory of a run: claimed by one live watcher, with the files it writes, and let go of."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from gradwatch.sinks.record import Record
from gradwatch.sinks.tensorboard import TensorBoardSink
from gradwatch.values.report import Sink

if sys.platform != "win32":
    import fcntl


_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.-]")

_held: dict[Path, int | None] = {}
"""Directories of the live watchers of this process, each with what locks it."""


class RunDirectory:
    """A directory that no other watcher writes into until this is closed, and the sinks that write its files."""

    def __init__(
        self,
        logdir: str | os.PathLike[str],
        name: str | None = None,
        *,
        events: bool = True,
        free: Callable[[], object] = gc.collect,
    ) -> None:
        """Claim `gradwatch` or `gradwatch-<name>` in `logdir`, with `-2`, ... if any process has a live watcher there.

        Args:
            logdir: the folder to make it in.
            name: tells several apart.
            events: write TensorBoard events too, beside the record.
            free: makes watchers that nobody uses let go of theirs; called if this process holds the directory.

        Raises:
            TypeError, ValueError: `logdir` is not a path.
            NotADirectoryError: it is a file, or is to be in one.

        """
        self.path = _claim(logdir, name, free)
        self._closing = contextlib.ExitStack()  # closes in reverse, whatever fails: the files, then the lock
        self._closing.callback(_release, self.path)
        record = Record(self.path)
        self._closing.callback(record.close)
        self.sinks: list[Sink] = [record]
        if events:
            board = TensorBoardSink(self.path)
            self._closing.callback(board.close)
            self.sinks.insert(0, board)

    def close(self) -> None:
        """Close the files and let go of the directory, which is removed if it is empty; a second call does nothing.

        Raises:
            OSError: a file cannot be finished; everything is closed all the same.

        """
        self._closing.close()


def held() -> frozenset[Path]:
    """Return the directories that live watchers of this process hold."""
    return frozenset(_held)


def _claim(logdir: str | os.PathLike[str], name: str | None, free: Callable[[], object]) -> Path:
    if not isinstance(logdir, str | os.PathLike):
        raise TypeError(f"logdir must be a path, got {logdir!r:.80}")
    if not os.fspath(logdir) or "\0" in os.fspath(logdir):
        raise ValueError(f"logdir must be a path, got {os.fspath(logdir)!r:.80}")
    top = Path(logdir).resolve()
    if (file := next((p for p in (top, *top.parents) if p.exists()), top)).is_file():
        raise NotADirectoryError(
            f"logdir must be a folder, got the file {file}"
            if file == top
            else f"logdir must be a folder, and cannot be in the file {file}, got {top}"
        )
    first = "gradwatch" if name is None else f"gradwatch-{_FORBIDDEN.sub('-', name)}"
    if top / first in _held:
        free()
    names = itertools.chain([first], (f"{first}-{k}" for k in itertools.count(2)))
    return next(top / n for n in names if _lock(top / n))


def _release(directory: Path) -> None:
    handle = _held.pop(directory, None)
    if handle is not None:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # where it could not be locked
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough: a forked child has the handle too
        os.close(handle)
    with contextlib.suppress(OSError):  # what has been written keeps it
        directory.rmdir()


def _lock(directory: Path) -> bool:
    """Hold a directory, which is made, until `_release` or the end of this process; False where somebody holds it.

    The directory itself is locked, so that nothing is left in it; Windows has no such locks, but files that go with
    their process. What cannot be made or locked is held within this process only: the record will say why.
    """
    if directory in _held:
        return False
    handle = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            handle = os.open(directory / ".lock", os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        else:
            handle = os.open(directory, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileExistsError):
        if handle is not None:
            os.close(handle)
        return not directory.is_dir()  # a file of that name is nobody's
    except OSError:
        pass
    _held[directory] = handle
    return True
