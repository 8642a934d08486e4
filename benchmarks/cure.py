"""How often each remedy helped: `gradwatch.cure` on the faulty runs of `benchmarks.runs`, and of the zoo.

python -m benchmarks.cure                            # our own labelled runs; -v: what was said of each
PYTHONPATH=../shared python -m benchmarks.cure       # with the zoo, where it is importable

Each run is trained by the plain loop of `cure`, without its own clipping, schedule or scaler; one that cannot be (its
loop is its own) is left out and counted. That healthy runs are left alone is counted beside.
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gradwatch
from benchmarks.command import parsed, parser
from benchmarks.runs import QUICK, RUNS

STEPS = 60


@dataclass
class Case:
    """What `cure` is given."""

    name: str
    make: Callable[[], tuple[nn.Module, Any, Callable[[Any, int], Any]]]
    """Returns model, optimizers, and the loss of a model at a step."""
    faulty: bool
    horizon: int | None


def ours() -> Iterator[Case]:
    """Yield our own runs that have a loss of their own."""
    for run in RUNS:

        def make(run: Any = run) -> Any:
            made = run.build()
            return made.model, made.optimizers, made.loss_of

        if run.build().loss_of is not None:
            yield Case(run.name, make, bool(run.faults), run.horizon)


def zoo() -> Iterator[Case]:
    """Yield the runs of the zoo that are driven by its plain loop."""
    if importlib.util.find_spec("zoo") is None:
        return
    from zoo import core  # type: ignore[import-not-found]

    for case in core.cases("*", truth=True, fuzz=True):

        def make(case: Any = case) -> Any:
            run = case.open()

            def loss(model: Any, i: int) -> Any:
                return run.loss_fn(model, run.batch(i))

            return run.model, run.optimizers, loss

        opened = case.open()
        if opened.stepper is None and opened.scaler is None:
            lag = case.hints.get("horizon")
            yield Case(case.name, make, not case.healthy, None if lag is None else lag + 1)


def tried(case: Case) -> gradwatch.Cures:
    """Try the remedies of one run."""
    model, optimizers, loss = case.make()
    torch.manual_seed(0)
    return gradwatch.cure(
        model, 0, loss=loss, optimizer=optimizers, data=range(STEPS), steps=STEPS, horizon=case.horizon
    )


class Table:
    """What came of all remedies, by code and action."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.rows: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()

    def add(self, found: gradwatch.Cures) -> None:
        """Count what came of one run."""
        for cure in found.cures:
            row = self.rows[cure.alert.finding.code, cure.remedy.action]
            row["tried"] += cure.after is not None
            row["not tried"] += cure.after is None
            row["eased"] += cure.eased
            row["helped"] += cure.helped
            row["best"] += cure is found.best
            if cure.after is None:
                self.reasons[cure.why_not] += 1

    def show(self) -> None:
        """Print it."""
        columns = ("tried", "eased", "helped", "best", "not tried")
        print(f"\n{'alert':8}{'remedy':24}" + "".join(f"{column:>10}" for column in columns))
        for (code, action), row in sorted(self.rows.items()):
            print(f"{code:8}{action:24}" + "".join(f"{row[column]:10}" for column in columns))
        print("not tried, because:")
        for reason, count in self.reasons.most_common(12):
            print(f"  {count:4} {reason:.140}")


def main() -> None:
    """Print the table."""
    mine = parser(__doc__)
    mine.add_argument("-v", "--verbose", action="store_true")
    options = parsed(mine)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table, faulty, healthy = Table(), Counter[str](), Counter[str]()
    for case in itertools.chain(ours(), zoo()):
        if options.quick and case.name not in QUICK:
            continue
        counts = faulty if case.faulty else healthy
        counts["runs"] += 1
        try:
            found = tried(case)
        except Exception as error:  # noqa: BLE001  (counted, and named)
            counts["not run"] += 1
            print(f"{case.name}: {type(error).__name__}: {error!s:.150}", flush=True)
            continue
        counts["with an alert"] += any(a.severity > gradwatch.Severity.INFO for a in found.alerts)
        counts["with a remedy to try"] += any(c.after is not None for c in found.cures)
        counts["helped"] += found.best is not None
        if options.verbose and found.alerts:
            print(f"--- {case.name} ({'faulty' if case.faulty else 'healthy'})\n{found}", flush=True)
        if case.faulty:
            table.add(found)
    table.show()
    for name, counts in (("faulty", faulty), ("healthy", healthy)):
        print(f"{name}: " + ", ".join(f"{counts[what]} {what}" for what in counts))


if __name__ == "__main__":
    main()
