"""`gradwatch run`: runs a program, watches what it trains, and says at its end what was seen."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from pathlib import Path

from gradwatch.run.program import Program
from gradwatch.run.training import Training, say
from gradwatch.values.configuration import Configuration

_IN_FULL = 2
"""Models of which everything is said at the end; of more, only the verdict on each."""


def run(
    program: Program,
    *,
    logdir: str | None = None,
    horizon: int | None = None,
    every: int | None = None,
    fail_on: str | None = None,
    settings: Configuration | None = None,
) -> None:
    """Run a program and watch it.

    Args:
        program: to run.
        logdir: where records and events go; default: `runs/` and the name of the program.
        horizon: as for `gradwatch.watch`.
        every: steps from one that is measured to the next.
        fail_on: "info", "warning" or "error": exit with 1 if there was an alert of that severity or higher, where the
            program itself exits with 0. Default: what the settings say, or never.
        settings: thresholds, what is muted, and what fails.

    Raises:
        BaseException: whatever the program raises, also SystemExit.

    """
    settings = Configuration() if settings is None else settings
    training = Training(logdir or str(Path("runs", program.name)), horizon=horizon, every=every, settings=settings)
    end = _End(training, fail_on or settings.fail_on)
    training.first = end.come_first
    end.come_first()
    try:
        program.execute()
    except SystemExit as exiting:
        end.status = exiting.code
        raise
    except BaseException as error:
        end.whole, end.interrupted = False, type(error) is KeyboardInterrupt
        raise


class _End:
    """What is to happen when the program has ended, its threads too, and before its files are closed."""

    def __init__(self, training: Training, fail_on: str | None) -> None:
        self._training, self._fail_on = training, fail_on
        self.status: object = None
        """What the program has given to `sys.exit`."""
        self.whole = True
        """Whether it came to its end: one that did not may have meant to train something."""
        self.interrupted = False
        """Whether it let a Ctrl-C through, after which Python ends itself by that signal."""

    def come_first(self) -> None:
        """Be called at the exit before all that is to be called by now."""
        atexit.unregister(self)
        atexit.register(self)

    def __call__(self) -> None:
        if os.getpid() != self._training.pid:  # a forked child, which ends like this too
            return
        failed = False
        with contextlib.suppress(BrokenPipeError):
            failed = self._said()
        if self.interrupted:
            with contextlib.suppress(KeyboardInterrupt):
                # Python forgets it with the next text that runs, of which each dataclass that we import is one.
                exec("raise KeyboardInterrupt")  # noqa: S102
        if failed and self.whole and self.status in (None, 0):
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(1)  # what is called at the exit cannot change the status otherwise

    def _said(self) -> bool:
        """Say what was seen, and tell whether that is to fail the program."""
        try:
            self._training.close()
            for problem in self._training.problems() if self.whole else ():
                say(problem)
            return _tell(self._training, self._fail_on)
        except Exception as error:  # noqa: BLE001  (the program has ended as it has)
            say(f"the report could not be made: {type(error).__name__}: {error}")
            return False


def _tell(training: Training, fail_on: str | None) -> bool:
    if not training.folders:
        return False
    from rich.text import Text

    from gradwatch.sinks.reading import read_runs
    from gradwatch.sinks.terminal.page import run_summary, verdict
    from gradwatch.sinks.terminal.show import show
    from gradwatch.values.report import Severity

    written = [folder for folder in training.folders if folder.is_dir()]  # not where another process speaks
    runs = {folder.name: run for folder in written for run in read_runs(folder).values()}
    if runs:
        several = len(runs) > 1
        say(
            f"{len(runs)} model{'s' * several} watched; `gradwatch report {training.logdir}`, `tensorboard --logdir"
            f" {training.logdir}`"
        )
    for number, (name, run) in enumerate(runs.items()):
        shown = name if len(runs) > 1 else ""
        if sys.stderr is not None:
            show(run_summary(run, shown) if number < _IN_FULL else Text(verdict(run, shown)), to=sys.stderr)
    if fail_on is None or fail_on == "never":
        return False
    limit = Severity(fail_on)
    return any(alert.severity >= limit for run in runs.values() for alert in run.alerts)
