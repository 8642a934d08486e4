"""A third set of situations, by three writers who had seen neither the library nor what it says of anything.

They looked for threads in public trackers and forums, knew the names of the kinds and of the situations before, and
verified each label and each twin in plain torch alone. As in the first sets, nothing may be changed to suit a rule.

First look, library at the commit that brought them (4a48ac8): of 36 faulty ones 22 were told rightly and 26 found at
all; of 18 healthy ones and of the 36 fixed twins none was accused.
"""

from benchmarks.situations.third import depth, loops, sequences

FAMILIES = (depth, loops, sequences)
