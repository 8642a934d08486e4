"""The tab "Gradients" of the real TensorBoard: its routes, what it never serves, and the page in a browser, live."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import browser as browsers
import pytest

from gradwatch import Alert, Finding, LayerInfo, ModelInfo, ParameterInfo, Record, Report, Severity, Snapshot
from gradwatch.sinks.page import columns

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=alert(1)>"


def model_of(names):
    return ModelInfo(
        tuple(LayerInfo(name, "Linear", i) for i, name in enumerate(names)),
        tuple(ParameterInfo(f"{n}.weight", n, (4, 4), "float32", 0, "weight") for n in names),
    )


def write(record, steps, names=("a", "b"), alerts=()):
    model = model_of(names)
    for step in steps:
        norm = tuple(10.0 ** -(i + 1) for i in range(len(names)))
        record(Report(Snapshot(step, 1e9 + step, model, loss=1.0, norm=norm), began=alerts, open=alerts))


@contextlib.contextmanager
def served(logdir, *options, prefix=""):
    """Run TensorBoard; return a function that asks it."""
    port = browsers.free_port()
    where = [] if any("logdir" in option for option in options) else ["--logdir", str(logdir)]
    command = [sys.executable, "-m", "tensorboard.main", *where, "--port", str(port), *options]
    if prefix:
        command += ["--path_prefix", prefix]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    top = f"http://localhost:{port}{prefix}"

    def ask(route, **wanted):
        query = urllib.parse.urlencode(wanted, doseq=True)
        with urllib.request.urlopen(f"{top}/data/plugin/gradwatch/{route}?{query}", timeout=20) as answer:
            return answer.read()

    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                ask("runs")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "TensorBoard ended"
                assert time.monotonic() < deadline, "TensorBoard does not answer"
                time.sleep(0.3)
        ask.top = top
        yield ask
    finally:
        process.terminate()
        process.wait(20)


def data_of(ask, *names):
    """Ask until all has been read."""
    deadline = time.monotonic() + 30
    while True:
        data = json.loads(ask("data", run=names))
        if not data["reading"]:
            return data
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def runs(tmp_path):
    with contextlib.ExitStack() as closing:
        made = {}
        for name in ("one", "two", f"x{HOSTILE.replace('/', '')}"):
            made[name] = Record(tmp_path / "runs" / name / "gradwatch")
            closing.callback(made[name].close)
            finding = Finding("GW101", HOSTILE, Severity.WARNING, "a", onset=2)
            alert = Alert(finding, 2, 9, None, HOSTILE, HOSTILE, HOSTILE, Severity.WARNING)
            write(made[name], range(10), alerts=(alert,), names=("a", HOSTILE))
        yield tmp_path / "runs", made


@pytest.mark.parametrize("options", [("--load_fast", "false"), ("--load_fast", "true"), ("--load_fast", "auto")])
def test_runs_and_their_data_are_served(runs, options):
    folder, _ = runs
    with served(folder, *options) as ask:
        names = json.loads(ask("runs"))["runs"]
        assert sorted(names) == sorted(["one/gradwatch", "two/gradwatch", f"x{HOSTILE}/gradwatch"])
        data = data_of(ask, "one/gradwatch", f"x{HOSTILE}/gradwatch")
        assert [run["name"] for run in data["runs"]] == ["one/gradwatch", f"x{HOSTILE}/gradwatch"]
        levels = columns.unpacked(data["runs"][0]["columns"]["norm"][0])
        assert levels == [pytest.approx(0.1, rel=4e-3)] * 10
        assert b"export async function render" in ask("index.js")
        assert b"--paper" in ask("page.css")


def test_nothing_else_is_served(runs):
    folder, _ = runs
    (folder.parent / "secret.txt").write_text("secret")
    with served(folder) as ask:
        for name in (
            "../secret.txt",
            "..",
            "/etc/passwd",
            "one",
            "",
            "one/gradwatch/record.jsonl",
            "one/gradwatch/../..",
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask("data", run=[name])
            assert refused.value.code == 404
            assert json.loads(refused.value.read()) == {"error": "no such run"}
            refused.value.close()
        for route in ("../../secret.txt", "assets/main.js", "record.jsonl", "%2e%2e/secret.txt"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(route)
            assert refused.value.code == 404
            refused.value.close()


def test_directories_by_name(runs):
    folder, _ = runs
    with served(None, "--logdir_spec", f"mine:{folder / 'one'},other:{folder / 'two'}") as ask:
        assert json.loads(ask("runs"))["runs"] == ["mine/gradwatch", "other/gradwatch"]
        assert [run["measured"] for run in data_of(ask, "mine/gradwatch")["runs"]] == [10]


def test_400_layers_of_8_runs_are_answered_at_once_and_in_five_megabytes(tmp_path):
    names = [f"blocks.{i // 4}.part{i % 4}" for i in range(400)]
    for i in range(8):
        record = Record(tmp_path / f"run{i}")
        write(record, range(0, 100_000, 250), names=names)
        record.close()
    with served(tmp_path) as ask:
        every = json.loads(ask("runs"))["runs"]
        assert len(every) == 8
        first = json.loads(ask("data", run=every))
        assert first["runs"] == []  # it waits for nothing
        assert first["reading"] == every
        data_of(ask, *every)
        text = ask("data", run=every)
        assert len(text) < 5e6
        assert len(json.loads(text)["runs"]) == 8


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
def test_the_tab_shows_the_page_and_what_comes_while_it_is_open(runs, request, prefix):
    folder, made = runs
    path = browsers.found(request.config)
    with served(folder, prefix=prefix) as ask, browsers.opened(path) as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(f"{ask.top}/#gradwatch")
        page.get_by_text("Gradients", exact=False).first.wait_for(timeout=20_000)
        frame = page.frame_locator("iframe")
        frame.locator(".headline").first.wait_for(timeout=20_000)
        assert frame.locator(".run").count() == 3
        assert HOSTILE in frame.locator(".headline").first.inner_text()
        assert frame.locator("img").count() == 0
        frame.get_by_text("two/gradwatch", exact=False).first.wait_for()
        write(made["one"], range(10, 200), names=("a", HOSTILE))
        frame.get_by_text("200 measured steps, 0 to 199").wait_for(timeout=20_000)
        frame.get_by_label("two/gradwatch").first.uncheck()
        frame.locator(".run").nth(2).wait_for(state="detached", timeout=20_000)
        assert wrong == []
        page.close()


def test_runs_that_come_and_that_are_replaced_are_shown(tmp_path, request):
    path = browsers.found(request.config)
    (tmp_path / "logs").mkdir()
    with served(tmp_path / "logs") as ask, browsers.opened(path) as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"{ask.top}/data/plugin_entry.html?name=gradwatch")
        page.get_by_text("No run of gradwatch below this log directory yet").wait_for(timeout=20_000)
        record = Record(tmp_path / "logs" / "one")
        write(record, range(40))
        record.close()
        page.get_by_text("one: 40 measured steps, 0 to 39").wait_for(timeout=20_000)
        page.get_by_role("searchbox").fill("a")
        page.locator("tbody tr").first.click()
        again = Record(tmp_path / "logs" / "one")  # as many steps, of another training
        write(again, range(100, 140))
        again.close()
        page.get_by_text("one: 40 measured steps, 100 to 139").wait_for(timeout=20_000)
        assert page.get_by_role("searchbox").input_value() == "a"
        assert page.locator("tr[aria-selected=true]").count() == 1
        page.close()


def test_what_vanishes_while_runs_are_looked_for_is_passed_over(tmp_path):
    import shutil
    import threading

    from gradwatch.sinks.reading import records

    done = threading.Event()

    def churn():
        while not done.is_set():
            for i in range(20):
                (tmp_path / f"d{i}" / "deep").mkdir(parents=True, exist_ok=True)
            for i in range(20):
                shutil.rmtree(tmp_path / f"d{i}", ignore_errors=True)

    record = Record(tmp_path / "kept")
    write(record, range(3))
    record.close()
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(300):
            assert "kept" in records(tmp_path)
    finally:
        done.set()
        thread.join()
