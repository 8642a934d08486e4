"""The structure of the package, held against a table: imports go down, parts do not know each other, torch stays in its world."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gradwatch

ROOT = Path(gradwatch.__file__).parent

GROUND = {"snapshot", "columns", "thresholds", "report", "reach", "history", "stats", "layers", "intact", "arrivals", "market"}
PARTS = {"hooks", "timesteps", "activations", "causes", "detectors", "record", "tensorboard", "console"}
ENGINE = {"watcher", "checks"}
FACES = {"__init__", "__main__", "lightning", "pytest_plugin", "demo", "cli"}
FLOORS = [GROUND, PARTS, ENGINE, FACES]
ORDER_ON_THE_GROUND = ["snapshot", "columns", "thresholds", "report", "reach", "history"]  # each may import those before it
SIDEWAYS = {
    ("layers", "snapshot"),  # what it makes is a value
    ("checks", "watcher"),  # a check is a watcher that lives for one batch
}
FOR_THE_TYPE_CHECKER = {("console", "record")}  # the `Run` that it shows

TORCH_AT_THE_TOP = {"stats", "layers", "intact", "arrivals", "hooks", "timesteps", "activations", "causes", "watcher", "checks", "lightning"}
TORCH_INSIDE_FUNCTIONS = {"demo", "cli", "pytest_plugin", "__init__"}
HOMES = {"lightning": "lightning", "pytorch_lightning": "lightning", "pytest": "pytest_plugin", "tensorboard": "tensorboard", "transformers": "huggingface"}


class Import:
    """One import: of what, by which room, and whether the module's loading runs it."""

    def __init__(self, room: str, target: str, *, top: bool, typing_only: bool) -> None:
        self.room, self.target, self.top, self.typing_only = room, target, top, typing_only

    def __repr__(self) -> str:
        return f"{self.room} -> {self.target}"


def imports(root: Path) -> list[Import]:
    found = []
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, top, typing_only in _walk(tree, top=True, typing_only=False):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.module == "gradwatch":
                names = [f"gradwatch.{alias.name}" for alias in node.names]
            found += [Import(room, name, top=top, typing_only=typing_only) for name in names]
    return found


def _walk(node: ast.AST, *, top: bool, typing_only: bool):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, top, typing_only
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guard = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from _walk(child, top=top and not inside, typing_only=typing_only or guard)


ALL = imports(ROOT)


def rooms_of(found: list[Import]) -> list[tuple[str, str, Import]]:
    inner = [(i.room, i.target.split(".")[1], i) for i in found if i.target.startswith("gradwatch.")]
    return [(a, b, i) for a, b, i in inner if a != b and not b.startswith("__version")]


def floor(room: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def violations(found: list[Import]) -> list[str]:
    wrong = []
    for a, b, i in rooms_of(found):
        if a == "__init__" and i.typing_only:
            continue
        if floor(b) > floor(a):
            wrong.append(f"{i} goes up")
        elif floor(a) == floor(b):
            ground = a in ORDER_ON_THE_GROUND and b in ORDER_ON_THE_GROUND and ORDER_ON_THE_GROUND.index(b) < ORDER_ON_THE_GROUND.index(a)
            allowed = ground or (a, b) in SIDEWAYS or a in {"cli", "__main__"} or ((a, b) in FOR_THE_TYPE_CHECKER and i.typing_only)
            if not allowed:
                wrong.append(f"{i} stays on its floor")
    for i in found:
        package = i.target.split(".")[0]
        if package == "torch" and not i.typing_only and i.room not in (TORCH_AT_THE_TOP if i.top else TORCH_AT_THE_TOP | TORCH_INSIDE_FUNCTIONS):
            wrong.append(f"{i} brings torch into the world of numbers")
        if package in HOMES and not i.typing_only and i.room not in (HOMES[package], *(["lightning"] if package == "lightning" else [])):
            wrong.append(f"{i} belongs into {HOMES[package]}")
    return wrong


def test_every_room_has_a_floor():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}

    assert rooms == set().union(*FLOORS)


def test_imports_go_down_and_parts_do_not_know_each_other_and_torch_stays_in_its_world():
    assert violations(ALL) == []


@pytest.mark.parametrize(
    ("room", "target", "top"),
    [
        ("snapshot", "gradwatch.report", True),
        ("record", "gradwatch.watcher", False),
        ("record", "gradwatch.tensorboard", True),
        ("hooks", "gradwatch.detectors", True),
        ("timesteps", "gradwatch.hooks", True),
        ("intact", "gradwatch.timesteps", True),
        ("history", "torch", False),
        ("console", "torch", True),
        ("demo", "torch", True),
        ("watcher", "lightning.pytorch", False),
        ("console", "tensorboard.compat", False),
    ],
)
def test_the_table_notices_a_wrong_import(room, target, top):
    assert violations([*ALL, Import(room, target, top=top, typing_only=False)])


def test_no_room_is_a_grab_bag():
    names = {path.stem for path in ROOT.rglob("*.py")}

    assert not names & {"utils", "util", "common", "helpers", "helper", "base", "core", "manager", "misc"}


def test_no_file_is_past_450_lines():
    long = {path.name: n for path in ROOT.rglob("*.py") if (n := len(path.read_text(encoding="utf-8").splitlines())) > 450}

    assert long == {}


def test_every_file_says_its_job_in_its_first_sentence():
    for path in ROOT.rglob("*.py"):
        sentence = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert sentence, path
        assert sentence.splitlines()[0].endswith((".", ":")), path
