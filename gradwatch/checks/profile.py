"""One batch against a golden profile: a file beside the test says what the gradients looked like."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradwatch.checks.check import check
from gradwatch.checks.horizon import horizon
from gradwatch.values.comparison import TOLERANCE, Comparison, compare
from gradwatch.values.profile import Profile, from_toml, profile_of, to_toml
from gradwatch.values.report import GradientHealthError
from gradwatch.values.sequences import SequenceStats

_TOLD = ("gone", "new", "kind", "gradient", "sensitivity", "dead", "horizon")
"""Changes that fail; a new name alone does not."""


def profile(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (whatever the model takes)
    *,
    loss: Callable[[Any], Tensor] | None = None,
) -> Profile:
    """Measure what the gradients of one batch look like, as `check` and `horizon` do; the model stays as it was.

    Args:
        model: as for `gradwatch.check`.
        batch: as for `gradwatch.check`.
        loss: as for `gradwatch.check`.

    Returns:
        log10 of norms and sensitivities by layer, shares of dead units, the model's horizon where it has one, versions.

    Raises:
        TypeError, ValueError: as `gradwatch.check`.

    """
    report = check(model, batch, loss=loss)
    return profile_of([report.snapshot], _horizon(model, batch), _versions())


def assert_profile(
    model: nn.Module,
    batch: Any,  # noqa: ANN401  (as above)
    path: str | os.PathLike[str],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    tolerance: float = TOLERANCE,
    layers: Mapping[str, float] | None = None,
    update: bool = False,
) -> Profile:
    """Compare the gradients of one batch with a profile in a file, and raise if they have changed.

    The pytest fixture gives the path, beside the test, and `pytest --gradwatch-update` writes what is there now. The
    first time there is none: it is written, and this raises.

    Args:
        model: as for `gradwatch.check`.
        batch: as for `gradwatch.check`; the same each time.
        path: the file.
        loss: as for `gradwatch.check`.
        tolerance: orders of magnitude by which a layer may change beside the last ones; 0.5 is a factor of 3.
        layers: the same of layers whose names match a pattern.
        update: whether the file is written anew.

    Returns:
        What was measured.

    Raises:
        GradientHealthError: what has changed, or that there was no file.
        TypeError, ValueError: as `gradwatch.check`; the file is no profile; a tolerance is not above 0.

    """
    __tracebackhide__ = True
    for name, number in {"tolerance": tolerance, **(layers or {})}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{name} must be a number of orders of magnitude above 0, got {number!r}")
    file, now = Path(path), profile(model, batch, loss=loss)
    if update or not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_toml(now), encoding="utf-8")
        if not update:
            raise GradientHealthError(
                f"there was no profile {file}: it was written now; look at it, and run this again"
            )
        return now
    try:
        before = from_toml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    found = compare(before, now, tolerance=tolerance, layers=layers)
    if any(change.what in _TOLD for change in found.changes):
        raise GradientHealthError(_words(found, before, now, file))
    return now


def _words(found: Comparison, before: Profile, now: Profile, file: Path) -> str:
    """Return what has changed, and what to do where that is meant."""
    changes = [change for change in found.changes if change.what in _TOLD]
    lines = [f"the gradients are not those of {file.name}: {len(changes)} changes"]
    lines += [f"  {change}" for change in found.changes]
    others = [f"{n} {v} (now {now.versions.get(n)})" for n, v in before.versions.items() if now.versions.get(n) != v]
    if others:
        lines.append(f"it was written with {', '.join(others)}")
    lines.append("if that is meant: pytest --gradwatch-update, or update=True")
    return "\n".join(lines)


def _horizon(model: nn.Module, batch: Any) -> list[SequenceStats]:  # noqa: ANN401
    try:
        return [horizon(model, batch)]
    except (TypeError, ValueError, RuntimeError):  # it has no sequence, or none that can be differentiated
        return []


def _versions() -> dict[str, str]:
    return {"gradwatch": _version("torch-gradwatch"), "torch": _version("torch").partition("+")[0]}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
