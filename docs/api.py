"""Writes docs/api.md from the docstrings of what is public: `python docs/api.py`, with griffe installed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

PAGE = Path(__file__).with_name("api.md")
FACES = ("gradwatch.lightning.GradientMonitor", "gradwatch.huggingface.GradientCallback")
"""Public names that are not in `gradwatch` itself, because they import a Trainer."""
HEAD = """# The public names

Made from the docstrings by `python docs/api.py`; the pages beside this one say what they are for. What is not named
here may change.
"""


def page() -> str:
    """Return the whole page."""
    logging.getLogger("griffe").setLevel(logging.ERROR)
    package: Any = griffe.load("gradwatch", docstring_parser="google", resolve_aliases=True)
    names = sorted(package.exports, key=str.lower)
    found = [(f"gradwatch.{name}", package[name]) for name in names]
    found += [(name, package[name.removeprefix("gradwatch.")]) for name in FACES]
    lines = [HEAD]
    for kind, title in (("function", "Functions"), ("class", "Classes"), ("attribute", "Others")):
        lines.append(f"## {title}\n")
        for name, member in found:
            if member.kind.value == kind:
                lines += of_member(name, member.final_target if member.is_alias else member)
    return "\n".join(lines).rstrip() + "\n"


def of_member(name: str, member: Any) -> Iterator[str]:
    """Yield the lines of a function, a class or an attribute."""
    yield f"### `{name}`\n"
    if member.kind.value == "attribute":
        yield from paragraphs(member)
        return
    if member.kind.value == "class":
        yield from of_class(name, member)
        return
    yield f"```py\n{signature(member, name.rpartition('.')[2])}\n```\n"
    yield from paragraphs(member)


def of_class(name: str, member: Any) -> Iterator[str]:
    """Yield the lines of a class: how it is made, what it has, and what it does."""
    attributes = [m for n, m in member.members.items() if m.is_attribute and not n.startswith("_")]
    methods = [m for n, m in member.members.items() if m.is_function and (not n.startswith("_") or n == "__call__")]
    init = member.members.get("__init__")
    if init is not None and init.parameters:
        yield f"```py\n{signature(init, name.rpartition('.')[2])}\n```\n"
    yield from paragraphs(member)
    if init is not None:
        yield from paragraphs(init, sections_only=True)
    for attribute in attributes:
        if "property" in attribute.labels or attribute.annotation is not None or attribute.docstring:
            of = f": {attribute.annotation}" if attribute.annotation is not None else ""
            default = (
                f" = {attribute.value}" if attribute.value is not None and "property" not in attribute.labels else ""
            )
            told = f": {flat(attribute.docstring.value)}" if attribute.docstring else ""
            yield f"- `{attribute.name}{of}{default}`{told}"
    if attributes:
        yield ""
    for method in methods:
        yield f"```py\n{signature(method, method.name)}\n```\n"
        yield from paragraphs(method)


def signature(function: Any, name: str) -> str:
    """Return how a function is called, with the types."""
    parts, star = [], False
    for parameter in function.parameters:
        kind = parameter.kind.value
        if parameter.name in ("self", "cls"):
            continue
        if kind == "keyword-only" and not star:
            parts.append("*")
            star = True
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        star = star or stars == "*"
        of = f": {parameter.annotation}" if parameter.annotation is not None else ""
        default = (
            "" if parameter.default is None or stars else f" = {parameter.default}" if of else f"={parameter.default}"
        )
        parts.append(f"{stars}{parameter.name}{of}{default}")
    gives = f" -> {function.returns}" if function.returns is not None and function.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){gives}"
    inside = "".join(f"    {part},\n" for part in parts)
    return line if len(line) <= 110 else f"{name}(\n{inside}){gives}"


def paragraphs(member: Any, *, sections_only: bool = False) -> Iterator[str]:
    """Yield a docstring as Markdown: its text, then lists of arguments, results and errors."""
    if member.docstring is None:
        return
    for section in member.docstring.parse("google", warnings=False):
        kind = section.kind.value
        if kind == "text":
            if not sections_only:
                yield f"{section.value}\n"
        elif kind == "parameters":
            yield from (f"- `{item.name}`: {flat(item.description)}" for item in section.value)
            yield ""
        elif kind in ("returns", "raises", "yields"):
            for item in section.value:
                of = f" `{item.annotation}`" if kind == "raises" else ""
                yield f"{kind.capitalize()}{of}: {flat(item.description)}\n"


def flat(text: str) -> str:
    """Return a text in one line."""
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
