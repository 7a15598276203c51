"""The README's demo output, taken from the rows of a run and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from generators.markdown import fence, number
from temper.core.types import Row
from temper.report.folder import RunView, read_run

__all__ = ["demo_block"]

HEADLINES = {
    "auroc": "AUROC of the refusal probability",
    "f1_default": "F1 by default",
    "f1_calibrated": "F1 calibrated",
    "attack_success_rate": "attacks that succeeded",
}
BY_GROUP = {
    "refused_default": "refused by default",
    "refused_calibrated": "refused, calibrated",
    "off_drop": "switched off: own rate drops by",
    "off_spill": "switched off: others move by",
}


def demo_block(run: Path) -> str:
    """The headline numbers of each arm and the numbers by category, as one fenced block."""
    view = read_run(run)
    if view.record.get("status") != "done":
        raise SystemExit(f"docs/generate.py: {run} is not finished: {view.record.get('status')}")
    whole = [row for row in view.rows if row.item is None]
    lines = [
        f"$ make demo        # {_machine(view)}",
        *_headlines(whole),
        "",
        *_by_group(whole),
        "",
        _wall(view),
    ]
    return fence("\n".join(lines))


def _machine(view: RunView) -> str:
    seen: Any = view.record.get("environment") or {}
    return f"{seen.get('cores')} cores, torch {seen.get('torch')}, {(view.record.get('options') or {}).get('precision')}"


def _headlines(rows: Sequence[Row]) -> list[str]:
    cells = [("arm", "metric", "value", "95% interval", "n")]
    for row in rows:
        if row.metric in HEADLINES and not row.group:
            cells.append((row.arm, HEADLINES[row.metric], number(row.value), _interval(row), str(row.n)))
    if len(cells) == 1:
        raise SystemExit("docs/generate.py: the run has none of the demo's rows")
    return _aligned(cells)


def _by_group(rows: Sequence[Row]) -> list[str]:
    """One line a category and arm; a measure that the arm lacks is a dash."""
    found = {
        (row.arm, row.group, row.metric): row.value for row in rows if row.group and row.metric in BY_GROUP
    }
    keys = list(dict.fromkeys((arm, group) for arm, group, _ in found))
    lines = [
        (arm, group, *(number(found.get((arm, group, metric))) for metric in BY_GROUP)) for arm, group in keys
    ]
    return _aligned([("arm", "category", *BY_GROUP.values()), *lines])


def _interval(row: Row) -> str:
    return f"[{number(row.low)}, {number(row.high)}]" if row.low is not None else "-"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _wall(view: RunView) -> str:
    wall = sum(float(step.done.get("wall_s") or 0) for step in view.steps)
    peaks = [step.done["peak_rss_bytes"] for step in view.steps if step.done.get("peak_rss_bytes")]
    memory = f", peak memory {max(peaks) / 1e9:.1f} GB" if peaks else ""
    return f"{int(wall // 60)} min {int(wall % 60)} s{memory}; report: runs/{view.record['id']}/report.html"
