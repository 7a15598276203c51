"""What a learning attack brought back, told by the rows that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from temper.core.types import Row

__all__ = ["SEEN", "unseen_rows"]

SEEN = "seen by the attack"
"""The group of rows about items that an attack was trained on; they count in no map, ranking or claim."""


def unseen_rows(rows: Iterable[Row], seen: Collection[str]) -> Iterator[Row]:
    """The rows; those about seen items in a group of their own, and means over items without them.

    Where all items of a metric were seen nothing else is left to look at, and its rows stay as they are.
    """
    if not seen:
        yield from rows
        return
    rows = list(rows)
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row.item is not None and row.value is not None:
            values.setdefault((row.metric, row.split, row.group), {})[row.item] = row.value
    for row in rows:
        by_item = values.get((row.metric, row.split, row.group), {})
        left = [value for item, value in by_item.items() if item not in seen]
        if len(left) in (0, len(by_item)):
            yield row
        elif row.item is None:
            yield _without_seen(row, list(by_item.values()), left)
        else:
            yield replace(row, group=SEEN) if row.item in seen else row


def _without_seen(row: Row, values: list[float], left: list[float]) -> Row:
    """A mean over all items as one over those left; another figure of all items stays, and says so."""
    seen = f"the {len(values) - len(left)} rows that the attack was trained on"
    if row.value is None or not math.isclose(
        row.value, sum(values) / len(values), rel_tol=1e-6, abs_tol=1e-9
    ):
        return replace(row, note=_noted(row, f"with {seen}"))
    mean = sum(left) / len(left)
    return replace(
        row, value=mean, n=len(left), stderr=None, low=None, high=None, note=_noted(row, f"without {seen}")
    )


def _noted(row: Row, note: str) -> str:
    return f"{row.note}; {note}" if row.note else note
