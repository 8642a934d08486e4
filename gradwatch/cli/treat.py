"""`gradwatch cure`: the remedies of what is wrong with a model, tried."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping
from typing import Any

from gradwatch.cli.reading import print_

_SETUP = ("model", "batch", "loss", "optimizer", "data")
"""What a function returns for `gradwatch cure`."""


def cure(options: argparse.Namespace) -> int:
    """Tell what came of each remedy."""
    from gradwatch import cure

    asked = {name: value for name in ("steps", "horizon") if (value := getattr(options, name)) is not None}
    found = cure(**{**_setup(options.setup), **asked})
    print_(str(found))
    return int(bool(found.alerts) and found.best is None)


def _setup(name: str) -> dict[str, Any]:
    """Call the function of that name, which is looked for from the current folder on, and return arguments of `cure`.

    Raises:
        ValueError: there is none, or it returns something else.

    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"MODULE:FUNCTION must be a module and a function in it, got {name!r}")
    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), function)()
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"there is no module {module!r}") from error
    except AttributeError as error:
        if hasattr(sys.modules.get(module), function):
            raise
        raise ValueError(f"there is no function {function!r} in {module}") from error
    if isinstance(made, Mapping):
        return dict(made)
    if isinstance(made, tuple) and 2 <= len(made) <= len(_SETUP):
        return dict(zip(_SETUP, made, strict=False))
    raise ValueError(
        f"{name} must return ({', '.join(_SETUP)}), of which the last three may be missing, or a dict of them;"
        f" got {type(made).__name__}"
    )
