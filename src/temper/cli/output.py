"""How commands print: a table on a terminal, plain lines elsewhere, one JSON document with --json.

Results go to stdout, everything said on the way to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

__all__ = ["AsJson", "bytes_text", "number", "print_json", "print_table", "say", "seconds_text"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def say(text: str) -> None:
    """A line about what is going on, to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document; an iterator is printed as an array, item by item."""
    if isinstance(value, Mapping | list | tuple | str | int | float) or value is None:
        print(json.dumps(value, ensure_ascii=False, indent=1))
        return
    print("[", end="")
    for position, item in enumerate(value):
        print(("," if position else "") + "\n" + json.dumps(item, ensure_ascii=False), end="")
    print("\n]")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """A table on a terminal; aligned plain lines, with the column names first, elsewhere."""
    cells = [[_cell(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(columns, cells, title)
        return
    if title:
        print(title)
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    for row in [list(columns), *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _rich_table(columns: Sequence[str], cells: list[list[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*(Text(text) for text in row))
    Console(no_color="NO_COLOR" in os.environ or None).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)


def number(value: float | None) -> str:
    """A number with four significant digits, "-" for none."""
    return "-" if value is None else f"{value:.4g}"


def bytes_text(size: int | None) -> str:
    """Bytes as MB or GB."""
    if size is None:
        return "unknown"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def seconds_text(seconds: float | None) -> str:
    """Seconds as s, min or h."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
