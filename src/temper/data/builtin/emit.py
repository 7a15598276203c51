"""Writing the parts of a built-in set, or comparing them with what is checked in."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from temper.core.errors import DataError, TemperError

__all__ = ["check", "main", "render", "write"]

Parts = Mapping[str, Sequence[Mapping[str, object]]]


def render(rows: Sequence[Mapping[str, object]]) -> str:
    """The JSON lines of a part: one row a line, UTF-8 kept as it is, keys in their given order."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, parts: Parts) -> None:
    """Write `<part>.jsonl` for every part."""
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_bytes(render(rows).encode())


def check(folder: Path, parts: Parts) -> None:
    """Raises DataError when a file of the folder differs from what the generator gives."""
    stale = [name for name, rows in parts.items() if not _same(folder / f"{name}.jsonl", render(rows))]
    stale += sorted({path.stem for path in folder.glob("*.jsonl")} - set(parts))
    if stale:
        raise DataError(
            f"parts {stale} differ from what their generator gives",
            where=str(folder),
            cure=f"Run: python -m temper.data.builtin.{folder.name}.generate --write",
        )


def main(folder: Path, build: Callable[[], Parts], arguments: Sequence[str] | None = None) -> int:
    """The command line of a generator: `--check` compares, `--write` writes; the exit code."""
    parser = argparse.ArgumentParser(description=f"Generator of the built-in set {folder.name}.")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--check", action="store_true", help="compare with the checked-in files")
    group.add_argument("--write", action="store_true", help="write the files")
    options = parser.parse_args(arguments)
    try:
        parts = build()
        (write if options.write else check)(folder, parts)
    except TemperError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{name}: {len(rows)} rows\n" for name, rows in parts.items()))
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()
