"""How the newest output of a model hangs on each of its inputs, by lag: as few products as it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.timesteps.input_calls import InputSequence, Root, Roots
from gradwatch.timesteps.lag_gain import gain_and_error, gain_by_lag
from gradwatch.timesteps.model_gain import InputGain

_SEED = 0
"""Of the cotangents, so that two measurements agree."""
COTANGENTS = 3
"""Directions that are taken, at most."""
_SPARE = 24
"""Rows from which on one is left out of the output: what comes back to its data tells whether rows are mixed."""


@dataclass(eq=False)
class Source:
    """Something with timesteps by which an output is differentiated, and what came of that."""

    module: str
    """Whose input it is; "" is the model itself."""
    input: str
    """Name of the model's input; "" is what enters the module."""
    time: int | None
    assumed: bool
    """Whether nothing tells which dimension is time."""
    sequences: Sequence[InputSequence]
    joined: bool
    """Whether the sequences are of the same timesteps, as several embeddings of one input; else each is of its own."""
    spread: Tensor
    """Standard deviation of its entries: by so much it usually differs."""
    on_the_way: frozenset[str] = frozenset()
    """Of a place on the way of the data through the model, the inputs whose timesteps it has. It tells where on that
    way a horizon is narrowed, and no more is asked of it."""
    into: str = ""
    """Of an input, the module that takes it first, as it is."""
    clock: int = 1
    """Of such a place, timesteps of the input from one of its own to the next."""
    found: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    """By direction, and by sequence: squared norms, (T, B), and lengths of rows, (B,)."""
    used: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    """The same of what the timesteps add to the output; none where that is not known."""
    padding: Tensor | None = None
    mixed: Tensor | None = None
    """What comes back to the data of a row whose output is left out, beside what comes to that of the others."""
    reached: bool = False
    """Whether the output depends on it at all."""

    @property
    def roots(self) -> list[Root]:
        """By what to differentiate."""
        return [call.root for sequence in self.sequences for call in sequence.calls]

    def take(
        self, gradients: Mapping[Root, Tensor | None], roots: Roots, lengths: Mapping[int, Tensor], spared: int | None
    ) -> None:
        """Take what one direction brought.

        Args:
            gradients: see `Roots.gradients`.
            roots: what was differentiated by.
            lengths: of the rows, by `id` of the sequence, where they are known.
            spared: the row whose output was left out, the last; None: none was.

        """
        mine = [s.squares(gradients, lengths.get(id(s))) for s in self.sequences]
        if self.padding is None and not self.on_the_way:
            self.padding = self.sequences[-1].padding(mine[-1][0])
        asked = self.sequences if self.input else []
        added = [a for s in asked if (a := s.contributions(gradients, roots)) is not None]
        if self.joined and len(mine) > 1:
            squares = torch.stack([s for s, _ in mine]).sum(0)
            mine = [(squares, torch.stack([n for _, n in mine]).amax(0))]
            added = [torch.stack(added).sum(0)] if len(added) == len(self.sequences) else []
        if spared is not None and len(mine) == 1 and mine[0][0].shape[1] == spared + 1:
            squares, rows = mine[0]
            if self.mixed is None:
                by_row = squares.sum(0).sqrt()
                self.mixed = by_row[spared] / by_row[:spared].mean()
            mine, added = [(squares[:, :spared], rows[:spared])], [a[:, :spared] for a in added]
        self.found.append(mine)
        if len(added) == len(mine):
            self.used.append([(a.square(), lengths) for a, (_, lengths) in zip(added, mine, strict=True)])
        self.reached |= any(gradients[root] is not None for root in self.roots)

    def gain(self, *, exact: bool) -> InputGain:
        """Return the gain by lag, as far as it is known by now."""
        rows = max(s.rows for s in self.sequences) if self.joined else sum(s.rows for s in self.sequences)
        rows -= self.mixed is not None
        numbers = gain_and_error(self.found, exact=exact)
        used = gain_by_lag(self.used) if self.used else torch.full_like(numbers[: len(numbers) // 2], torch.nan)
        padding = torch.zeros(2, dtype=torch.float64, device="cpu") if self.padding is None else self.padding
        mixed = torch.full((1,), torch.nan, device="cpu") if self.mixed is None else self.mixed.view(1)
        numbers = torch.cat([self.spread.to(numbers).view(1), mixed.to(numbers), padding.to(numbers), numbers, used])
        way, into = self.on_the_way, self.into
        return InputGain(self.module, self.input, self.time, self.assumed, rows, numbers, way, into, self.clock)


def gains(
    roots: Roots,
    newest: Tensor,
    rows: int,
    sources: Sequence[Source],
    lengths: Mapping[int, Tensor],
    *,
    apart: bool,
) -> list[InputGain]:
    """Differentiate an output by several sources at once.

    With a cotangent v for each row, whose entries are 1 / sqrt(R) or -1 / sqrt(R) by chance, R the width of the output:
    the root mean square of `||J^T v||` over the rows estimates the Frobenius norm of the Jacobian over sqrt(R)
    (Hutchinson, "A stochastic estimator of the trace", 1989). Where the horizon is not sure then, up to two more, each
    orthogonal to those before: R of them give that norm exactly.

    Args:
        roots: the tensors to differentiate by.
        newest: the output, whose rows know nothing of each other, or which is one number.
        rows: how many it has.
        sources: by what.
        lengths: of rows, by `id` of the sequence, where they are known.
        apart: whether rows are to know nothing of each other, so that one can tell whether they do.

    Raises:
        RuntimeError: torch cannot.

    """
    if not rows:
        raise ValueError("the batch must have rows, and has none")
    left_out: set[Source] = set()
    keys = list(dict.fromkeys(root for source in sources for root in source.roots))
    width = max(newest.numel() // rows if rows in newest.shape else newest.numel(), 1)
    private = torch.Generator(device="cpu").manual_seed(_SEED)  # drawing from torch's own would change the training
    sorted_by_length = any(s.packed is not None for source in sources for s in source.sequences)
    apart = (
        apart and rows >= _SPARE and newest.shape.count(rows) == 1 and bool(sources[0].input) and not sorted_by_length
    )
    spared = rows - 1 if apart else None
    found: list[InputGain] = []
    signs = torch.randint(0, 2, newest.shape, generator=private, device="cpu", dtype=torch.float32) * 2 - 1
    for number in range(COTANGENTS):
        drawn = signs * _wave(number, newest.shape, rows, width)
        exact = number + 1 == width  # then all of the Jacobian was seen
        left = COTANGENTS - 1 - number
        if spared is not None:
            drawn.select(newest.shape.index(rows), spared).zero_()
        cotangent = drawn.to(newest.device, newest.dtype) / math.sqrt(width)
        gradients = roots.gradients(newest, cotangent, keys, again=bool(left) and not exact)
        with torch.no_grad():
            found = []
            for source in (s for s in sources if s not in left_out):
                try:
                    source.take(gradients, roots, lengths, spared)
                    found.append(source.gain(exact=exact))
                except Exception:
                    if not source.on_the_way:
                        raise
                    left_out.add(source)  # what is told besides must not cost what was asked
        if exact or not left or all(gain.on_the_way or gain.is_sure() for gain in found):
            break
    return found


def _wave(number: int, shape: torch.Size, rows: int, width: int) -> Tensor:
    """Return a cosine over the output of a row, of mean square 1; those of two numbers below R are orthogonal."""
    if not number:
        return torch.ones(shape, device="cpu")
    places = (torch.arange(width, device="cpu") + 0.5) / width
    wave = math.sqrt(2) * torch.cos(math.pi * number * places)
    if rows not in shape:
        return wave.view(shape)
    at = shape.index(rows)
    return wave.view(1, *shape[:at], *shape[at + 1 :]).expand(rows, *shape[:at], *shape[at + 1 :]).movedim(0, at)
