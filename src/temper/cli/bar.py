"""The progress bar: on a terminal, on stderr; elsewhere silence."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from temper.core.types import Ticker
from temper.run.progress import silent

__all__ = ["make_ticker"]

T = TypeVar("T")


def make_ticker() -> Ticker:
    """A bar where stderr is a terminal, else nothing."""
    return _bar if sys.stderr.isatty() else silent


_active: list[object] = []


def _bar(items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
    if _active:
        # Two live displays cannot share a terminal; the outer one stays.
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if total is None and isinstance(items, Sized):
        total = len(items)
    console = Console(stderr=True, no_color="NO_COLOR" in os.environ or None)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label or "working", total=total)
        _active.append(task)
        try:
            for item in items:
                yield item
                progress.advance(task)
        finally:
            _active.pop()
