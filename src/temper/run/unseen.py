"""What a learning attack brought back, told by the rows that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from temper.core.types import Row

__all__ = ["SEEN", "unseen_rows"]

SEEN = "seen by the attack"
"""The group of rows about items that an attack was trained on; they count in no map, ranking or claim."""


def unseen_rows(rows: Iterable[Row], seen: Mapping[str, Collection[str]]) -> Iterator[Row]:
    """The rows; those about seen items (part -> ids) in a group of their own, and means over items without them.

    Other figures of a part with seen items stay, and say so. Where all items of a metric were seen nothing else is left
    to look at, and its rows stay as they are. A row whose split is no part may be about an item of any.
    """
    anywhere = frozenset().union(*seen.values())
    if not anywhere:
        yield from rows
        return
    rows = list(rows)
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row.item is not None and row.value is not None:
            values.setdefault((row.metric, row.split, row.group), {})[row.item] = row.value
    for row in rows:
        by_item, ids = values.get((row.metric, row.split, row.group), {}), seen.get(row.split, anywhere)
        left = [value for item, value in by_item.items() if item not in ids]
        if row.item is not None:
            yield replace(row, group=SEEN) if left and row.item in ids else row
        elif by_item and len(left) in (0, len(by_item)):
            yield row
        else:
            yield _without_seen(row, list(by_item.values()), left) if ids else row


def _without_seen(row: Row, values: list[float], left: list[float]) -> Row:
    """A mean over all items as one over those left; another figure stays."""
    is_mean = (
        bool(values)
        and row.value is not None
        and math.isclose(row.value, sum(values) / len(values), rel_tol=1e-6, abs_tol=1e-9)
    )
    if not is_mean:
        return row.noted("with the rows that the attack was trained on")
    note = f"without the {len(values) - len(left)} rows that the attack was trained on"
    mean = sum(left) / len(left)
    return replace(row, value=mean, n=len(left), stderr=None, low=None, high=None).noted(note)
