"""The tab "Gradients" of TensorBoard. It is loaded in every TensorBoard server, so it imports next to nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

_CELLS = 1_200_000
"""Numbers of an answer, over all its runs: 3 MB. More layers and runs have fewer columns each."""
_FEWEST, _MOST = 40, 300
"""Columns of a picture."""
_LONG_AGO = 60.0
"""Seconds for which a run is read on that nobody asks for any more."""
_PAUSE = 1.0
"""Seconds between two looks at what has grown."""


def _route(answer: Callable[[Any, wrappers.Request], Any]) -> Any:  # noqa: ANN401  (a WSGI application)
    """Make a method one that takes what a server hands over."""
    return wrappers.Request.application(answer)  # type: ignore[arg-type]  # a method, which werkzeug knows


class GradientsPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """Serves the page and its data; runs are records of gradwatch below the log directory."""

    plugin_name = "gradwatch"

    def __init__(self, context: Any) -> None:  # noqa: ANN401  (TensorBoard's)
        """Take the log directories that TensorBoard was given."""
        self._runs = _Runs(_directories(context))

    def is_active(self) -> bool:
        """Tell whether there is anything to show; TensorBoard asks again and again."""
        return bool(self._runs.names())

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Say where the script is, and what the tab is called."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Gradients")

    def get_plugin_apps(self) -> dict[str, Any]:
        """Return the routes: nothing else is served, and none of them takes a path."""
        return {
            "/index.js": self._script,
            "/page.css": self._style,
            "/runs": self._names,
            "/data": self._data,
        }

    @_route
    def _script(self, request: wrappers.Request) -> Any:  # noqa: ANN401
        from gradwatch.sinks.page.data import FORMAT
        from gradwatch.sinks.page.render import asset, script

        code = f"const FORMAT = {FORMAT};\n{script()}\n{asset('tensorboard.js')}"
        return http_util.Respond(request, code, "application/javascript")

    @_route
    def _style(self, request: wrappers.Request) -> Any:  # noqa: ANN401
        from gradwatch.sinks.page.render import asset

        return http_util.Respond(request, asset("page.css"), "text/css")

    @_route
    def _names(self, request: wrappers.Request) -> Any:  # noqa: ANN401
        return http_util.Respond(request, json.dumps({"runs": self._runs.names()}), "application/json")

    @_route
    def _data(self, request: wrappers.Request) -> Any:  # noqa: ANN401
        asked = request.args.getlist("run")
        if not set(asked) <= set(self._runs.names()):
            return http_util.Respond(request, json.dumps({"error": "no such run"}), "application/json", code=404)
        return http_util.Respond(request, json.dumps(self._runs.data(asked)), "application/json")


def _directories(context: Any) -> dict[str, Path]:  # noqa: ANN401
    """Return the log directories by the names that `--logdir_spec` gives them; that of `--logdir` has none."""
    spec = getattr(context.flags, "logdir_spec", "") or ""
    if not spec:
        return {"": Path(context.logdir).expanduser()} if context.logdir else {}
    found = {}
    for number, part in enumerate(spec.split(",")):
        name, separator, path = part.partition(":")
        found[name if separator else str(number)] = Path(path if separator else name).expanduser()
    return found


class _Runs:
    """Records below log directories, read in the background so that no answer waits for it."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        """Take the directories; nothing is read before something is asked for."""
        self._directories = directories
        self._lock = threading.Lock()
        self._known: dict[str, Path] = {}
        self._looked = -_LONG_AGO
        self._asked: dict[str, float] = {}
        self._read: dict[str, Any] = {}
        """Runs by name, as `Following` gave them last."""
        self._made: dict[str, tuple[Any, int, Any]] = {}
        """The newest answer of each: the run, the number of columns, the data."""
        self._versions: dict[str, int] = {}
        """How often each has been another one."""
        self._thread: threading.Thread | None = None

    def names(self) -> list[str]:
        """Return the names of all runs, looked for every few seconds."""
        from gradwatch.sinks.reading import records

        with self._lock:
            if time.monotonic() - self._looked <= _PAUSE:
                return list(self._known)
            self._looked = time.monotonic()
        known = {  # not under the lock: a slow disk would hold up every answer
            "/".join(part for part in (of, name) if part): file
            for of, top in self._directories.items()
            for name, file in records(top).items()
        }
        with self._lock:
            self._known = known
        return list(known)

    def data(self, names: list[str]) -> dict[str, Any]:
        """Return what the page shows of some runs: of those that have been read, and the names of the others."""
        from gradwatch import __version__
        from gradwatch.sinks.page.data import FORMAT

        with self._lock:
            self._asked |= dict.fromkeys(names, time.monotonic())
            ready = {name: self._read[name] for name in names if name in self._read}
        self._start()
        most = max((len(run.models[-1].layers) for run in ready.values() if run.models), default=1)
        columns = min(max(_CELLS // (5 * most * max(len(names), 1)), _FEWEST), _MOST)
        made = [self._made_of(name, run, columns) for name, run in ready.items()]
        stamp = f"{names}{[(name, self._versions[name]) for name in ready]}"
        return {
            "format": FORMAT,
            "gradwatch": __version__,
            "runs": made,
            "reading": [name for name in names if name not in ready],
            "stamp": stamp,
        }

    def _made_of(self, name: str, run: Any, columns: int) -> Any:  # noqa: ANN401
        from gradwatch.sinks.log import printable
        from gradwatch.sinks.page.data import run_data

        known = self._made.get(name)
        if known is None or known[0] is not run or known[1] != columns:
            known = self._made[name] = run, columns, {**run_data(name, run, columns=columns), "name": printable(name)}
        return known[2]

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._follow, name="gradwatch", daemon=True)
                self._thread.start()

    def _follow(self) -> None:
        """Read on what somebody has asked for lately, until nobody does."""
        from gradwatch.sinks.reading import Following

        readers: dict[str, Following] = {}
        while True:
            with self._lock:
                now = time.monotonic()
                self._asked = {name: at for name, at in self._asked.items() if now - at < _LONG_AGO}
                wanted = {name: self._known[name] for name in self._asked if name in self._known}
                for kept in (readers, self._read, self._made):
                    for name in [name for name in kept if name not in wanted]:
                        del kept[name]
                if not wanted:
                    self._thread = None
                    return
            for name, file in wanted.items():
                reader = readers.setdefault(name, Following(file))
                try:
                    run = reader.run()
                except (OSError, ValueError):  # it is being made, or was deleted, or is none
                    continue
                with self._lock:
                    if self._read.get(name) is not run:
                        self._read[name], self._versions[name] = run, self._versions.get(name, 0) + 1
            time.sleep(_PAUSE)
