"""The command line that all benchmarks share: with `--quick` each runs whole, but so small that it takes seconds."""

from __future__ import annotations

import argparse


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for a benchmark's own options, which are described by its docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parsed(mine: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options that were given, `quick` among them."""
    mine.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it works: figures not to be quoted"
    )
    options = mine.parse_args()
    if options.quick:
        print("--quick: to see that it works; its figures are not to be quoted")
    return options
