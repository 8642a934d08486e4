"""Reports and runs -> what people read in a terminal and a notebook."""

import random

# rich draws a random number while it is imported, and that may be in the middle of somebody's training.
_random_state = random.getstate()

import rich.console  # noqa: E402
import rich.table  # noqa: E402, F401

random.setstate(_random_state)
