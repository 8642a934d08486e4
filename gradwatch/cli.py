"""The command line: `gradwatch run`, `gradwatch report`, `gradwatch check`, `gradwatch demo`."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence

from gradwatch import __version__


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
        choices=("warning", "error"),
        help="exit with 1 if there was an alert of this severity or higher, where the program exits with 0",
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
    report.set_defaults(run=_report)

    says = (
        "judge a run by its recorded alerts; exit status 0: none of severity warning or higher, 1: some, 2: unreadable"
    )
    check = commands.add_parser("check", help=says, description=_sentence(says))
    check.add_argument("path", metavar="RUN", help="a record, its folder, or a log directory")
    check.set_defaults(run=_check)
    return parser


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


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    from gradwatch.run.command import run
    from gradwatch.run.program import NotFoundError, Program

    its = options.arguments
    if given[-len(its) - 1] == "--":  # which argparse takes for its own
        its = ["--", *its]
    try:
        program = Program(options.program, its, module=options.module)
        run(program, logdir=options.logdir, horizon=options.horizon, every=options.every, fail_on=options.fail_on)
    except NotFoundError as error:
        print(f"gradwatch run: {error}", file=sys.stderr)  # noqa: T201  (a command line prints)
        return 2
    return 0


def _demo(options: argparse.Namespace) -> int:
    from gradwatch.demo.story import demo

    demo(options.logdir, seed=options.seed, steps=options.steps, data=options.data)
    return 0


def _report(options: argparse.Namespace) -> int:
    from rich.rule import Rule

    from gradwatch.sinks.record import read_runs
    from gradwatch.sinks.terminal.page import run_summary
    from gradwatch.sinks.terminal.show import show

    gc.disable()  # what is read stays until the process ends
    runs = read_runs(options.path)
    if len(runs) == 1:
        show(*map(run_summary, runs.values()), to=sys.stdout)
    else:
        show(*(part for name, run in runs.items() for part in (Rule(), run_summary(run, name))), to=sys.stdout)
    return 0


def _check(options: argparse.Namespace) -> int:
    from rich.text import Text

    from gradwatch.sinks.record import read_runs
    from gradwatch.sinks.terminal.alert_text import alert_lines
    from gradwatch.sinks.terminal.page import note_lines, verdict
    from gradwatch.sinks.terminal.show import show
    from gradwatch.values.report import Severity

    gc.disable()  # what is read stays until the process ends
    runs = read_runs(options.path)
    wrong = {name: [alert for alert in run.alerts if alert.severity > Severity.INFO] for name, run in runs.items()}
    several = len(runs) > 1
    show(
        *(
            part
            for name, run in runs.items()
            for part in (Text(verdict(run, name if several else "")), *alert_lines(wrong[name]), *note_lines(run))
        ),
        to=sys.stdout,
    )
    return 2 if any(run.ruined for run in runs.values()) else int(any(wrong.values()))
