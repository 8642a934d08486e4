"""Whether what a model gives at one timestep depends on a later one: as numbers, and in one sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Leak:
    """One dependence on the future: of all that were found, that with the farthest timestep of the input."""

    output: int
    """Timestep of the output, from 0 on."""
    input: str
    """The way to the input, as "x" or "batch['prices']"."""
    at: int
    """Timestep of that input on which the output depends."""
    change: float
    """By how much the output changed when the future did, over its largest entry: infinite where that is 0."""
    gradient: float | None = None
    """Norm of the derivative of the output at that timestep by the input at `at`; None: there is none to take."""
    module: str = ""
    """The first module on the way whose own output leaks while what it takes does not; "" is the model itself."""
    kind: str = ""
    """Class of that module."""
    before: str | None = None
    """The module that takes what leaks already, where the fault is in what is computed around it."""
    cause: str = ""
    remedy: str = ""
    feature: str | None = None
    """Of `assert_causal_features`, the feature that is meant; the timesteps are rows."""

    @property
    def ahead(self) -> int:
        """How many timesteps ahead it looks."""
        return self.at - self.output

    def __str__(self) -> str:
        """Return it in one sentence."""
        if self.feature is not None:
            feature = f"feature {self.feature!r}" if self.feature else "the feature"
            return f"{feature} of row {self.output} depends on row {self.at}, {self.ahead} ahead"
        of = f" of {self.input}" if self.input else ""
        steps = f"{self.ahead} timestep{'s' if self.ahead != 1 else ''} ahead"
        return f"the output at timestep {self.output} depends on timestep {self.at}{of}, {steps}"


@dataclass(frozen=True, slots=True)
class Causality:
    """What `causal` has found: a leak, or none at the timesteps that were looked at."""

    timesteps: int
    """How many the inputs have."""
    inputs: tuple[str, ...]
    """Those whose future was changed; of features none."""
    positions: tuple[int, ...]
    """Timesteps of the output up to which it was compared, each with all that comes after it changed."""
    offset: int = 0
    """How many timesteps ahead an output may look."""
    training: bool = False
    """Whether the model ran in training mode."""
    leak: Leak | None = None
    rounding: float = 0.0
    """The largest change that shrank with the precision of the numbers, and so was none; over the largest entry."""
    notes: tuple[str, ...] = ()
    """What was left out, and what else is worth telling."""

    @property
    def causal(self) -> bool:
        """Whether no leak was found."""
        return self.leak is None

    def __str__(self) -> str:
        """Return the verdict, and what it cannot see."""
        mode = " in training mode" if self.training else ""
        beyond = f" more than {self.offset} timesteps ahead" if self.offset > 0 else ""
        if self.leak is not None:
            text = f"looks ahead{mode}: {self.leak}"
        elif not self.inputs:
            text = f"causal: no feature of a row changed when later ones were gone, at {len(self.positions)} rows"
        else:
            text = (
                f"causal{mode}: no output up to a timestep changed when {' and '.join(self.inputs)}"
                f"{beyond} after it did, at {len(self.positions)} of {self.timesteps} timesteps"
            )
        return ". ".join([text, *self.notes])
