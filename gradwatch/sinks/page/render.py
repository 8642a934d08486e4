"""The data of a page -> one HTML file by itself: no network, and nothing of a record becomes markup or a script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from typing import Any

SCRIPTS = ("read.js", "draw.js", "panels.js", "main.js")
"""In this order, as one script."""
_START = 'show(document.getElementById("gradwatch"), JSON.parse(document.getElementById("data").textContent));'


def asset(name: str) -> str:
    """Return the text of a file of the page."""
    return resources.files("gradwatch.sinks.page").joinpath("assets", name).read_text(encoding="utf-8")


def script() -> str:
    """Return the page's own script: `show(element, data)`."""
    return "\n".join(asset(name) for name in SCRIPTS)


def page_html(data: dict[str, Any], title: str) -> str:
    """Return a whole page.

    Its script may run because the policy names its hash; the data are no script, and whatever stands in them (`<`, `&`
    and the separators that end a line in a script are escaped) is shown as text.
    """
    code, style = f'"use strict";\n{script()}\n{_START}', asset("page.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(code)}'; style-src '{_hash(style)}';"
        " base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main id="gradwatch"><noscript>This page draws its data with a script of its own.</noscript></main>
<script type="application/json" id="data">{in_markup(data)}</script>
<script>{code}</script>
</body>
</html>
"""


def in_markup(data: dict[str, Any]) -> str:
    """Return data as JSON that ends no element and begins none, wherever it stands in a page."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
