"""What the verdicts are worth: `benchmarks.runs`, and the zoo where it is importable, beside other tools' rules.

python -m benchmarks.verdicts -v                                # our own runs; names all missed or falsely accused
PYTHONPATH=../shared python -m benchmarks.verdicts --write      # with the zoo; the tables go into benchmarks/RESULTS.md
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.command import parsed, parser
from benchmarks.runs import QUICK, RUNS, Run
from gradwatch import Alert, Severity, watch

RESULTS = Path(__file__).parent / "RESULTS.md"
OURS = ("benchmarks.zoo_adapter", "benchmarks.zoo_adapter_without_loss")
PEERS = (
    "sagemaker",
    "norm_abs",
    "ratio_first_last",
    "autotrainer_gated",
    "deepdiagnosis",
    "traintools",
    "trainpulse",
    "gradscope",
    "update_ratio",
)
ONE_OF_THE_ZOO = "cosine_to_zero-s0"
BEGIN, END = "<!-- verdicts: begin -->", "<!-- verdicts: end -->"


@dataclass
class Outcome:
    """What was said of one run."""

    run: Run
    alerts: list[tuple[int, Alert]] = field(default_factory=list)
    """Those of severity warning or error, with the step at which they began."""

    @property
    def wrong(self) -> list[tuple[int, Alert]]:
        """Alerts of a kind that is neither asked for nor a consequence, or before the fault is there."""
        onset = {label.kind: label.onset for label in self.run.faults}
        first = min(onset.values(), default=0)
        return [
            (s, a)
            for s, a in self.alerts
            if s < onset.get(a.finding.kind, first) or a.finding.kind not in {*onset, *self.run.also}
        ]

    def found(self) -> list[tuple[str, int | None, bool | None]]:
        """Return each fault's kind, delay (None: missed), and whether an alert names one of its places (None: none)."""
        rows: list[tuple[str, int | None, bool | None]] = []
        for label in self.run.faults:
            mine = [(s, a) for s, a in self.alerts if a.finding.kind == label.kind and s >= label.onset]
            named = {a.finding.place for _, a in mine}
            hit = any(_same(name, place) for name in named for place in label.places) if mine and label.places else None
            rows.append((label.kind, mine[0][0] - label.onset if mine else None, hit))
        return rows

    def __str__(self) -> str:
        """Say what was said."""
        said = "; ".join(f"{s} {a.finding.code} {a.finding.place}" for s, a in self.alerts) or "nothing"
        return f"  {self.run.name} [{', '.join(label.kind for label in self.run.faults) or 'healthy'}]: {said}"


def _same(name: str, place: str) -> bool:
    return bool(name) and (name == place or name.startswith(f"{place}.") or place.startswith(f"{name}."))


def judged(run: Run, *, loss: bool) -> Outcome:
    """Watch a run from its beginning to its end, in the hook form and with the default settings."""
    training = run.build()
    outcome = Outcome(run)
    steps = 0

    def heard(alert: Alert) -> None:
        if alert.severity > Severity.INFO:
            outcome.alerts.append((steps, alert))

    def tell(value: torch.Tensor) -> None:
        nonlocal steps
        steps += 1
        if loss:
            watcher.record(value)

    steps = -1
    with watch(training.model, training.optimizers, horizon=run.horizon, on_alert=heard) as watcher:
        training.run(tell)
    return outcome


def table(outcomes: list[Outcome]) -> list[str]:
    """Give recall by kind, false alarms, places and delays, in lines."""
    rows = [row for o in outcomes for row in o.found()]
    well = [o for o in outcomes if not o.run.faults]
    hits, delays = [hit for *_, hit in rows if hit is not None], [delay for _, delay, _ in rows if delay is not None]
    kinds = {kind: [delay is not None for k, delay, _ in rows if k == kind] for kind in sorted({k for k, *_ in rows})}
    stray = sum(bool(o.wrong) for o in outcomes if o.run.faults)
    caught, accused = sum(map(sum, kinds.values())), sum(bool(o.alerts) for o in well)
    found = f"recall {caught}/{len(rows)}, false alarms {accused}/{len(well)}"
    median = statistics.median(delays or [math.nan])
    where = f"stray {stray}/{len(outcomes) - len(well)}, place {sum(hits)}/{len(hits)}, median delay {median:.0f}"
    return [f"{found}, {where}", "  " + ", ".join(f"{kind} {sum(found)}/{len(found)}" for kind, found in kinds.items())]


def own(runs: Sequence[Run], *, verbose: bool) -> list[str]:
    """Judge our own runs, with and without the loss."""
    lines = [
        (
            f"{len(runs)} runs of our own "
            f"({sum(bool(r.faults) for r in runs)} faulty, {sum(not r.faults for r in runs)} healthy)"
        )
    ]
    for loss in (True, False):
        outcomes = [judged(run, loss=loss) for run in runs]
        lines += [f"{'with' if loss else 'without'} the loss: {(t := table(outcomes))[0]}", t[1]]
        bad = [
            o
            for o in outcomes
            if o.wrong
            or (not o.run.faults and o.alerts)
            or any(delay is None or hit is False for _, delay, hit in o.found())
        ]
        lines += [str(o) for o in bad] if verbose else []
    return lines


def zoo(pattern: str) -> list[str]:
    """Judge the zoo, in a process of its own."""
    adapters = [argument for name in (*OURS, *PEERS) for argument in ("--adapter", name)]
    command = [sys.executable, "-m", "zoo.run", "--share", "-v", "--pattern", pattern, *adapters]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("  ") or line.strip().startswith(OURS)]


def main() -> None:
    """Print the tables, or write them."""
    mine = parser(__doc__)
    mine.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    mine.add_argument("--only", default="", help="a pattern of names: those of our own runs alone")
    mine.add_argument("-v", action="store_true", help="name every run that is missed or falsely accused")
    arguments = parsed(mine)
    if arguments.quick and arguments.write:
        mine.error("--quick judges a few runs: it cannot --write the tables")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    runs = [run for run in RUNS if re.search(arguments.only, run.name) and (run.name in QUICK or not arguments.quick)]
    lines = own(runs, verbose=arguments.v or arguments.write)
    if importlib.util.find_spec("zoo") is None:
        lines += ["", "the zoo: not importable, not judged"]
    elif not arguments.only:
        lines += ["", *zoo(ONE_OF_THE_ZOO if arguments.quick else "*")]
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        before, _, rest = RESULTS.read_text(encoding="utf-8").partition(BEGIN)
        RESULTS.write_text(
            f"{before}{BEGIN}\n\n```text\n{text}\n```\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
