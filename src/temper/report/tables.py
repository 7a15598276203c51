"""Rows as tables: one line a metric and one column an arm, and heat maps of arms by category.

Standard library only, so that the command line can print them without loading anything heavy.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from temper.core.types import Row
from temper.run.axes import each_once

__all__ = [
    "Cell",
    "HeatMap",
    "SummaryRow",
    "SummaryTable",
    "format_interval",
    "format_value",
    "heat_maps",
    "summary_table",
]

# Student's t at 97.5 %, by degrees of freedom; beyond 30 the normal one is near enough for a table.
_T: tuple[float, ...] = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_RATE = re.compile(
    r"(^|_)(auroc|average_precision|f1|tpr|fpr|rate|share|accuracy|precision|recall|refused|refusal|rouge|success|agreement|probability)"
)
_NO_RATE = re.compile(r"gain|drop|spill|diff|delta|_s$|_nats$")


class Cell(NamedTuple):
    """A metric in one arm: mean over seeds (or items) with a 95 % interval where one can be given.

    `spread` says what the interval is over: "seeds", "items", "row" (as the method gave it) or "".
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    num_seeds: int
    spread: str
    note: str


class SummaryRow(NamedTuple):
    """One metric (in one split and group) with a cell for each arm that has it."""

    metric: str
    split: str
    group: str
    higher_is_better: bool | None
    cells: dict[str, Cell]

    @property
    def best(self) -> str | None:
        """The arm with the best value; None with fewer than two arms, on a tie, or where neither way is better."""
        known = [(cell.value, arm) for arm, cell in self.cells.items() if cell.value is not None]
        if len(known) < 2 or self.higher_is_better is None:
            return None
        known.sort(reverse=self.higher_is_better)
        return None if known[0][0] == known[1][0] else known[0][1]


class SummaryTable(NamedTuple):
    """All metrics in the order they first came, arms likewise."""

    arms: list[str]
    rows: list[SummaryRow]


class HeatMap(NamedTuple):
    """One metric by arm (lines) and group (columns); None where nothing was measured."""

    metric: str
    split: str
    higher_is_better: bool | None
    arms: list[str]
    groups: list[str]
    cells: list[list[Cell | None]]

    @property
    def scale(self) -> tuple[float, float]:
        """The range colours span: 0 to 1 for rates, else the range of the values."""
        values = [c.value for line in self.cells for c in line if c is not None and c.value is not None]
        if not values or (min(values) >= 0 and max(values) <= 1):
            return 0.0, 1.0
        return min(values), max(values)


Key = tuple[str, str, str]


def summary_table(rows: Iterable[Row], *, groups: bool = False) -> SummaryTable:
    """Metrics by arm; rows about one item are averaged per metric, rows with a group come with `groups` only.

    Where several steps of an arm measured the same, each is a column of its own; one that all arms share comes once.
    """
    arms: dict[str, None] = {}
    buckets: dict[Key, dict[str, list[Row]]] = {}
    kept = _shared_once(each_once(row for row in rows if groups or not row.group))
    several = _measured_twice(kept)
    for row in kept:
        step = (
            str(row.facts.get("step", "")) if (row.metric, row.split, row.group, row.arm) in several else ""
        )
        arm = " ".join(part for part in (row.arm, step) if part)
        arms.setdefault(arm)
        buckets.setdefault((row.metric, row.split, row.group), {}).setdefault(arm, []).append(row)
    lines = [
        SummaryRow(*key, _direction(by_arm), {arm: _cell(found) for arm, found in by_arm.items()})
        for key, by_arm in buckets.items()
    ]
    return SummaryTable(list(arms), lines)


def _shared_once(rows: list[Row]) -> list[Row]:
    """Rows of a step that is the same in every arm, such as a reference, once and named by the step.

    Only where each arm also has steps of its own: else the arms are what is compared.
    """
    arms: dict[str, set[str]] = {}
    for row in rows:
        arms.setdefault(str(row.facts.get("step_hash", row.arm)), set()).add(row.arm)
    everyone = set().union(*arms.values())
    shared = {step for step, found in arms.items() if found == everyone and len(found) > 1}
    own = set().union(*(found for step, found in arms.items() if step not in shared))
    if not shared or own != everyone:
        return rows
    first = next(row.arm for row in rows if row.facts.get("step_hash") in shared)
    return [
        row if row.facts.get("step_hash") not in shared else replace(row, arm=str(row.facts.get("step", "")))
        for row in rows
        if row.facts.get("step_hash") not in shared or row.arm == first
    ]


def _measured_twice(rows: Sequence[Row]) -> set[tuple[str, str, str, str]]:
    """Metric, split, group and arm of what two steps of the same arm measured."""
    steps: dict[tuple[str, str, str, str], set[str]] = {}
    for row in rows:
        key = (row.metric, row.split, row.group, row.arm)
        steps.setdefault(key, set()).add(str(row.facts.get("step", "")))
    return {key for key, found in steps.items() if len(found) > 1}


def _direction(by_arm: dict[str, list[Row]]) -> bool | None:
    return next(
        (r.higher_is_better for found in by_arm.values() for r in found if r.higher_is_better is not None),
        None,
    )


def _cell(rows: Sequence[Row]) -> Cell:
    items = [row for row in rows if row.item is not None]
    known = [row for row in items or rows if row.value is not None]  # a mean beside its items counts once
    notes = "; ".join(dict.fromkeys(row.note for row in rows if row.note))
    seeds = _by_seed(known)
    if not known:
        return Cell(None, None, None, 0, 0, "", notes)
    values = [statistics.fmean(float(r.value or 0) for r in group) for group in seeds]
    mean, n = statistics.fmean(values), sum(row.n for row in known)
    if len(values) > 1:
        return Cell(mean, *_within(_t_interval(values), known), n, len(values), "seeds", notes)
    if len(known) > 1:
        interval = _t_interval([float(r.value or 0) for r in known])
        return Cell(mean, *_within(interval, known), n, 1, "items", notes)
    only = known[0]
    low, high = (only.low, only.high) if only.low is not None else _from_stderr(only)
    return Cell(mean, low, high, n, 1, "row" if low is not None else "", notes)


def _by_seed(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str((row.facts.get("seed"), row.facts.get("matrix"))), []).append(row)
    return list(found.values())


def _t_interval(values: Sequence[float]) -> tuple[float, float]:
    mean, freedom = statistics.fmean(values), len(values) - 1
    half = (
        (_T[freedom - 1] if freedom <= len(_T) else 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    )
    return mean - half, mean + half


def _within(interval: tuple[float, float], rows: Sequence[Row]) -> tuple[float, float]:
    """The interval, kept inside [0, 1] for what is a rate by its name."""
    metric = rows[0].metric
    if not _RATE.search(metric) or _NO_RATE.search(metric) or any(not 0 <= (r.value or 0) <= 1 for r in rows):
        return interval
    return max(0.0, interval[0]), min(1.0, interval[1])


def _from_stderr(row: Row) -> tuple[float | None, float | None]:
    if row.stderr is None or row.value is None:
        return None, None
    return row.value - 1.96 * row.stderr, row.value + 1.96 * row.stderr


def heat_maps(rows: Iterable[Row]) -> list[HeatMap]:
    """One heat map for each metric that was measured in at least two groups."""
    table = summary_table((row for row in rows if row.group), groups=True)
    by_metric: dict[tuple[str, str], list[SummaryRow]] = {}
    for line in table.rows:
        by_metric.setdefault((line.metric, line.split), []).append(line)
    out = []
    for (metric, split), lines in by_metric.items():
        if len(lines) < 2:
            continue
        arms = [arm for arm in table.arms if any(arm in line.cells for line in lines)]
        cells = [[line.cells.get(arm) for line in lines] for arm in arms]
        out.append(
            HeatMap(metric, split, lines[0].higher_is_better, arms, [line.group for line in lines], cells)
        )
    return out


def format_value(value: float | None, metric: str = "") -> str:
    """A number for people: three decimals for rates, fewer for large ones, units from the metric's name."""
    if value is None:
        return "–"
    if metric.endswith("_s"):
        return f"{value:.1f} s" if abs(value) >= 1 else f"{value:.3f} s"
    if value == 0 or 0.001 <= abs(value) < 100:
        text = f"{value:.3f}"
    elif abs(value) >= 100:
        text = f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    else:
        text = f"{value:.2g}"
    return text.replace("-", "−")


def format_interval(cell: Cell, metric: str = "") -> str:
    """The interval in brackets, or nothing."""
    if cell.low is None or cell.high is None:
        return ""
    return f"[{format_value(cell.low, metric)}, {format_value(cell.high, metric)}]"
