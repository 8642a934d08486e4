"""A real browser, where the machine has one: `--browser PATH`, or chromium on the path."""

from __future__ import annotations

import contextlib
import shutil
import socket

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def found(config):
    """Return where the browser is; skip with the reason where there is none."""
    pytest.importorskip("playwright", reason="needs playwright (pip install playwright) and a Chromium")
    path = config.getoption("browser") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs a Chromium: --browser PATH")
    return path


def free_port():
    """Return a port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def opened(path):
    """Open it; what a page logs as an error, or raises, fails the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page_of(browser, address, *, width=1400, height=1000, scheme="light"):
    """Open a page, and see that nothing went wrong in it."""
    page, wrong = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: wrong.append(f"asked for {request.url}") if outside(request.url) else None)
    page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
    page.goto(address)
    try:
        yield page
    finally:
        page.close()
    assert wrong == []


def outside(address):
    """Tell whether an address leads out of this machine."""
    return not address.startswith(("file:", "data:", "blob:", "about:", "http://localhost:"))
