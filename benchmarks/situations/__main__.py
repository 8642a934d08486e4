"""Watches every situation as a user would, and judges what is said by its label.

A faulty situation is told rightly if an alert of the right kind, or of an honest neighbour, comes at warning or above,
at a right place, with the words that the label asks for, none that it forbids, no alert of another kind or too soon,
and if its fixed twin is silent.
"""

from __future__ import annotations

import fnmatch
import logging
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.command import parsed, parser
from benchmarks.situations import SITUATIONS, Situation
from gradwatch import Alert, Severity, watch

RESULTS = Path(__file__).parents[1] / "RESULTS.md"
BEGIN, END = "<!-- situations: begin -->", "<!-- situations: end -->"
QUICK = ("zeroed_before_the_step", "warm_up_by_whole_numbers", "regression_on_raw_areas", "triplets_become_easy")
"""Short ones: what `--quick` takes."""


@dataclass
class Said:
    """What was said of a training."""

    alerts: dict[tuple[str, str], Alert] = field(default_factory=dict)
    """The worst of each code and place, at warning or above, in the order in which they began."""

    def __call__(self, alert: Alert) -> None:
        """Hear an alert."""
        key = (alert.finding.code, alert.finding.place)
        known = self.alerts.get(key)
        if alert.severity > Severity.INFO and (known is None or alert.severity > known.severity):
            self.alerts[key] = alert

    def __str__(self) -> str:
        """Say it in a line."""
        lines = [
            f"{a.finding.code} {a.finding.kind} {a.severity.value} {a.finding.place or '(model)'} from {a.began}"
            for a in self.alerts.values()
        ]
        return "; ".join([*lines[:3], f"and {len(lines) - 3} more"] if len(lines) > 3 else lines) or "nothing"


@dataclass
class Verdict:
    """What a situation was told to be, and what its fixed twin."""

    situation: Situation
    said: Said
    twin: Said | None

    @property
    def right_kind(self) -> list[Alert]:
        """Alerts of a kind that the label names."""
        right = self.situation.right
        return [a for a in self.said.alerts.values() if a.finding.kind in right.kinds and a.severity >= right.severity]

    def wrong(self) -> Iterator[str]:
        """Name what is not as it should be, in a word or two each."""
        right = self.situation.right
        if not right.kinds:
            yield from ["accused"] if self.said.alerts else []
            return
        if self.twin is not None and self.twin.alerts:
            yield "twin accused"
        if not self.right_kind:
            yield "another kind" if self.said.alerts else "missed"
            return
        there = [a for a in self.right_kind if _among(a.finding.place, right.places)]
        if not there:
            yield "place"
        elif not any(re.search(right.words, f"{a.cause} {a.remedy}", re.IGNORECASE) for a in there):
            yield "words"
        said = self.said.alerts.values()
        if right.never and any(re.search(right.never, f"{a.cause} {a.remedy}", re.IGNORECASE) for a in said):
            yield "forbidden words"
        if any(a.finding.kind not in right.kinds for a in said):
            yield "another kind too"
        if any(a.began < right.since for a in said):
            yield "too soon"

    def __str__(self) -> str:
        """Say in a word or two whether that is right."""
        return ", ".join(self.wrong()) or "right"


def _among(name: str, places: tuple[str, ...]) -> bool:
    return not places or any(f"{name}.".startswith(f"{place}.") for place in places)


def watched(situation: Situation, *, fixed: bool) -> Said:
    """Watch a training from its beginning to its end, in the hook form and with the default settings."""
    training, said = situation.build(fixed=fixed), Said()
    with watch(training.model, training.optimizers, horizon=situation.horizon, on_alert=said) as watcher:
        training.run(watcher.record)
    return said


def judged(situation: Situation) -> Verdict:
    """Watch a situation, and its fixed twin where it has one."""
    twin = watched(situation, fixed=True) if situation.right.kinds else None
    return Verdict(situation, watched(situation, fixed=False), twin)


def totals(verdicts: Sequence[Verdict]) -> list[str]:
    """Count what was told rightly, found at all, and accused."""
    ill = [v for v in verdicts if v.situation.right.kinds]
    well = [v for v in verdicts if not v.situation.right.kinds]
    lines = [
        (
            f"{len(ill)} faulty: told rightly {sum(str(v) == 'right' for v in ill)}, "
            f"found at all {sum(bool(v.right_kind) for v in ill)}"
        ),
        f"{len(well)} healthy: accused {sum(str(v) != 'right' for v in well)}",
        f"{len(ill)} fixed twins: accused {sum(bool(v.twin and v.twin.alerts) for v in ill)}",
    ]
    for kind in dict.fromkeys(v.situation.right.kinds[0] for v in ill):
        of_it = [v for v in ill if v.situation.right.kinds[0] == kind]
        told, found = sum(str(v) == "right" for v in of_it), sum(bool(v.right_kind) for v in of_it)
        lines.append(f"  {kind}: told rightly {told}/{len(of_it)}, found at all {found}/{len(of_it)}")
    return lines


def line(verdict: Verdict) -> str:
    """Return the table's row."""
    kind = next(iter(verdict.situation.right.kinds), "healthy")
    text = f"{verdict.situation.name:41} {kind:15} {verdict!s:28} {verdict.said}"
    return f"{text} | twin: {verdict.twin}" if verdict.twin and verdict.twin.alerts else text


def plain(situation: Situation) -> None:
    """Print the first and last losses of a situation and of its twin, without gradwatch."""
    for fixed in (False, True) if situation.right.kinds else (False,):
        losses: list[float] = []
        began = time.perf_counter()

        def tell(loss: Tensor, losses: list[float] = losses) -> None:
            losses.append(float(loss))

        situation.build(fixed=fixed).run(tell)
        many = max(1, len(losses) // 10)
        start, end = sum(losses[:many]) / many, sum(losses[-many:]) / many
        state = "healthy" if not situation.right.kinds else "fixed" if fixed else "faulty"
        print(f"{situation.name:41} {state:8} {start:10.3g} to {end:10.3g} ({time.perf_counter() - began:.1f} s)")


def main() -> None:
    """Print the table and the totals, or write them."""
    mine = parser(__doc__)
    mine.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    mine.add_argument("--only", default="*", metavar="GLOB", help="those whose names match")
    mine.add_argument("--plain", action="store_true", help="losses without gradwatch, to check the labels")
    mine.add_argument("-v", action="store_true", help="print what the alerts say")
    options = parsed(mine)
    if options.write and (options.quick or options.only != "*"):
        mine.error("a part of the situations cannot be written as the table")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    chosen = [s for s in SITUATIONS if fnmatch.fnmatch(s.name, options.only) and (s.name in QUICK or not options.quick)]
    if options.plain:
        for situation in chosen:
            plain(situation)
        return
    verdicts, lines = [], []
    for situation in chosen:
        verdicts.append(judged(situation))
        lines.append(line(verdicts[-1]))
        print(lines[-1], flush=True)
        for who, said in (("", verdicts[-1].said), ("twin: ", verdicts[-1].twin)) if options.v else ():
            for a in said.alerts.values() if said else ():
                print(f"    {who}{a.finding.code} {a.message} | why: {a.cause} | try: {a.remedy}")
    lines += ["", *totals(verdicts)]
    print("\n".join(lines[len(verdicts) :]))
    if options.write:
        text = "\n".join(lines)
        before, _, rest = RESULTS.read_text(encoding="utf-8").partition(BEGIN)
        RESULTS.write_text(
            f"{before}{BEGIN}\n\n```text\n{text}\n```\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
