"""A fifth set of situations, by three more writers who had seen neither the library nor what it says of anything.

Written after what the third and fourth taught was built in. As in the other sets, nothing may be changed to suit a
rule.

First look, library at bb80d57: of 27 faulty ones 19 were told rightly, and no other found; of 12 healthy ones 1 was
accused, and of the 27 fixed twins none. What was learned from it: gradients that spike (GW208), a direction of which
one timestep is read (GW308), old copies of weights under autocast (GW910), quotients of values and themselves (GW402),
layers replaced behind the optimizer (GW902), a schedule that leaves next to nothing of the rate (GW903), and that
masks of -10,000 in weights tell nothing (GW207). Left as they are, knowingly: scores that a softmax over one value
makes 1, which is information by design, and a mask that is cut at a half beside another head that learns.
"""

from benchmarks.situations.fifth import loops, sequences, vision

FAMILIES = (vision, loops, sequences)
