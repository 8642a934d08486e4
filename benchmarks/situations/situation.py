"""What a situation is: a program that somebody reported, rebuilt small, and what a colleague would say of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.runs import Training
from gradwatch import Severity

Make = Callable[..., Training]


@dataclass(frozen=True)
class Right:
    """What is right to say."""

    kinds: tuple[str, ...] = ()
    """The kind of fault, and after it those that are an honest way to put it; none: nothing is wrong."""
    places: tuple[str, ...] = ()
    """Names of modules, each with all that is in it; none: the whole model, and any place will do."""
    since: int = 0
    """The first step at which it can be seen."""
    words: str = ""
    """A pattern that the cause or the remedy must hold, whatever the case."""
    never: str = ""
    """A pattern that no cause or remedy may hold."""
    severity: Severity = Severity.WARNING


@dataclass(frozen=True)
class Situation:
    """A training, where it was reported, and what is right to say of it."""

    name: str
    source: str
    make: Make = field(repr=False)
    right: Right
    horizon: int | None
    """How many of the newest timesteps matter, as the user would declare it."""
    steps: int

    def build(self, *, fixed: bool = False) -> Training:
        """Make it anew, always the same, or its twin with the fault fixed; a healthy one is its own."""
        seed = zlib.crc32(self.name.encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.make(fixed=fixed) if self.right.kinds else self.make()
        made.steps, made.seed = self.steps, seed
        return made


SITUATIONS: list[Situation] = []


def faulty(
    *kinds: str,
    source: str,
    places: tuple[str, ...] = (),
    since: int = 0,
    words: str = "",
    never: str = "",
    horizon: int | None = None,
    steps: int = 150,
) -> Callable[[Make], Make]:
    """Register a situation with a fault, which `fixed=True` leaves out."""

    def register(make: Make) -> Make:
        right = Right(kinds, places, since, words, never)
        SITUATIONS.append(Situation(make.__name__, source, make, right, horizon, steps))
        return make

    return register


def healthy(*, source: str, horizon: int | None = None, steps: int = 150) -> Callable[[Make], Make]:
    """Register a situation in which nothing is wrong."""

    def register(make: Make) -> Make:
        SITUATIONS.append(Situation(make.__name__, source, make, Right(), horizon, steps))
        return make

    return register
