"""Opens the real TensorBoard on a run in a headless Chromium, and takes a picture of every tab that gradwatch writes to.

gradwatch demo && pip install playwright && python -m benchmarks.screenshots runs/demo pictures
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

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


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description="pictures of a run in TensorBoard")
    parser.add_argument("logdir")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--browser",
        default=shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"),
    )
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    options.folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            options.logdir,
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
            browser = driver.chromium.launch(executable_path=options.browser, args=flags)
            page = browser.new_page(viewport={"width": 1500, "height": 1100})
            for name, tab in TABS.items():
                page.goto(f"{address}/#{tab}")
                page.reload()
                page.wait_for_timeout(6000)
                page.screenshot(path=options.folder / f"{name}.png")
                print(options.folder / f"{name}.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
