"""Rows and attempts as JSON objects, and which of their facts may differ between two equal runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from temper.core.errors import StoreError
from temper.core.types import Attempt, Json, Row

__all__ = ["VOLATILE", "attempt_from", "attempt_record", "row_from", "row_record", "stable"]

VOLATILE = frozenset({"wall_s", "cache_hits", "run", "reused_from", "machine"})
"""Facts that say when and where a number was made and not what it is."""

ROW_FIELDS = tuple(f.name for f in dataclasses.fields(Row))
ATTEMPT_FIELDS = tuple(f.name for f in dataclasses.fields(Attempt))
ROW_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Row) if f.default is not dataclasses.MISSING}


def row_record(row: Row) -> dict[str, Json]:
    """A row as JSON; fields at their default are left out. Raises StoreError for a non-finite value."""
    for name in ("value", "stderr", "low", "high"):
        number = getattr(row, name)
        if number is not None and not math.isfinite(number):
            raise StoreError(
                f"Row {row.metric!r} has {name} = {number}",
                cure="A number that cannot be computed is None, with a note that says why.",
            )
    record = {name: getattr(row, name) for name in ROW_FIELDS}
    record["facts"] = dict(row.facts)
    keep = ("metric", "value", "n", "facts")
    return {k: _plain(v) for k, v in record.items() if k in keep or v != ROW_DEFAULTS.get(k)}


def _plain(value: Json) -> Json:
    """NumPy and torch scalars as Python numbers; everything else as it is."""
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def row_from(record: Mapping[str, Json]) -> Row:
    """The row in a record; keys it does not know are dropped."""
    return Row(**{name: record[name] for name in ROW_FIELDS if name in record})


def attempt_record(attempt: Attempt) -> dict[str, Json]:
    """An attempt as JSON."""
    record = {name: getattr(attempt, name) for name in ATTEMPT_FIELDS}
    return record | {"cost": dict(attempt.cost), "detail": dict(attempt.detail)}


def attempt_from(record: Mapping[str, Json]) -> Attempt:
    """The attempt in a record; keys it does not know are dropped."""
    return Attempt(**{name: record[name] for name in ATTEMPT_FIELDS if name in record})


def stable(record: Mapping[str, Json]) -> dict[str, Json]:
    """A record without what may differ between two equal runs: wall time, cache hits, the machine's name."""
    out = {key: value for key, value in record.items() if key not in VOLATILE}
    for key in ("facts", "cost", "detail"):
        if isinstance(out.get(key), Mapping):
            out[key] = {k: v for k, v in out[key].items() if k not in VOLATILE}
    return out
