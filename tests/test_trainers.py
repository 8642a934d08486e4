"""docs/trainers.md and `benchmarks.trainers` speak of the same libraries, versions and places; no library is needed."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("benchmarks", reason="the tests run from a checkout")

from benchmarks.trainers.environments import ENVIRONMENTS
from benchmarks.trainers.libraries import LIBRARIES
from benchmarks.trainers.recipes import PAGE, PROGRAMS, recipe, watched


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_the_recipe_of_a_library_fits_its_program(library):
    program = library.program.read_text(encoding="utf-8")

    whole = watched(program, recipe(library.section))

    compile(whole, library.program.name, "exec")
    assert "gradwatch" in whole
    assert "gradwatch" not in program


def test_every_program_is_run():
    assert {path.name for path in PROGRAMS.glob("*.py")} == {library.program.name for library in LIBRARIES}
    assert {library.environment for library in LIBRARIES} == set(ENVIRONMENTS)


def test_the_page_names_the_versions_that_are_installed():
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+)(?: with ([\w-]+))?[^|]*\| ([\d., ]+) \|", page, re.MULTILINE)
    named = {name: v for *names, versions in rows for name, v in zip(names, versions.split(", "), strict=False) if name}
    pins = [pin for e in ENVIRONMENTS.values() for pin in (*e.pins, *e.without_dependencies)]
    installed = dict(re.sub(r"\[.*\]", "", pin).split("==") for pin in pins)

    assert len(named) > 25
    assert {name: installed.get(name) for name in named if name != "mosaicml"} == {
        name: version for name, version in named.items() if name != "mosaicml"
    }


def test_a_recipe_of_two_pieces_goes_to_two_places():
    program = "model = 1\n# --- watch here ---\nfor x in y:\n    loss = x\n    # --- watch here ---\n    step()\n"

    assert watched(program, ["watch(model)\n", "record(loss)\n"]) == (
        "model = 1\nwatch(model)\nfor x in y:\n    loss = x\n    record(loss)\n    step()\n"
    )
    with pytest.raises(ValueError, match="2 places, and the recipe 1 pieces"):
        watched(program, ["watch(model)\n"])
