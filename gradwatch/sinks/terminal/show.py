"""Prints what is made for a terminal, on whatever stands at the other end."""

from __future__ import annotations

import io
import os
from typing import TextIO

from rich.console import Console, RenderableType

from gradwatch.sinks.terminal.page import Harmless


def show(*parts: RenderableType, to: TextIO) -> None:
    """Print; a reader that has seen enough (`| head`) and a terminal that lacks a character are no failures."""
    if isinstance(to, io.TextIOWrapper):
        to.reconfigure(errors="replace")
    console = Console(file=to, force_jupyter=False)
    with console.capture() as page:
        for part in parts:
            console.print(Harmless(part))
    write("\n".join(line.rstrip() for line in page.get().splitlines()), to)


def write(text: str, to: TextIO) -> None:
    """Write a text that is complete; a reader that has seen enough (`| head`) is no failure."""
    if isinstance(to, io.TextIOWrapper):
        to.reconfigure(errors="replace")
    try:
        print(text, file=to)
        to.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())  # where the flush at exit can go
