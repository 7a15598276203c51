"""Debian packages as archives of data: fetched by apt-get without root or installing, read as ar and tar.

apt-get does the downloading, so the machine's own sources and proxy hold; the hash is checked here.
"""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from temper.core.errors import NeedsError, StoreError

__all__ = ["download", "is_debian", "member_chunks"]

MEGABYTE = 2**20
HEADER_BYTES = 60
"""Of a member of an ar archive: name 16, dates and owner 32, size 10, end 2."""
MAGIC = b"!<arch>\n"


def is_debian(lock_line: str) -> bool:
    """Whether a lock line names a Debian package, NAME=VERSION, and not one of the Python index."""
    return "==" not in lock_line


def download(lock_line: str, folder: Path) -> Path:
    """The package that a lock line names, in `folder`, unchecked; raises NeedsError without apt-get, StoreError."""
    package = lock_line.partition(" ")[0]
    name, _, version = package.partition("=")
    path = folder / f"{name}_{version}_all.deb"
    if path.exists():
        return path
    if shutil.which("apt-get") is None:
        raise NeedsError(
            f"{package} is a Debian package, and there is no apt-get here",
            cure=f"Put {path.name} from a Debian mirror into {folder} and fetch again.",
        )
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        ["apt-get", "download", "-q", package],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    found = next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)
    if done.returncode or found is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise StoreError(
            f"apt-get could not download it: {last}",
            where=package,
            cure="Run apt-get update; it needs a source with Debian 12 (bookworm).",
        )
    return found


def member_chunks(path: Path, name: str) -> Iterator[bytes]:
    """A file's bytes; links are not followed. Raises KeyError where there is none."""
    with _data(path) as archive:
        for member in archive:
            if member.isfile() and member.name.removeprefix("./") == name:
                source = archive.extractfile(member)
                assert source is not None
                while chunk := source.read(MEGABYTE):
                    yield chunk
                return
    raise KeyError(name)


@contextmanager
def _data(path: Path) -> Iterator[tarfile.TarFile]:
    """The tar archive of a package's files, read in one pass; raises StoreError for what is no Debian package."""
    with path.open("rb") as file:
        try:
            part: Any = _Part(file, _seek_data(file))
            archive = tarfile.open(fileobj=part, mode="r|xz")  # noqa: SIM115
        except (ValueError, tarfile.TarError, lzma.LZMAError) as error:
            raise StoreError(f"This is no Debian package: {error}", where=path.name) from None
        with archive:
            yield archive


class _Part:
    """So many bytes of an open file, from where it stands."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left = file, size

    def read(self, size: int = -1) -> bytes:
        chunk = self.file.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(chunk)
        return chunk


def _seek_data(file: IO[bytes]) -> int:
    """Go to the start of data.tar.xz within the ar archive; gives its size."""
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin as an ar archive")
    while len(header := file.read(HEADER_BYTES)) == HEADER_BYTES:
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name == "data.tar.xz":
            return size
        file.seek(size + size % 2, os.SEEK_CUR)  # members begin at even places
    raise ValueError("it holds no data.tar.xz")
