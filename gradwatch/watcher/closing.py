"""What closes the sinks of a watcher: with it, when the process ends, or when the watcher goes."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from gradwatch.sinks.run_directory import RunDirectory
from gradwatch.values.report import Sink


def closing_with(watcher: object, directory: RunDirectory | None, sinks: Sequence[Sink]) -> Callable[[], object]:
    """Return what closes the sinks, and does when the process ends, and the files when the watcher goes.

    Only files are held for that: another sink may know the watcher, and would keep it and the optimizer alive.
    """
    files: list[object] = [sink for sink in sinks if getattr(sink, "outlives_watcher", False)]
    others = [weakref.ref(sink) for sink in sinks if sink not in files and hasattr(sink, "close")]
    if directory is not None:
        files.insert(0, directory)
    return weakref.finalize(watcher, _close, os.getpid(), files, others)


def _close(pid: int, files: Sequence[object], others: Sequence[weakref.ref[Any]]) -> None:
    if os.getpid() != pid:  # a forked child that ends; the files are its parent's
        return
    for sink in (*files, *(ref() for ref in others)):
        with contextlib.suppress(
            Exception
        ):  # what cannot be closed has said so at its last report, or has nothing to lose
            getattr(sink, "close", lambda: None)()
