"""Append-only JSON lines, each ending in a checksum of itself.

A line is a JSON object whose last key is `crc32`, over the bytes of the object without that key. A torn last
line is what a killed process leaves: readers skip it and `repair` cuts it off. Damage anywhere else is an error.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from temper.core.errors import StoreError
from temper.core.types import Json
from temper.store.atomic import disk_errors

__all__ = ["LineWriter", "append", "count", "decode", "encode", "read", "repair"]

TAIL = re.compile(rb'(?:,)?"crc32":"([0-9a-f]{8})"\}$')


def encode(record: Mapping[str, Json]) -> bytes:
    """One line, newline included; NaN and infinities are refused with StoreError."""
    try:
        body = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"A record cannot be written as JSON: {error}",
            cure="Use plain values; None for a number that is not known.",
        ) from None
    comma = b"" if body == b"{}" else b","
    return body[:-1] + comma + b'"crc32":"%08x"}\n' % zlib.crc32(body)


def decode(line: bytes) -> dict[str, Json] | None:
    """The record of one line without its newline, or None when it is damaged."""
    match = TAIL.search(line)
    if match is None:
        return None
    body = line[: match.start()] + b"}"
    if zlib.crc32(body) != int(match[1], 16):
        return None
    return json.loads(body)  # type: ignore[no-any-return]


def read(path: Path) -> Iterator[dict[str, Json]]:
    """Every record, streaming; a torn last line is skipped, a damaged one before it raises StoreError.

    A missing file has no records.
    """
    if not path.exists():
        return
    with disk_errors("read", path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # torn: only the last line can lack its newline
            record = decode(line[:-1])
            if record is None:
                raise _damage(path, number)
            yield record


def _damage(path: Path, number: int) -> StoreError:
    return StoreError(
        "A line is damaged: its checksum does not fit",
        where=f"{path}, line {number}",
        cure="Restore it from a copy.",
    )


def count(path: Path) -> int:
    """How many records there are; raises as `read` does."""
    return sum(1 for _ in read(path))


def repair(path: Path) -> int:
    """Cut a torn last line off; returns the bytes removed. Damage before it raises StoreError."""
    if not path.exists():
        return 0
    for _ in read(path):
        pass
    with disk_errors("repair", path), path.open("r+b") as file:
        content_end = file.seek(0, os.SEEK_END)
        keep = _after_last_newline(file, content_end)  # type: ignore[arg-type]
        file.truncate(keep)
    return content_end - keep


def _after_last_newline(file: Iterable[bytes], end: int) -> int:
    """The offset just after the last newline, looking back block by block."""
    position = end
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)  # type: ignore[attr-defined]
        block: bytes = file.read(position - start)  # type: ignore[attr-defined]
        if (at := block.rfind(b"\n")) >= 0:
            return start + at + 1
        position = start
    return 0


class LineWriter:
    """Appends records to a file; a record that does not fit on the disk leaves no trace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors("open", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: Mapping[str, Json]) -> None:
        """Append one record."""
        line = encode(record)
        with disk_errors("append to", self.path):
            before = os.fstat(self._handle).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._handle, line[written:])
            except OSError:
                os.ftruncate(self._handle, before)
                raise

    def close(self) -> None:
        """Flush to the disk and close."""
        with disk_errors("close", self.path):
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def append(path: Path, records: Iterable[Mapping[str, Json]]) -> int:
    """Append all records; returns how many."""
    total = 0
    with LineWriter(path) as writer:
        for record in records:
            writer.write(record)
            total += 1
    return total
