"""What one training step measured, as frozen plain values."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from gradwatch.values.autograd import Cut, Flow, Squashed, Stray
from gradwatch.values.sequences import SequenceStats

Role = Literal["weight", "bias", "normalization", "embedding", "gain"]
"""What a parameter does: a matrix or kernel, an added vector, the gain of a normalization, a lookup table, any other
gain."""

Stage = Literal["before_clip", "applied"]
"""Whether the gradients were read before clipping, or as the optimizer consumed them."""

Absent = Literal["frozen", "unused", "disconnected", "unstepped"]
"""Why a parameter has no gradient: `requires_grad` is False; no forward pass that was seen used its
layer; its layer ran in the forward pass of this step and still nothing arrived; one is there, its module is in training
mode, and no optimizer that is watched steps it."""

Function = Literal["relu", "tanh", "sigmoid", "hardtanh", "softmax", "softsign", "clamp"]
"""An activation; "relu" is any whose output is exactly 0 where its derivative is."""

FactName = Literal[
    "silent_by_bias",
    "input_offset",
    "input_size",
    "spectral_norm",
    "spectral_radius",
    "forget_gate",
    "forget_bias",
    "input_gate",
    "input_bias",
    "cell_saturation",
    "update_gate",
    "saturation",
    "saturated_gates",
    "skip_connection",
    "far_smaller",
    "steps_behind",
    "chance",
    "cross_entropy",
]
"""What a `Fact` tells.

silent_by_bias: of the units that are 0 for every input, the share that would not be without their bias.
input_offset: norm of the input's mean over its spread; infinite where the input is the same for every sample.
input_size: root mean square of the input; of a standardized one it is 1.
spectral_norm, spectral_radius: of the largest weight; of a recurrent module, of W_hh.
forget_gate, update_gate: mean share of the state that the gates keep; forget_bias: mean of the forget gates' bias.
input_gate: mean share of what is new that an LSTM's gates let into its cell; input_bias: mean of their bias.
cell_saturation: share of an LSTM's cells whose tanh is in the outer 1 % of its range.
saturation: share of a tanh network's outputs above 0.98.
saturated_gates: share of a recurrent layer's gates and candidates (of an RNN, of its states) in the outer 1 % of their
range.
skip_connection: 1 where what a module takes or gives is a sum of something and of what was made from it.
far_smaller: share of a module's weights, zeros aside, that are below a two-hundredth of their root mean square.
steps_behind: how many times weights have been written to since the copy in another format was made that is used.
chance: the loss that equal scores for all classes would have, at the module that gives the scores; cross_entropy: what
it was, where all losses of the step are of that kind, their mean.
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
    trainable: bool | None = None
    """`requires_grad`, when the model was described; None: nobody wrote that down."""
    replaced: bool = False
    """Whether an optimizer has another in its place, none of the model's, which has never had a gradient."""

    @property
    def elements(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One step of depth: a module that owns parameters, or one of the layers inside of it."""

    name: str
    kind: str
    """Class name of the module."""
    order: int | None = None
    """Position in the forward pass; None until a probe has seen the layer run."""
    location: str | None = None
    """`file:line` of the user's class that holds the layer; None if it and all around it are of installed libraries."""
    within: str | None = None
    """The module that holds this layer beside others; None where the layer is the module."""

    @property
    def module(self) -> str:
        """Name of the module that owns its parameters: what runs, and what hooks see."""
        return self.name if self.within is None else self.within


@dataclass(frozen=True, slots=True)
class OptimizerInfo:
    """An optimizer that steps parameters of the model."""

    kind: str
    adaptive: bool
    """Whether it divides the gradient by a running measure of its size, as Adam does."""
    eps: float | None = None
    empty: int = 0
    """Groups of it that hold no parameter."""
    first_rate: float | None = None
    """The largest learning rate that it was made with, if a schedule has kept that."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What does not change from step to step; a new one is made when it does."""

    layers: tuple[LayerInfo, ...]
    parameters: tuple[ParameterInfo, ...]
    optimizers: tuple[OptimizerInfo, ...] = ()

    @property
    def unstepped(self) -> tuple[ParameterInfo, ...]:
        """The parameters that are to be trained and in no optimizer; none where no optimizer is watched."""
        if not self.optimizers:
            return ()
        return tuple(p for p in self.parameters if p.optimizer is None and p.trainable)

    def named(self, parameters: Collection[ParameterInfo], most: int = 6) -> str:
        """Name some of the parameters, by their layer where all of it is among them, in the order of the model."""
        among = set(parameters)
        whole = {p.layer for p in parameters if p.layer} - {p.layer for p in self.parameters if p not in among}
        names = list(dict.fromkeys(p.layer if p.layer in whole else p.name for p in parameters))
        more = len(names) - most
        return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")

    def is_like(self, other: ModelInfo) -> bool:
        """Tell whether layers and parameters of both have the same names, in the same order."""
        return self is other or (
            [x.name for x in self.layers] == [x.name for x in other.layers]
            and [p.name for p in self.parameters] == [p.name for p in other.parameters]
        )

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
    """Share of its entries that a bounded activation after it put into the outer 1 % of its range, at either end; of a
    softmax, share of the distributions of which one entry has 99 %."""
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


Phase = Literal["data", "weights", "forward", "backward"]
"""When a number came to be not finite: before the model took it; in an earlier step, which left it in the weights or
buffers; in the forward pass; on the way back."""

NotFinite = Literal["nan", "inf", "-inf"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where NaN or infinity came from in a step that was looked at."""

    phase: Phase
    module: str | None
    """The innermost module that it came up in, or that took or held it; None: outside of the model, in the loss
    function."""
    value: NotFinite
    argument: str = ""
    """Of "data", the argument of the module that held it."""
    operation: str = ""
    """What computed it; "" where only modules were looked at."""


@dataclass(frozen=True, slots=True)
class Silence:
    """Steps in a row, up to that of the snapshot, at which no parameter that is stepped had a gradient; or no step."""

    since: int
    """The first of them, of those that were measured."""
    steps: int
    """How many were measured; 0: not one step has come."""
    moved: bool | None = None
    """Whether parameters have changed since the first of them all the same; None: nobody knows."""
    told: int = 0
    """Where no step has come, how many steps another optimizer has made; or how many losses and readings came."""
    by: str = ""
    """The class of that optimizer."""
    watched: bool = False
    """Whether that one is watched too."""
    ended: bool = False
    """Whether the training is over."""
    nonfinite: bool = False
    """Where no step has come, whether gradients are NaN or infinite all the same."""


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
    origin: Origin | None = None
    """Where what was not finite in a probe came from, whether or not it reached a gradient."""
    silence: Silence | None = None
    """There where no parameter had a gradient: one snapshot stands for several such steps in a row."""
    loss_scale: float | None = None
    """The loss scale of the GradScaler that steps this optimizer, whoever divides it out; None where none was seen."""
    rate: float | None = None
    """The largest learning rate of the optimizer's groups; None where it has none."""
    left_over: float | None = None
    """Share of a gradient at this step that stood there before the forward pass, and that nobody zeroed: 0 where it was
    zeroed. None where nothing could be compared."""
    came: float | None = None
    """How far weights had come since the probe before, over what one step moves them (the smaller of the two probes'):
    1 or more, unless the steps are undone. The median over some of the weight matrices; None where nobody knows."""
    flows: tuple[Flow, ...] | None = None
    """Of layers in question, how the gradient comes to them."""
    strays: tuple[Stray, ...] | None = None
    """Tensors that the model uses as weights and does not own; None where none was seen, or nobody looked."""
    squashed: Squashed | None = None
    """What the loss takes between 0 and 1 and squashes once more; None where that is not so, or nobody looked."""
    crossed: int | None = None
    """How many forecasts the loss holds against as many targets, each against each, as broadcasting does; None as
    above.
    """

    @property
    def finite(self) -> bool:
        """Whether no gradient that there is holds NaN or infinity."""
        return all(n is None or math.isfinite(n) for n in self.norm)

    @property
    def norm_global(self) -> float | None:
        """L2 norm over all gradients together; None if there is none."""
        norms = [n for n in self.norm if n is not None]
        return math.hypot(*norms) if norms else None

    @property
    def update_global(self) -> float | None:
        """How far the step has moved all parameters together, over their norm; None where it was not measured.

        One that was 0 adds nothing: it has no size to compare with.
        """
        both = zip(self.update_ratio or (), self.weight_norm or (), strict=False)
        known = [(ratio * weight, weight) for ratio, weight in both if ratio is not None and weight]
        return math.hypot(*(u for u, _ in known)) / math.hypot(*(w for _, w in known)) if known else None

    @property
    def rms(self) -> Column:
        """Norm over the root of the number of entries: the size of a typical entry."""
        return tuple(
            None if n is None else n / math.sqrt(max(p.elements, 1))
            for n, p in zip(self.norm, self.model.parameters, strict=True)
        )
