"""`gradwatch diff`: what changed between two runs."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradwatch import __version__
from gradwatch.cli.reading import muted, print_, settings

if TYPE_CHECKING:
    from gradwatch.sinks.reading import Run
    from gradwatch.values.comparison import Comparison
    from gradwatch.values.profile import Profile


def diff(options: argparse.Namespace) -> int:
    """Tell what changed between two runs, or a run and a profile."""
    from gradwatch.sinks.formats import changes
    from gradwatch.sinks.formats.github import append_summary

    gc.disable()  # what is read stays until the process ends
    its = settings(None)
    ignore = (*its.ignore, *options.ignore)
    before, after = _sides(options.before, ignore), _sides(options.after, ignore)
    if len(before) == len(after) == 1:
        after = dict(zip(before, after.values(), strict=True))
    common = [name for name in before if name in after]
    if not common:
        raise ValueError(
            f"no run of {options.before} ({', '.join(before)}) has the name of one of {options.after}"
            f" ({', '.join(after)}): give the folders of two runs"
        )
    found = {name: _compared(before[name], after[name], options.tolerance) for name in common}
    limit = options.fail_on or its.fail_on or "warning"
    if options.format == "text":
        print_(changes.text(found))
    elif options.format == "json":
        print_(changes.document(found, limit, __version__))
    elif options.format == "markdown":
        print_(changes.markdown(found, limit))
    elif options.format == "junit":
        print_(changes.junit(found, limit))
    else:
        print_(changes.commands(found))
        append_summary(changes.markdown(found, limit))
    return int(any(changes.fails(change, limit) for one in found.values() for change in one.changes))


def _sides(path: str, ignore: Sequence[str]) -> dict[str, Run | Profile]:
    """Read runs, or a profile."""
    from pathlib import Path

    from gradwatch.sinks.reading import read_runs
    from gradwatch.values.profile import from_toml

    if path.endswith(".toml"):
        try:
            return {path: from_toml(Path(path).read_text(encoding="utf-8"))}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return {name: muted(run, ignore) for name, run in read_runs(path).items()}


def _compared(before: Run | Profile, after: Run | Profile, tolerance: float | None) -> Comparison:
    from gradwatch.sinks.formats.changes import seconds_a_step
    from gradwatch.values.comparison import TOLERANCE, compare, with_alerts, with_cost
    from gradwatch.values.profile import Profile, profile_of

    profiles = [side if isinstance(side, Profile) else profile_of(side.snapshots) for side in (before, after)]
    found = compare(*profiles, tolerance=tolerance or TOLERANCE)
    if isinstance(before, Profile) or isinstance(after, Profile):
        return found
    costs = [
        seconds_a_step([s.step for s in run.snapshots], [s.wall_time for s in run.snapshots]) for run in (before, after)
    ]
    return with_cost(with_alerts(found, before.alerts, after.alerts), *costs)
