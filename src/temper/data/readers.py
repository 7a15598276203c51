"""JSON lines, JSON, CSV and Parquet files, and folders of images, as numbered rows, read once, one row at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from temper.core.errors import DataError, NeedsError
from temper.core.types import Json
from temper.data.columns import Place

__all__ = ["LINE_LIMIT", "NumberedRow", "image_parts", "read_rows", "rows_of"]

LINE_LIMIT = 64 * 2**20
"""Bytes of the longest line; a longer one is not JSON lines or CSV."""

BOM = b"\xef\xbb\xbf"
LIST_CELLS = ("messages", "conversations", "choices", "negatives", "tools", "turns")
CHAT_CELLS = ("prompt", "completion", "chosen", "rejected")
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
FLAG_CELLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


class NumberedRow(NamedTuple):
    """A row's values and where they stand."""

    values: Json
    place: Place


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file.

    JSON lines and CSV are numbered by line, the others by row, from 1. Blank lines count but are
    skipped; a byte-order mark is ignored. In CSV, cells of columns that hold lists are JSON, an
    empty cell is no value, and `label` and `answer` are numbers where they look like whole ones.
    Raises DataError for a file that is missing, empty, not UTF-8 or not of its format.
    """
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers[path.suffix.lower()]
    try:
        rows = reader(path)
        first = next(rows, None)
        if first is None:
            raise DataError(
                "The file has no rows", where=str(path), cure="Give a file with at least one row."
            )
        yield first
        yield from rows
    except UnicodeDecodeError as error:
        raise DataError(f"The file is not UTF-8: {error.reason} at byte {error.start}", where=str(path),
                        cure="Save it as UTF-8.") from None  # fmt: skip
    except IsADirectoryError:
        raise DataError("This is a folder, not a file", where=str(path), cure="Name a file in it.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("There is no such file", where=str(path), cure="Check the path.") from None
    except PermissionError:
        raise DataError("The file may not be read", where=str(path), cure="Check its permissions.") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their end; binary, because only a newline ends a line of JSON lines."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            place = Place(str(path), number, "line")
            if len(line) > LINE_LIMIT:
                raise place.error(
                    f"The line is longer than {LINE_LIMIT >> 20} MiB", cure="Put one row on a line."
                )
            try:
                yield number, (line.removeprefix(BOM) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise place.error(
                    f"The line is not UTF-8 at byte {error.start + 1}", cure="Save it as UTF-8."
                ) from None


def _json_lines(path: Path) -> Iterator[NumberedRow]:
    for number, line in _lines(path):
        if line.strip():
            place = Place(str(path), number, "line", path.parent)
            yield NumberedRow(_parse(line, place), place)


def _json(path: Path) -> Iterator[NumberedRow]:
    """A JSON list of objects; a file of JSON lines under this name is read as that."""
    with path.open("rb") as file:
        start = file.read(256).removeprefix(BOM).lstrip()[:1]
    if start != b"[":
        yield from _json_lines(path)
        return
    place = Place(str(path), 1, "line")
    for number, row in enumerate(_parse(path.read_text("utf-8-sig"), place), start=1):
        yield NumberedRow(row, Place(str(path), number, "row", path.parent))


def _parse(text: str, place: Place) -> Json:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = place.row + error.lineno - 1
        spot = Place(place.source, line, place.unit)
        raise spot.error(
            f"Not valid JSON at character {error.colno}: {error.msg}", cure="One JSON object to a line."
        ) from None
    except RecursionError:
        raise place.error("The JSON is nested too deeply", cure="Flatten the row.") from None


def _csv(path: Path) -> Iterator[NumberedRow]:
    # The csv module's limit is one for the whole process, and its default is shorter than a long document.
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header = _header(next(_cells(reader, path), None), path)
    for cells in _cells(reader, path):
        place = Place(str(path), reader.line_num, "line", path.parent)
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise place.error(
                f"{len(cells)} cells under {len(header)} columns", cure="Quote cells with commas."
            )
        row = {name: _cell(name, cell, place) for name, cell in zip(header, cells, strict=True)}
        yield NumberedRow(row, place)


def _cells(reader: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        number = reader.line_num  # type: ignore[attr-defined]
        raise Place(str(path), number, "line").error(
            f"Not valid CSV: {error}", cure="Check the quotes."
        ) from None


def _header(cells: list[str] | None, path: Path) -> list[str]:
    names = [cell.strip() for cell in cells or []]
    twice = {name for name in names if names.count(name) > 1}
    if twice or "" in names:
        what = f"The column {sorted(twice)[0]!r} stands twice" if twice - {""} else "A column has no name"
        raise Place(str(path), 1, "line").error(what, cure="Give every column a name of its own.")
    return names


def _cell(column: str, cell: str, place: Place) -> Json:
    if cell == "":
        return None
    if column in ("label", "answer") and cell.removeprefix("-").isdecimal():
        return int(cell)
    if column == "benign":
        return FLAG_CELLS.get(cell.lower(), cell)
    if column in LIST_CELLS:
        return _list_cell(column, cell, place)
    if column in CHAT_CELLS and cell.lstrip().startswith("[{"):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell  # a text that happens to begin like a list
    return cell


def _list_cell(column: str, cell: str, place: Place) -> Json:
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise place.error(
            f"The cell is not a JSON list: {error.msg} at character {error.colno}", column=column,
            cure='Write e.g. [{"role": "user", "content": "..."}], or use JSON lines.',
        ) from None  # fmt: skip


def _parquet(path: Path) -> Iterator[NumberedRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise NeedsError(
            "Parquet files need pyarrow", where=str(path), cure="pip install 'temper-ml[data]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield NumberedRow(row, Place(str(path), number, "row", path.parent))
    except pyarrow.ArrowException as error:
        raise DataError(f"Not a Parquet file: {error}", where=str(path), cure="Write it again.") from None


def rows_of(values: Iterator[Mapping[str, Json]], source: str) -> Iterator[NumberedRow]:
    """Rows that are already in memory, numbered from 1."""
    for number, row in enumerate(values, start=1):
        yield NumberedRow(row, Place(source, number))


def image_parts(folder: Path, splits: Collection[str]) -> dict[str, Iterator[NumberedRow]]:
    """The images of FOLDER/CLASS/FILE as part "train", or of FOLDER/SPLIT/CLASS/FILE as a part for each split.

    A row has an image and its class's folder name as label, and `class_index`, the place of that name among all
    classes in the order of names. Rows take one image of each class in turn, so their beginning holds every class.
    Raises DataError where no image stands in a folder of its own class, and for a class without an image beside others.
    """
    below = _folders(folder)
    parts = {path.name: path for path in below} if below and {p.name for p in below} <= set(splits) else {}
    found = {name: _images_by_class(path) for name, path in (parts or {"train": folder}).items()}
    names = sorted({name for classes in found.values() for name in classes})
    for part, classes in found.items():
        if not classes:
            raise DataError(
                "The folder holds neither files of rows nor images by class",
                where=str(parts.get(part, folder)),
                cure="Put images as FOLDER/CLASS/IMAGE.png, train/ and test/ above the classes if you like.",
            )
    return {part: _image_rows(classes, names) for part, classes in found.items()}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    found = {
        path.name: [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
        for path in _folders(folder)
    }
    empty = [name for name, images in found.items() if not images]
    if empty and len(empty) < len(found):
        raise DataError(
            f"The class {empty[0]!r} has no image",
            where=str(folder / empty[0]),
            cure=f"Put images ({', '.join(sorted(IMAGE_SUFFIXES))}) into its folder, or remove the folder.",
        )
    return {name: sorted(images) for name, images in found.items() if images}


def _image_rows(classes: Mapping[str, list[Path]], names: list[str]) -> Iterator[NumberedRow]:
    turns = zip_longest(*classes.values())
    shown = (
        (name, path) for turn in turns for name, path in zip(classes, turn, strict=True) if path is not None
    )
    for number, (name, path) in enumerate(shown, start=1):
        row = {
            "id": f"{name}/{path.name}",
            "image": path.name,
            "label": name,
            "class_index": names.index(name),
        }
        yield NumberedRow(row, Place(str(path.parent), number, "image", path.parent))
