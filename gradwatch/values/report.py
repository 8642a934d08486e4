"""Findings, the alerts they become, and what a step reports to the sinks."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gradwatch.values.snapshot import Snapshot

UNKNOWN = "cause not found"
"""What is said where a cause could be measured, and nothing was found."""


@functools.total_ordering
class Severity(enum.Enum):
    """How bad a finding is: INFO is shown and never fails anything, WARNING and ERROR do."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    def __lt__(self, other: Severity) -> bool:
        """Order by gravity."""
        order = list(Severity)
        return order.index(self) < order.index(other)


@dataclass(frozen=True, slots=True)
class Finding:
    """A detector's word on one snapshot: this condition holds here, now."""

    code: str
    """Stable code of the rule, such as GW101."""
    kind: str
    """vanishing-depth, exploding, disconnected, non-finite, ..."""
    severity: Severity
    place: str
    """Name of the module; "" is the whole model."""
    parameter: str | None = None
    lag: int | None = None
    onset: int | None = None
    """First step of the unbroken run of measured snapshots that show the condition, as far back as is remembered."""
    evidence: Mapping[str, float] = field(default_factory=dict)
    """The numbers it rests on, by name."""
    optimizer: int | None = None
    """The optimizer on whose snapshots it was found: only those can clear it."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the words need beside numbers: other modules, an activation, a number format."""
    cause: str = ""
    """What was measured to account for it, as a key of `gradwatch.detectors.cause_words.CAUSES`; "" where nothing
    was."""

    @property
    def key(self) -> tuple[str, str, str | None, int | None]:
        """What makes two findings the same alert."""
        return self.code, self.place, self.parameter, self.optimizer


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a finding means, in words."""

    message: str
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Alert:
    """A finding that began at a step, was last seen at another, and may have cleared at a third."""

    finding: Finding
    began: int
    last: int
    cleared: int | None = None
    message: str = ""
    cause: str = ""
    remedy: str = ""
    worst: Severity = Severity.INFO
    """The highest severity up to now."""

    @property
    def severity(self) -> Severity:
        """Severity of the newest finding."""
        return self.finding.severity

    @property
    def since(self) -> int:
        """Step at which it set in: the onset, where the finding knows one, or the step at which the alert began."""
        return self.began if self.finding.onset is None else self.finding.onset

    def __str__(self) -> str:
        """Return the alert as a colleague would say it, in one line."""
        parts = [f"{self.finding.code} {self.finding.kind}: {self.message}."]
        if self.cause:
            parts.append(
                f"{self.cause[0].upper()}{self.cause[1:]}."
                if self.cause.startswith("cause not ")
                else f"Likely cause: {self.cause}."
            )
        if self.remedy:
            parts.append(f"Try: {self.remedy}.")
        return " ".join(parts)


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What one measured step says: its numbers, and the alerts that began, worsened, are open, or cleared with it."""

    snapshot: Snapshot
    began: tuple[Alert, ...] = ()
    open: tuple[Alert, ...] = ()
    cleared: tuple[Alert, ...] = ()
    worsened: tuple[Alert, ...] = ()
    """Those that were open before, with a lower severity than ever until now."""

    def __repr__(self) -> str:
        """Return the step, how many parameters have a gradient, and the open alerts: what a notebook shows of it."""
        norm = self.snapshot.norm
        count = sum(one is not None for one in norm)
        title = f"Report of step {self.snapshot.step}: {count} of {len(norm)} parameters with a gradient"
        alerts = f"{len(self.open) or 'no'} open alert{'s' * (len(self.open) != 1)}"
        return "\n".join([f"{title}, {alerts}", *map(str, self.open)])


class GradientHealthError(AssertionError):
    """Raised by `assert_healthy`, and in training by `on_alert="raise"`; `alerts` are those that caused it."""

    __module__ = "gradwatch"  # where users find it, and what a traceback shows

    def __init__(self, message: str, alerts: Sequence[Alert] = ()) -> None:
        """Keep the alerts beside the text."""
        super().__init__(message)
        self.alerts = tuple(alerts)


class GradwatchWarning(UserWarning):
    """Something gradwatch could not do; training goes on without it."""


Sink = Callable[[Report], object]
"""Anything that takes the reports; `list.append` is one."""
