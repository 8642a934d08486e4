"""A file of thresholds and of what is muted: TOML, the project's pyproject.toml, or YAML."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradwatch.values.thresholds import Thresholds

_KEYS = ("thresholds", "ignore", "fail-on")
FAIL_ON = ("info", "warning", "error", "never")
"""From which severity on something fails."""


@dataclass(frozen=True)
class Configuration:
    """What a project has set."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    ignore: tuple[str, ...] = ()
    fail_on: str | None = None


def read(path: str | os.PathLike[str]) -> Configuration:
    """Read a file: the table `[tool.gradwatch]` where there is one, else all of it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither TOML nor YAML, or holds what is not known; the text says what is allowed.

    """
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    try:
        content = _yaml(text, file) if file.suffix in (".yaml", ".yml") else tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    its = content.get("tool", {}).get("gradwatch") if isinstance(content.get("tool"), dict) else None
    if its is None:
        its = {} if file.name == "pyproject.toml" else content
    try:
        return _configuration(its)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def nearest(folder: str | os.PathLike[str] = ".") -> Configuration:
    """Read the pyproject.toml of a folder, or of the nearest above it that has one; nothing is set without one.

    Raises:
        ValueError: as `read`.

    """
    here = Path(folder).resolve()
    for place in (here, *here.parents):
        if (file := place / "pyproject.toml").is_file():
            return read(file)
    return Configuration()


def _configuration(content: Any) -> Configuration:  # noqa: ANN401  (what a file may hold)
    if not isinstance(content, Mapping):
        raise TypeError(f"gradwatch must be a table, got {content!r:.80}")
    names = {f.name for f in dataclasses.fields(Thresholds)}
    plain = {k: v for k, v in content.items() if k in names}  # a file of thresholds alone
    unknown = [key for key in content if key not in names and key not in _KEYS]
    if unknown:
        raise ValueError(f"must have {', '.join(_KEYS)}, or fields of Thresholds, got {', '.join(map(repr, unknown))}")
    given = content.get("thresholds", {})
    if not isinstance(given, Mapping):
        raise TypeError(f"thresholds must be a table, got {given!r:.80}")
    strange = [key for key in given if key not in names]
    if strange:
        raise ValueError(f"thresholds must have fields of gradwatch.Thresholds, got {', '.join(map(repr, strange))}")
    ignore = content.get("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(one, str) for one in ignore):
        raise TypeError(f'ignore must be a list of strings, such as "GW101:encoder.*", got {ignore!r:.80}')
    fail_on = content.get("fail-on")
    if fail_on is not None and fail_on not in FAIL_ON:
        raise ValueError(f"fail-on must be one of {', '.join(FAIL_ON)}, got {fail_on!r:.80}")
    return Configuration(Thresholds(**{**plain, **given}), tuple(ignore), fail_on)


def _yaml(text: str, file: Path) -> Any:  # noqa: ANN401
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{file}: reading YAML takes PyYAML (pip install pyyaml); TOML needs nothing") from error
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
