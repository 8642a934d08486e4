"""The command line: `gradwatch demo`, `gradwatch report`, `gradwatch check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gradwatch import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status.

    0: fine, and for `check` no alert of severity warning or higher in the whole run; 1: at least one, open or cleared;
    2: wrong usage, or a run that cannot be read.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (OSError, ValueError) as error:
        print(f"gradwatch {options.command}: {error}", file=sys.stderr)  # noqa: T201  (a command line prints)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradwatch", description="Sees the gradients that vanish.")
    parser.add_argument("--version", action="version", version=f"gradwatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a sick network beside a healthy one on real market data, and look at both")
    demo.add_argument("--logdir", default="runs/demo", help="where the runs are written (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="the same seed gives the same numbers (default: %(default)s)")
    demo.add_argument("--steps", type=_positive, default=250, help="training steps of each network (default: %(default)s)")
    demo.add_argument("--data", choices=("auto", "sp500", "synthetic"), default="auto", help="auto: the S&P 500 if it is installed (pip install arch)")
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="tell what happened in a run: where, since when, why, and what to do")
    report.add_argument("path", metavar="RUN", help="a record, its folder, or a log directory")
    report.set_defaults(run=_report)

    check = commands.add_parser("check", help="judge a run by its recorded alerts: exit 0 healthy, 1 not, 2 unreadable")
    check.add_argument("path", metavar="RUN", help="a record, its folder, or a log directory")
    check.set_defaults(run=_check)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _demo(options: argparse.Namespace) -> int:
    from gradwatch.demo import demo

    demo(options.logdir, seed=options.seed, steps=options.steps, data=options.data)
    return 0


def _report(options: argparse.Namespace) -> int:
    from rich.console import Console

    from gradwatch.console import run_summary
    from gradwatch.record import read_runs

    console = Console()
    runs = read_runs(options.path)
    for name, run in runs.items():
        if len(runs) > 1:
            console.rule()
        console.print(run_summary(run, name if len(runs) > 1 else ""))
    return 0


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console

    from gradwatch.console import alert_lines, verdict
    from gradwatch.record import read_runs
    from gradwatch.report import Severity

    console = Console()
    status = 0
    runs = read_runs(options.path)
    for name, run in runs.items():
        wrong = [alert for alert in run.alerts if alert.severity > Severity.INFO]
        console.print(verdict(run, name if len(runs) > 1 else ""))
        for line in alert_lines(wrong):
            console.print(line)
        status = max(status, int(bool(wrong)))
    return status
