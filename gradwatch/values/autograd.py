"""What the autograd graph of a step tells, as frozen plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CutKind = Literal["between", "inside", "own", "unused", "outside", "checkpoint"]
"""How a layer that ran is without a gradient.

between: it ends between two modules. inside: what the layer gave has one, and its weights, which are all that it holds,
have none. own: the same of a module that also holds layers, and does without its own weights, or gave what it took.
unused: nothing was seen to take what it gave. outside: what it gave left the model, and does not come into the loss.
checkpoint: a reentrant checkpoint ran it over inputs that need no gradient.
"""

BarrierKind = Literal["softmax", "layer_norm", "group_norm", "quotient", "shift"]
"""An operation that gives the same whatever it takes: softmax of one value, a normalization of one or two, a quotient
of values and the sum or norm of each one alone, a sum with what is alike for all that a softmax compares."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the gradient ended on its way back to a layer that ran and that it did not reach."""

    layer: str
    """The layer in question."""
    unreached: str
    """The last module that ran and that the gradient did not reach; perhaps the layer itself."""
    reached: str | None
    """The first module after that which it did reach; None where it reached none."""
    graph: bool
    """Whether the output of `unreached` has a graph."""
    kind: CutKind | None = None
    """None: of a record that does not tell."""


@dataclass(frozen=True, slots=True)
class Barrier:
    """An operation that lets next to no gradient through, because it works over too few values."""

    at: str
    """The module that gave what it computes, or was made of it."""
    operation: BarrierKind
    values: int
    """Over how many values it works."""


@dataclass(frozen=True, slots=True)
class Flow:
    """How the gradient comes to a layer in question, and past it."""

    layer: str
    source: str | None = None
    """The layer whose output it takes; None where that was not found."""
    fed: bool = True
    """Whether anything of the batch, or of a layer before it, goes into it."""
    joined: bool = False
    """Whether it takes the sum of that and of something else, or both side by side."""
    added: bool = False
    """Whether its weights are added to that output, or put beside it, as embeddings of positions are."""
    whole: float | None = None
    """Norm of the gradient at what its output is a part of, where it is put side by side with something else."""
    through: float | None = None
    """The largest share of the gradient at that output that can have come through this layer: the rest passes by it."""
    state_of: str | None = None
    """A recurrent layer, if it feeds nothing but the initial state of that."""
    barrier: Barrier | None = None
    """One that lies on every way from the layer to what the model gave."""
    peak: float | None = None
    """The mean of the largest weights of the softmax that it leads to; None where it leads to none that can be read."""


@dataclass(frozen=True, slots=True)
class Stray:
    """A tensor that got a gradient within the model, and that is none of its parameters and nobody's input."""

    number: int
    """The same at several probes where it is the same tensor."""
    shape: tuple[int, ...]
    parameter: bool
    """Whether it is an `nn.Parameter`."""
    kind: str = ""
    """Class of the module that holds it; "" where none that ran does."""
    training: bool = True
    """Whether that is in training mode."""
    weight_norm: float | None = None
    """Its L2 norm before the update; None where it was gone by then."""
    version: int = 0
    """How often it has been written to."""


@dataclass(frozen=True, slots=True)
class Squashed:
    """What a loss function takes for scores of any size, or for their logarithm, and lies between 0 and 1."""

    module: str
    """The one that gave it, or the nearest before it; "" where that is the model, or none."""
    by: Literal["softmax", "sigmoid"]
    """What made it."""
    into: Literal["softmax", "sigmoid", "nll"]
    """What the loss function makes of it: of "nll" it takes the logarithm to be there already."""
    classes: int
    """Over how many the loss function works; 1: each stands for itself."""
