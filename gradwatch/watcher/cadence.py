"""Which steps are measured, and which of those are probes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """A rhythm of steps, which count from 0; None is the default one."""

    every: int | None = None
    probe_every: int | None = None

    def measured(self, step: int) -> bool:
        """Tell whether gradients are read: at the first 200 steps, then every 10th, or every n-th; at each probe."""
        if self.every is None:
            return step < 200 or step % 10 == 0 or self.probed(step)
        return step % self.every == 0 or self.probed(step)

    def probed(self, step: int) -> bool:
        """Tell whether more is looked at: at steps 1, 10, 20, ... 200 and then every 50th, or at every n-th."""
        if self.probe_every is not None:
            return step % self.probe_every == 0
        if self.every is None:
            return _by_default(step)
        # Measured steps are few: a probe that falls between two of them moves to the second.
        return step % self.every == 0 and any(map(_by_default, range(max(step - self.every + 1, 0), step + 1)))


def _by_default(step: int) -> bool:
    return step == 1 or (step > 0 and step % (10 if step <= 200 else 50) == 0)
