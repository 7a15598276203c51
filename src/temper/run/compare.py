"""Two runs compared, paired by item where both have rows by item, else by seed; Holm-corrected over all metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

from temper.core.errors import DataError
from temper.core.types import Row
from temper.run.axes import each_once, own_choices
from temper.store.folders import RunFolder

__all__ = ["Comparison", "compare_runs"]

LEVEL = 0.95
Group = tuple[str, str, str, str, str]
"""Step, metric, split, group and arm."""


class Comparison(NamedTuple):
    """One metric of two runs; `difference` is b - a and `p` is corrected for the number of metrics."""

    step: str
    metric: str
    split: str
    group: str
    arm: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    n: int
    pairing: Literal["items", "seeds"]
    p: float
    verdict: Literal["higher", "lower", "no difference seen"]
    needed: int | None
    """Pairs at which a difference of this size would be seen with 80% power; None for a difference of 0."""


def compare_runs(run_a: RunFolder, run_b: RunFolder) -> list[Comparison]:
    """Every metric that both runs have; raises DataError when they share none.

    Rows by item are averaged over seeds and paired by item. A metric with rows by item is not compared by seed as well.
    """
    a, b = _collect(run_a), _collect(run_b)
    pairs = {key: _paired(a[key], b[key]) for key in a if key in b}
    pairs = {key: pair for key, pair in pairs.items() if pair[0]}
    if not pairs:
        raise DataError(
            "The runs have no metric in common",
            where=f"{run_a.id} and {run_b.id}",
            cure="Compare runs of one measure.",
        )
    with_items = {key[0] for key in pairs if key[1] == "items"}
    kept = {key: pair for key, pair in pairs.items() if key[1] == "items" or key[0] not in with_items}
    return _corrected(kept)


Place = tuple[str, str]
"""A seed or an item, and the matrix values: what two values must share to be a pair."""
Collected = dict[tuple[Group, Literal["items", "seeds"]], dict[Place, float]]


def _collect(folder: RunFolder) -> Collected:
    """Values by what they are paired on; an item's values are averaged over seeds, since they are not independent."""
    values: dict[tuple[Group, Literal["items", "seeds"]], dict[Place, list[float]]] = {}
    for row in each_once(folder.rows()):
        if row.value is None:
            continue
        kind: Literal["items", "seeds"] = "seeds" if row.item is None else "items"
        place = (str(row.facts.get("seed", 0)) if row.item is None else row.item, _matrix(row))
        group = (str(row.facts.get("step", "")), row.metric, row.split, row.group, row.arm)
        values.setdefault((group, kind), {}).setdefault(place, []).append(row.value)
    return {
        key: {place: sum(found) / len(found) for place, found in by_place.items()}
        for key, by_place in values.items()
    }


def _matrix(row: Row) -> str:
    return str(sorted(own_choices(row).items()))


def _paired(a: Mapping[Place, float], b: Mapping[Place, float]) -> tuple[list[float], list[float]]:
    places = [place for place in a if place in b]
    return [a[place] for place in places], [b[place] for place in places]


def _corrected(
    pairs: Mapping[tuple[Group, Literal["items", "seeds"]], tuple[list[float], list[float]]],
) -> list[Comparison]:
    from temper.ops.stats import holm, needed_items, paired_difference

    with warnings.catch_warnings():
        # Seeds that agree to the last digits are no fault of the user's; the interval shows them.
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        gaps = [
            paired_difference(b, a, method="bootstrap" if key[1] == "items" else "t")
            for key, (a, b) in pairs.items()
        ]
    # One pair says nothing; it must not make the others' correction harsher.
    adjusted = iter(holm([gap.p for gap in gaps if gap.n > 1]) if any(gap.n > 1 for gap in gaps) else [])
    corrected = [next(adjusted) if gap.n > 1 else 1.0 for gap in gaps]
    out = []
    for (group, kind), (a, b), gap, p in zip(pairs, pairs.values(), gaps, corrected, strict=True):
        spread = (gap.stderr or 0.0) * math.sqrt(gap.n)
        needed = needed_items(spread, gap.value) if gap.value and gap.n > 1 else None
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        low, high = (bound if math.isfinite(bound) else None for bound in (gap.low, gap.high))
        sure = p <= 1 - LEVEL
        verdict: Literal["higher", "lower", "no difference seen"] = (
            "no difference seen" if not sure or not gap.value else "higher" if gap.value > 0 else "lower"
        )
        out.append(Comparison(*group, mean_a, mean_b, gap.value, low, high, gap.n, kind, p, verdict, needed))
    return out
