"""Situations from public reports, written before anybody looked at what gradwatch says of them.

python -m benchmarks.situations -v         # what is said of each, and whether that is right
python -m benchmarks.situations --plain    # first and last loss, without gradwatch: where the labels come from

Each is built anew after a report, of which it holds neither code nor words; a faulty one has a twin with the fix.
Issues are cited by number; of forums, in quotation marks, the gist of a question that is asked there again and again.
Nothing here may be changed to suit a rule; a label that plain torch shows to be false is dropped, and named below.

First look, library at 84d4c76: of 38 faulty ones 23 were told rightly and 29 found at all; of 28 healthy ones 1 was
accused, and of the 38 fixed twins none.

Dropped after the first look: relu_on_the_forecast, a regression that ends with a ReLU and gives 0. It was told (GW401,
GW601 at the head), but its twin is not healthy as labelled: the head's weights are all negative in both, and by plain
torch half to 62 % of the units of body.2 give 0 for all of 1,920 samples from step 60 on, as GW601 said. With it the
figures are 39 faulty, 23 told rightly, 30 found, 1 twin accused.
"""

from benchmarks.situations import depth, harmless, loops, numbers, rates, sequences, severed
from benchmarks.situations.situation import SITUATIONS, Right, Situation

FAMILIES = (severed, depth, rates, numbers, sequences, harmless, loops)
"""The modules that hold them: importing them fills the registry."""

__all__ = ["FAMILIES", "SITUATIONS", "Right", "Situation"]
