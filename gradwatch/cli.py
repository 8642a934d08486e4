"""The command line: `gradwatch run`, `gradwatch report`, `gradwatch check`, `gradwatch diff`, `gradwatch demo`."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch import __version__
from gradwatch.values.configuration import FAIL_ON

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gradwatch.sinks.formats.judged import Judged
    from gradwatch.sinks.record import Run
    from gradwatch.values.comparison import Comparison
    from gradwatch.values.configuration import Configuration
    from gradwatch.values.profile import Profile


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: fine, and for `check` no alert of severity warning or higher in the whole run; 1: at least one, open or cleared;
    2: wrong usage, or a run that cannot be read, that holds no step, or of which more is lost than the half line that a
    killed process leaves. `run` ends as the program ends that it runs, also by an exception.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    if options.command == "run":
        return _run(options, given)
    try:
        return int(options.run(options))
    except (OSError, ValueError) as error:
        print(f"gradwatch {options.command}: {error}", file=sys.stderr)  # noqa: T201  (a command line prints)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradwatch", description="Sees the gradients that vanish.")
    parser.add_argument("--version", action="version", version=f"gradwatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    says = "run a program, unchanged, and watch whatever it trains"
    run = commands.add_parser(
        "run",
        help=says,
        description=_sentence(says),
        usage="gradwatch run [OPTION ...] (SCRIPT | -m MODULE) [ARGUMENT ...]",
    )
    run.add_argument("--logdir", help="where records and TensorBoard events go (default: runs/SCRIPT)")
    run.add_argument("--horizon", type=_positive, metavar="N", help="how many of the newest timesteps matter")
    run.add_argument("--every", type=_positive, metavar="N", help="read the gradients at every n-th step")
    run.add_argument(
        "--fail-on",
        choices=FAIL_ON,
        help="exit with 1 if there was an alert of this severity or higher, where the program exits with 0"
        " (default: fail-on of [tool.gradwatch] in pyproject.toml, else never)",
    )
    run.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    run.add_argument("program", metavar="SCRIPT", help="a script, or the name of a module")
    run.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="arguments of the program")

    says = "train sick networks beside healthy ones, on real market data and on order flow, and look at them"
    demo = commands.add_parser("demo", help=says, description=_sentence(says))
    demo.add_argument("--logdir", default="runs/demo", help="where the runs are written (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    demo.add_argument(
        "--steps", type=_positive, default=250, help="training steps of each network (default: %(default)s)"
    )
    demo.add_argument(
        "--data",
        choices=("auto", "sp500", "synthetic"),
        default="auto",
        help="auto: the S&P 500 if it is installed (pip install arch), else synthetic prices (default: %(default)s)",
    )
    demo.set_defaults(run=_demo)

    says = "tell what happened in a run: where, since when, why, and what to do"
    report = commands.add_parser("report", help=says, description=_sentence(says))
    report.add_argument("path", metavar="RUN", help="a record, its folder, or a log directory")
    _judging(report, fails="exit with 1 if there was an alert of this severity or higher (default: never)")
    report.set_defaults(run=_report)

    says = "judge a run by its recorded alerts; exit status 0: none of --fail-on or higher, 1: some, 2: unreadable"
    check = commands.add_parser("check", help=says, description=_sentence(says))
    check.add_argument("path", metavar="RUN", help="a record, its folder, or a log directory")
    _judging(check, fails="severity from which on an alert fails the run (default: that of pyproject.toml, or warning)")
    check.set_defaults(run=_check)

    says = "tell what changed between two runs, or a run and a profile; exit status 1: something of --fail-on or higher"
    diff = commands.add_parser("diff", help=says, description=_sentence(says))
    diff.add_argument("before", metavar="BEFORE", help="a record, its folder, a log directory, or a profile (.toml)")
    diff.add_argument("after", metavar="AFTER", help="the same")
    _formatted(diff, fails="severity from which on a change fails (default: that of pyproject.toml, or warning)")
    diff.add_argument(
        "--tolerance",
        type=_magnitude,
        default=None,
        metavar="N",
        help="orders of magnitude by which a layer may change beside the last ones (default: 0.5, a factor of 3)",
    )
    diff.set_defaults(run=_diff)
    return parser


def _judging(parser: argparse.ArgumentParser, *, fails: str) -> None:
    """Add what reports and checks have in common."""
    _formatted(parser, fails=fails)
    parser.add_argument(
        "--rejudge", action="store_true", help="judge the recorded numbers by the rules of this version, and no alerts"
    )
    parser.add_argument(
        "--thresholds",
        metavar="FILE",
        help="TOML (or YAML) with thresholds, ignore and fail-on, by which the run is judged again"
        " (default: [tool.gradwatch] of the nearest pyproject.toml, for --rejudge)",
    )


def _formatted(parser: argparse.ArgumentParser, *, fails: str) -> None:
    """Add what all that judge have in common."""
    parser.add_argument(
        "--format",
        choices=("text", "json", "markdown", "github", "junit"),
        default="text",
        help="github: annotations, and Markdown for the step's summary where there is one (default: %(default)s)",
    )
    parser.add_argument("--fail-on", choices=FAIL_ON, help=fails)
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="CODE[:PLACE]",
        help='mute a rule, or a rule at places that match, such as "GW101:encoder.*"; may be given several times',
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _magnitude(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from error
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite and above 0, got {text}")
    return number


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    from gradwatch.run.command import run
    from gradwatch.run.program import NotFoundError, Program

    its = options.arguments
    if given[-len(its) - 1] == "--":  # which argparse takes for its own
        its = ["--", *its]
    try:
        settings = _settings(None)
    except ValueError as error:  # which the program's own would not be
        print(f"gradwatch run: {error}", file=sys.stderr)  # noqa: T201  (a command line prints)
        return 2
    try:
        program = Program(options.program, its, module=options.module)
        run(
            program,
            logdir=options.logdir,
            horizon=options.horizon,
            every=options.every,
            fail_on=options.fail_on,
            settings=settings,
        )
    except NotFoundError as error:
        print(f"gradwatch run: {error}", file=sys.stderr)  # noqa: T201  (a command line prints)
        return 2
    return 0


def _demo(options: argparse.Namespace) -> int:
    from gradwatch.demo.story import demo

    demo(options.logdir, seed=options.seed, steps=options.steps, data=options.data)
    return 0


def _report(options: argparse.Namespace) -> int:
    return _told(options, options.fail_on or "never", report=True)


def _check(options: argparse.Namespace) -> int:
    return _told(options, options.fail_on, report=False)


def _diff(options: argparse.Namespace) -> int:
    from gradwatch.sinks.formats import changes
    from gradwatch.sinks.formats.github import append_summary

    gc.disable()  # what is read stays until the process ends
    settings = _settings(None)
    ignore = (*settings.ignore, *options.ignore)
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
    limit = options.fail_on or settings.fail_on or "warning"
    if options.format == "text":
        _print(changes.text(found))
    elif options.format == "json":
        _print(changes.document(found, limit, __version__))
    elif options.format == "markdown":
        _print(changes.markdown(found, limit))
    elif options.format == "junit":
        _print(changes.junit(found, limit))
    else:
        _print(changes.commands(found))
        append_summary(changes.markdown(found, limit))
    return int(any(changes.fails(change, limit) for one in found.values() for change in one.changes))


def _sides(path: str, ignore: Sequence[str]) -> dict[str, Run | Profile]:
    """Read runs, or a profile."""
    from pathlib import Path

    from gradwatch.sinks.record import read_runs
    from gradwatch.values.profile import from_toml

    if path.endswith(".toml"):
        try:
            return {path: from_toml(Path(path).read_text(encoding="utf-8"))}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return {name: _muted(run, ignore) for name, run in read_runs(path).items()}


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


def _told(options: argparse.Namespace, fail_on: str | None, *, report: bool) -> int:
    """Read runs, judge them, say it in the format that is wanted, and return the exit status."""
    from gradwatch.sinks.formats.judged import judged
    from gradwatch.sinks.record import read_runs

    gc.disable()  # what is read stays until the process ends
    settings = _settings(options.thresholds)
    ignore = (*settings.ignore, *options.ignore)
    runs = read_runs(options.path)
    if options.rejudge or options.thresholds:
        runs = {name: _rejudged(run, settings, ignore) for name, run in runs.items()}
    else:
        runs = {name: _muted(run, ignore) for name, run in runs.items()}
    limit = fail_on or settings.fail_on or "warning"
    found = judged(runs, limit, every=report)
    _say(found, options.format, limit, report=report)
    if any(run.ruined for run in runs.values()) and not report:
        return 2
    return int(any(one.failing for one in found))


def _settings(path: str | None) -> Configuration:
    from gradwatch.values import configuration

    return configuration.nearest() if path is None else configuration.read(path)


def _rejudged(run: Run, settings: Configuration, ignore: Sequence[str]) -> Run:
    from gradwatch.detectors.rejudge import rejudged

    return replace(run, alerts=rejudged(run.snapshots, settings.thresholds, ignore))


def _muted(run: Run, ignore: Sequence[str]) -> Run:
    from gradwatch.detectors.alerts import muted

    module_of = {layer.name: layer.module for model in run.models for layer in model.layers}
    kept = tuple(a for a in run.alerts if not muted(a.finding, ignore, module_of.get(a.finding.place)))
    return replace(run, alerts=kept)


def _say(found: list[Judged], kind: str, fail_on: str, *, report: bool) -> None:
    """Print runs in a format."""
    from gradwatch.sinks.formats.markdown import markdown

    if kind == "text":
        _say_text(found, report=report)
    elif kind == "json":
        import json

        from gradwatch.sinks.formats.document import document

        _print(json.dumps(document(found, fail_on, __version__), indent=2))
    elif kind == "markdown":
        _print(markdown(found))
    elif kind == "junit":
        from gradwatch.detectors import RULES
        from gradwatch.sinks.formats.junit import junit

        _print(junit(found, {code: rule.kind for code, rule in RULES.items()}))
    else:
        from gradwatch.sinks.formats.github import append_summary, commands

        _print("\n".join(commands(found)))
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


def _print(text: str) -> None:
    """Print what another program reads, as it is."""
    from gradwatch.sinks.terminal.show import write

    write(text, sys.stdout)
