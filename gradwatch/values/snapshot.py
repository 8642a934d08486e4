"""What one training step measured, as frozen plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gradwatch.values.sequences import SequenceStats

Role = Literal["weight", "bias", "normalization", "embedding", "gain"]
"""What a parameter does: a matrix or kernel, an added vector, the gain of a normalization, a lookup table, any other
gain."""

Stage = Literal["before_clip", "applied"]
"""Whether the gradients were read before clipping, or as the optimizer consumed them."""

Absent = Literal["frozen", "unused", "disconnected"]
"""Why a parameter has no gradient: `requires_grad` is False; no forward pass that was seen used its
layer; its layer ran in the forward pass of this step and still nothing arrived."""

Function = Literal["relu", "tanh", "sigmoid", "hardtanh", "softmax"]
"""An activation; "relu" is any whose output is exactly 0 where its derivative is."""

CutKind = Literal["between", "inside", "own", "unused", "outside", "checkpoint"]
"""How a layer that ran is without a gradient.

between: it ends between two modules. inside: what the layer gave has one, and its weights, which are all that it holds,
have none. own: the same of a module that also holds layers, and does without its own weights, or gave what it took.
unused: nothing was seen to take what it gave. outside: what it gave left the model, and does not come into the loss.
checkpoint: a reentrant checkpoint ran it over inputs that need no gradient.
"""

BarrierKind = Literal["softmax", "layer_norm", "group_norm"]
"""An operation that gives the same whatever it takes: softmax of one value, a normalization of one or two."""

FactName = Literal[
    "silent_by_bias",
    "input_offset",
    "spectral_norm",
    "spectral_radius",
    "forget_gate",
    "forget_bias",
    "update_gate",
    "saturation",
    "input_size",
]
"""What a `Fact` tells.

silent_by_bias: of the units that are 0 for every input, the share that would not be without their bias.
input_offset: norm of the input's mean over its spread; infinite where the input is the same for every sample.
spectral_norm, spectral_radius: of the largest weight; of a recurrent module, of W_hh.
forget_gate, update_gate: mean share of the state that the gates keep; forget_bias: mean of the forget gates' bias.
saturation: share of a tanh network's outputs above 0.98.
input_size: the largest absolute entry of what a layer took; 0 where that is zero all over.
"""

Column = tuple[float | None, ...]
"""One number per entry of `ModelInfo.parameters`; None where there is no gradient, which is never 0."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter of the watched model; tied parameters stand once, under their first name."""

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    optimizer: int | None
    """Index into `ModelInfo.optimizers`; None if no watched optimizer steps it."""
    role: Role

    @property
    def elements(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A module that owns parameters."""

    name: str
    kind: str
    """Class name of the module."""
    order: int | None = None
    """Position in the forward pass; None until a probe has seen the layer run."""
    location: str | None = None
    """`file:line` of the user's class that holds the layer; None if it and all around it are of installed libraries."""


@dataclass(frozen=True, slots=True)
class OptimizerInfo:
    """An optimizer that steps parameters of the model."""

    kind: str
    adaptive: bool
    """Whether it divides the gradient by a running measure of its size, as Adam does."""
    eps: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What does not change from step to step; a new one is made when it does."""

    layers: tuple[LayerInfo, ...]
    parameters: tuple[ParameterInfo, ...]
    optimizers: tuple[OptimizerInfo, ...] = ()

    @property
    def forward_order(self) -> tuple[int, ...]:
        """Numbers of the layers in the order of the forward pass; those that never ran come last."""
        return tuple(
            sorted(range(len(self.layers)), key=lambda i: math.inf if (at := self.layers[i].order) is None else at)
        )


@dataclass(frozen=True, slots=True)
class ActivationStats:
    """A module that gave something in a probe."""

    module: str
    grad_norm: float | None = None
    """L2 norm of the gradient of what it gave; None where none came, or several backward passes brought parts of it."""
    dead: float | None = None
    """Share of its units that a ReLU-like activation after it left at 0 for every input of many probes, for longer than
    chance explains."""
    saturated: float | None = None
    """Share of its entries that a bounded activation after it put into the outer 1 % of its range, at either end."""
    units: int | None = None
    """Features, or channels."""
    scaled: bool = False
    """Whether an unknown factor (a loss scale) is on the norm, or cannot be excluded."""
    function: Function | None = None
    """The activation that its output goes through; None where none was seen."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A number measured at a module, that may be the cause of what is wrong there."""

    place: str
    """Name of the module."""
    name: FactName
    value: float
    part: str = ""
    """"" is the module as a whole; "l0", "l0_reverse", ... a layer and direction of a recurrent one."""


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
    through: float | None = None
    """The largest share of the gradient at that output that can have come through this layer: the rest passes by it."""
    state_of: str | None = None
    """A recurrent layer, if it feeds nothing but the initial state of that."""
    barrier: Barrier | None = None
    """One that lies on every way from the layer to what the model gave."""
    peak: float | None = None
    """The mean of the largest weights of the softmax that it leads to; None where it leads to none that can be read."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The numbers of one executed optimizer step. Columns run along `model.parameters`.

    A column that is None was not taken in this step. An entry that is None has no gradient, or belongs
    to a parameter that this optimizer does not step; None is never 0.
    """

    step: int
    wall_time: float
    """Seconds since the epoch."""
    model: ModelInfo
    optimizer: int | None = None
    """Index into `model.optimizers`; None if the loop has no optimizer object."""
    stage: Stage = "applied"
    loss: float | None = None
    """Mean unscaled loss of the step; None if the loop did not tell."""
    scale: float | None = None
    """The loss scale that was divided out of the gradients."""
    clip_factor: float | None = None
    """Global norm as applied over global norm before clipping."""
    skipped: bool = False
    """Whether a GradScaler skipped the update."""
    norm: Column = ()
    """L2 norm of the gradient, exact to 1e-6 over the range of its format."""
    nonfinite: Column | None = None
    """Number of NaN and infinite entries, counted where the norm is not finite."""
    weight_norm: Column | None = None
    """L2 norm of the parameter before the update."""
    zeros: Column | None = None
    """Share of entries of the gradient that are exactly 0."""
    subnormal: Column | None = None
    """Share of the non-zero entries below the smallest normal number of the computing dtype."""
    update_ratio: Column | None = None
    """`||after - before|| / ||before||` of the parameter in this step; infinite if it was 0 and moved."""
    absent: tuple[Absent | None, ...] | None = None
    """Why there is no gradient. An entry also stands beside a norm of exactly 0, which `zero_grad(set_to_none=False)`
    leaves to a layer that did not run."""
    activations: tuple[ActivationStats, ...] | None = None
    sequences: tuple[SequenceStats, ...] | None = None
    facts: tuple[Fact, ...] | None = None
    notes: tuple[str, ...] = ()
    lost: Column | None = None
    """Share of the entries with a gradient that the step left as they were;
    of parameters in a format of less than 32 bits."""
    cuts: tuple[Cut, ...] | None = None
    """Of layers in question, where the gradient ended."""
    computed_in: str | None = None
    """The format that computed the gradients, where it is another than that of the parameters
    ("float16" under autocast)."""
    flows: tuple[Flow, ...] | None = None
    """Of layers in question, how the gradient comes to them."""

    @property
    def norm_global(self) -> float | None:
        """L2 norm over all gradients together; None if there is none."""
        norms = [n for n in self.norm if n is not None]
        return math.hypot(*norms) if norms else None

    @property
    def rms(self) -> Column:
        """Norm over the root of the number of entries: the size of a typical entry."""
        return tuple(
            None if n is None else n / math.sqrt(max(p.elements, 1))
            for n, p in zip(self.norm, self.model.parameters, strict=True)
        )
