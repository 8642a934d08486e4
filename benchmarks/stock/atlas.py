r"""How far back public models learn, as they are made and after a short training, beside an independent Jacobian.

In the environments of `python -m benchmarks.stock` and of benchmarks/stock/layers.py; nothing is downloaded:

fc/bin/python -m benchmarks.stock.atlas --library neuralforecast --train --json neuralforecast.json
hf/bin/python -m benchmarks.stock.atlas --library transformers --only '*causal*' --train --json transformers.json
seq/bin/python -m benchmarks.stock.atlas --library layers --train --json seq.json      # and in those of qlib and tsai
python -m benchmarks.stock.atlas --table *.json   # writes docs/atlas.md and docs/atlas.png
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

import numpy as np
import torch
from torch import nn

from benchmarks.command import parser
from benchmarks.stock import learning, tasks, truth
from benchmarks.stock.layers import FEATURES, Layer, layers
from benchmarks.stock.run import Heard, Stock
from gradwatch.timesteps.model_pass import model_gain
from gradwatch.values.sequences import reach_of

WIDTH, TIMESTEPS, WORDS, ROWS = 64, 250, 128, 16
SLOW = 0.4
"""Seconds that a forward and backward pass may take of what is trained."""
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
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task, fields of `Trained`."""
    torch: str = torch.__version__.partition("+")[0]
    earlier: str = ""
    """Of which day `trained` is, where that was not measured again."""

    @property
    def right(self) -> bool:
        """Whether what is true lies within the interval."""
        return self.interval is not None and self.true is not None and self.interval[0] <= self.true <= self.interval[1]


@dataclass
class Trained:
    """A model after a short training on a task."""

    score: float
    """Share of the answers that are right, or 1 - the squared error of targets of variance 1."""
    horizon: int
    low: int
    high: int
    used: int | None
    true: int | None

    @property
    def right(self) -> bool:
        """Whether what is true lies within the interval."""
        return self.true is not None and self.low <= self.true <= self.high


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


def captured(stock: Stock) -> Captured | None:
    """Return the first call of a model's network in its own training; None where that does not come to it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (by this gluonts draws its windows)
    try:
        with capturing():
            stock.train(WIDTH, 1, Heard())
    except Captured as caught:
        return caught
    except Exception:  # noqa: BLE001  (one model that cannot be built leaves the others)
        return None
    return None


def drawn(layer: Layer) -> Captured:
    """Return a call of a layer that is made here."""
    torch.manual_seed(0)
    return Captured(layer.make(WIDTH, TIMESTEPS), (torch.randn(ROWS, TIMESTEPS, FEATURES),), {})


def row(library: str, name: str, first: Captured, *, train: bool) -> Row:
    """Return what is said of a network as it is made, and if asked, after training."""
    model, args, kwargs = first.module.eval(), first.arguments, first.keywords
    found = Row(library, importlib.metadata.version(library), name)
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
    if train and learning.seconds(model, args, kwargs) < SLOW:
        begun = {key: value.clone() for key, value in model.state_dict().items()}
        for task in learning.TASKS:
            model.load_state_dict(begun)
            with contextlib.suppress(Exception):  # it cannot be trained by that input alone
                found.trained[task.name] = asdict(trained(learning.Fed(model, args, kwargs, stats.input), task))
    return found


def trained(fed: learning.Fed, task: learning.Task) -> Trained:
    """Train a network on a task, and measure how far back it learns then."""
    torch.manual_seed(1)
    score = learning.train(fed, task)
    x = fed.fed(task.draw(fed.rows, fed.timesteps)[0])
    stats = model_gain(fed, (x,), {}).stats()
    reach = reach_of(stats)
    if reach is None:
        raise ValueError(f"after {task.name} its gain by lag is not finite")
    true: int | None = None
    with contextlib.suppress(Exception):  # as above
        true = next(iter(truth.horizons(fed, (x,), {}).values()))
    return Trained(score, reach.timesteps, reach.low, reach.high, stats.used, true)


def line(one: Row) -> str:
    """Say it in a line of a table."""
    if one.refused:
        return f"| {one.library} | {one.name} | {one.refused.splitlines()[0][:110].replace('|', '/')} | | | | |"
    low, high = one.interval or (0, 0)
    said = _said(one.horizon or 0, low, high, one.length) if one.sure else f"{low} to {high}"
    true = "" if one.true is None else str(one.true) if one.right else f"**{one.true}**"
    after = " | ".join(
        _after(one, Trained(**one.trained[t.name])) if t.name in one.trained else "" for t in learning.TASKS
    )
    return f"| {one.library} | {one.name} | {said} of {one.length} | {true} | {after} |"


def _said(horizon: int, low: int, high: int, length: int) -> str:
    if high == length:
        return f"at least {low}"
    return f"{horizon}" + ("" if low == high else f" ({low} to {high})")


def _after(one: Row, trained: Trained) -> str:
    said = _said(trained.horizon, trained.low, trained.high, one.length)
    wrong = "" if trained.right or trained.true is None else f" **{trained.true}**"
    whole = f"{said}{wrong}, uses {trained.used}: {trained.score:.0%}"
    return f"*{whole}*" if one.earlier else whole


def page(rows: list[Row]) -> str:
    """Return the atlas."""
    held = [r for r in rows if r.true is not None]
    right = sum(r.right for r in held)
    after = [t for r in rows for t in (Trained(**fields) for fields in r.trained.values()) if t.true is not None]
    mine = torch.__version__.partition("+")[0]
    versions = ", ".join(
        sorted({f"{r.library} {r.version}" + (f" with torch {r.torch}" if r.torch != mine else "") for r in rows})
    )
    says = (
        f"{len(rows)} stock models and layers of {len({r.library for r in rows})} libraries from their configurations,"
        f" at width {WIDTH}, with their libraries' own initialization and {TIMESTEPS} timesteps ({WORDS} words):"
        " `gradwatch.horizon` on the batch that their own training begins with, before any training. *True* is the"
        " Jacobian by `torch.autograd.grad` alone, in float64 where the network can be cast"
        f" (`benchmarks/stock/truth.py`, in which there is no gradwatch). It could be taken of {len(held)}, and of"
        f" {right} of those it lies within the interval that gradwatch gives; the others are in bold. Where gradwatch"
        " gives no number, its reason stands there."
    )
    then = (
        f"Then each is trained for {learning.STEPS} steps of Adam ({learning.RATE:g}, {ROWS} rows, clipped to"
        f" {learning.CLIP:g}) with a linear readout of its newest output, on three tasks that lie in its main input:"
        " the sign of the oldest value; the sum of two marked values anywhere; and which side was pressed from"
        f" {int(learning.EVENT[0] * TIMESTEPS)} to {int(learning.EVENT[1] * TIMESTEPS)} timesteps ago. It says how far"
        " back it learns then, how many timesteps it uses, and the score: share of right answers (a coin has 50 %), or"
        f" of the sum 1 - the squared error. Of {len(after)} trained networks {sum(t.right for t in after)} have the"
        " true horizon within their interval. One seed, one short training: it tells what a start makes easy, not what"
        " an architecture can learn."
    )
    if earlier := [r.earlier for r in rows if r.earlier]:
        then += (
            f" What stands in italics, of {len(earlier)} models after training, was not measured again: it is"
            f" of {' and '.join(sorted(set(earlier)))}."
        )
    tasks_named = " | ".join(t.name for t in learning.TASKS)
    return "\n".join(
        [
            "# How far back public models learn",
            "",
            "![How far back some of them see, as they are made and after a signal that lies long ago](atlas.png)",
            "",
            says,
            "",
            then,
            "",
            "`python -m benchmarks.stock.atlas` makes it again; its docstring says in which environments.",
            "",
            "```python",
            "import torch",
            "",
            "import gradwatch",
            "",
            "stats = gradwatch.horizon(torch.nn.GRU(4, 16, batch_first=True), torch.randn(8, 250, 4))",
            "assert stats.interval is not None and stats.horizon is not None",
            "assert stats.interval[0] <= stats.horizon <= stats.interval[1] < 30",
            "```",
            "",
            f"| library | model | as made it learns from | true | {tasks_named} |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *map(line, rows),
            "",
            f"{versions}; torch {mine}.",
            "",
        ]
    )


def main() -> None:
    """Measure a library, or write the page."""
    mine = parser(__doc__)
    mine.add_argument("--library")
    mine.add_argument("--only", default="*", help="models whose name matches")
    mine.add_argument("--train", action="store_true", help="also after a short training on three tasks")
    mine.add_argument("--json", type=Path)
    mine.add_argument("--table", type=Path, nargs="+")
    options = mine.parse_args()
    if options.table:
        every: dict[tuple[str, str], Row] = {}
        for one in (Row(**fields) for file in options.table for fields in json.loads(file.read_text())):
            every.setdefault((one.library, one.name), one)  # torch's own are in each environment
        rows = list(every.values())
        for one in rows:
            one.interval = None if one.interval is None else (one.interval[0], one.interval[1])
        from benchmarks.stock import picture

        PAGE.write_text(page(rows))
        picture.draw(rows).save(PAGE.with_suffix(".png"), optimize=True)
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for library, name, first in calls(options.library, options.only):
        one = row(library, name, first, train=options.train)
        print(line(one), flush=True)
        rows.append(one)
        if options.json:
            options.json.write_text(json.dumps([asdict(one) for one in rows]))


def calls(library: str, only: str) -> Iterator[tuple[str, str, Captured]]:
    """Yield the networks of a library, or the layers that are here, by library and name."""
    if library == "layers":
        for layer in layers():
            if fnmatch.fnmatch(layer.name, only):
                yield layer.library, layer.name, drawn(layer)
        return
    from benchmarks.stock import forecasting

    forecasting.PAST, forecasting.LENGTH, forecasting.ROWS = TIMESTEPS, 4 * TIMESTEPS, ROWS
    tasks.LENGTH = WORDS
    from benchmarks.stock.__main__ import models  # which read these numbers

    for stock in models(library):
        if fnmatch.fnmatch(stock.name, only) and (first := captured(stock)) is not None:
            yield library, stock.name, first


if __name__ == "__main__":
    main()
