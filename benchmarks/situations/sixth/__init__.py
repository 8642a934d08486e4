"""A sixth set of situations, by two more writers who had seen neither the library nor what it says of anything.

Written after what the fifth taught was built in. As in the other sets, nothing may be changed to suit a rule.

First look, library at 5cc631e: of 28 faulty ones 15 were told rightly and 17 found at all; of 12 healthy ones 1 was
accused, and of the 28 fixed twins none. What was learned from it: an input of next to nothing (GW106), scores that
are worse than a guess (GW209), a loss whose reference moves along (GW803), what shifts all that a softmax compares
(GW402), a loss that is exactly 0 with gradients of rounding (GW402), dead units behind a ReLU that is a function
between functions (GW601), that small gradients that are true are no rounding, and that rows of an embedding that are
put back are no steps undone (GW907). Left as they are, knowingly: a rate that is too low for 200 steps while the loss
falls slowly, as that of many a fine-tuning does; a codebook of which one entry is taken; a Wasserstein critic without
a bound, whose loss is below 0; a code that says nothing, behind a divergence of too large a weight; and dead units
beside the collapse that made them.
"""

from benchmarks.situations.sixth import series, texts

FAMILIES = (series, texts)
