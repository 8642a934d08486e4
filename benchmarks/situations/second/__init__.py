"""A second set of situations, by four writers who had seen neither the library nor what it says of anything.

They knew the names of the kinds and the programs of the first set, and tried each situation in plain torch alone.
Where no thread was found, the source names the practice or the paper. As in the first set, nothing may be changed to
suit a rule.

First look, library at bdc6988: of 40 faulty ones 21 were told rightly and 24 found at all; of 36 healthy ones 1 was
accused, and of the 40 fixed twins none. What was learned from it: attention over the batch, optimizers that step what
was frozen for a turn and never thawed, steps that are undone (GW907), a handful of dead units. Left as they are,
knowingly: attention weights over one value are information (slides_of_twenty_patches, weights_of_vibrations), and so
is what no optimizer has (decay_for_weights_only); a schedule that falls too early is told once no weight moves; a noise
of a true zero is seen behind a normalization of one feature, and not behind one whose mean is taken; a loss that is
absurdly large has no size to be held against.
"""

from benchmarks.situations.second import depth, harmless, loops, sequences

FAMILIES = (depth, sequences, loops, harmless)
