"""Train with public libraries, watched as docs/trainers.md says, and check what gradwatch told.

Each library has a small program in `benchmarks/trainers/programs` that knows nothing of gradwatch, and an environment,
which is made where it is missing (all of them: 12 GB, from the package registry). Each program is run as it is, and
with the recipe of its section put where it says `# --- watch here ---`, and these must hold: the weights at the end
are bitwise the same, each step is one snapshot, each norm is that of an independent float64 measurement, and the loss
was told where the recipe tells it. Once more each runs under `gradwatch run`, without a line: the same must hold, or,
where it can see no step of the library, it must say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.command import parser
from benchmarks.trainers.environments import python
from benchmarks.trainers.libraries import LIBRARIES, Library
from benchmarks.trainers.recipes import ROOT, recipe, watched

CLOSE = 1e-6
"""How far a norm may be from the true one, relative to it."""
PATIENCE = 600
"""Seconds for one program."""
SAME = {
    "PYTHONPATH": str(ROOT),
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


class FailedError(Exception):
    """A program did not end well; the text is what it said last."""


def run(interpreter: Path, arguments: list[str], folder: Path) -> str:
    """Run Python in a folder, and return what it printed.

    Raises:
        FailedError: it ended with an error.

    """
    done = subprocess.run(
        [str(interpreter), *arguments],
        cwd=folder,
        env=os.environ | SAME,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode:
        raise FailedError(done.stdout)
    return done.stdout


def measured(interpreter: Path, library: Library, program: str, *, alone: bool = False) -> dict[str, Any]:
    """Run a program in an empty folder, perhaps under `gradwatch run`, and return what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "train.py"), Path(folder, "measured.json")
        source.write_text(program, encoding="utf-8")
        when = (alone and library.alone) or library.when
        arguments = [str(source), when, str(out), *["worker"] * library.in_worker]
        start = ["-m", "gradwatch", "run", "--logdir", "runs"] if alone else []
        said = run(interpreter, [*start, "-m", "benchmarks.trainers.inside", *arguments], Path(folder))
        return json.loads(out.read_text(encoding="utf-8")) | {"said": said}


def faults(plain: dict[str, Any], seen: dict[str, Any], *, loss: bool) -> list[str]:
    """Return what does not hold."""
    found = []
    if seen["weights"] != plain["weights"]:
        found.append("THE WEIGHTS ARE OTHERS")
    if not seen["snapshots"]:
        found.append("NO SNAPSHOT")
    if seen["snapshots"] != seen["steps"]:
        found.append(f"{seen['steps']} STEPS")
    if seen["difference"] > CLOSE:
        found.append("THE NORMS ARE OTHERS")
    if bool(seen["losses"]) != loss:
        found.append("A LOSS" if seen["losses"] else "NO LOSS")
    return found


def judged(library: Library, environments: Path) -> tuple[bool, str]:
    """Run a library's program three times, and say in two lines whether all is well."""
    try:
        interpreter = python(library.environment, environments)
        program = library.program.read_text(encoding="utf-8")
        plain = measured(interpreter, library, program)
        by_recipe = with_recipe(library, interpreter, program, plain)
        without = without_a_line(library, interpreter, program, plain)
    except (FailedError, LookupError, ValueError, OSError, subprocess.SubprocessError) as error:
        return False, f"{library.name:22} FAILED\n{str(error)[-2000:]}"
    return by_recipe[0] and without[0], f"{library.name:22} {by_recipe[1]}\n{'':14} no line {without[1]}"


def with_recipe(library: Library, interpreter: Path, program: str, plain: dict[str, Any]) -> tuple[bool, str]:
    """Say what the recipe makes be seen."""
    seen = measured(interpreter, library, watched(program, recipe(library.section)))
    return line(seen, library.when, faults(plain, seen, loss=library.loss))


def without_a_line(library: Library, interpreter: Path, program: str, plain: dict[str, Any]) -> tuple[bool, str]:
    """Say what `gradwatch run` sees of the program as it is."""
    seen = measured(interpreter, library, program, alone=True)
    if library.alone is not None:
        return line(seen, library.alone, faults(plain, seen, loss=True))
    said = next((text for text in seen["said"].splitlines() if text.startswith("gradwatch: ")), "")
    wrong = ["THE WEIGHTS ARE OTHERS"] if seen["weights"] != plain["weights"] else []
    wrong += ["SEEN"] if seen["snapshots"] else [] if said else ["NOTHING SAID"]
    return not wrong, f"{said[:150]}{': ' * bool(wrong)}{', '.join(wrong)}"


def line(seen: dict[str, Any], when: str, wrong: list[str]) -> tuple[bool, str]:
    """Tell whether nothing is wrong, and what was seen."""
    told = (
        f"{seen['snapshots']:4} snapshots, {seen['losses']:4} with a loss, norms within {seen['difference']:.0e}"
        f" (truth: {when}), accused: {' '.join(seen['accused']) or 'nothing'}"
    )
    return not wrong, f"{told}{': ' * bool(wrong)}{', '.join(wrong)}"


def options() -> argparse.Namespace:
    """Return the options of the command line."""
    mine = parser(__doc__)
    names = [library.name for library in LIBRARIES]
    mine.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    mine.add_argument(
        "--environments", type=Path, default=ROOT / ".trainers", help="the folder of environments (%(default)s)"
    )
    return mine.parse_args()


def main() -> None:
    """Judge them one after another."""
    mine, well = options(), []
    chosen = [library for library in LIBRARIES if library.name in mine.only]
    for library in chosen:
        fine, line = judged(library, mine.environments.resolve())
        well.append(fine)
        print(line, flush=True)
    print(f"{sum(well)} of {len(chosen)} are as docs/trainers.md says")
    sys.exit(not all(well))


if __name__ == "__main__":
    main()
