"""Situations from public reports, written before anybody looked at what gradwatch says of them.

python -m benchmarks.situations -v         # what is said of each, and whether that is right
python -m benchmarks.situations --plain    # first and last loss, without gradwatch: where the labels come from

Each is built anew after a report, of which it holds neither code nor words; a faulty one has a twin with the fix.
Issues are cited by number; of forums, in quotation marks, the gist of a question that is asked there again and again.
Nothing here may be changed to suit a rule; a label that plain torch shows to be false is dropped, and named below.
"""

from benchmarks.situations import depth, harmless, loops, numbers, rates, sequences, severed
from benchmarks.situations.situation import SITUATIONS, Right, Situation

FAMILIES = (severed, depth, rates, numbers, sequences, harmless, loops)
"""The modules that hold them: importing them fills the registry."""

__all__ = ["FAMILIES", "SITUATIONS", "Right", "Situation"]
