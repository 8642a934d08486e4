"""A program, run as Python itself would run it: its arguments, exit code, tracebacks, and `__main__` are its own."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

_HERE = str(Path(__file__).parent.parent) + os.sep
_OURS = tuple(_HERE + name for name in ("run" + os.sep, str(Path("model", "optimizer_hooks.py"))))
"""Files of ours that a program may call without knowing it."""


_UNTRACED = str(Path("torch", "_dynamo", "eval_frame.py"))
"""What calls ours where torch.compile is to leave it alone."""


class NotFoundError(Exception):
    """There is no such program; the text says which."""


class Program:
    """A script or a module, found and not yet run."""

    def __init__(self, name: str, arguments: Sequence[str], *, module: bool) -> None:
        """Find it.

        Args:
            name: path of a script; or name of a module.
            arguments: of the program.
            module: whether `name` is a module's, as after `python -m`.

        Raises:
            NotFoundError: the script cannot be read.

        """
        self._module = name if module else None
        self._spec: importlib.machinery.ModuleSpec | None = None
        if module:
            self._origin, self._path = "-m", str(Path.cwd())
        else:
            self._origin, self._path = str(Path(name).absolute()), str(Path(name).resolve().parent)
            try:
                with io.open_code(self._origin) as file:
                    self._source = file.read()
            except OSError as error:
                raise NotFoundError(str(error)) from error
        self._arguments = [self._origin if module else name, *arguments]
        self.name = name.rpartition(".")[2] if module else Path(name).stem

    def execute(self) -> None:
        """Run it as `__main__`, in a module of its own.

        Raises:
            NotFoundError: there is no such module.
            BaseException: what the program raises, also SystemExit. Once this is raised, the traceback that Python
                prints has no frames of ours.

        """
        try:
            main = self._as_main()
            exec(self._code(), vars(main))  # noqa: S102  (that is what it is for)
        except (SystemExit, NotFoundError):
            raise
        except BaseException:
            _hide_our_frames()
            raise

    def _code(self) -> CodeType:
        if self._spec is None:
            return compile(self._source, self._origin, "exec", dont_inherit=True)
        assert isinstance(self._spec.loader, importlib.machinery.SourceFileLoader)
        code = self._spec.loader.get_code(self._spec.name)
        assert code is not None
        return code

    def _as_main(self) -> ModuleType:
        main = types.ModuleType("__main__")
        # As `python -m` does: what lies in the current folder comes first, also to find the module, whose package runs.
        sys.argv = self._arguments
        _set_first_path(self._path)
        if self._module is not None:
            self._spec = _spec_of(self._module)
            self._origin = self._arguments[0] = self._spec.origin or self._module
        loader = (
            importlib.machinery.SourceFileLoader("__main__", self._origin) if self._spec is None else self._spec.loader
        )
        vars(main).update(
            __file__=self._origin,
            __builtins__=builtins,
            __spec__=self._spec,
            __package__=self._spec.parent if self._spec is not None else None,
            __cached__=self._spec.cached if self._spec is not None else None,
            __loader__=loader,
            __annotations__={},
        )
        # Without the second, objects from spawned children do not unpickle.
        sys.modules["__main__"] = sys.modules["__mp_main__"] = main
        return main


def _set_first_path(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _spec_of(name: str) -> importlib.machinery.ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # what its package imports
            raise
        spec = None
    if spec is None:
        raise NotFoundError(f"no module named {name!r}, or it is a package without __main__")
    if not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
        raise NotFoundError(f"the module {name!r} has no source")
    return spec


def _hide_our_frames() -> None:
    """Let Python print the traceback that it would have printed without us; the hook may be the program's own."""
    theirs = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        _clean(error, set())
        theirs(kind, error, error.__traceback__)

    sys.excepthook = hook


def _clean(error: BaseException, seen: set[int]) -> None:
    seen.add(id(error))
    error.__traceback__ = _without_ours(error.__traceback__)
    for other in (error.__cause__, error.__context__):
        if other is not None and id(other) not in seen:
            _clean(other, seen)


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    frames: list[TracebackType] = []
    while trace is not None:
        code = trace.tb_frame.f_code
        if code is Program.execute.__code__:  # what led to the program
            frames.clear()
        elif not code.co_filename.startswith(_OURS):
            frames.append(trace)
        elif frames and frames[-1].tb_frame.f_code.co_filename.endswith(_UNTRACED):
            frames.pop()
        trace = trace.tb_next
    for one in reversed(frames):
        trace = TracebackType(trace, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return trace
