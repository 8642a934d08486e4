"""Every Python snippet of README and docs runs, and README keeps its promises about commands."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreters import warm

import gradwatch as package

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api.md"
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page != API)]
TEXTS = [*PAGES, API, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore:.*CPU.*:UserWarning")
def test_the_snippets_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), names)
    for name, test in list(names.items()):
        if name.startswith("test_"):
            test(package)


def test_the_page_of_public_names_is_what_their_docstrings_make():
    made = runpy.run_path(str(API.with_suffix(".py")))["page"]()
    assert API.read_text(encoding="utf-8") == made, "python docs/api.py writes it anew"


def test_there_are_snippets():
    assert all(snippets(page) for page in PAGES)


def test_the_first_snippet_of_the_readme_alerts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(snippets(PAGES[0])[0], {})

    printed = capsys.readouterr().out
    assert "GW101 vanishing-depth (warning) 0" in printed
    shown = re.search(r"^```text\n.*?^(GW101.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert _words(shown[1]) in _words(printed)
    assert [a.finding.code for a in package.read_run("runs/mine").alerts] == ["GW101"]


def test_what_the_page_says_of_a_cure_is_what_is_printed(capsys):
    code = next(s for s in snippets(ROOT / "docs" / "ci.md") if "gradwatch.cure(" in s)
    exec(code, {"torch": torch, "gradwatch": package})
    shown = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8").split("```text\nGW101 vanishing-depth: 0 to 14")[1]
    printed = capsys.readouterr().out
    lines = [without_losses(line) for line in shown.split("```")[0].splitlines()[1:] if line.strip(" .")]
    assert len(lines) > 5
    assert [line for line in lines if line not in map(without_losses, printed.splitlines())] == []


def without_losses(line: str) -> str:
    """Leave out what another processor may compute a little differently."""
    return re.sub(r"loss at the end .*", "", line)


def test_a_detector_of_ones_own_takes_five_lines(tmp_path, monkeypatch):
    code = next(s for s in snippets(ROOT / "docs" / "rules.md") if "def quiet_head" in s)
    body = code[code.index("def quiet_head") : code.index("detectors =")].strip().splitlines()
    assert len(body) <= 5
    names: dict[str, object] = {}
    exec(code, names)
    model = torch.nn.Sequential()
    model.add_module("body", torch.nn.Linear(4, 4))
    model.add_module("head", torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with package.watch(model, optimizer, detectors=names["detectors"]) as watcher:
        (model(torch.randn(8, 4)) * 1e-9).sum().backward()
        optimizer.step()

    assert [a.finding.code for a in watcher.report.open] == ["MY001"]
    assert watcher.report.open[0].message.startswith("head: norm ")


def _words(text: str) -> str:
    """Leave out the numbers, which depend on the processor, and where lines end."""
    return " ".join(re.sub(r"\d\S*", "#", text).split())


def commands_of_the_readme():
    text = PAGES[0].read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.startswith("python3 -m venv")]


def test_the_readme_has_exactly_two_commands_for_a_fresh_machine():
    commands = commands_of_the_readme()

    assert len(commands) == 2
    assert commands[0].endswith("gradwatch demo")
    assert commands[1].endswith("pytest -n 2")
    assert all("-c constraints.txt" in c for c in commands)
    assert (ROOT / "constraints.txt").read_text(encoding="utf-8").strip() == "torch==2.13.0"


def test_ci_runs_both_commands_one_after_the_other_in_one_clone():
    program = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    told = re.search(
        r"^mapfile -t commands < <\((grep .*)\)\nfor command in (.*); do\n(.*?)^done", program, re.MULTILINE | re.DOTALL
    )
    assert told is not None
    chosen = subprocess.run(["bash", "-c", told[1]], cwd=ROOT, capture_output=True, text=True, check=True)

    assert chosen.stdout.splitlines() == commands_of_the_readme()
    assert told[2] == '"${commands[@]}"'
    assert 'bash -euo pipefail -c "$command"\n' in told[3]
    assert "cd " not in told[3]


def mapped(page: str) -> list[str]:
    """Return the files of the package that the map of a page names."""
    block = re.search(r"^## The map\n.*?^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    files, open_at, folder = [], {0: ""}, ""
    for line in block[1].splitlines():
        first, *names = line.split()
        if first.endswith("/"):
            indent = len(line) - len(line.lstrip())
            above = "" if first == "gradwatch/" else open_at[max(i for i in open_at if i < indent)]
            folder = open_at[indent] = above + first.removeprefix("gradwatch/")
        else:
            names = [first, *names]
        files += [f"{folder}{name}.py" for name in names]
    return files


def test_the_map_names_every_file_of_the_package_and_no_other():
    package_root = Path(package.__file__).parent
    there = {path.relative_to(package_root).as_posix() for path in package_root.rglob("*.py")}
    there -= {name for name in there if name.endswith("/__init__.py")}  # a wing's own sentence
    named = mapped((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))

    assert sorted(named) == sorted(there)


def test_the_methods_that_the_pages_for_developers_name_are_there():
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(package.__file__).parent.rglob("*.py")]
    methods = {
        f"{node.name}.{item.name}"
        for source in sources
        for node in ast.walk(source)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef)
    }
    text = "".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("architecture", "extending"))
    named = set(re.findall(r"`([A-Z]\w+\.[a-z_]\w*)`", text))

    assert len(named) > 20
    assert sorted(named - methods) == []


def test_what_pages_say_of_other_files_is_there():
    for page in TEXTS:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:gradwatch|tests|docs|benchmarks|examples)/[\w/-]+\.(?:py|md)\b", text))
        wings = "values|model|measurement|timesteps|detectors|sinks|watcher|checks|demo"
        named |= {f"gradwatch/{name}" for name in re.findall(rf"(?<![\w/])(?:{wings})/[\w/]+\.py\b", text)}

        assert [name for name in sorted(named) if not (ROOT / name).exists()] == [], page.name


def test_links_lead_somewhere():
    for page in TEXTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_example_of_a_forecasting_library_says_what_it_needs():
    without = (
        "import runpy, sys; sys.modules['neuralforecast'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    done = subprocess.run(
        [*warm(), "-c", without, ROOT / "examples" / "forecasting_library.py"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"this example watches neuralforecast \(.*\): pip install .*neuralforecast\n", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "record"),
    [("raw_loop.py", "."), ("lightning_program.py", "version_0"), ("huggingface_program.py", ".")],
)
def test_the_examples_run_and_leave_a_record(example, record, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [example, "--steps", "5", "--logdir", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")

    assert len(package.read_run(tmp_path / record).snapshots) == 5


@pytest.mark.slow
def test_the_tests_of_the_market_example_pass_and_fail_as_they_say():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_market.py"]
    done = subprocess.run(command, cwd=ROOT / "examples", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "5 passed, 3 xfailed" in done.stdout
    assert "test_its_gradients_are_as_they_were: assert_profile: 3 layers as they were" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "record"),
    [
        (["-m", "gradwatch", "run", "--horizon", "80", "plain_program.py"], "runs/plain_program"),
        (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ddp_program.py"], "runs/ddp"),
    ],
)
def test_the_examples_that_a_command_starts_run_and_leave_a_record(command, record, tmp_path):
    *command, example = command
    done = subprocess.run(
        [sys.executable, *command, ROOT / "examples" / example, "--steps", "5"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "last loss" in done.stdout
    (run,) = package.read_runs(tmp_path / record).values()
    assert len(run.snapshots) == 5
