"""The workflows and the action are what GitHub's schema allows, and README tells which of their cells have run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import gradwatch

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def valid(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_they_are_what_the_schema_allows(tmp_path):
    workflows = sorted((GITHUB / "workflows").glob("*.yml"))
    assert [file.stem for file in workflows] == ["release", "tests"]
    done = valid("vendor.github-workflows", *workflows)
    assert done.returncode == 0, done.stdout
    done = valid("vendor.github-actions", *GITHUB.glob("actions/*/action.yml"))
    assert done.returncode == 0, done.stdout

    wrong = tmp_path / "wrong.yml"
    wrong.write_text(workflows[0].read_text(encoding="utf-8").replace("runs-on", "runs-at"), encoding="utf-8")
    assert valid("vendor.github-workflows", wrong).returncode == 1


def test_the_workflow_that_readers_copy_is_valid_too(tmp_path):
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    block = re.search(r"^```yaml\n(name:.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    file = tmp_path / "gradients.yml"
    file.write_text(block[1], encoding="utf-8")
    done = valid("vendor.github-workflows", file)
    assert done.returncode == 0, done.stdout


def test_the_readme_tells_of_the_matrix():
    matrix = yaml.safe_load((GITHUB / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]["tests"][
        "strategy"
    ]["matrix"]
    assert matrix == {
        "os": ["ubuntu-latest", "macos-latest", "windows-latest"],
        "python": ["3.11", "3.12", "3.13", "3.14"],
    }
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "(Python 3.11 to 3.14 on Linux, macOS and Windows) one cell has run: Linux with Python 3.11" in readme


@pytest.mark.parametrize(
    ("tag", "status"), [(f"v{gradwatch.__version__}", 0), (f"v{gradwatch.__version__}1", 1), ("v", 1)]
)
def test_only_the_tag_of_the_version_is_released(tag, status):
    jobs = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    step = next(s for s in jobs["build"]["steps"] if s.get("name") == "The tag is the version")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step["run"]],
        cwd=ROOT,
        env={"TAG": tag, "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == status


def test_what_workflows_run_is_there():
    for file in (GITHUB / "workflows").glob("*.yml"):
        for job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values():
            for step in job["steps"]:
                for name in re.findall(r"\.ci/\w+", step.get("run", "")):
                    assert (ROOT / name).stat().st_mode & 0o111, name
