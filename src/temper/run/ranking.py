"""`rank:` of a recipe: its arms in order over several metrics, each tested against the first, paired by item.

An arm's place is the mean of its ranks over the columns, so that no unit outweighs another. The tests are paired over
the same items (else over seeds) and Holm-corrected over the whole table; which arm comes first is read off the same
numbers, so a small p says that an arm differs from the first, not that the first is the best there is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from temper.core.errors import ConfigError, DataError, nearest
from temper.core.types import Json, Row
from temper.run.axes import attack_chosen, each_once
from temper.run.budgets import attack_of

__all__ = [
    "Column",
    "RankCell",
    "RankLine",
    "Ranking",
    "check_columns",
    "columns_from",
    "columns_record",
    "parse_rank",
    "rank_arms",
    "rank_lines",
    "ranking_note",
    "stops_note",
]

KEYS = ("metric", "as", "step", "split", "under", "better")
STOPPED = "\N{DAGGER}"
"""Marks an arm in the table whose training was stopped before its time."""
EXAMPLE = (
    "Write e.g. - {metric: forget_probability, step: score, under: relearn num_steps 20, better: lower}."
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """What arms are ranked by."""

    metric: str
    name: str
    step: str = ""
    """The measure step, where several measure the same."""
    split: str = ""
    """The part of the data, where several have the metric."""
    under: str = ""
    """The attack, named as in the map of attacks; "" = unattacked, and of an axis over attacks all of them."""
    better: Literal["higher", "lower", ""] = ""
    """"" = as the metric's rows say."""


class RankCell(NamedTuple):
    """An arm's value in a column and how it differs from the first arm's; p is None where there is nothing to pair."""

    value: float | None
    rank: float
    difference: float | None = None
    p: float | None = None
    n: int = 0
    pairing: Literal["items", "seeds", ""] = ""


class RankLine(NamedTuple):
    """An arm with its mean rank and a cell for each column; `stops` says which of its fits did not train to their end."""

    arm: str
    mean_rank: float
    cells: tuple[RankCell, ...]
    stops: tuple[str, ...] = ()


class Ranking(NamedTuple):
    """Arms, the best first; p is corrected for `num_tests`."""

    columns: tuple[Column, ...]
    lines: tuple[RankLine, ...]
    num_tests: int


def parse_rank(raw: Json, where: str) -> tuple[Column, ...]:
    """The columns of a recipe's `rank`. Raises ConfigError."""
    if not isinstance(raw or [], list):
        raise ConfigError("rank is not a list", where=where, cure=EXAMPLE)
    out = []
    for number, item in enumerate(raw or [], 1):
        place = f"{where} {number}"
        if not isinstance(item, Mapping) or not isinstance(item.get("metric"), str):
            raise ConfigError("A column of rank names a metric", where=place, cure=EXAMPLE)
        for key, value in item.items():
            if key not in KEYS:
                raise ConfigError(f"Unknown key {key!r}", where=place, cure=nearest(key, KEYS))
            if not isinstance(value, str) or (key == "better" and value not in ("higher", "lower")):
                raise ConfigError(f"{key} = {value!r} is not understood", where=place, cure=EXAMPLE)
        fields = {key: value for key, value in item.items() if key != "as"}
        out.append(Column(name=item.get("as", item["metric"]), **fields))
    return tuple(out)


def check_columns(
    columns: Sequence[Column], attacks: Collection[str], steps: Collection[str], where: str
) -> None:
    """Raise ConfigError for a column whose step or attack the plan does not have."""
    for column in columns:
        if column.step and column.step not in steps:
            raise ConfigError(
                f"There is no measure step {column.step!r}",
                where=f"{where}: rank: {column.name}",
                cure=nearest(column.step, steps),
            )
        if column.under and column.under not in attacks:
            raise ConfigError(
                f"There is no attack {column.under!r}",
                where=f"{where}: rank: {column.name}",
                cure=f"Attacks of this recipe: {', '.join(attacks) or 'none'}.",
            )


def columns_from(record: Json) -> tuple[Column, ...]:
    """The columns as `run.json` keeps them (`asdict`)."""
    return tuple(Column(**entry) for entry in record or ())


def columns_record(columns: Sequence[Column]) -> list[dict[str, Json]]:
    """The columns as `run.json` keeps them."""
    return [asdict(column) for column in columns]


Values = dict[tuple[str, str], float]
"""Item or seed, and the matrix values -> value."""


class _Found(NamedTuple):
    items: Values
    seeds: Values
    better: Literal["higher", "lower", ""]

    def mean(self) -> float | None:
        values = list((self.seeds or self.items).values())
        return sum(values) / len(values) if values else None


def rank_arms(rows: Iterable[Row], columns: Sequence[Column]) -> Ranking | None:
    """The ranking; None with fewer than two arms. Raises DataError for a column without rows or without a direction."""
    rows = each_once(rows)
    found = [_found(rows, column) for column in columns]
    arms = list(dict.fromkeys(arm for by_arm in found for arm in by_arm))
    if len(arms) < 2:
        return None
    ranks = [_ranks(by_arm, arms, column) for by_arm, column in zip(found, columns, strict=True)]
    mean = {arm: sum(by_arm[arm] for by_arm in ranks) / len(ranks) for arm in arms}
    order = sorted(arms, key=lambda arm: mean[arm])
    cells = {
        arm: [_cell(by_arm, arm, order[0], places) for by_arm, places in zip(found, ranks, strict=True)]
        for arm in order
    }
    num_tests = _correct(cells)
    stops = _stops(row for row in rows if any(_is_of(row, column) for column in columns))
    lines = tuple(RankLine(arm, mean[arm], tuple(cells[arm]), stops.get(arm, ())) for arm in order)
    return Ranking(tuple(columns), lines, num_tests)


def _found(rows: Sequence[Row], column: Column) -> dict[str, _Found]:
    """Each arm's values by item and by seed."""
    chosen = [row for row in rows if _is_of(row, column)]
    place = f"rank: {column.name}"
    if not any(row.value is not None for row in chosen):
        known = sorted({attack_of(row.facts["against"]) for row in rows if "against" in row.facts})
        raise DataError(
            f"No row of {column.metric!r}{f' under {column.under!r}' if column.under else ''}",
            where=place,
            cure=f"Attacks of this run: {', '.join(known) or 'none'}.",
        )
    steps = sorted({_step(row) for row in chosen})
    if len(steps) > 1:
        raise DataError(
            f"Several steps measured {column.metric!r}",
            where=place,
            cure=f"Add step: one of {', '.join(steps)}.",
        )
    splits = sorted({row.split for row in chosen})
    if len(splits) > 1:
        raise DataError(
            f"Several splits have {column.metric!r}",
            where=place,
            cure=f"Add split: one of {', '.join(splits)}.",
        )
    sides = {row.higher_is_better for row in chosen} - {None}
    better = column.better or ("higher" if True in sides else "lower" if False in sides else "")
    if not better:
        raise DataError(
            f"Neither way is better for {column.metric!r}", where=place, cure="Add better: higher, or lower."
        )
    by_arm: dict[str, list[Row]] = {}
    for row in chosen:
        by_arm.setdefault(_arm(row), []).append(row)
    return {
        arm: _Found(
            _averaged(r for r in group if r.item is not None),
            _averaged(r for r in group if r.item is None),
            better,
        )
        for arm, group in by_arm.items()
    }


def _is_of(row: Row, column: Column) -> bool:
    label = row.facts.get("against")
    attack = attack_of(label) if label else attack_chosen(row) if column.under else ""
    if label and not label["defended"]:
        return False
    return (
        row.metric == column.metric
        and not row.group
        and attack == column.under
        and column.step in ("", _step(row))
        and column.split in ("", row.split)
    )


def _step(row: Row) -> str:
    return str((row.facts.get("against") or {}).get("look") or row.facts.get("step", ""))


def _arm(row: Row) -> str:
    return str((row.facts.get("against") or {}).get("arm", row.arm))


def _stops(rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    """What each arm's rows say of fits that were stopped: the fit, the reason, and the step for each seed."""
    steps: dict[str, dict[tuple[str, str], dict[str, None]]] = {}
    for row in rows:
        for fit, ending in row.facts.get("ended", {}).items():
            of_arm = steps.setdefault(_arm(row), {})
            of_arm.setdefault((fit, ending["why"]), {}).setdefault(str(ending["step"]))
    return {
        arm: tuple(f"{fit} at step {', '.join(at)}: {why}" for (fit, why), at in found.items())
        for arm, found in steps.items()
    }


def _averaged(rows: Iterable[Row]) -> Values:
    """By item, averaged over seeds, which are not independent items; rows about no item by seed."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.value is not None:
            place = str(row.facts.get("seed", 0)) if row.item is None else row.item
            matrix = str(sorted((row.facts.get("matrix") or {}).items()))
            values.setdefault((place, matrix), []).append(row.value)
    return {key: sum(found) / len(found) for key, found in values.items()}


def _ranks(by_arm: Mapping[str, _Found], arms: Sequence[str], column: Column) -> dict[str, float]:
    """1 for the best; equal values share the mean of their places, an arm without a value comes last."""
    sign = -1.0 if next(iter(by_arm.values())).better == "higher" else 1.0
    means = {arm: by_arm[arm].mean() if arm in by_arm else None for arm in arms}
    keys = {arm: math.inf if value is None else round(sign * value, 12) for arm, value in means.items()}
    return {
        arm: sum(other < key for other in keys.values())
        + (sum(other == key for other in keys.values()) + 1) / 2
        for arm, key in keys.items()
    }


def _cell(by_arm: Mapping[str, _Found], arm: str, first: str, places: Mapping[str, float]) -> RankCell:
    from temper.ops.stats import paired_difference

    mine, theirs = by_arm.get(arm), by_arm.get(first)
    value = mine.mean() if mine else None
    if arm == first or mine is None or theirs is None:
        return RankCell(value, places[arm])
    for pairing in ("items", "seeds"):
        a, b = getattr(mine, pairing), getattr(theirs, pairing)
        shared = [place for place in a if place in b]
        if len(shared) > 1:
            with warnings.catch_warnings():
                # Seeds that agree to the last digits are no fault of the user's.
                warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
                gap = paired_difference(
                    [a[p] for p in shared],
                    [b[p] for p in shared],
                    method="bootstrap" if pairing == "items" else "t",
                )
            return RankCell(value, places[arm], gap.value, gap.p, gap.n, pairing)  # type: ignore[arg-type]
    return RankCell(value, places[arm])


def _correct(cells: Mapping[str, list[RankCell]]) -> int:
    """Replace each p by Holm's over all of them; how many there are."""
    from temper.ops.stats import holm

    tested = [(arm, k) for arm, line in cells.items() for k, cell in enumerate(line) if cell.p is not None]
    raised = holm([cells[arm][k].p or 0.0 for arm, k in tested]) if tested else []
    for (arm, k), p in zip(tested, raised, strict=True):
        cells[arm][k] = cells[arm][k]._replace(p=p)
    return len(tested)


def ranking_note(ranking: Ranking) -> str:
    """How to read the table."""
    return (
        "A place is the mean of an arm's ranks over the columns. p: whether an arm differs from the first, paired, "
        f"Holm-corrected over {ranking.num_tests} tests; a column without p has one number an arm."
    )


def stops_note(ranking: Ranking) -> str:
    """What the mark behind some arms means; "" where none has one."""
    arms = [f"{line.arm} ({'; '.join(line.stops)})" for line in ranking.lines if line.stops]
    return f"{STOPPED} Training was stopped before its end: {', '.join(arms)}." if arms else ""


def rank_lines(ranking: Ranking) -> list[list[str]]:
    """The table as text: a head, then one line an arm; each value with the corrected p of its difference from the first's."""
    head = ["place", "arm", "mean rank", *(column.name for column in ranking.columns)]
    lines = [
        [
            str(place),
            f"{line.arm} {STOPPED if line.stops else ''}".rstrip(),
            f"{line.mean_rank:.1f}",
            *(_cell_text(cell) for cell in line.cells),
        ]
        for place, line in enumerate(ranking.lines, 1)
    ]
    return [head, *lines]


def _cell_text(cell: RankCell) -> str:
    if cell.value is None:
        return "none"
    tested = "" if cell.p is None else f" (p {cell.p:.2g}, {cell.n} {cell.pairing})"
    return f"{cell.value:.3g}{tested}"
