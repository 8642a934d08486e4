"""The command line: `gradwatch run`, `report`, `check`, `diff`, `cure`, `demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gradwatch import __version__
from gradwatch.cli import compare, judge, reading, treat
from gradwatch.values.configuration import FAIL_ON


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
    report.add_argument("paths", nargs="+", metavar="RUN", help="a record, its folder, or a log directory")
    report.add_argument(
        "--html", metavar="FILE", help="write a page, one file by itself; several runs stand side by side on one scale"
    )
    report.add_argument("--follow", action="store_true", help="show a run live while it goes on; Ctrl-C ends it")
    _judging(report, fails="exit with 1 if there was an alert of this severity or higher (default: never)")
    report.set_defaults(run=judge.report)

    says = "judge a run by its recorded alerts; exit status 0: none of --fail-on or higher, 1: some, 2: unreadable"
    check = commands.add_parser("check", help=says, description=_sentence(says))
    check.add_argument("paths", nargs=1, metavar="RUN", help="a record, its folder, or a log directory")
    _judging(check, fails="severity from which on an alert fails the run (default: that of pyproject.toml, or warning)")
    check.set_defaults(run=judge.check)

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
    diff.set_defaults(run=compare.diff)

    says = "try the remedies of what is wrong with a model, on copies; exit status 1: something is, and none has helped"
    cure = commands.add_parser("cure", help=says, description=_sentence(says))
    cure.add_argument(
        "setup",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns what gradwatch.cure takes: (model, batch, loss, optimizer,"
        " data), of which the last three may be missing, or a dict of its arguments",
    )
    cure.add_argument("--steps", type=_positive, metavar="N", help="how many steps each copy is trained (default: 60)")
    cure.add_argument("--horizon", type=_positive, metavar="N", help="how many of the newest timesteps matter")
    cure.set_defaults(run=treat.cure)
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
        settings = reading.settings(None)
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
