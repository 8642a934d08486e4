"""Pictures the page of runs, and every tab of the real TensorBoard that gradwatch writes to, in a headless Chromium.

gradwatch demo && pip install playwright && python -m benchmarks.screenshots runs/demo pictures
    # --quick: one, of a run of three steps
python -m benchmarks.screenshots runs/demo docs --page     # the pictures of docs: page-*.png
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

from benchmarks.command import parsed, parser
from gradwatch import __version__, read_run, watch
from gradwatch.sinks.page.data import page_data
from gradwatch.sinks.page.render import page_html

TABS = {
    "scalars": "scalars&_smoothingWeight=0",
    "norms": "scalars&_smoothingWeight=0&tagFilter=gradwatch_norm",
    "images": "images",
    "histograms": "histograms",
    "text": "text",
    "gradients": "gradwatch",
}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PAGES = (
    ("page-depth", ("sigmoid",), 1100, "light"),
    ("page-time", ("flow-lstm",), 1100, "light"),
    ("page-several", ("flow-lstm", "flow-lstm-bias"), 1100, "dark"),
    ("page-phone", ("sigmoid",), 390, "dark"),
)
"""Name, runs, width and colours."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(address: str) -> None:
    """Wait until TensorBoard answers, and has read its files."""
    for _ in range(120):
        try:
            with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                if len(answer.read()) > 4:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"no TensorBoard at {address}")


def small_run(logdir: str) -> None:
    """Leave a record of three steps."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, logdir=logdir):
        for _ in range(3):
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()


def photograph(logdir: str, folder: Path, browser_path: str, tabs: dict[str, str]) -> None:
    """Take a picture of each of these tabs."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            logdir,
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
    )
    try:
        wait_for(address)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
            page = browser.new_page(viewport={"width": 1500, "height": 1100})
            for name, tab in tabs.items():
                page.goto(f"{address}/#{tab}")
                page.reload()
                page.wait_for_timeout(6000)
                page.screenshot(path=folder / f"{name}.png")
                print(folder / f"{name}.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def photograph_pages(logdir: str, folder: Path, browser_path: str) -> None:
    """Take the pictures of the page that docs show: its first screen, of each of `PAGES`."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as scratch:
        browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
        for name, runs, width, scheme in PAGES:
            chosen = {run: read_run(Path(logdir, run)) for run in runs}
            file = Path(scratch, f"{name}.html")
            file.write_text(page_html(page_data(chosen, __version__), name), encoding="utf-8")
            page = browser.new_page(viewport={"width": width, "height": 860}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(f"file://{file}")
            page.wait_for_timeout(500)
            page.screenshot(path=folder / f"{name}.png")
            print(folder / f"{name}.png")
        browser.close()


def main() -> None:
    """Take the pictures, or say what is missing for that."""
    mine = parser(__doc__)
    mine.add_argument("logdir", nargs="?")
    mine.add_argument("folder", type=Path, nargs="?")
    mine.add_argument(
        "--browser",
        default=shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"),
    )
    mine.add_argument("--page", action="store_true", help="the page alone, as docs show it")
    options = parsed(mine)
    here = {"playwright": importlib.util.find_spec("playwright") is not None, "a Chromium": options.browser is not None}
    if missing := [what for what, is_here in here.items() if not is_here]:
        said = f"screenshots: {' and '.join(missing)} not found, nothing taken"
        print(said) if options.quick else mine.error(said)
    elif options.quick:
        with tempfile.TemporaryDirectory() as scratch:
            small_run(f"{scratch}/run")
            photograph(f"{scratch}/run", Path(scratch), options.browser, {"scalars": TABS["scalars"]})
    elif options.logdir is None or options.folder is None:
        mine.error("logdir and folder are needed, but for --quick")
    elif options.page:
        photograph_pages(options.logdir, options.folder, options.browser)
    else:
        photograph(options.logdir, options.folder, options.browser, TABS)


if __name__ == "__main__":
    main()
