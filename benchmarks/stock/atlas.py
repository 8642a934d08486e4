r"""How far back stock models of public libraries learn as they are made, beside an independent Jacobian.

In the environments of `python -m benchmarks.stock`, which see; nothing is trained, and nothing is downloaded:

fc/bin/python -m benchmarks.stock.atlas --library neuralforecast --json neuralforecast.json
hf/bin/python -m benchmarks.stock.atlas --library transformers --only '*causal*' --json transformers.json
python -m benchmarks.stock.atlas --table neuralforecast.json transformers.json   # writes docs/atlas.md
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.command import parser
from benchmarks.stock import forecasting, tasks, truth
from benchmarks.stock.run import Heard, Stock
from gradwatch.timesteps.model_pass import model_gain
from gradwatch.values.sequences import reach_of

WIDTH, TIMESTEPS, WORDS = 64, 250, 128
PAGE = Path(__file__).parents[2] / "docs" / "atlas.md"


class Captured(Exception):  # noqa: N818  (nothing is wrong)
    """The first call of a network in a training."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep it."""
        super().__init__()
        self.module, self.arguments, self.keywords = module, args, kwargs


@dataclass
class Row:
    """A model, what gradwatch says of it, and what is true."""

    library: str
    version: str
    name: str
    input: str = ""
    length: int = 0
    horizon: int | None = None
    interval: tuple[int, int] | None = None
    sure: bool = True
    true: int | None = None
    refused: str = ""
    """Why gradwatch gives no number."""
    others: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of the model's other inputs, horizon and length."""

    @property
    def right(self) -> bool:
        """Whether what is true lies within the interval."""
        return self.interval is not None and self.true is not None and self.interval[0] <= self.true <= self.interval[1]


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Stop a training at the first call of a module that has something to train."""
    call = nn.Module.__call__

    def stop(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and module.training and any(p.requires_grad for p in module.parameters()):
            raise Captured(module, args, kwargs)
        return call(module, *args, **kwargs)

    nn.Module.__call__ = stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def row(library: str, stock: Stock) -> Row | None:
    """Return what is said of a model as it is made; None where its training does not come to it."""
    torch.manual_seed(0)
    try:
        with capturing():
            stock.train(WIDTH, 1, Heard())
    except Captured as caught:
        first = caught
    except Exception:  # noqa: BLE001  (one model that cannot be built leaves the others)
        return None
    else:
        return None
    model, args, kwargs = first.module.eval(), first.arguments, first.keywords
    found = Row(library, importlib.metadata.version(library), stock.name)
    exact: dict[str, int] = {}
    with contextlib.suppress(Exception):  # then there is nothing to hold it against
        exact = truth.horizons(model, args, kwargs)
    try:
        stats = model_gain(model, args, kwargs).stats()
    except (ValueError, RuntimeError) as error:
        found.refused = str(error)
        return found
    reach = reach_of(stats)
    found.input, found.length, found.true = stats.input, stats.length, exact.get(stats.input)
    if reach is not None:
        found.horizon, found.interval, found.sure = reach.timesteps, (reach.low, reach.high), reach.sure
    found.others = {s.input: (s.horizon, s.length) for s in stats.beside if s.input and s.horizon is not None}
    return found


def line(one: Row) -> str:
    """Say it in a line of a table."""
    if one.refused:
        return f"| {one.library} | {one.name} | not told | | {one.refused.splitlines()[0][:110].replace('|', '/')} |"
    low, high = one.interval or (0, 0)
    within = "" if low == high else f" ({low} to {high})"
    said = f"{one.horizon}{within}" if one.sure else f"{low} to {high}"
    if high == one.length:
        said = f"at least {low}"
    true = "" if one.true is None else str(one.true) if one.right else f"**{one.true}**"
    return f"| {one.library} | {one.name} | {said} of {one.length} | {true} | `{one.input}` |"


def page(rows: list[Row]) -> str:
    """Return the atlas."""
    held = [r for r in rows if r.true is not None]
    right = sum(r.right for r in held)
    versions = ", ".join(sorted({f"{r.library} {r.version}" for r in rows}))
    says = (
        f"{len(rows)} stock models from their configurations, at width {WIDTH}, with their libraries' own"
        f" initialization and {TIMESTEPS} timesteps ({WORDS} words), before any training: `gradwatch.horizon` on the"
        " batch that their own training begins with. *True* is the Jacobian by `torch.autograd.grad` alone, in float64"
        " where the network can be cast (`benchmarks/stock/truth.py`, in which there is no gradwatch). It could be"
        f" taken of {len(held)}, and of {right} of those it lies within the interval that gradwatch gives; the others"
        " are in bold. *Not told*: gradwatch gives no number, and says why."
    )
    return "\n".join(
        [
            "# How far back public models learn, as they are made",
            "",
            says,
            "",
            "`python -m benchmarks.stock.atlas` makes it again; its docstring says in which environments.",
            "",
            "```python",
            "import torch",
            "",
            "import gradwatch",
            "",
            "stats = gradwatch.horizon(torch.nn.GRU(4, 16, batch_first=True), torch.randn(8, 250, 4))",
            "assert stats.interval[0] <= stats.horizon <= stats.interval[1] < 30",
            "```",
            "",
            "| library | model | learns from | true | by its input, or why not |",
            "| --- | --- | --- | --- | --- |",
            *map(line, rows),
            "",
            f"{versions}; torch {torch.__version__.partition('+')[0]}.",
            "",
        ]
    )


def main() -> None:
    """Measure a library, or write the page."""
    mine = parser(__doc__)
    mine.add_argument("--library")
    mine.add_argument("--only", default="*", help="models whose name matches")
    mine.add_argument("--json", type=Path)
    mine.add_argument("--table", type=Path, nargs="+")
    options = mine.parse_args()
    if options.table:
        rows = [Row(**one) for file in options.table for one in json.loads(file.read_text())]
        for one in rows:
            one.interval = None if one.interval is None else (one.interval[0], one.interval[1])
        PAGE.write_text(page(rows))
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    forecasting.PAST, forecasting.LENGTH, forecasting.ROWS = TIMESTEPS, 4 * TIMESTEPS, 8
    tasks.LENGTH = WORDS
    from benchmarks.stock.__main__ import models  # which read these numbers

    rows = []
    for stock in models(options.library):
        if fnmatch.fnmatch(stock.name, options.only) and (one := row(options.library, stock)) is not None:
            print(line(one), flush=True)
            rows.append(one)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in rows]))


if __name__ == "__main__":
    main()
