"""The report of a run: one self-contained HTML file, made from the run folder's files alone.

No script, no request to anywhere (the page's own policy forbids both); everything that came from a model or a
file is escaped, and what an attack wrote or provoked stays folded until asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from temper.core.errors import DataError, NeedsError, StoreError
from temper.core.types import Json
from temper.report import figures
from temper.report.against import attack_curves, attack_maps, bills, is_attacked
from temper.report.folder import MAX_ATTEMPTS, CellStep, RunView, read_run
from temper.report.noted import noted_tables
from temper.report.pictures import drawings, grids
from temper.report.tables import HeatMap, format_interval, format_value, heat_maps, summary_table
from temper.run.ranking import columns_from, rank_arms, rank_lines, ranking_note, stops_note

__all__ = ["Setting", "render_report", "write_report"]

HERE = Path(__file__).parent
MAX_THRESHOLD_FIGURES = 4


class Setting(NamedTuple):
    """One setting of a step: each value in use, the arms that use it, where it came from."""

    key: str
    values: list[tuple[str, str, str]]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder, whole or not at all; returns its path."""
    target = run_folder / "report.html"
    text = render_report(run_folder)
    draft = target.with_name(".report.html.part")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StoreError(
            f"The report could not be written: {error.strerror}",
            where=str(target),
            cure="Check space and permissions.",
        ) from error
    return target


def render_report(run_folder: Path) -> str:
    """The page of a run as text."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise NeedsError(
            "Reports need jinja2", where="temper.report", cure='Install it: pip install "temper-ml[report]".'
        ) from None
    from markupsafe import Markup

    view = read_run(run_folder)
    env = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": format_value, "interval": format_interval, "svg": Markup, "plain": _plain}
    return env.get_template("page.html").render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")), **_context(view)
    )


def _context(view: RunView) -> dict[str, Any]:
    record = view.record
    examples = _examples(view.steps)
    plain = [row for row in view.rows if not is_attacked(row)]
    return {
        "record": record,
        "title": str(record.get("name") or record.get("id") or "Run"),
        "facts": _facts(view),
        "summary": summary_table(plain),
        "maps": [
            (name, title, column, [(m, _shades(m)) for m in maps])
            for name, title, column, maps in (
                ("categories", "By category", "Category", heat_maps(plain)),
                ("against", "Under attack", "Attack", attack_maps(view.rows)),
            )
            if maps
        ],
        "ranked": _ranked(view),
        "bills": bills((step.record, step.done) for step in view.steps),
        "figures": _figures(view),
        "drawings": drawings(view.steps),
        "grids": grids(view.steps),
        "noted": noted_tables(view.steps),
        "examples": examples,
        "attempts": list(zip(view.attempts, view.attempt_arms, strict=True))[:MAX_ATTEMPTS],
        "num_attempts": view.num_attempts,
        "settings": _settings(view.steps),
        "environment": _flat(record.get("environment") or {}),
        "options": _flat(record.get("options") or {}),
        "request": _flat(record.get("request") or {}),
        "costs": _costs(view),
    }


def _ranked(view: RunView) -> dict[str, Any] | None:
    """The arms in order, where the recipe ranks them; the reason where this run cannot."""
    columns = columns_from(view.record.get("rank"))
    try:
        ranking = rank_arms(view.rows, columns) if columns else None
    except DataError as error:
        return {"lines": [], "note": str(error), "stops": ""}
    if ranking is None:
        return None
    return {"lines": rank_lines(ranking), "note": ranking_note(ranking), "stops": stops_note(ranking)}


def _facts(view: RunView) -> list[tuple[str, str]]:
    """The strip of figures under the title."""
    cells = view.record.get("cells") or ()
    arms = list(dict.fromkeys(str(cell.get("arm", "")) for cell in cells))
    seeds = list(dict.fromkeys(cell.get("seed") for cell in cells))
    wall = sum(float(step.done.get("wall_s") or 0) for step in view.steps)
    request = view.record.get("request") or {}
    return [
        ("Status", str(view.record.get("status", "unknown"))),
        ("System", str(request.get("system") or _first_system(view.steps))),
        ("Arms", str(len(arms))),
        ("Seeds", ", ".join(map(str, seeds)) or "–"),
        ("Rows", f"{len(view.rows):,}"),
        ("Wall time", _duration(wall)),
    ]


def _first_system(steps: Sequence[CellStep]) -> str:
    return next((str(s.record["system"]) for s in steps if s.record.get("system")), "–")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _figures(view: RunView) -> list[figures.Figure]:
    """All curves: ROC and calibration with every arm in one picture, thresholds one picture an arm."""
    roc = [
        (_name(step, name), line) for step in view.steps for name, line in step.figures.get("roc", {}).items()
    ]
    rel = [
        (_name(step, name), ln)
        for step in view.steps
        for name, ln in step.figures.get("reliability", {}).items()
    ]
    out: list[figures.Figure] = []
    if roc:
        out.append(figures.roc_figure(roc))
        swept = {
            name: line for name, line in reversed(roc) if line.get("threshold")
        }  # the first seed of each
        for i, (name, line) in enumerate(list(reversed(swept.items()))[:MAX_THRESHOLD_FIGURES]):
            out.append(figures.threshold_figure(name, line, prefix=f"threshold{i}"))
    if rel:
        out.append(figures.reliability_figure(rel))
    budget = figures.budget_figure(view.attempts, view.attempt_arms)
    if budget:
        out.append(budget)
    out += figures.shared_curve_figures([(step.arm, _curves(step, is_shared=True)) for step in view.steps])
    ranked = [column.metric for column in columns_from(view.record.get("rank"))]
    out += figures.curve_figures(attack_curves(view.rows, ranked), prefix="against")
    for i, step in enumerate(view.steps):
        drawn = figures.curve_figures(_curves(step, is_shared=False), prefix=f"own{i}-")
        out += [f._replace(title=f"{f.title} ({step.label})") for f in drawn]
    return out


def _curves(step: CellStep, is_shared: bool) -> dict[str, Any]:
    """Those of a step's own curves that all arms share a picture for, or the others."""
    curves = step.figures.get("curves", {})
    return {title: curve for title, curve in curves.items() if bool(curve.get("shared")) == is_shared}


def _name(step: CellStep, name: str) -> str:
    """A legend name: the arm, and the method's own name where a step drew several."""
    several = any(len(step.figures.get(kind, {})) > 1 for kind in ("roc", "reliability"))
    return " · ".join(part for part in (step.arm, name if several or not step.arm else "") if part)


def _shades(heat: HeatMap) -> list[list[int | None]]:
    """Per cell of a heat map, how strongly it is tinted, in percent; beyond 55 the text on it loses contrast."""
    low, high = heat.scale
    span = (high - low) or 1.0
    return [
        [None if c is None or c.value is None else round(6 + 49 * (c.value - low) / span) for c in line]
        for line in heat.cells
    ]


def _examples(steps: Iterable[CellStep]) -> list[tuple[CellStep, list[dict[str, Any]]]]:
    """Examples of the first seed of every arm and step, changed ones first."""
    out: dict[tuple[str, str], tuple[CellStep, list[dict[str, Any]]]] = {}
    for step in steps:
        if step.examples and (step.arm, step.id) not in out:
            known = ("prompt", "before", "after", "verdict")
            found = [
                {**{key: e.get(key) for key in known}, "more": {k: v for k, v in e.items() if k not in known}}
                for e in step.examples
            ]
            out[step.arm, step.id] = (step, sorted(found, key=lambda e: e["before"] == e["after"]))
    return list(out.values())


def _settings(steps: Sequence[CellStep]) -> list[tuple[str, str, list[Setting]]]:
    """Per step id: title, method, and its settings, those that differ between arms with each value."""
    by_id: dict[str, list[CellStep]] = {}
    for step in steps:
        by_id.setdefault(step.id, []).append(step)
    out = []
    for step_id, group in by_id.items():
        keys = dict.fromkeys(key for step in group for key in step.record.get("settings", {}))
        title = f"{step_id}: {group[0].record.get('verb', '')} {group[0].record.get('method', '')}"
        out.append((step_id, title, [_setting(key, group) for key in keys]))
    return out


def _setting(key: str, group: Sequence[CellStep]) -> Setting:
    used: dict[tuple[str, str], dict[str, None]] = {}
    for step in group:
        entry = step.record.get("settings", {}).get(key)
        if entry is not None:
            used.setdefault((_plain(entry.get("value")), str(entry.get("origin", ""))), {}).setdefault(
                step.arm
            )
    several = len(used) > 1
    return Setting(
        key,
        [
            (value, origin, ", ".join(filter(None, arms)) if several else "")
            for (value, origin), arms in used.items()
        ],
    )


def _costs(view: RunView) -> list[tuple[str, str, str, str, str]]:
    """Per step: label, what ran, wall time, tokens, peak memory; a dash where the run did not record it."""
    out = []
    for step in view.steps:
        done = step.done
        memory = done.get("peak_rss_bytes")
        tokens = (done.get("used") or {}).get("tokens")
        out.append(
            (
                step.label,
                f"{step.id}: {step.record.get('verb', '')} {step.record.get('method', '')}",
                _duration(float(done["wall_s"])) if "wall_s" in done else "not finished",
                f"{int(tokens):,}" if tokens else "–",
                f"{memory / 2**30:.2f} GiB" if memory else "–",
            )
        )
    return out


def _flat(values: Mapping[str, Json]) -> list[tuple[str, str]]:
    return [(key, _plain(value)) for key, value in values.items() if value not in (None, [], {}, "")]


def _plain(value: Json) -> str:
    """A JSON value on one line for people."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} = {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
