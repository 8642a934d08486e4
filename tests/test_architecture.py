"""The structure of the package, held against a table.

Imports go down, parts do not know each other, torch stays in its world.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gradwatch

ROOT = Path(gradwatch.__file__).parent

GROUND = {"values"}
HANDS = {"model"}  # on the user's model; it makes values
PARTS = {"measurement", "timesteps", "detectors", "sinks"}
ENGINE = {"watcher"}
CHECKS = {"checks"}
FACES = {
    "__init__",
    "__main__",
    "lightning",
    "huggingface",
    "pytest_plugin",
    "tensorboard_plugin",
    "cli",
    "run",
    "demo",
}
FLOORS = [GROUND, HANDS, PARTS, ENGINE, CHECKS, FACES]

TORCH_AT_THE_TOP = {"model", "measurement", "timesteps", "watcher", "checks", "lightning", "huggingface"}
TORCH_INSIDE_FUNCTIONS = {"demo", "cli", "run", "pytest_plugin", "__init__"}
NUMBERS = {"values", "detectors", "sinks"}
HOMES = {
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "transformers": "huggingface",
    "pytest": "pytest_plugin",
    "tensorboard": "sinks.tensorboard",
}
SECOND_HOMES = {"tensorboard": "tensorboard_plugin"}
"""Where TensorBoard itself loads us."""


class Import:
    """One import: of what, by which module, and whether the module's loading runs it."""

    def __init__(self, module: str, target: str, *, top: bool, typing_only: bool) -> None:
        self.module, self.target, self.top, self.typing_only = module, target, top, typing_only

    @property
    def wing(self) -> str:
        return self.module.split(".")[0]

    def __repr__(self) -> str:
        return f"{self.module} -> {self.target}"


def imports(root: Path) -> list[Import]:
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, top, typing_only in _walk(tree, top=True, typing_only=False):
            found += [Import(module, name, top=top, typing_only=typing_only) for name in _targets(root, node)]
    return found


def _targets(root: Path, node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = node.module or ""
    if not package.startswith("gradwatch"):
        return [package]
    folder = root.joinpath(*package.split(".")[1:])
    inner = {p.stem for p in folder.glob("*")} if folder.is_dir() else set()
    return [f"{package}.{alias.name}" if alias.name in inner else package for alias in node.names]


def _walk(node: ast.AST, *, top: bool, typing_only: bool):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, top, typing_only
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guard = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from _walk(child, top=top and not inside, typing_only=typing_only or guard)


ALL = imports(ROOT)


def floor(wing: str) -> int:
    return next(level for level, wings in enumerate(FLOORS) if wing in wings)


def violations(found: list[Import]) -> list[str]:
    wrong = []
    for i in found:
        package, *inner = i.target.split(".")
        if package == "gradwatch" and inner and i.wing != inner[0] and not (i.module == "__init__" and i.typing_only):
            there = inner[0]
            sideways = floor(there) == floor(i.wing) and i.wing not in {"cli", "__main__"}
            if floor(there) > floor(i.wing) or sideways:
                wrong.append(f"{i} goes {'sideways' if sideways else 'up'}")
            if i.wing in NUMBERS and there not in NUMBERS:
                wrong.append(f"{i} leads from numbers to tensors")
        allowed = TORCH_AT_THE_TOP if i.top else TORCH_AT_THE_TOP | TORCH_INSIDE_FUNCTIONS
        if package == "torch" and not i.typing_only and i.wing not in allowed:
            wrong.append(f"{i} brings torch into the world of numbers")
        home = HOMES.get(package)
        if i.module == SECOND_HOMES.get(package):
            continue
        if home is not None and not i.typing_only and not f"{i.module}.".startswith(f"{home}."):
            wrong.append(f"{i} belongs into {home}")
    return wrong


def circles(found: list[Import]) -> list[str]:
    """Modules that import each other, directly or on a way round; what only the type checker sees does not count."""
    below: dict[str, set[str]] = {}
    for i in found:
        package, *inner = i.target.split(".")
        if package == "gradwatch" and inner and i.top and not i.typing_only:
            below.setdefault(i.module, set()).add(".".join(inner))
    reached = {module: set(targets) for module, targets in below.items()}
    for _ in below:
        for module, targets in reached.items():
            reached[module] = targets.union(*(reached.get(t, set()) for t in targets))
    return sorted(module for module, targets in reached.items() if module in targets)


def test_every_wing_has_a_floor():
    wings = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}

    assert wings == set().union(*FLOORS)


def test_imports_go_down_and_parts_do_not_know_each_other_and_torch_stays_in_its_world():
    assert violations(ALL) == []


def test_there_are_no_circles():
    assert circles(ALL) == []


@pytest.mark.parametrize(
    ("module", "target", "top"),
    [
        ("values.snapshot", "gradwatch.sinks.record", True),
        ("values.history", "torch", False),
        ("values.history", "gradwatch.model.layers", True),
        ("model.rerun", "gradwatch.timesteps", True),
        ("sinks.record", "gradwatch.watcher.watcher", False),
        ("sinks.record", "gradwatch.detectors", True),
        ("sinks.terminal.page", "torch", True),
        ("sinks.terminal.page", "tensorboard.compat", False),
        ("sinks.log", "gradwatch.model.layers", True),
        ("detectors.time", "gradwatch.sinks.terminal.page", True),
        ("detectors.time", "gradwatch.timesteps.series", True),
        ("timesteps.recorder", "gradwatch.measurement.norms", True),
        ("measurement.units", "gradwatch.timesteps", True),
        ("watcher.watcher", "gradwatch.checks.check", True),
        ("watcher.watcher", "lightning.pytorch", False),
        ("lightning", "transformers", False),
        ("demo.story", "torch", True),
        ("demo.story", "gradwatch.lightning", True),
    ],
)
def test_the_table_notices_a_wrong_import(module, target, top):
    assert violations([*ALL, Import(module, target, top=top, typing_only=False)])


def test_the_search_for_circles_finds_one_on_a_way_round():
    back = [Import("values.sequences", "gradwatch.values.report", top=True, typing_only=False)]

    assert {"values.report", "values.sequences", "values.snapshot"} <= set(circles([*ALL, *back]))


def test_no_private_name_is_imported_from_another_module():
    found = [
        f"{path.relative_to(ROOT)}: {alias.name}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradwatch")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]

    assert found == []


def test_no_room_is_a_grab_bag():
    names = {path.stem for path in ROOT.rglob("*.py")}

    assert not names & {"utils", "util", "common", "helpers", "helper", "base", "core", "manager", "misc"}


def test_no_file_is_past_400_lines():
    long = {
        path.name: n for path in ROOT.rglob("*.py") if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }

    assert long == {}


def test_every_file_says_its_job_in_its_first_sentence():
    for path in ROOT.rglob("*.py"):
        sentence = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert sentence, path
        assert sentence.splitlines()[0].endswith((".", ":")), path
