"""A rule: the code of a kind of finding, what it means in words, and how its alerts behave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding


@dataclass(frozen=True, slots=True)
class Rule:
    """What belongs to one code.

    A detector that carries its rules as `rules`, a list or tuple of them, has words for what it finds.
    """

    code: str
    """Stable code, such as GW101."""
    kind: str
    """vanishing-depth, exploding, ...: what `Finding.kind` says."""
    explain: Callable[[Finding], Explanation]
    """Puts a finding into words."""
    cause: Callable[[History, Finding], Finding] | None = None
    """Returns the finding with what probes have measured of its cause, or as it is where that is nothing."""
    event: bool = False
    """Whether something has set it off: then the cause that was found first stays, and not what the fault makes of
    the weights after that."""
    explains_a_stall: bool = True
    """Whether it tells why a loss may stand still; False for what may well be meant, or is not known."""
