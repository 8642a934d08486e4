"""`gradwatch cure`: the remedies of what is wrong with a model, tried."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from gradwatch.cli.reading import print_

_SETUP = ("model", "batch", "loss", "optimizer", "data")
"""What a function returns for `gradwatch cure`."""


def cure(options: argparse.Namespace) -> int:
    """Tell what came of each remedy."""
    from gradwatch import cure

    asked = {name: value for name in ("steps", "horizon") if (value := getattr(options, name)) is not None}
    given = {**_setup(options.setup), **asked}
    known = inspect.signature(cure).parameters
    for name in given:
        if name not in known:
            raise ValueError(f"unknown argument {name!r} of {options.setup}; there are {', '.join(known)}")
    for name in ("model", "batch"):
        if name not in given:
            raise ValueError(f"{options.setup} must give a {name}")
    try:
        found = cure(**given)
    except TypeError as error:
        raise ValueError(str(error)) from error
    print_(str(found))
    return int(bool(found.alerts) and found.best is None)


def _setup(name: str) -> dict[str, Any]:
    """Call the function of that name, which is looked for from the current folder on, and return arguments of `cure`.

    Raises:
        ValueError: there is none, or it returns something else.
        SystemExit: it raises something, of which the traceback is printed.

    """
    module, _, name_of = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), name_of]):
        raise ValueError(f"MODULE:FUNCTION must be a module and a function in it, got {name!r}")
    sys.path.insert(0, "")
    if _its(lambda: importlib.util.find_spec(module)) is None:
        raise ValueError(f"there is no module {module!r}")
    function = getattr(_its(lambda: importlib.import_module(module)), name_of, None)
    if function is None:
        raise ValueError(f"there is no function {name_of!r} in {module}")
    if not callable(function):
        raise ValueError(f"{name_of!r} in {module} is no function")  # noqa: TRY004  (of the command line)
    made = _its(function)
    if isinstance(made, Mapping):
        return dict(made)
    if isinstance(made, tuple) and 2 <= len(made) <= len(_SETUP):
        return dict(zip(_SETUP, made, strict=False))
    raise ValueError(
        f"{name} must return ({', '.join(_SETUP)}), of which the last three may be missing, or a dict of them;"
        f" got {f'a tuple of {len(made)}' if isinstance(made, tuple) else type(made).__name__}"
    )


def _its(code: Callable[[], Any]) -> Any:  # noqa: ANN401
    """Run code of the user's; what it raises is told with its traceback, and ends the command with 2."""
    try:
        return code()
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(2) from error
