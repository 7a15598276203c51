"""Pictures on the page: those that steps left, and grids that lay the drawings of arms side by side."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from temper.core.errors import StoreError
from temper.report.folder import CellStep

__all__ = ["Drawing", "Grid", "drawings", "grids"]

MAX_DRAWINGS = 24
PNG = b"\x89PNG\r\n\x1a\n"


class Drawing(NamedTuple):
    """A picture that a step left: its title, and the picture as a data URI."""

    title: str
    uri: str


class Grid(NamedTuple):
    """Strips of pictures, a column an arm: of each row its name and a data URI an arm, "" where an arm has none."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def drawings(steps: Sequence[CellStep]) -> list[Drawing]:
    """The first pictures that steps left."""
    found = [
        Drawing(f"{title} ({step.label})", _uri(drawn, title, step))
        for step in steps
        for title, drawn in step.figures.get("pictures", {}).items()
    ]
    return found[:MAX_DRAWINGS]


def grids(steps: Sequence[CellStep]) -> list[Grid]:
    """A grid a title, of the first seed that has it: arms drew it from the same seed, so columns can be compared."""
    titles = dict.fromkeys(title for step in steps for title in step.figures.get("grids", {}))
    return [
        _grid(title, [step for step in steps if title in step.figures.get("grids", {})]) for title in titles
    ]


def _grid(title: str, steps: Sequence[CellStep]) -> Grid:
    seed = steps[0].seed
    shown = [step for step in steps if step.seed == seed]
    strips = [dict(_strips(step, title)) for step in shown]
    names = dict.fromkeys(name for strip in strips for name in strip)
    arms = [step.arm for step in shown]
    columns = [
        " · ".join(part for part in (step.arm, step.id if arms.count(step.arm) > 1 else "") if part)
        or step.id
        for step in shown
    ]
    return Grid(
        f"{title} (seed {seed})", columns, [(n, [strip.get(n, "") for strip in strips]) for n in names]
    )


def _strips(step: CellStep, title: str) -> Iterator[tuple[str, str]]:
    for name, drawn in step.figures["grids"][title].items():
        yield name, _uri(drawn, f"{title}: {name}", step)


def _uri(drawn: Any, title: str, step: CellStep) -> str:
    """Nothing but a PNG in base64 gets onto the page."""
    try:
        content = base64.b64decode(drawn["png"], validate=True)
    except (KeyError, TypeError, ValueError):
        content = b""
    if not content.startswith(PNG):
        raise StoreError(
            f"The picture {title!r} is no PNG in base64", where=step.label, cure="Run the step again."
        )
    return "data:image/png;base64," + base64.b64encode(content).decode()
