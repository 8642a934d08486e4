"""Every number that a verdict rests on, with its source."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

HORIZON_GAIN = 1e-3
"""Share of its maximum below which a lag gain counts as gone: 60 dB, where a gradient is lost beside the noise of the
newest timesteps'."""
USED = 0.05
"""Share of the variance of an output, to first order, that may come from timesteps that do not count as used."""
INTERVAL = 2
"""How many times its beginning the end of a horizon's interval may be: beyond that it is not measured."""

# --- what is compared with what ---

KEPT = 50
"""Snapshots and losses that are remembered, per optimizer; over so many losses a loss stands still."""
EDGE = 5
"""Losses, ratios and norms over whose median a level is taken: a single batch proves nothing."""
PROBES = 8
"""Probes that saw sequences which are remembered, per optimizer: hundreds of measured snapshots may lie between two."""
GIVEN_BACK = 0.5
"""Share of what the loss has gained that it may lose again and still count as improved."""
LOSS_SCATTER = 2.5
"""Median steps of the logarithm of the loss by which a jump must exceed its limit: of batches of one sample the loss
wavers by a factor of 7 from step to step (that of a squared normal number), of batches of 32 by 1.2."""
ORDINARY_SENSITIVITY = 10.0
"""Largest sensitivity over the first loss of gradients that are not exploded: healthy networks begin at 0.1 to 42."""
ORDINARY_GAIN = 1 / math.sqrt(3)
"""Gain of weights as torch itself initializes them (`torch.nn.Linear`). An update is held against the weights, or
against weights of that gain where they are smaller: what begins near 0 has to grow by many times itself."""
ORDINARY_STEP = 1e-3
"""Share of themselves by which a step changes weights, as a rule of thumb."""
OPENING_FLOOR = 0.01
"""A layer that is opening must have come within this share of its limit: below it, noise rises and falls too."""
BETWEEN_PROBES = 0.3
"""Share of the steps between probes at which a layer must get a gradient not to be dead; a rare outlier that wakes a
dead layer for a step does not revive it."""
UPDATE_PROBES = 3
"""Probes of a window at which a weight must change by more than itself, where no single change is large enough."""
LEFT_OUT = 0.5
"""Share of the parameters that are to be trained from which on it is meant that no optimizer steps them: tuning by
heads, norms, biases or prompts alone leaves out most. Also of those that fall silent."""
NAMED = 4
"""Shapes that an alert names; it says so where there are more."""
STEPLESS = 300
"""Losses, or readings of gradients, without a step from which on none comes: published trainings accumulate 256."""
RESTING = 150
"""Measured steps of others before which an optimizer need not step: critics are trained ahead by up to 100 (WGAN)."""
MIXED_ROWS = 0.3
"""How much a row's data moves outputs of other rows, beside its own, where rows are mixed up: by view() 0.6 to 1."""
CONSTANT_LOSS = 1e-6
"""Share of itself by which a loss varies that is the same for all batches: some units in the last place of float32."""
FAINT_INPUT = 1e-3
"""Root mean square of an input that is next to nothing: standardized it is 1, of pixels 0.5, of daily returns 0.01."""
WORSE_THAN_CHANCE = 3.0
"""Times the loss of equal scores that a model may have, for a while: pretrained ones that are sure and wrong do so."""
FALLING = 2.0
"""Standard errors by which the slope of the last 50 losses must be below 0 to be a fall: by chance once in 40."""
SLOW_STANDING = 2e-4
"""An update over the weights below which it may be the rate that leaves a loss where it is: a fifth of the usual."""
HALF_DIGITS = 11
"""Binary digits of a float16; a bfloat16 has 8."""
ROUNDING_SENSITIVITY = 1e-5
"""Sensitivity below which a gradient may be rounding where the loss is exactly 0, and tells of no size."""
TOLD = 10.0
"""Times `CONSTANT_LOSS` by which each step should change a loss, by its gradient, that does not change at all."""
RUN_AWAY = 1e4
"""Times its early size that a loss below 0 has gone on, to have no lower end: a log density gets to some hundred."""
MUCH = 0.25
"""Share of the layers whose output nobody takes that a model can hardly do without; a pooler is one of twenty."""
AMONG_OTHERS = 0.01
"""Share of the largest layer's gradient from which on a layer's is no small one."""
ZERO_STEPS = 0.1
"""Share of the steps at which its gradient must be exactly zero: what is just saturated passes something, always."""
UNMOVED = 2.0**-24
"""An update over the weights that leaves them where they are: half a unit in the last place of a float32, to which most
entries are rounded back; also the smallest float16 above 0. A rule of thumb for what trains is 1e-3."""
LOOKS_AT_LOSS = 3
"""Probes, the newest, in which a loss function is looked for: several losses may take turns."""
STANDING_PROBES = 3
"""Probes in a row at which no weight must have moved: steps 1, 10 and 20, which outlasts a warm-up's first rates."""
LEFT_OVER = 1e-2
"""Share by which a gradient must differ from what arrived in the backward pass before something else is in it; sums in
another order differ by a tenth of that. Where nothing is zeroed, half of the gradient of the second step is old."""
LEFT_OVER_PROBES = 2
"""Probes in a row at which a gradient must hold what was there before: once, somebody may have meant it."""
SAME_NORM = 1e-3
"""Share by which norms, or factors of clipping, differ and are one number still: batches scatter by far more."""
LINE_LAYERS = 6
"""Layers from which on a line through their gradients says something."""
LINE_CORRELATION = 0.8
"""Correlation from which on it is a line: growth by depth, and not a few layers of another scale."""
GROWTH_LAGS = 10
"""Lags over which a gain must have grown: over fewer it is a step, not a law."""
GROWTH_TO_INFINITY = 1e3
"""Growth before infinity that makes it an explosion: a derivative that does not exist comes without any."""

# --- what accounts for a fault ---

TANH_GAIN = 5 / 3
"""Gain of the weights that keeps a signal's variance through tanh (`torch.nn.init.calculate_gain`)."""
NEEDED_GAIN: Mapping[str, float] = {
    "relu": math.sqrt(2),
    "tanh": TANH_GAIN,
    "hardtanh": TANH_GAIN,
    "sigmoid": 4.0,
}
"""Gain of the weights that keeps a gradient through the activation as large as it was, 1 for others (He, 2015; Glorot,
2010). The derivative of the sigmoid is at most a quarter."""
ENOUGH_GAIN: Mapping[str, float] = {"tanh": TANH_GAIN}
"""Gain with which a bounded activation is not saturated, 1 for others (`torch.nn.init.calculate_gain`)."""
LARGE_GAIN = 3.0
"""A gain over what is needed that accounts for saturation or an explosion: initializations differ by less."""
SMALL_GAIN = 0.7
"""A gain over what is needed that counts as small where layer upon layer has it; 0.71, which Xavier initialization
gives a ReLU network, is not yet small."""
ACCOUNTED_FOR = 0.5
"""Share of the missing orders of magnitude that small gains must make up to be named as the cause: the larger part."""
EXPANDING = 1.05
"""Spectral radius of a recurrent matrix that accounts for an explosion: over 100 timesteps it makes a factor of 130,
and an identity matrix that has been trained for a step is not yet there."""
FAR_SMALLER, OF_TWO_SIZES = 5e-3, 0.05
"""Share of their root mean square below which weights are far smaller than others, and how many of them are where they
have two sizes: of normal numbers it is 0.004 of them, of 25 of which six are -10,000 all others."""
SPIKE, SPIKES = 30.0, 5
"""Times the median that make a gradient norm a spike, and how many of `KEPT` are the rule; of one sample it is 7."""
BEYOND_LOSS = 10.0
"""Times as far above its median as the loss above its own that a spike is: of a quotient it is the square."""
ROUNDED = 1e-6
"""Sensitivity over the largest after it that may be rounding alone: eight units in the last place of a float32."""
BEHIND = 10
"""Writes to weights since the copy was made that is used: within a step, of optimizers that take turns, one or two."""
SHRUNK = 0.01
"""Share of the learning rate that an optimizer was made with below which a schedule has taken nearly all of it."""
UNDONE, UNDONE_PROBES = 0.5, 3
"""How far weights must have come since the probe before, in steps, and at how many probes in a row. In 140 trainings,
sound and faulty, no probe was below 0.9 but of one that had converged to the last digit; where averages were copied
over the weights, or these were rounded to 4 bits, they were below 0.06."""
FEW_DEAD = 4
"""Dead units below which most of a layer is but a handful: of the four units of a squeeze, two or three often rest."""
MOSTLY_DEAD = 0.95
"""Share of dead units, or of saturated entries, that accounts for a gradient of nothing."""
MOSTLY_FLAT = 0.4
"""Share of saturated entries that accounts for a gradient that is nearly gone: they pass at most 4 % of it, and layer
upon layer has them. Also of the losses that are not finite: one batch in four may well have no target."""
OFF_CENTRE = 5.0
"""Mean of an input over its spread that counts as off-centre: standardized it is 0, of pixels in [0, 1] 2 or less."""
LARGE_INPUT = 10.0
"""Root mean square of an input that accounts for saturation: the usual initializations keep a signal at 1."""
KICK = 0.3
"""An update over the weights that can move a layer's units out of reach: 1e-3 a step is the rule of thumb."""
SOUND_UPDATE = 0.01
"""An update over the weights to which too large a rate is to come down: of healthy first steps it is 0.005 to 0.1."""
KICK_LASTS = 200
"""Steps for which such an update is remembered as a cause: those of the beginning, where updates are largest."""
BY_BIAS = 0.5
"""Share of the silent units that their bias alone keeps silent, from which on it is the cause: the larger part."""
GATE_BIAS_NEAR = 0.7
"""How near a gate's bias is to what a need asks for to count as set: the log of 2, a memory of half as long."""
MISREAD_PROBES = 2
"""Probes in a row at which a recurrent module must read its padding or its batch in place of its data."""
SATURATED_OUTPUTS = 0.1
"""Share of saturated outputs of a recurrent network that is worth a word."""
OUTER_SHARE = 0.01
"""Share of its range at each end where a bounded activation is saturated: tanh passes 4 % there, the sigmoid 1 %."""
SILENT_ENTRIES = 64.0
"""Entries in a row for which a unit must be silent before it counts as dead: two batches of 32."""
SILENT_SPELLS = 7.0
"""The same, in entries between two that are not silent of the layer's other units: by chance once in 1,000 (e^-7)."""

PASSED_BY = 0.2
"""Share of the gradient at what a layer takes that can have come through it, at most, for it to be passed by. In a
chain of layers it is 1 or more, because the Frobenius norm is an upper bound; of queries, keys and gates of stock
transformers of width 32, while they are below the limit of vanishing, it was 1e-6 to 0.1."""
JUNCTION = 100.0
"""Sensitivity over that of the layer before, from which on a gradient is lost at one place and not layer by layer: a
sigmoid with weights a tenth of what it needs loses 40 times."""

LARGEST_EXPONENT = 700.0
"""`math.exp` of more overflows a float64, at 709.8."""


@dataclass(frozen=True)
class Thresholds:
    """The numbers behind the verdicts; all are free of units unless they say otherwise.

    Every field is a plain number, so the whole can be written in YAML. `layers` overrides those of `PER_LAYER` for the
    layers whose name matches a pattern: `Thresholds(layers={"encoder.*": {"vanishing_ratio": 1e-5}})`.

    Raises:
        TypeError: a value is not a number, or not a whole one where it counts something.
        ValueError: a number is out of its range, or an override names a field that is not looked up for each layer.

    """

    window: int = 20
    """Measured snapshots over which a condition must hold. 20 outlasts the noise of single batches and the
    first steps of a warm-up (research of the labelled runs in benchmarks/)."""
    share: float = 0.8
    """Share of the window in which it must hold."""
    clear_factor: float = 3.0
    """An open alert clears only once its number is better than the limit by this factor: hysteresis."""
    clear_share_factor: float = 1.5
    """The same for limits that are a share of the whole, which has no room for a factor of 3."""

    vanishing_ratio: float = 1e-3
    """A layer's sensitivity over the largest of the layers after it. AutoTrainer (ICSE 2021) takes the same
    1e-3 for first over last kernel; the square of 1e-3 is below the noise of a mini-batch gradient."""
    vanishing_ratio_adaptive: float = 1e-4
    """The same under Adam-like optimizers, which give small gradients steps of full size."""
    vanishing_sound: float = 1e-2
    """A layer whose ratio once reached this was sound; if it fades later, the loss decides."""
    vanishing_hopeless: float = 1e-6
    """A ratio below which a loss that has come down is no evidence for a layer that never was sound: float32 keeps
    seven digits, so such a layer's updates are lost beside the noise of the others'."""
    vanishing_rising: float = 3.0
    """Not vanishing while the last third of the window is this much above the first third: it is opening."""
    flat_sensitivity: float = 1e-4
    """The largest sensitivity over |loss|: below it, and with a loss that stands still, nothing learns."""
    norm_below: float | None = None
    """Absolute norm of a layer's gradient below which it counts as vanished; in the units of the loss, so off."""

    explosion_growth: float = 100.0
    """Global norm over the median of its own first window."""
    explosion_update: float = 1.0
    """A weight that changes by more than itself in one step."""
    explosion_update_at_once: float = 30.0
    """A change so large that one is enough."""
    explosion_loss: float = 20.0
    """Median of the last losses over the best level before: a jump that lasts."""
    explosion_hopeless: float = 1e6
    """Growth through time from which on a loss that has come down is no excuse: float32 keeps seven digits, so beside
    the oldest timesteps the newest no longer count. The counterpart of `vanishing_hopeless`."""
    explosion_depth: float = 300.0
    """Growth of the gradient at what layers give, from the last to the first, built up over several of them. Twelve
    ReLU layers at twice He initialization grow 1,400 times; of 217 healthy labelled runs none more than 51 times."""
    explosion_depth_at_once: float = 1e4
    """A growth so large that one probe is enough: before the second, the first steps have thrown the weights."""
    explosion_depth_gap: float = 0.7
    """Share of that growth, in orders of magnitude, that a single layer may account for: more, and it is a matter of
    that layer's scale, not of depth."""
    explosion_sensitivity: float = 1 / ORDINARY_STEP
    """The largest sensitivity over the loss in the first steps: from here on an ordinary step moves the loss by more
    than itself. Healthy labelled runs stay below 160."""
    norm_above: float | None = None
    """Absolute global norm above which it counts as exploded; in the units of the loss, so off."""

    improved: float = 0.7
    """The loss has improved when the median of the last 5 is below this share of that of the first 5."""
    disconnected_steps: int = 10
    """Measured snapshots without any gradient before a layer that ran counts as disconnected."""
    dead_units: float = 0.6
    """Share of a layer's units that are silent for every input. Of a sound ReLU layer up to 0.4 may be (research of
    the labelled runs); DeepDiagnosis and SageMaker's rule take 0.5 of one batch."""
    dead_probes: int = 3
    """Probes in a row at which they must be: 20 steps at the beginning of a run, which outlasts the first updates."""
    flushed: float = 0.5
    """Share of the gradient's entries that are exactly 0, where nearly all others are too small for the format."""
    flushed_small: float = 0.9
    """Share of the entries that are not 0 which must be below the smallest normal number of the format: zeros of ReLU
    and embeddings stand beside large ones."""
    clipped: float = 1e-3
    """Share of the gradient that clipping leaves, below which it takes nearly everything: clipping that tames spikes
    leaves a tenth, that of a loss scale times the gradient 1e-5."""
    slow_update: float = 1e-5
    """An update over the weights at which nothing is learned in the steps of a training: 1e-3 is a rule of thumb, and
    ten thousand steps of 1e-5 in one direction move a weight by a tenth of itself."""
    ordinary_update: float = 1e-3
    """An update over the weights of ordinary size: the rule of thumb. Beside it a layer below `slow_update` stands."""
    skipped_share: float = 0.2
    """Share of the last steps that a GradScaler may skip, in each half of what is remembered. It grows its scale every
    2,000 steps, and one that is told to grow it every ten skips one in eleven."""
    lost_updates: float = 0.5
    """Share of low-precision weights that have a gradient and that a step leaves as they were."""
    below_epsilon: float = 1 / 3
    """Root mean square of the gradient over the optimizer's epsilon; at a third of it steps are a quarter of what
    they should be."""
    underflow_probes: int = 2
    """Probes in a row at which entries must be flushed or updates lost."""
    stalled_after: int = 200
    """Measured snapshots before a loss may be said to stand: slow training is no fault."""
    stalled: float = 0.01
    """Share of itself by which the loss may move in 50 measured steps and still stand."""
    skipped_steps: int = 25
    """Steps in a row that a GradScaler may skip; it halves the scale each time, and 2^25 outlasts float16."""
    horizon_gain: float = HORIZON_GAIN
    """Share of its maximum below which the lag gain counts as gone."""
    horizon_probes: int = 4
    """Probes in a row at which the horizon must be too short. Four separated the labelled runs that never learn from
    those that open in time."""
    horizon_rising: float = 1.5
    """Not too short while the newest of these horizons is this much above the oldest: it is opening. More than the
    step by which estimates differ."""
    horizon_share: float = 0.5
    """Share of the sequence; where nobody has declared a need, a horizon of at most that is worth a word, and never
    more than info."""
    horizon_met: int = 2
    """Probes in a row that must reach the need before an open finding clears: hysteresis, in place of a factor,
    because a need met is met."""
    explosion_time: float = 1e4
    """Growth of the gain by lag, along its fitted line up to its maximum. What trains well stays below: a recurrent
    matrix of 1.08 times the identity, clipped, grows 50 times in 60 timesteps, two LSTM layers with wide open forget
    gates 700 times in 500; 1.2 times the identity 30,000 times in 60."""

    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every number."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "layers" or (value is None and f.default is None):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Thresholds.{f.name} must be a number, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"Thresholds.{f.name} must be finite and above 0, got {value!r}")
            if f.name in _COUNTS and not isinstance(value, int):
                raise TypeError(f"Thresholds.{f.name} must be a whole number, got {value!r}")
        for name in (
            "share",
            "horizon_gain",
            "horizon_share",
            "dead_units",
            "flushed",
            "flushed_small",
            "lost_updates",
            "clipped",
            "skipped_share",
            "explosion_depth_gap",
        ):
            if getattr(self, name) > 1:
                raise ValueError(f"Thresholds.{name} must be at most 1, got {getattr(self, name)!r}")
        self._check_layers()

    def _check_layers(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"Thresholds.layers must map patterns of layers to fields and numbers, got {self.layers!r}")
        for pattern, numbers in self.layers.items():
            if not isinstance(pattern, str) or not isinstance(numbers, Mapping):
                raise TypeError(
                    f"Thresholds.layers must map patterns of layers to fields and numbers, got {pattern!r}: {numbers!r}"
                )
            unknown = [name for name in numbers if name not in PER_LAYER]
            if unknown:
                raise ValueError(
                    f"Thresholds.layers[{pattern!r}] must name fields that are looked up for each layer"
                    f" ({', '.join(PER_LAYER)}), got {', '.join(unknown)}"
                )
            dataclasses.replace(self, layers={}, **numbers)  # type: ignore[arg-type]  # which checks them

    def of(self, *names: str) -> Thresholds:
        """Return the thresholds that hold for a layer of these names: the last pattern that matches one wins."""
        mine = {
            k: v
            for pattern, numbers in self.layers.items()
            if any(fnmatch.fnmatchcase(name, pattern) for name in names)
            for k, v in numbers.items()
        }
        return dataclasses.replace(self, layers={}, **mine) if mine else self  # type: ignore[arg-type]  # all checked


_COUNTS = (
    "window",
    "disconnected_steps",
    "skipped_steps",
    "horizon_probes",
    "horizon_met",
    "dead_probes",
    "underflow_probes",
    "stalled_after",
)
PER_LAYER = (
    "vanishing_ratio",
    "vanishing_ratio_adaptive",
    "vanishing_sound",
    "norm_below",
    "dead_units",
    "horizon_gain",
    "horizon_probes",
    "horizon_rising",
    "horizon_share",
    "horizon_met",
    "explosion_time",
)
"""The fields that a layer may have of its own; the others are of the run, or of all of its layers together."""
