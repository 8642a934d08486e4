r"""Train stock models of public libraries from their configurations, and list what gradwatch accuses.

Nothing is downloaded. Each library has an environment of its own (`constraints.txt` holds torch 2.13.0):

python3.11 -m venv hf && hf/bin/pip install -c constraints.txt . transformers==5.24.0 accelerate==1.15.0
python3.11 -m venv fc && fc/bin/pip install -c constraints.txt . \
    neuralforecast==3.3.0 pytorch-forecasting==1.8.0 darts==0.48.1 gluonts==0.17.0
hf/bin/python -m benchmarks.stock --library transformers --width 32 --json transformers_32.json
fc/bin/python -m benchmarks.stock --library neuralforecast --only 'T*' --width 256
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.command import parser
from benchmarks.stock.run import Outcome, Stock, judged

LIBRARIES = {
    "transformers": ("transformers_text", "transformers_sight", "transformers_others"),
    "neuralforecast": ("neuralforecast_models",),
    "pytorch-forecasting": ("pytorch_forecasting_models",),
    "darts": ("darts_models",),
    "gluonts": ("gluonts_models",),
}


def models(library: str) -> list[Stock]:
    """Return the models of a library."""
    return [
        model for part in LIBRARIES[library] for model in importlib.import_module(f"benchmarks.stock.{part}").MODELS
    ]


def totals(outcomes: list[Outcome]) -> str:
    """Say how many there were, and which of those whose loss came down are accused."""
    ran = [o for o in outcomes if not o.failed]
    down = [o for o in ran if o.came_down]
    accused = [o for o in down if o.alerts]
    lines = [
        (
            f"{len(outcomes)} models, {len(ran)} ran, the loss of {len(down)} came down, "
            f"and {len(accused)} of those are accused"
        ),
        *(f"  {o.name} {o.width}: " + ", ".join(sorted({a["code"] for a in o.alerts})) for o in accused),
    ]
    return "\n".join(lines)


def main() -> None:
    """Train them one after another."""
    mine = parser(__doc__)
    mine.add_argument("--library", choices=LIBRARIES, required=True)
    mine.add_argument("--width", type=int, default=32)
    mine.add_argument("--steps", type=int, default=200)
    mine.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names")
    mine.add_argument("--json", type=Path, help="where the results go, after each model")
    mine.add_argument("-v", action="store_true", help="show tracebacks")
    options = mine.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    outcomes = []
    for model in models(options.library):
        if not any(fnmatch.fnmatch(model.name, pattern) for pattern in options.only):
            continue
        outcomes.append(judged(options.library, model, options.width, options.steps))
        print(outcomes[-1], flush=True)
        if options.v and outcomes[-1].failed:
            print(outcomes[-1].failed, flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    print(totals(outcomes))


if __name__ == "__main__":
    main()
