"""Tables that steps wrote themselves: words and numbers that no row holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from temper.core.errors import StoreError
from temper.core.types import Json
from temper.report.folder import CellStep

__all__ = ["Noted", "noted_tables"]

MAX_TABLES, MAX_ROWS = 24, 200


class Noted(NamedTuple):
    """A table with its title; the first column names the rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def noted_tables(steps: Sequence[CellStep]) -> list[Noted]:
    """The tables of the first seed of every arm and step. Raises StoreError for one whose rows do not fit its columns."""
    seen: set[tuple[str, str, str]] = set()
    found = []
    for step in steps:
        for title, table in step.figures.get("tables", {}).items():
            if (step.arm, step.id, title) not in seen:
                seen.add((step.arm, step.id, title))
                found.append(_table(f"{title} ({step.label}, {step.id})", table, step))
    return found[:MAX_TABLES]


def _table(title: str, table: Json, step: CellStep) -> Noted:
    try:
        columns = [str(column) for column in table["columns"]]
        rows = [[str(cell) for cell in row] for row in table["rows"]][:MAX_ROWS]
    except (KeyError, TypeError):
        columns, rows = [], []
    if not columns or any(len(row) != len(columns) for row in rows):
        raise StoreError(
            f"The table {title!r} has no columns, or rows of other lengths",
            where=step.label,
            cure="Run the step again.",
        )
    return Noted(title, columns, rows)
