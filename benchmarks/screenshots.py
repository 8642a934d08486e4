"""Opens the real TensorBoard on a run in a headless Chromium, and pictures every tab that gradwatch writes to.

gradwatch demo && pip install playwright && python -m benchmarks.screenshots runs/demo pictures
    # --quick: one, of a run of three steps
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
from gradwatch import watch

TABS = {
    "scalars": "scalars&_smoothingWeight=0",
    "norms": "scalars&_smoothingWeight=0&tagFilter=gradwatch_norm",
    "images": "images",
    "histograms": "histograms",
    "text": "text",
}


def free_port() -> int:
    """Give a port that nobody listens on."""
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
            flags = [
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ]
            browser = driver.chromium.launch(executable_path=browser_path, args=flags)
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


def main() -> None:
    """Take the pictures, or say what is missing for that."""
    mine = parser(__doc__)
    mine.add_argument("logdir", nargs="?")
    mine.add_argument("folder", type=Path, nargs="?")
    mine.add_argument(
        "--browser",
        default=shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"),
    )
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
    else:
        photograph(options.logdir, options.folder, options.browser, TABS)


if __name__ == "__main__":
    main()
