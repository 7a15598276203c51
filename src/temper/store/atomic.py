"""Whole files written at once or not at all, and disk errors as StoreError."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from temper.core.errors import StoreError
from temper.core.types import Json

__all__ = [
    "canonical",
    "disk_errors",
    "read_json",
    "refusals",
    "sweep",
    "write_bytes",
    "write_json",
    "write_with",
]

PART = ".part"
"""Ending of a file that is still being written."""

CURES = {
    errno.ENOSPC: "The disk is full: free some space, then run the same command again; it resumes.",
    errno.EDQUOT: "The disk quota is used up: free some space, then run the same command again.",
    errno.EROFS: "The file system is read-only: choose another folder with --out.",
    errno.EACCES: "No permission: choose another folder with --out, or change its mode.",
    errno.EPERM: "No permission: choose another folder with --out, or change its mode.",
    errno.ENOENT: "Check the path.",
    errno.EEXIST: "A file has this name: choose another folder.",
    errno.EFBIG: "The file would grow larger than allowed: raise the limit (ulimit -f).",
    errno.ENOTDIR: "A part of the path is a file: choose another folder.",
}

REFUSALS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
"""What only a disk says, whatever the file."""


@contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError inside into a StoreError that says what was tried, where and the cure."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(
            f"Cannot {action}: {reason}", where=str(path), cure=CURES.get(error.errno or 0, "")
        ) from error


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn a refusal of the disk inside, full or read-only, into a StoreError; other errors pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS:
            with disk_errors("write", path):
                raise
        raise


def write_with(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there; on any error nothing is left."""
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def sweep(folder: Path) -> None:
    """Delete what a killed process was still writing anywhere below; for the folder's only writer."""
    with disk_errors("clear", folder):
        for left in folder.rglob(f".*{PART}"):
            left.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_with(path, write)


def write_json(path: Path, value: Json) -> None:
    """Write `value` atomically as indented JSON with a final newline."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Json:
    """The JSON value in `path`; raises StoreError when it is missing or not JSON."""
    with disk_errors("read", path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise StoreError(
            f"Not readable as JSON: {error}", where=str(path), cure="Restore the file or delete its folder."
        ) from None


def canonical(value: Json) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
