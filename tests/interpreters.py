"""Python processes that need not load torch: each is forked from an interpreter that has loaded it, and hides it.

`[*warm(), "-c", program]` is a command like `[sys.executable, "-c", program]`, for `subprocess` and the like, and
saves two seconds of a processor. What it starts is a process of its own that ends as any does; what is hidden
is in its `sys.modules` only after it has imported it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

LOADED = (
    "numpy",
    "pytest",
    "rich.console",
    "rich.table",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)

ASK = """
import marshal, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
request = marshal.dumps((sys.argv[2:], dict(os.environ), os.getcwd()))
socket.send_fds(connection, [request], [0, 1, 2])
for file in (0, 1, 2):
    os.close(file)
status = marshal.loads(connection.recv(64))
if status < 0:
    os.kill(os.getpid(), -status)
os._exit(status)
"""
"""Has a program run in place of this process, and ends as it does."""


@functools.cache
def warm() -> tuple[str, ...]:
    """Return the beginning of a command that runs Python; what is forked ends with this process."""
    if not hasattr(os, "pidfd_open"):  # only Linux has it
        return (sys.executable,)
    folder = tempfile.TemporaryDirectory(prefix="warm")
    address = str(Path(folder.name) / "socket")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    server = subprocess.Popen(
        [sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=one_thread
    )
    server.stdout.readline()
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)
    return (sys.executable, "-I", "-S", "-c", ASK, address)


class Hidden(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A package that is loaded and comes into `sys.modules` when it is imported."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.modules = {found: sys.modules.pop(found) for found in list(sys.modules) if found.split(".")[0] == name}

    def find_spec(self, fullname, path=None, target=None):
        return importlib.machinery.ModuleSpec(fullname, self) if fullname == self.name else None

    def create_module(self, spec):
        self.spec = self.modules[self.name].__spec__
        return self.modules[self.name]

    def exec_module(self, module):
        module.__spec__ = self.spec
        sys.meta_path.remove(self)
        sys.modules.update(self.modules)


def serve(address: str) -> None:
    """Fork for each that asks; return in the process that is to run the program."""
    for name in LOADED:
        importlib.import_module(name)
    sys.meta_path[:0] = [Hidden(name) for name in {name.split(".")[0] for name in LOADED}]
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    running: dict[int, tuple[int, socket.socket]] = {}  # by what tells of its end
    while sys.stdin not in (
        told := select.select([sys.stdin, listener, *running, *(asker for _, asker in running.values())], [], [])[0]
    ):
        for end in set(told) & running.keys():
            child, asker = running.pop(end)
            os.close(end)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(OSError), asker:
                asker.sendall(marshal.dumps(status))
        for child, asker in running.values():
            if asker in told:  # nobody waits any more
                os.kill(child, signal.SIGKILL)
        if listener in told:
            asker = listener.accept()[0]
            request, files, *_ = socket.recv_fds(asker, 2**20, 3)
            child = os.fork()
            if child == 0:
                listener.close()
                asker.close()
                begin(request, files)
                return
            for file in files:
                os.close(file)
            running[os.pidfd_open(child)] = child, asker
    os._exit(0)


def begin(request: bytes, files: list[int]) -> None:
    """Become what was asked for."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    arguments, environment, folder = marshal.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:] = arguments
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = (
        open(0, encoding=encoding, closefd=False),  # noqa: SIM115
        open(1, "w", encoding=encoding, closefd=False),  # noqa: SIM115
        open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False),  # noqa: SIM115
    )


def program() -> types.CodeType:
    """Take off of the command line what is to be run, as the interpreter does."""
    how = sys.argv.pop(0)
    if how == "-c":
        code, sys.argv[0], sys.path[0] = compile(sys.argv[0], "<string>", "exec"), "-c", ""
    elif how == "-m":
        sys.path[0] = str(Path.cwd())
        package = importlib.import_module(sys.argv[0])
        sys.argv[0] = str(Path(package.__file__).parent / "__main__.py")
        code = compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec")
    else:
        sys.argv.insert(0, how)
        code, sys.path[0] = compile(Path(how).read_bytes(), how, "exec"), str(Path(how).parent)
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(program(), main.__dict__)
    except SystemExit as ending:
        if "torch" in sys.modules or not isinstance(ending.code, int | None):
            raise
        status = ending.code or 0
    if (
        "torch" not in sys.modules
    ):  # an interpreter that ends takes down torch, hidden or not, and small programs cost less than that
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
