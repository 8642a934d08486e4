"""A sixth set of situations, by two more writers who had seen neither the library nor what it says of anything.

Written after what the fifth taught was built in. As in the other sets, nothing may be changed to suit a rule.

First look, library at 5cc631e: of 28 faulty ones 15 were told rightly and 17 found at all; of 12 healthy ones 1 was
accused, and of the 28 fixed twins none.
"""

from benchmarks.situations.sixth import series, texts

FAMILIES = (series, texts)
