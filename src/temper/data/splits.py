"""Split files of few-shot image benchmarks: one JSON object, part -> [[path, label, class name], ...]."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from temper.core.types import Json
from temper.data.columns import Place
from temper.data.readers import NumberedRow

__all__ = ["split_parts"]


def split_parts(path: Path) -> dict[str, Iterator[NumberedRow]] | None:
    """Part -> rows with image, label and name, or None where the file is not a split file.

    Paths start from the file's folder, or from the first folder beside the file that holds them. Raises DataError for a row that
    is not a path, a number and a name.
    """
    if path.suffix.lower() != ".json":
        return None
    try:
        with path.open("rb") as file:
            if file.read(64).lstrip()[:1] != b"{":
                return None
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError):
        return None
    parts = {name: rows for name, rows in content.items() if isinstance(rows, list) and rows}
    if not parts or len(parts) < len([rows for rows in content.values() if rows]):
        return None
    if not all(isinstance(rows[0], list) and len(rows[0]) == 3 for rows in parts.values()):
        return None
    root = _root(path, next(iter(parts.values()))[0][0])
    return {name: _rows(rows, path, name, root) for name, rows in parts.items()}


def _root(path: Path, first: Json) -> Path:
    beside = sorted(folder for folder in path.parent.iterdir() if folder.is_dir())
    return next((root for root in (path.parent, *beside) if (root / str(first)).is_file()), path.parent)


def _rows(rows: list[Json], path: Path, part: str, root: Path) -> Iterator[NumberedRow]:
    for number, row in enumerate(rows, start=1):
        place = Place(f"{path}, part {part!r}", number, "row", root)
        good = isinstance(row, list) and [type(value) for value in row] == [str, int, str]
        if not good:
            raise place.error(
                f"{row!r} is not [path, label, name]", cure="Write a path, a number and a class name."
            )
        yield NumberedRow({"image": row[0], "label": row[1], "name": row[2]}, place)
