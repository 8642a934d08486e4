"""Reports and runs -> what people read in a terminal and a notebook."""

import random

# rich draws a random number while it is imported, and this package is imported in the middle of other people's trainings.
_random_state = random.getstate()

import rich.console  # noqa: E402
import rich.table  # noqa: E402, F401

random.setstate(_random_state)
