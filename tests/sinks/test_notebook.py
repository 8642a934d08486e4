"""What a notebook shows: a still that survives what notebooks strike out, and the page in a frame."""

from __future__ import annotations

import html
import pickle
import re
from html.parser import HTMLParser

import pytest
import torch
from jupyter_client.manager import start_new_kernel
from models import deep
from torch import nn

import gradwatch
from gradwatch import Alert, Finding, LayerInfo, ModelInfo, ParameterInfo, Severity, Snapshot
from gradwatch.sinks.page.notebook import Page, still
from gradwatch.sinks.reading import Run

KEPT = {"div", "p", "b", "br", "table", "caption", "tr", "td", "tbody"}
"""What no sanitizer of a notebook strikes out: no script, frame, style sheet, picture or handler is needed."""
STYLES = {"background-color", "padding", "padding-left", "border-left"}


class Tags(HTMLParser):
    """Collects tags and what stands at them."""

    def __init__(self):
        super().__init__()
        self.tags, self.styles, self.others, self.text = set(), set(), set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "style":
                self.styles |= {part.split(":")[0].strip() for part in value.split(";") if part.strip()}
            else:
                self.others.add(name)

    def handle_data(self, data):
        self.text += data


def parsed(text):
    tags = Tags()
    tags.feed(text)
    return tags


def watched(logdir=None, steps=60, depth=14):
    torch.manual_seed(0)
    model = deep(depth, 6, nn.Sigmoid)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watcher = gradwatch.watch(model, optimizer, logdir=logdir, on_alert=lambda _: None)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.randn(16, 6)) - 1).square().mean()
        watcher.record(loss)
        loss.backward()
        optimizer.step()
    return watcher


@pytest.mark.parametrize("recorded", [True, False])
def test_a_watcher_shows_the_sentence_the_picture_and_the_remedy_without_script(tmp_path, recorded):
    with watched(tmp_path / "mine" if recorded else None) as watcher:
        tags = parsed(watcher._repr_html_())
        assert tags.tags <= KEPT
        assert tags.styles <= STYLES
        assert tags.others == set()
        assert "of 15 layers (0 to 18) get next to no gradient since step 0" in tags.text
        assert "Try: ReLU in place of the sigmoids" in tags.text
        first = watcher.report.snapshot.step - 49 if not recorded else 0
        assert f"Gradient of each layer, step {first} to {watcher.report.snapshot.step}: dark is little" in tags.text
        colours = re.findall(r"background-color: (#[0-9a-f]{6})", watcher._repr_html_())
        rows = 15
        assert len(colours) % rows == 0

        def light(colour):
            return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

        assert light(colours[0]) < light(colours[-1])  # the first layer, and the last


def test_the_page_of_a_watcher_shows_the_whole_run_and_can_be_saved(tmp_path):
    with watched(tmp_path / "mine") as watcher:
        page = watcher.page()
        page.save(tmp_path / "out.html")
        text = (tmp_path / "out.html").read_text(encoding="utf-8")
        assert '"name":"mine"' in text
        assert f'"measured":{len(gradwatch.read_run(tmp_path / "mine").snapshots)}' in text
        frame = page._repr_html_()
        tags = parsed(frame)
        assert tags.tags == {"iframe", "p"}
        assert 'sandbox="allow-scripts"' in frame
        assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == text


def test_the_still_of_a_run_that_goes_on_tells_alerts_as_they_are_now(tmp_path):
    with watched(tmp_path / "mine") as watcher:
        (now,) = [a for a in watcher.report.open if a.finding.code == "GW101"]
        (read,) = [a for a in gradwatch.read_run(tmp_path / "mine").alerts if a.finding.code == "GW101"]
        assert now.message in parsed(watcher._repr_html_()).text
        assert now.last > read.last  # or this test shows nothing


CELL = """
import gradwatch, torch
from torch import nn
torch.manual_seed(0)
layers = [part for _ in range(14) for part in (nn.Linear(6, 6), nn.Sigmoid())]
model = nn.Sequential(*layers, nn.Linear(6, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
watcher = gradwatch.watch(model, optimizer, on_alert=lambda _: None)
for _ in range(30):
    optimizer.zero_grad()
    (model(torch.randn(16, 6)) - 1).square().mean().backward()
    optimizer.step()
text = repr(watcher)
"""


def run_in(kernel, cell):
    """Run a cell in a kernel; return what it shows, the last value among it."""
    shown = []

    def take(message):
        kind, content = message["header"]["msg_type"], message["content"]
        assert kind != "error", content["traceback"]
        if kind in ("display_data", "execute_result"):
            shown.append(content["data"])
        elif kind == "stream":
            shown.append({content["name"]: content["text"]})

    kernel.execute_interactive(cell, timeout=120, output_hook=take)
    return shown


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_notebook_shows_the_still_once_and_text_is_text(kernel):
    assert run_in(kernel, CELL) == []
    ((still,),) = [run_in(kernel, "watcher")]
    assert set(still) == {"text/plain", "text/html"}
    assert "get next to no gradient since step 0" in still["text/html"]
    assert "GW101 vanishing-depth (warning)" in still["text/plain"]
    ((printed,),) = [run_in(kernel, "print(text)")]
    assert printed["stdout"].strip() == still["text/plain"].strip()
    ((page,),) = [run_in(kernel, "watcher.page()")]
    assert page["text/html"].startswith("<iframe srcdoc=")


def test_a_notebook_shows_of_a_report_what_is_wrong(kernel):
    run_in(kernel, CELL)
    ((report,),) = [run_in(kernel, "watcher.close()")]
    first, *alerts = report["text/plain"].splitlines()
    assert first == "Report of step 29: 30 of 30 parameters with a gradient, 1 open alert"
    assert [one.split(":")[0] for one in alerts] == ["GW101 vanishing-depth"]


def test_errors_in_a_notebook_hold_their_pictures(kernel):
    shown = run_in(
        kernel,
        """
import torch, gradwatch
from torch import nn
torch.manual_seed(0)
model = nn.RNN(2, 8, batch_first=True)
try:
    gradwatch.assert_horizon(model, torch.randn(4, 60, 2), at_least=55, output=lambda y: y[0][:, -1])
except gradwatch.GradientHealthError as error:
    print(error)
""",
    )
    (stream,) = shown
    assert "gain" in stream["stdout"]
    assert "\u2588" in stream["stdout"]


def test_what_verdicts_remember_is_in_the_order_of_the_steps():
    with watched(steps=80) as watcher:
        steps = [s.step for s in watcher._judge.history.remembered]
        assert steps == sorted(steps)
        assert steps[-1] == watcher.report.snapshot.step


def test_without_a_record_the_page_shows_what_verdicts_remember():
    with watched(steps=80) as watcher:
        text = watcher.page()._html
        assert '"measured":50' in text
        assert '"name":"Sequential"' in text


def test_a_watcher_that_has_seen_nothing_says_so():
    with watched(steps=0) as watcher:
        assert "nothing was recorded" in watcher._repr_html_()


def test_a_watcher_that_was_pickled_is_its_last_report():
    with watched(steps=5) as watcher:
        assert isinstance(pickle.loads(pickle.dumps(watcher)), gradwatch.Report)


HOSTILE = "<script>alert(1)</script>\x1b[31m&"


def test_names_stay_names():
    model = ModelInfo(
        (LayerInfo(HOSTILE, "Linear", 0),), (ParameterInfo("w", HOSTILE, (2, 2), "float32", 0, "weight"),)
    )
    snapshot = Snapshot(0, 0.0, model, norm=(1.0,))
    finding = Finding("GW101", HOSTILE, Severity.ERROR, HOSTILE)
    alert = Alert(finding, 0, 0, None, HOSTILE, HOSTILE, HOSTILE, Severity.ERROR)
    run = Run((model,), (snapshot,), (alert,))
    text = still("x", run)
    assert parsed(text).tags <= KEPT
    assert "\x1b" not in text
    assert parsed(Page(HOSTILE, run, "0")._repr_html_()).tags == {"iframe", "p"}


def test_of_many_layers_those_with_alerts_are_shown():
    names = [f"layer{i}" for i in range(60)]
    model = ModelInfo(
        tuple(LayerInfo(name, "Linear", i) for i, name in enumerate(names)),
        tuple(ParameterInfo(f"{n}.w", n, (2, 2), "float32", 0, "weight") for n in names),
    )
    norm = [1.0] * 60
    norm[7], norm[8] = 0.0, float("nan")
    finding = Finding("GW101", "vanishing-depth", Severity.WARNING, "layer55", onset=0)
    alert = Alert(finding, 0, 0, None, "m", "c", "r", Severity.WARNING)
    text = still("x", Run((model,), (Snapshot(0, 0.0, model, norm=tuple(norm)),), (alert,)))
    assert "Gradient of 24 of 60 layers" in text
    assert "&#9650; layer55" in text
    assert "layer7<" in text  # the smallest
    assert "#000000" in text
