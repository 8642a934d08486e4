"""The real JupyterLab in a real browser: the still, the page and TensorBoard's tab, trusted and untrusted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import browser as browsers
import pytest

pytestmark = pytest.mark.slow

TRAIN = """
import gradwatch, torch
from torch import nn
torch.manual_seed(0)
layers = [part for _ in range(12) for part in (nn.Linear(16, 16), nn.Sigmoid())]
model = nn.Sequential(*layers, nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters())
watcher = gradwatch.watch(model, optimizer, logdir="runs/mine", on_alert=lambda _: None)
for _ in range(60):
    optimizer.zero_grad()
    loss = (model(torch.randn(8, 16)) - 1).square().mean()
    watcher.record(loss)
    loss.backward()
    optimizer.step()
watcher
"""
SENTENCE = "get next to no gradient since step 0"


def notebook(*cells):
    """Return a notebook with these cells."""
    nbformat = pytest.importorskip("nbformat", reason="needs jupyterlab (pip install jupyterlab)")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.writes(book)


@contextlib.contextmanager
def lab(folder):
    """Run JupyterLab over a folder; its kernels are this interpreter's."""
    programs = str(Path(sys.executable).parent)
    if shutil.which("jupyter-lab", path=programs) is None:
        pytest.skip("needs jupyterlab (pip install jupyterlab)")
    port = browsers.free_port()
    options = ["--no-browser", "--allow-root", f"--port={port}", f"--notebook-dir={folder}", "--LabApp.news_url="]
    own = f"{folder}/.jupyter"
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options, "--IdentityProvider.token="],
        env={
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "JUPYTER_CONFIG_DIR": own,
            "JUPYTER_DATA_DIR": own,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/api", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "JupyterLab ended"
                assert time.monotonic() < deadline, "JupyterLab does not answer"
                time.sleep(0.3)
        yield f"http://localhost:{port}/lab/tree"
    finally:
        process.terminate()
        process.wait(60)


def test_jupyterlab_shows_the_still_the_page_and_the_tab(tmp_path, request):
    path, port = browsers.found(request.config), browsers.free_port()
    board = f"%load_ext tensorboard\n%tensorboard --logdir runs --port {port}"
    (tmp_path / "a.ipynb").write_text(notebook(TRAIN, "watcher.page()", board), encoding="utf-8")
    with lab(tmp_path) as top, browsers.opened(path) as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        page.goto(f"{top}/a.ipynb?reset")
        page.get_by_text("gradwatch.watch").first.wait_for(timeout=90_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

        still = page.locator(".jp-OutputArea-output table")
        still.first.wait_for(timeout=90_000)
        assert still.count() == 1
        assert page.locator(".jp-OutputArea-output b").first.inner_text().endswith(SENTENCE)

        cells = page.locator(".jp-Notebook .jp-Cell")
        cells.nth(1).scroll_into_view_if_needed()
        frame = page.frame_locator("iframe[srcdoc]")
        frame.get_by_text(SENTENCE).first.wait_for(timeout=30_000)
        picture = frame.locator("canvas").first
        picture.scroll_into_view_if_needed()
        picture.hover(position={"x": 200, "y": 5})
        frame.locator(".tip").get_by_text("sensitivity").wait_for(timeout=10_000)

        cells.nth(2).scroll_into_view_if_needed()
        tab = page.frame_locator(f"iframe[src*='{port}']")
        tab.get_by_role("tab", name="Gradients").click(timeout=90_000)
        tab.frame_locator("iframe[src*='gradwatch']").get_by_text(SENTENCE).first.wait_for(timeout=30_000)


def test_of_an_untrusted_notebook_jupyterlab_keeps_the_still(tmp_path, request):
    path, file = browsers.found(request.config), tmp_path / "theirs.ipynb"
    file.write_text(notebook(TRAIN, "watcher.page()"), encoding="utf-8")
    pytest.importorskip("nbconvert", reason="needs jupyterlab (pip install jupyterlab)")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(file)]
    away = {**os.environ, "JUPYTER_DATA_DIR": str(tmp_path / "elsewhere")}  # signed by somebody else
    subprocess.run(command, check=True, capture_output=True, env=away, timeout=120)
    with lab(tmp_path) as top, browsers.opened(path) as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        page.goto(f"{top}/theirs.ipynb?reset")
        still = page.locator(".jp-OutputArea-output table")
        still.wait_for(timeout=90_000)
        colours = still.locator("td").evaluate_all("cells => cells.map(c => getComputedStyle(c).backgroundColor)")
        assert len(set(colours)) > 13  # a picture of 13 layers
        assert page.locator(".jp-OutputArea-output b").first.inner_text().endswith(SENTENCE)
        page.get_by_text('page.save("page.html") writes a file').wait_for()
        assert page.locator("iframe").count() == 0
