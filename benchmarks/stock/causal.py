r"""Which public sequence models look ahead, by `gradwatch.causal`, beside their exact derivatives in float64.

In the environments of benchmarks/stock/layers.py and of `python -m benchmarks.stock`; nothing is downloaded:

seq/bin/python -m benchmarks.stock.causal --library layers
hf/bin/python -m benchmarks.stock.causal --library transformers
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.command import parser
from benchmarks.stock import atlas, truth
from benchmarks.stock.layers import Readout


class Every(nn.Module):
    """A layer's outputs at all timesteps."""

    def __init__(self, layer: Readout) -> None:
        """Wrap it."""
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, timesteps, 1)."""
        return self.layer.every(x)


def main() -> None:
    """Print a line for each model, and how many are told right."""
    mine = parser(__doc__)
    mine.add_argument("--library", default="layers")
    mine.add_argument("--only", default="*", help="models whose name matches")
    options = mine.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    atlas.TIMESTEPS, atlas.WORDS, atlas.ROWS = 60, 48, 4
    told: list[tuple[bool, bool]] = []
    for library, name, first in atlas.calls(options.library, options.only):
        model = Every(first.module) if isinstance(first.module, Readout) else first.module
        model.eval()
        try:
            ahead = truth.looks_ahead(model, first.arguments, first.keywords)
        except Exception:  # noqa: BLE001  (then there is nothing to hold it against)
            ahead = None
        batch = first.arguments or first.keywords
        try:
            found = gradwatch.causal(model, {**first.keywords} if not first.arguments else batch)
        except (ValueError, RuntimeError) as error:
            print(f"{library:16} {name:34} true {ahead!s:5} {type(error).__name__}: {str(error)[:150]}", flush=True)
            continue
        wrong = "" if ahead in (None, not found.causal) else "  WRONG"
        place = "" if found.leak is None else f" in {found.leak.module or 'the model'} ({found.leak.kind})"
        print(f"{library:16} {name:34} true {ahead!s:5} {str(found)[:120]}{place}{wrong}", flush=True)
        if ahead is not None:
            told.append((ahead, not found.causal))
    leaking, sound = [s for a, s in told if a], [not s for a, s in told if not a]
    print(f"told right: {sum(sound)} of {len(sound)} that do not look ahead, {sum(leaking)} of {len(leaking)} that do")


if __name__ == "__main__":
    main()
