"""`gradwatch report` and `gradwatch check`: a run, told and judged."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch import __version__
from gradwatch.cli.reading import muted, print_, read, settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gradwatch.sinks.formats.judged import Judged
    from gradwatch.sinks.reading import Run
    from gradwatch.values.configuration import Configuration


def report(options: argparse.Namespace) -> int:
    """Tell all of a run."""
    if options.follow:
        return _followed(options)
    return _told(options, options.fail_on or "never", report=True)


def check(options: argparse.Namespace) -> int:
    """Tell what is wrong with a run."""
    return _told(options, options.fail_on, report=False)


def _told(options: argparse.Namespace, fail_on: str | None, *, report: bool) -> int:
    """Read runs, judge them, say it in the format that is wanted, and return the exit status."""
    from gradwatch.sinks.formats.judged import judged

    gc.disable()  # what is read stays until the process ends
    its = settings(options.thresholds)
    ignore = (*its.ignore, *options.ignore)
    runs = read(options.paths)
    if options.rejudge or options.thresholds:
        runs = {name: _rejudged(run, its, ignore) for name, run in runs.items()}
    runs = {name: muted(run, ignore) for name, run in runs.items()}
    limit = fail_on or its.fail_on or "warning"
    found = judged(runs, limit, every=report)
    if report and options.html is not None:
        _write_page(runs, options.html)
    else:
        _say(found, options.format, limit, report=report)
    if any(run.ruined for run in runs.values()) and not report:
        return 2
    return int(any(one.failing for one in found))


def _followed(options: argparse.Namespace) -> int:
    """Show a run while it goes on."""
    from gradwatch.sinks.terminal.follow import follow

    if len(options.paths) > 1:
        raise ValueError(f"--follow shows one run, got {len(options.paths)}")
    others = {"--html": options.html, "--rejudge": options.rejudge, "--thresholds": options.thresholds}
    others |= {"--fail-on": options.fail_on, "--ignore": options.ignore, "--format": options.format != "text"}
    if given := [name for name, value in others.items() if value]:
        raise ValueError(f"--follow shows a run as it is recorded, and takes no {' or '.join(given)}")
    with contextlib.suppress(KeyboardInterrupt):  # it is how it ends
        follow(options.paths[0], sys.stdout)
    return 0


def _rejudged(run: Run, settings: Configuration, ignore: Sequence[str]) -> Run:
    from gradwatch.detectors.rejudge import rejudged

    return replace(run, alerts=rejudged(run.snapshots, settings.thresholds, ignore))


def _write_page(runs: dict[str, Run], file: str) -> None:
    from pathlib import Path

    from gradwatch.sinks.page.data import page_data
    from gradwatch.sinks.page.render import page_html

    page = page_html(page_data(runs, __version__), ", ".join(runs))
    Path(file).write_text(page, encoding="utf-8")
    print_(f"{file}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(page) / 1024:,.0f} KiB")


def _say(found: list[Judged], kind: str, fail_on: str, *, report: bool) -> None:
    """Print runs in a format."""
    from gradwatch.sinks.formats.markdown import markdown

    if kind == "text":
        _say_text(found, report=report)
    elif kind == "json":
        import json

        from gradwatch.sinks.formats.document import document

        print_(json.dumps(document(found, fail_on, __version__), indent=2))
    elif kind == "markdown":
        print_(markdown(found))
    elif kind == "junit":
        from gradwatch.detectors import RULES
        from gradwatch.sinks.formats.junit import junit

        print_(junit(found, {code: rule.kind for code, rule in RULES.items()}))
    else:
        from gradwatch.sinks.formats.github import append_summary, commands

        print_("\n".join(commands(found)))
        append_summary(markdown(found))


def _say_text(found: list[Judged], *, report: bool) -> None:
    from rich.rule import Rule
    from rich.text import Text

    from gradwatch.sinks.terminal.alert_text import alert_lines
    from gradwatch.sinks.terminal.page import note_lines, run_summary, verdict
    from gradwatch.sinks.terminal.show import show

    several = len(found) > 1
    parts: list[RenderableType] = []
    for one in found:
        if report:
            parts += [*([Rule()] if several else []), run_summary(one.run, one.name)]
        else:
            parts += [Text(verdict(one.run, one.name)), *alert_lines(one.shown), *note_lines(one.run)]
    show(*parts, to=sys.stdout)
