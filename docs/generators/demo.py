"""The README's demo output: the lines that the run's own table has for the headline metrics, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from generators.markdown import fence
from temper.report.folder import RunView, read_run
from temper.report.tables import Cell, SummaryRow, format_interval, format_value, summary_table

__all__ = ["demo_block"]

HEADLINES = ("auroc", "f1_default", "f1_calibrated", "f1_text", "f1_text_calibrated", "attack_success_rate")
BY_GROUP = ("refused_default", "refused_calibrated", "off_drop", "off_spill")


def demo_block(run: Path) -> str:
    """Headline metrics, refusals by category and what switching one off does, one column an arm."""
    view = read_run(run)
    if view.record.get("status") != "done":
        raise SystemExit(f"docs/generate.py: {run} is not finished: {view.record.get('status')}")
    table = summary_table(view.rows, groups=True)
    shown = [row for row in table.rows if row.metric in HEADLINES and not row.group]
    shown += [row for metric in BY_GROUP for row in table.rows if row.metric == metric]
    if not shown:
        raise SystemExit("docs/generate.py: the run has none of the demo's rows")
    cells = [("metric", "group", *(arm or "value" for arm in table.arms))]
    cells += [_line(row, table.arms) for row in shown]
    lines = [f"$ make demo        # {_machine(view)}", *_aligned(cells), "...", _wall(view)]
    return fence("\n".join(lines))


def _machine(view: RunView) -> str:
    seen: Any = view.record.get("environment") or {}
    options: Any = view.record.get("options") or {}
    return f"{seen.get('cores')} cores, torch {seen.get('torch')}, {options.get('precision')}"


def _line(row: SummaryRow, arms: Sequence[str]) -> tuple[str, ...]:
    return (row.metric, row.group, *(_value(row.cells.get(arm), row.metric) for arm in arms))


def _value(cell: Cell | None, metric: str) -> str:
    if cell is None or cell.value is None:
        return "" if cell is None else f"none: {cell.note}"
    return f"{format_value(cell.value, metric)} {format_interval(cell, metric)}".rstrip()


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _wall(view: RunView) -> str:
    wall = sum(float(step.done.get("wall_s") or 0) for step in view.steps)
    peaks = [step.done["peak_rss_bytes"] for step in view.steps if step.done.get("peak_rss_bytes")]
    memory = f", peak memory {max(peaks) / 1e9:.1f} GB" if peaks else ""
    return f"{int(wall // 60)} min {int(wall % 60)} s{memory}; runs/{view.record['id']}/report.html"
