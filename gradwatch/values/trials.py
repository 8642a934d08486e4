"""Numbers of what is tried against a fault, and of when it has helped, with their sources."""

from __future__ import annotations

SLOWER_RATE = 0.1
"""Factor on a learning rate that is too high, where nothing tells by how much: a step of a usual search."""
FASTER_RATE = 10.0
"""The same of one that is too low."""
LARGER_LOSS = 1e3
"""Factor on a loss whose steps are too small: enough to tell whether its scale is why."""
LARGEST_LOSS = 1e6
"""Factor on a loss whose gradients are rounded to 0 in float32: from its smallest normal numbers into sight."""
EPSILON_SHARE = 1e-3
"""What an epsilon should be of the gradients' own size to be out of their way: torch's 1e-8 is that of 1e-5."""
CLIPPED_AT = 1.0
"""Norm at which gradients are clipped, as most published recipes do."""
REMEMBERED = 100.0
"""Timesteps that are taken to matter where neither a need nor the length of the sequences is known."""

CURE_MARGIN = 0.05
"""Share of all that the loss has fallen by which a treated copy must differ from its untouched twin, on the same
batches, to be better or worse."""
HORIZON_LONGER = 2.0
"""How many times as long a horizon must be to be longer for a remedy: estimates differ by less."""
