"""Progress: silence here; the command line brings its own bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["silent"]

T = TypeVar("T")


def silent(items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
    """The items, unannounced."""
    yield from items
