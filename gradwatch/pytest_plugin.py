"""The pytest fixture `gradwatch`: loaded in every pytest run of its environment, so it imports next to nothing."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gradwatch.values.configuration import Configuration

_PREFIX = "gradwatch."
"""With which the properties of a test begin that say what was measured."""
_JUDGING = ("check", "assert_healthy", "assert_trains")
"""What takes thresholds, and what is muted."""
_TOLD = (*_JUDGING, "assert_horizon", "horizon", "assert_causal", "causal", "assert_causal_features", "assert_profile")
_HEAD = "# gradwatch profile"
"""With which the files begin that `assert_profile` writes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the command line and of the ini file."""
    group = parser.getgroup("gradwatch")
    group.addoption("--gradwatch-report", metavar="DIR", help="write what was measured in each test into a file of it")
    group.addoption("--gradwatch-update", action="store_true", help="write golden profiles as they are now")
    parser.addini(
        "gradwatch_thresholds",
        "TOML or YAML file with thresholds and ignore (default: [tool.gradwatch] of pyproject.toml)",
    )
    parser.addini("gradwatch_ignore", 'what is muted: "GW101", or "GW101:encoder.*"', type="linelist")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        "gradwatch(ignore=[...], thresholds={...}): mute findings, and set thresholds, for the fixture gradwatch",
    )


@pytest.fixture
def gradwatch(request: pytest.FixtureRequest) -> ModuleType:
    """Return the package, for `gradwatch.assert_healthy(model, batch)` and all the rest.

    With the project's thresholds, and what it mutes, where a call gives none of its own; what is measured is told in
    the summary of the run, and in the properties of the test that JUnit files have.
    """
    return _Package(request.node, request.config)  # type: ignore[return-value]  # it acts like it


class _Package:
    """The package, whose checks know what the project and the test's markers say."""

    def __init__(self, item: pytest.Item, config: pytest.Config) -> None:
        self._item, self._config, self._profiles = item, config, 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (whatever the package has)
        import gradwatch

        value = getattr(gradwatch, name)
        return self._told(name, value) if name in _TOLD else value

    def _told(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a check that says what it has found."""

        @functools.wraps(function)
        def told(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            __tracebackhide__ = True
            if name in _JUDGING:
                kwargs = self._with_settings(kwargs)
            if name == "assert_profile":
                kwargs = self._with_file(kwargs, given_path=len(args) > 2)
            try:
                found = function(*args, **kwargs)
            except AssertionError as error:
                self._note(name, str(error))
                raise
            self._note(name, _said(found))
            return found

        return told

    def _with_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        settings = self._settings()
        ignore, thresholds = [*settings.ignore, *self._config.getini("gradwatch_ignore")], settings.thresholds
        for marker in reversed([*self._item.iter_markers("gradwatch")]):  # the nearest one last
            its = _of_marker(marker)
            ignore += its.get("ignore", ())
            thresholds = replace(thresholds, **its.get("thresholds", {}))
        mine = given.get("ignore", ())
        return {"thresholds": thresholds, **given, "ignore": [*ignore, *mine]}

    def _with_file(self, given: dict[str, Any], *, given_path: bool) -> dict[str, Any]:
        """Return what a profile is compared with: a file beside the test, one for each call."""
        mine = {"update": bool(self._config.getoption("--gradwatch-update")), **given}
        if given_path or "path" in mine:
            return mine
        self._profiles += 1
        number = f"-{self._profiles}" if self._profiles > 1 else ""
        return {"path": profiles_of(self._item.path) / f"{_file_name(_name(self._item))}{number}.toml", **mine}

    def _settings(self) -> Configuration:
        from gradwatch.values import configuration

        file, root = self._config.getini("gradwatch_thresholds"), self._config.rootpath
        return configuration.read(root / file) if file else configuration.nearest(root)

    def _note(self, name: str, text: str) -> None:
        self._item.user_properties.append((f"{_PREFIX}{name}", text.split("\n", 1)[0]))
        if folder := self._config.getoption("--gradwatch-report"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = Path(folder, f"{_file_name(self._item.nodeid)}.txt")
            with file.open("a", encoding="utf-8") as out:
                out.write(f"{name}: {text}\n\n")


def profiles_of(test: Path) -> Path:
    """Return the folder for the profiles of a file of tests, in the manner of pytest-regressions."""
    return test.with_suffix("")


def _file_name(name: str) -> str:
    """Return a name for a file of its own: "TestModel::test_it[a]" is "TestModel.test_it_a"."""
    plain = name.replace("::", ".").replace("[", "_").replace("]", "")
    clean = re.sub(r"[^\w.=-]+", "_", plain)[-150:]
    return clean if clean == plain else f"{clean}-{zlib.crc32(name.encode(errors='replace')):08x}"


def _name(item: pytest.Item) -> str:
    """Return the name of a test within its file, with its class."""
    return item.nodeid.partition("::")[2] or item.name


def _stale(config: pytest.Config) -> Iterator[Path]:
    """Yield profiles that belong to none of the tests of a file, of which all were collected."""
    by_file: dict[Path, set[str]] = getattr(config, _COLLECTED, {})
    for file, names in by_file.items():
        for profile in sorted(profiles_of(file).glob("*.toml")) if profiles_of(file).is_dir() else ():
            mine = re.sub(r"-\d+$", "", profile.stem)
            with profile.open(encoding="utf-8", errors="replace") as text:
                ours = text.readline().startswith(_HEAD)
            if ours and not {profile.stem, mine} & names:
                yield profile


_COLLECTED = "_gradwatch_collected"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Remember which tests there are, before any are left out."""
    by_file: dict[Path, set[str]] = vars(item.config).setdefault(_COLLECTED, {})
    by_file.setdefault(item.path, set()).add(_file_name(_name(item)))


def _of_marker(marker: pytest.Mark) -> Mapping[str, Any]:
    """Return what a marker says.

    Raises:
        ValueError: it says what is not known.

    """
    ignore, thresholds = marker.kwargs.get("ignore", []), marker.kwargs.get("thresholds", {})
    known = marker.kwargs.keys() <= {"ignore", "thresholds"} and not marker.args
    if not known or not isinstance(ignore, list | tuple) or not isinstance(thresholds, dict):
        raise ValueError(
            "the marker must be gradwatch(ignore=[...], thresholds={...}), with a list of strings and fields of"
            f" Thresholds, got {marker.args!r:.80} {marker.kwargs!r:.80}"
        )
    from gradwatch.values.thresholds import Thresholds

    unknown = thresholds.keys() - vars(Thresholds()).keys()
    if unknown:
        raise ValueError(f"the marker gradwatch must name fields of Thresholds, got {', '.join(map(repr, unknown))}")
    return marker.kwargs


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:  # noqa: ANN401  (pytest does not say what it is)
    """Say what was measured in which test."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    lines = sorted({line for report in reports for line in _lines(report)})
    if not any("::" in argument for argument in config.args):  # else tests of a file are not collected
        lines += [f"{profile}: no test of this name is there any more" for profile in _stale(config)]
    if lines:
        terminalreporter.section("gradwatch")
        for line in lines:
            terminalreporter.write_line(line)


def _lines(report: Any) -> Iterator[str]:  # noqa: ANN401
    if getattr(report, "when", "") == "call":
        for name, value in report.user_properties:
            if name.startswith(_PREFIX):
                yield f"{report.nodeid}: {name.removeprefix(_PREFIX)}: {value}"


def _said(found: Any) -> str:  # noqa: ANN401  (what a check returns)
    """Return what a check has found, in a line."""
    from gradwatch.sinks.reading import Run
    from gradwatch.values.profile import Profile
    from gradwatch.values.report import Report
    from gradwatch.values.sequences import SequenceStats, sentences

    if isinstance(found, Report):
        said = "; ".join(f"{a.finding.code} {a.finding.kind} {a.finding.place}".rstrip() for a in found.open)
        return said or "no finding"
    if isinstance(found, SequenceStats):
        return next((line for _, line in sentences([found])), "no horizon")
    if isinstance(found, Profile):
        return f"{len(found.layers)} layers as they were"
    if isinstance(found, Run):
        from gradwatch.sinks.terminal.page import verdict

        return verdict(found)
    return str(found)
