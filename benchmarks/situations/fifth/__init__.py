"""A fifth set of situations, by three more writers who had seen neither the library nor what it says of anything.

Written after what the third and fourth taught was built in. As in the other sets, nothing may be changed to suit a
rule.

First look, library at bb80d57: of 27 faulty ones 19 were told rightly, and no other found; of 12 healthy ones 1 was
accused, and of the 27 fixed twins none.
"""

from benchmarks.situations.fifth import loops, sequences, vision

FAMILIES = (vision, loops, sequences)
