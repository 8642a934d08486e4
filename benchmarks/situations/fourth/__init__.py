"""A fourth set of situations, by two more writers who had seen neither the library nor what it says of anything.

Written after what the third set taught was built in, to see how far that goes. As in the other sets, nothing may be
changed to suit a rule.

First look, library at 1275dc1: of 18 faulty ones 8 were told rightly and 9 found at all; of 8 healthy ones and of the
18 fixed twins none was accused. What was learned from it: layers that steps leave where they are (GW909), and a quarter
of a model and more whose output nothing takes while the loss stands still. Left as they are, knowingly: adapters that
come back frozen (freezing may be meant), a head whose gradient is a thousandth of another's beside it, single units
that a clamp in the loss shuts, and a loss that is absurdly large, which has no size to be held against.
"""

from benchmarks.situations.fourth import loops, sequences

FAMILIES = (loops, sequences)
