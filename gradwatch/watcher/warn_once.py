"""Warnings that come once for each reason, and never end a training."""

from __future__ import annotations

import contextlib
import logging
import warnings

from gradwatch.values.report import GradwatchWarning

_log = logging.getLogger("gradwatch")


class WarnOnce:
    """Says each thing a single time."""

    def __init__(self) -> None:
        """Begin with nothing said."""
        self._said: set[str] = set()

    def __call__(self, key: str, message: str) -> None:
        """Warn, once for each key; under `-W error` log instead, because a warning must not end a training."""
        if key in self._said:
            return
        self._said.add(key)
        try:
            warnings.warn(f"gradwatch: {message}", GradwatchWarning, stacklevel=3)
        except Exception:  # noqa: BLE001  (a warning that is an error; a standard error that is closed)
            with contextlib.suppress(Exception):
                _log.warning(message)


def name_of(function: object) -> str:
    """Return the name of a function, or that of an object's class."""
    return getattr(function, "__name__", None) or type(function).__name__


def said(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {error}"
