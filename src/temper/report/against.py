"""Rows of attacked fits: each metric as a map of attacks by defences, as curves over the attacker's budget, and the bill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from temper.core.budget import UNITS
from temper.core.types import Json, Row
from temper.report.tables import HeatMap, SummaryRow, summary_table
from temper.run.against import UNATTACKED
from temper.run.axes import attack_chosen, is_attack_axis, own_choices
from temper.run.budgets import attack_of

__all__ = ["Bill", "attack_curves", "attack_maps", "bills", "is_attacked"]

PLAIN = "plain"
DEFENDED = "fitted"
MAX_CURVES = 6
CAPTION = "The fitted system and the plain one, attacked with the same budget."


class Bill(NamedTuple):
    """What an attack was allowed, and what it used on the fits and on the plain system; texts."""

    attack: str
    limits: str
    fitted: str
    plain: str


def is_attacked(row: Row) -> bool:
    """Whether the row is about an attacked system, or the plain one beside it; each attack of an axis is one."""
    return "against" in row.facts or bool(attack_chosen(row))


def attack_maps(rows: Iterable[Row]) -> list[HeatMap]:
    """One map a metric: fits and their plain twins (lines) by attack and budget (columns)."""
    rows = list(rows)
    if not any(map(is_attacked, rows)):
        return []
    lines = _lines(rows)
    return [
        HeatMap(metric, split, found[0].higher_is_better, *_cells(found))
        for (metric, split), found in lines.items()
    ]


def attack_curves(rows: Iterable[Row], first: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Effect over budget, for opponents with at least two budgets; the unattacked value stands at 0.

    Those of the metrics `first` come first; the last caption says how many more there were.
    """
    rows = list(rows)
    budgets = _budgets(rows)
    out: dict[str, dict[str, Any]] = {}
    for (metric, split), found in sorted(_lines(rows).items(), key=lambda line: line[0][0] not in first):
        for opponent, (setting, steps) in budgets.items():
            # Fewer bits are more of an attack; every other budget counts up from nothing.
            start = {} if setting == "bits" else {0.0: UNATTACKED}
            lines = {}
            for arm in dict.fromkeys(arm for line in found for arm in line.cells):
                points = _points(found, arm, start | steps)
                if len(points) > 1:
                    lines[arm] = {"x": [x for x, _ in points], "y": [y for _, y in points]}
            name = metric if metric.startswith(split) else f"{metric} {split}"
            title = f"{name} under {opponent}"
            if lines:
                out[title] = {"x": setting, "y": metric, "lines": lines, "caption": CAPTION}
    kept = dict(list(out.items())[:MAX_CURVES])
    if len(out) > len(kept):
        kept[list(kept)[-1]]["caption"] += f" {len(out) - len(kept)} more are not drawn; rows.jsonl has them."
    return kept


def _lines(rows: Sequence[Row]) -> dict[tuple[str, str], list[SummaryRow]]:
    """Metric and split -> a line for each attack, with a cell for each defence."""
    seen = {row.metric for row in rows if is_attacked(row)}
    looks = {_label(row).get("look") for row in rows if is_attacked(row)}
    kept = [row for row in rows if is_attacked(row) or row.facts.get("step") in looks]
    named = _all_named([row for row in kept if row.metric in seen and not row.group])
    out: dict[tuple[str, str], list[SummaryRow]] = {}
    for line in summary_table(named, groups=True).rows:
        out.setdefault((line.metric, line.split), []).append(line)
    return {key: found for key, found in out.items() if any(_is_known(line) for line in found)}


def _is_known(line: SummaryRow) -> bool:
    """Whether the line says something of an attack."""
    return line.group != UNATTACKED and any(cell.value is not None for cell in line.cells.values())


def _all_named(rows: Sequence[Row]) -> list[Row]:
    """The rows, named; a plain system that all arms have in common comes once, after them."""
    plain = [row for row in rows if not _label(row)["defended"]]
    steps: dict[str, set[str]] = {}
    for row in plain:
        step = [row.facts.get("step"), row.facts.get("seed")]
        steps.setdefault(str(step), set()).add(str(row.facts.get("step_hash")))
    if any(len(found) > 1 for found in steps.values()):
        return [_named(row) for row in rows]
    fitted = [_named(row) for row in rows if _label(row)["defended"]]
    once = {(r.facts.get("step_hash"), r.metric, r.split, r.item): r for r in reversed(plain)}
    return fitted + [_named(row, is_shared=True) for row in reversed(once.values())]


def _label(row: Row) -> Mapping[str, Json]:
    chosen = attack_chosen(row)
    is_defended = not chosen or bool(row.arm) or "+" in str(row.facts.get("system", ""))
    plain = {"opponent": chosen or UNATTACKED, "budget": {}, "defended": is_defended}
    return row.facts.get("against") or plain


def _named(row: Row, *, is_shared: bool = False) -> Row:
    """The row with its attack as the group and its defence as the arm; every choice of the matrix is one."""
    label = _label(row)
    matrix = [f"{key} {value}" for key, value in own_choices(row).items() if not is_attack_axis(key)]
    named = [str(label.get("arm", row.arm)), *matrix]
    arm = "" if is_shared else ", ".join(part for part in named if part)
    parts = [arm, "" if label["defended"] and arm else DEFENDED if label["defended"] else PLAIN]
    facts = {**row.facts, "step": label.get("look", row.facts.get("step"))}
    return replace(row, group=attack_of(label), arm=", ".join(part for part in parts if part), facts=facts)


def _cells(found: Sequence[SummaryRow]) -> tuple[list[str], list[str], list[list[Any]]]:
    arms = list(dict.fromkeys(arm for line in found for arm in line.cells))
    return arms, [line.group for line in found], [[line.cells.get(arm) for line in found] for arm in arms]


def bills(steps: Iterable[tuple[Mapping[str, Json], Mapping[str, Json]]]) -> list[Bill]:
    """A line for each attack from its steps' facts and what `done.json` holds of them; one that did not end has none."""
    found: dict[str, tuple[dict[str, float], dict[bool, list[Mapping[str, Json]]]]] = {}
    for facts, done in steps:
        label = facts.get("against")
        if label and not label.get("look") and "used" in done:
            _, used = found.setdefault(attack_of(label), (dict(done.get("limits") or {}), {}))
            used.setdefault(bool(label["defended"]), []).append(done["used"])
    return [
        Bill(
            attack,
            ", ".join(f"{most:g} {unit}" for unit, most in limits.items()) or "none",
            _spent(used.get(True, [])),
            _spent(used.get(False, [])),
        )
        for attack, (limits, used) in found.items()
    ]


def _spent(used: Sequence[Mapping[str, Json]]) -> str:
    """Each unit's least and most, and what ended some of the attacks."""
    parts = []
    for unit in UNITS:
        values = [float(one[unit]) for one in used]
        low, high = (f"{value:,.1f}" if unit == "seconds" else f"{value:,.0f}" for value in _ends(values))
        if any(values):
            parts.append(f"{low if low == high else f'{low} to {high}'} {unit}")
    ends = dict.fromkeys(str(one["stopped_by"]) for one in used if one.get("stopped_by"))
    return ", ".join(parts) + (f"; stopped by its {' and '.join(ends)}" if ends else "")


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values, default=0.0), max(values, default=0.0)


def _budgets(rows: Iterable[Row]) -> dict[str, tuple[str, dict[float, str]]]:
    """Opponent -> its setting, and the attack's name by the setting's value, for numbers that vary."""
    found: dict[str, tuple[str, dict[float, str]]] = {}
    for row in filter(is_attacked, rows):
        label = _label(row)
        for setting, value in label["budget"].items():
            if isinstance(value, int | float):
                found.setdefault(label["opponent"], (setting, {}))[1][float(value)] = attack_of(label)
    return {name: (setting, steps) for name, (setting, steps) in found.items() if len(steps) > 1}


def _points(found: Sequence[SummaryRow], arm: str, steps: Mapping[float, str]) -> list[tuple[float, float]]:
    by_attack = {line.group: line.cells.get(arm) for line in found}
    known = [(x, by_attack.get(name)) for x, name in sorted(steps.items())]
    return [(x, cell.value) for x, cell in known if cell is not None and cell.value is not None]
