r"""Trains small networks with every optimizer of several libraries, unwatched and watched, and holds the two together.

Bits: weights, gradients and losses of each step, the optimizer's state, random states. Norms: those right after
`backward()`, in float64. Updates: the weights before and after the outermost call that steps. Snapshots: one for each
training step. Alerts: of warning or error, in a longer run with the defaults, to be looked at. Whatever classes the
installed versions have are found; a library that is not there is left out. Exit status 1 if a bit has changed.

python3 -m venv optimizers && optimizers/bin/pip install -c constraints.txt . transformers==5.24.0 opt-einsum einops
optimizers/bin/pip install --no-deps pytorch-optimizer==4.1.0 schedulefree==1.4.1 torch-optimi==0.3.3 \
    lomo-optim==0.1.1 heavyball==3.2.1
optimizers/bin/python -m benchmarks.optimizers                             # a quarter of an hour; --quick: seconds
optimizers/bin/python -m benchmarks.optimizers --library schedulefree --only '*Closure'
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import logging
import sys
import warnings

import torch

from benchmarks.command import parsed, parser
from benchmarks.optimizers.cases import LIBRARIES, cases
from benchmarks.optimizers.compared import Outcome, compared
from benchmarks.optimizers.training import NETWORKS

STEPS, QUICK_STEPS = 30, 6
QUICK = ("SGD", "AdamW", "LBFGS", "Muon and AdamW", "apply_optimizer_in_backward, SGD")
"""What `--quick` takes, of torch's own."""


def totals(outcomes: list[Outcome]) -> list[str]:
    """Count what is as it should be."""
    ran = [o for o in outcomes if not o.alone]
    watched = [o for o in ran if not o.refused]
    heard = [o for o in watched if not o.unheard]
    return [
        f"{len(outcomes)} cases, {len(ran)} train by themselves, {len(watched)} with gradwatch",
        f"  bitwise the same {sum(not o.bits for o in watched)} of {len(watched)}",
        f"  not heard, and that is said {len(watched) - len(heard)}",
        f"  norms right {sum(not o.norms for o in heard)} of {len(heard)}",
        f"  updates right {sum(not o.updates for o in heard)} of {len(heard)}",
        f"  snapshots right {sum(not o.snapshots for o in heard)} of {len(heard)}",
        f"  with alerts {sum(bool(o.alerts) for o in watched)}",
    ]


def main() -> None:
    """Print a line for each case that differs, and a summary."""
    mine = parser(__doc__)
    mine.add_argument("--library", choices=LIBRARIES, help="cases of this one alone")
    mine.add_argument("--only", default="*", metavar="PATTERN", help="cases whose names match")
    options = parsed(mine)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    found, missing = cases([options.library] if options.library else LIBRARIES)
    for line in missing:
        print(line)
    chosen = [
        case
        for case in found
        if fnmatch.fnmatchcase(case.name, options.only)
        and (not options.quick or (case.library.startswith("torch.") and case.name in QUICK))
    ]
    steps = QUICK_STEPS if options.quick else STEPS
    outcomes = []
    for case in chosen:
        for network in NETWORKS:
            with contextlib.redirect_stdout(io.StringIO()):  # some talk
                outcomes.append(compared(case, network, steps, alerts=not options.quick))
            for line in outcomes[-1].lines():
                print(f"{case.library} {case.name}, {network}: {line}", flush=True)
    print("\n".join(totals(outcomes)))
    if any(o.bits for o in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
