"""The recipes of docs/trainers.md, and the programs that they are put into."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "trainers.md"
PROGRAMS = Path(__file__).parent / "programs"
_PLACE = re.compile(r"^( *)# --- watch here ---\n", re.MULTILINE)


def recipe(section: str) -> list[str]:
    """Return the pieces of a section's first block of code, which stand apart by a line of three dots."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    text = next((one for one in sections if one.startswith(f"{section}\n")), "")
    found = re.search(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"{PAGE.name} has no recipe under {section!r}")
    return re.split(r"^\.\.\.\n", found[1], flags=re.MULTILINE)


def watched(program: str, pieces: list[str]) -> str:
    """Put each piece at its place in a program."""
    places = _PLACE.findall(program)
    if len(places) != len(pieces):
        raise ValueError(f"the program has {len(places)} places, and the recipe {len(pieces)} pieces")
    left = iter(pieces)
    return _PLACE.sub(lambda place: textwrap.indent(textwrap.dedent(next(left)), place[1]), program)
