"""What came of remedies, and whether they helped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch import nn

from gradwatch.checks.batch import refuse
from gradwatch.checks.cures.changes import NotTried
from gradwatch.checks.cures.trial import Outcome
from gradwatch.detectors.remedies import NOT_TRIED, Remedy
from gradwatch.values.report import Alert
from gradwatch.values.sequences import Horizon
from gradwatch.values.trials import CURE_MARGIN, HORIZON_LONGER

_SHOWN = 4
"""Lines of code that are shown of one remedy."""


@dataclasses.dataclass(frozen=True)
class Cure:
    """One remedy against one alert: what came of it."""

    alert: Alert
    remedy: Remedy
    """What was to be tried: an action, places, a value; `str(remedy)` is that in a few words."""
    lines: tuple[str, ...]
    """What a user would change in the code, each line with + or - before it; `model` is the model."""
    before: Outcome
    """Of the untouched twin."""
    after: Outcome | None
    """None where it was not tried."""
    why_not: str = ""
    """Why it was not tried."""
    change: Callable[[nn.Module], object] | None = dataclasses.field(default=None, repr=False, compare=False)
    """What `apply` does; None for what changes the training loop, and what was not tried."""

    @property
    def gone(self) -> bool:
        """Whether the alert is not there any more."""
        if self.after is None:
            return False
        if self.alert.finding.code == "GW301":
            evidence = self.alert.finding.evidence
            return long_enough(self.after.horizon, evidence.get("need", evidence["length"]))
        return all(alert.finding.code != self.alert.finding.code for alert in self.after.alerts)

    @property
    def helped(self) -> bool:
        """Whether it helped: the alert is gone, or its horizon is much longer, and the loss is not worse for it.

        Against an alert that is not about time it also helped if the loss is lower, though the alert stays.
        """
        if self.after is None:
            return False
        better, about_time = self._better(), self.alert.finding.code == "GW301"
        return (self.eased and better >= 0) or (better > 0 and not about_time)

    @property
    def eased(self) -> bool:
        """Whether the alert is gone, or its horizon is much longer; the loss may be worse for it."""
        old, new = self.before.horizon, None if self.after is None else self.after.horizon
        if self.alert.finding.code != "GW301" or old is None or new is None:
            return self.gone
        return self.gone or new.timesteps >= HORIZON_LONGER * old.timesteps

    def _better(self) -> int:
        """Tell whether the loss is lower than that of the twin (1), higher (-1), or much the same (0)."""
        if self.after is None or self.before.loss is None or self.after.loss is None:
            return 0
        was, now = self.before.loss, self.after.loss
        if not math.isfinite(now):
            return -1  # also than one that is not finite: it has not helped
        if not math.isfinite(was):
            return 1 if self.before.first is None or now <= self.before.first else 0
        fell = max(abs((self.before.first or 0.0) - min(was, now)), 1e-12 * abs(was))
        return 0 if abs(was - now) <= CURE_MARGIN * fell else 1 if now < was else -1

    def apply(self, model: nn.Module) -> None:
        """Do it to a model in place: one of the same modules and names as that which it was tried on.

        An optimizer that was made before does not know of parameters that are new: make it after this.

        Raises:
            ValueError: it is a change of the training loop, or was not tried.

        """
        if self.change is None:
            what = f"was not tried: {self.why_not}" if self.why_not else "is a change of the training, not of the model"
            raise ValueError("\n".join([f"'{self.remedy}' {what}", *self.lines]))
        refuse(model, None)
        try:
            self.change(model)
        except NotTried as error:
            raise ValueError(f"'{self.remedy}' cannot be done to this model: {error}") from error

    def __str__(self) -> str:
        """Return remedy, outcome and verdict in one line."""
        if self.after is None:
            return f"not tried: {self.remedy}: {self.why_not}"
        verdict = "helped" if self.helped else "helped, but not the loss" if self.eased else "did not help"
        return f"{verdict}: {self.remedy}: {', '.join(self._numbers(self.after))}"

    def _numbers(self, after: Outcome) -> list[str]:
        said = []
        if self.alert.finding.code == "GW301" and self.before.horizon is not None and after.horizon is not None:
            length = after.sequences.length if after.sequences is not None else 0
            said.append(f"horizon {self.before.horizon.timesteps} -> {after.horizon.timesteps} of {length}")
        else:
            said.append(f"{self.alert.finding.code} {'is gone' if self.gone else 'stays'}")
        if self.before.loss is not None and after.loss is not None:
            said.append(f"loss at the end {self.before.loss:.3g} -> {after.loss:.3g}")
        known = {alert.finding.code for alert in self.before.alerts} | {self.alert.finding.code}
        new = sorted({a.finding.code for a in after.alerts} - known)
        return [*said, f"new: {', '.join(new)}"] if new else said


@dataclasses.dataclass(frozen=True)
class Cures:
    """What was found, what was tried against it, and what helped."""

    alerts: tuple[Alert, ...]
    cures: tuple[Cure, ...]
    steps: int | None
    """How many steps each copy was trained; None where nothing was."""

    @property
    def best(self) -> Cure | None:
        """The remedy that helped most: of those that helped, that with the lowest loss; None where none did.

        Where nothing was trained, that after which the alert is gone, or the horizon is longest.
        """

        def rank(cure: Cure) -> tuple[float, bool, float]:
            after = cure.after
            assert after is not None  # it was tried
            reach = after.horizon.timesteps if after.horizon is not None else 0
            return (math.inf if after.loss is None else after.loss, not cure.gone, -float(reach))

        return min((cure for cure in self.cures if cure.helped), key=rank, default=None)

    def __str__(self) -> str:
        """Return a list of all alerts, each with its remedies and what came of them."""
        if not self.alerts:
            return "nothing to cure: no alert of severity warning or higher" + (
                f" in {self.steps} steps" if self.steps is not None else ", measured on one batch"
            )
        trained = "measured again on copies of the model"
        if self.steps is not None:
            trained += f", each trained for {self.steps} steps beside an untouched twin, on the same batches"
        lines = [trained]
        for alert in self.alerts:
            lines += ["", f"{alert.finding.code} {alert.finding.kind}: {alert.message}"]
            mine = [cure for cure in self.cures if cure.alert is alert]
            for cure in mine:
                lines.append(f"  {cure}")
                lines += [f"      {line}" for line in cure.lines[:_SHOWN]]
                if len(cure.lines) > _SHOWN:
                    lines.append(f"      ... and {len(cure.lines) - _SHOWN} lines more")
            if not mine:
                why = NOT_TRIED.get(alert.finding.cause, "no remedy of it is a change of the model")
                lines.append(f"  nothing tried: {why}; {alert.remedy}")
        best = self.best
        lines += ["", f"best: {best.remedy} ({best.alert.finding.code})" if best else "best: none of these helped"]
        return "\n".join(lines)

    __repr__ = __str__


def long_enough(found: Horizon | None, need: float) -> bool:
    """Tell whether a horizon meets a need."""
    return found is not None and (found.censored or max(found.timesteps, found.high) >= need)
