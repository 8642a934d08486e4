"""No verdict reads prose, and every number that one rests on has its name and source in thresholds.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gradwatch import detectors

ROOM = Path(detectors.__file__).parent
FILES = sorted(ROOM.glob("*.py"))

PARSES = {
    "startswith",
    "endswith",
    "removeprefix",
    "removesuffix",
    "partition",
    "rpartition",
    "split",
    "rsplit",
    "splitlines",
    "find",
    "rfind",
    "fnmatch",
    "fnmatchcase",
    "fullmatch",
    "match",
    "search",
    "findall",
}
MAY_PARSE = {("alerts.py", "muted"): "the user's own pattern of what to mute, against codes and names of modules"}

PLAIN = {0, 1, 2}
"""Nothing, all, and the fewest of which one can be compared with another."""
NUMBERS = {
    ("depth.py", "_rising", 3): "thirds of a window",
    ("depth.py", "_everywhere", 1e-300): "keeps a division from failing; smaller than any loss",
    ("causes.py", "_weak", 1e-30): "keeps a logarithm from failing; smaller than any gain",
    ("measured.py", "steepest", 4): "how many layers are looked at more closely",
    ("suspects.py", "", 32): "how many layers a probe looks at more closely",
    ("suspects.py", "", 256): "how many at the first look",
    ("time.py", "_growth", 64): "entries of a cache",
    ("underflow.py", "", 11): "bits of float16: of the words",
    ("underflow.py", "", 8): "bits of bfloat16: of the words",
    ("underflow.py", "_explain_lost", 11): "bits of float16: of the words",
    ("underflow.py", "_explain_epsilon", 1e3): "how far below its gradients an epsilon is out of the way: of the words",
}


def places(tree: ast.AST, function: str = ""):
    """Every node with the function that it stands in."""
    for child in ast.iter_child_nodes(tree):
        inner = child.name if isinstance(child, ast.FunctionDef) and not function else function
        yield child, inner
        yield from places(child, inner)


def prose(source: str, file: str = "a.py") -> list[str]:
    """What reads a note, takes a string apart, or looks for one within another."""
    found = []
    for node, function in places(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in {"note", "notes"}:
            found.append(f"{file}: {function} reads .{node.attr}")
        if isinstance(node, ast.Attribute) and node.attr in PARSES and (file, function) not in MAY_PARSE:
            found.append(f"{file}: {function} takes a string apart by .{node.attr}")
        if isinstance(node, ast.Import | ast.ImportFrom) and "re" in {a.name for a in node.names}:
            found.append(f"{file}: {function} imports re")
        if isinstance(node, ast.Compare):
            sides = zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)
            within = [(a, b) for a, op, b in sides if isinstance(op, ast.In | ast.NotIn)]
            found += [
                f"{file}: {function} looks for {ast.unparse(a)} in {ast.unparse(b)}"
                for a, b in within
                if isinstance(b, ast.Attribute) and b.attr in TEXTS
            ]
    return found


TEXTS = {"module", "place", "name", "part", "kind", "code", "parameter", "message", "cause", "remedy", "layer"}


def literals(source: str, file: str = "a.py") -> list[str]:
    """Numbers that have no name."""
    return [
        f"{file}: {function or 'the module'} has {node.value}"
        for node, function in places(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
        and node.value not in PLAIN
        and (file, function, node.value) not in NUMBERS
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_no_verdict_reads_prose(file):
    assert prose(file.read_text(encoding="utf-8"), file.name) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_number_of_a_verdict_has_its_name_in_thresholds(file):
    assert literals(file.read_text(encoding="utf-8"), file.name) == []


@pytest.mark.parametrize(
    "line",
    [
        'x = "detached" in stats.note',
        "x = snapshot.notes",
        'x = name.startswith("activation ")',
        'x = fact.name.removeprefix("activation ")',
        'x = stats.part.endswith("_reverse")',
        'x = "LSTM" in layer.kind',
        "x = rule.partition(':')",
        "import re",
    ],
)
def test_the_search_for_prose_finds_it(line):
    assert len(prose(f"def f(stats):\n    {line}\n")) >= 1


@pytest.mark.parametrize(
    "line", ["x = share / (1.5 if is_open else 1.0)", "x = len(a) >= 3", "_OFTEN = 0.3", "f(count=4)", "x = -0.8"]
)
def test_the_search_for_numbers_finds_one(line):
    assert len(literals(f"def f():\n    {line}\n")) == 1


def test_every_exception_is_still_one():
    there = {
        (file.name, function, node.value)
        for file in FILES
        for node, function in places(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)
    }

    assert set(NUMBERS) <= there
