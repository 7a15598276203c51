"""Members of locked packages: download without installing, unzip only what is listed, check every hash.

pip does the downloading, so the user's index, proxy and certificate settings hold. Nothing of a
package is ever imported or put on a path.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from temper.core.errors import StoreError
from temper.core.types import Ticker
from temper.data import debian

__all__ = ["LockedFile", "download", "extract", "file_sha256", "read_lock"]

MEGABYTE = 2**20
POLL_S = 0.2


class LockedFile(NamedTuple):
    """A file to make from members of archives, joined in order; hash and size are of the result."""

    file: str
    sha256: str
    bytes: int
    sources: tuple[tuple[str, str], ...]
    """(package, member) pairs; a member with `*` stands for all that match, sorted by name."""


def read_lock(path: Path) -> dict[str, str]:
    """Package name -> its line of a lock file."""
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    return {line.partition("=")[0]: line for line in lines if line and not line.startswith("#")}


def download(lock_line: str, folder: Path, *, size_bytes: int, ticker: Ticker, label: str) -> Path:
    """The archive that a lock line names, in `folder`; one that is already there, with its hash, is kept.

    Raises StoreError for no network, an unknown package or another hash; then no archive is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if debian.is_debian(lock_line):
        return _checked(debian.download(lock_line, folder), lock_line)
    there = _wheel(folder, lock_line)
    if there is not None and lock_line.endswith(f"--hash=sha256:{file_sha256(there)}"):
        return there
    code, output = _run_pip(lock_line, folder, max(1, round(size_bytes / MEGABYTE)), ticker, label)
    wheel = _wheel(folder, lock_line) if code == 0 else None
    _keep_only(folder, wheel)
    if wheel is None:
        raise _pip_error(output, lock_line.partition(" ")[0])
    return wheel


def _checked(archive: Path, lock_line: str) -> Path:
    """The archive, if it has the locked hash."""
    if not lock_line.endswith(f"--hash=sha256:{file_sha256(archive)}"):
        archive.unlink()
        raise _other_hash(lock_line.partition(" ")[0])
    return archive


def _other_hash(package: str) -> StoreError:
    return StoreError(
        "The downloaded archive is not the locked one: its hash differs", where=package,
        cure="Nothing was kept. Ask the owner of your package index what it serves, or use another index.",
    )  # fmt: skip


def _run_pip(lock_line: str, folder: Path, megabytes: int, ticker: Ticker, label: str) -> tuple[int, str]:
    """Run `pip download`; gives its exit code and what it printed."""
    lock, log = folder / "wanted.lock", folder / "pip.log"
    lock.write_text(lock_line + "\n", "utf-8")
    options = "--no-deps --only-binary=:all: --require-hashes --no-input --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--progress-bar=off"]
    command += ["-r", str(lock), "-d", str(folder)]
    # pip unpacks where TMPDIR says: here, so that progress can be seen and leftovers are ours to clear.
    env = {**os.environ, "TMPDIR": str(folder)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            for _ in ticker(_megabytes(process, folder, megabytes), total=megabytes, label=label):
                pass
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    return process.returncode, log.read_text("utf-8", "replace")


def _keep_only(folder: Path, wheel: Path | None) -> None:
    """Clear what pip and earlier killed runs left beside the archive."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != wheel:
            path.unlink(missing_ok=True)


def _megabytes(process: subprocess.Popen[bytes], folder: Path, total: int) -> Iterator[int]:
    """Yields once for each megabyte that has arrived, until pip ends; never more than `total`."""
    shown = 0
    while process.poll() is None:
        arrived = min(_tree_bytes(folder) // MEGABYTE, total - 1)
        yield from range(shown, arrived)
        shown = max(shown, arrived)
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            continue
    if process.returncode == 0:
        yield from range(shown, total)


def _tree_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:
                continue  # pip moved it meanwhile
    return total


def _wheel(folder: Path, lock_line: str) -> Path | None:
    name, _, rest = lock_line.partition("==")
    stem = re.sub(r"[-_.]+", "_", name).lower() + "-" + rest.partition(" ")[0]
    return next((p for p in folder.glob("*.whl") if p.name.lower().startswith(stem + "-")), None)


def _pip_error(log: str, package: str) -> StoreError:
    """What pip's output means for the user; addresses lose their credentials."""
    log = re.sub(r"//[^/@\s]+@", "//***@", log)
    errors = [line.strip() for line in log.splitlines() if line.lstrip().startswith("ERROR:")]
    last = (
        errors[-1].removeprefix("ERROR:").strip()
        if errors
        else (log.strip().splitlines() or ["no output"])[-1]
    )
    if "DO NOT MATCH THE HASHES" in log:
        return _other_hash(package)
    if "No space left" in log:
        return StoreError("The disk is full", where=package, cure="Free some space, or set TEMPER_CACHE.")
    if "No module named pip" in log:
        return StoreError("pip is not installed", where=sys.executable, cure="python -m ensurepip")
    return StoreError(
        f"pip could not download it: {last}", where=package,
        cure="Check the network and pip's own settings (pip config list; PIP_INDEX_URL, PIP_PROXY, PIP_CERT), "
        "or put the wheel into a folder and set PIP_FIND_LINKS to it.",
    )  # fmt: skip


def extract(files: Sequence[LockedFile], wheels: dict[str, Path], folder: Path) -> None:
    """Write the listed members, and nothing else, below `folder`; raises StoreError for anything unexpected."""
    for wheel in wheels.values():
        _check_names(wheel)
    for locked in files:
        _check_name(locked.file, "the list of assets")
        target = folder / locked.file
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            digest = _copy(locked, wheels, out)
        if digest != locked.sha256:
            raise StoreError(
                f"{locked.file} has another hash: {digest}", where=" + ".join(member for _, member in locked.sources),
                cure="Nothing was kept. The package is not what it was when it was locked.",
            )  # fmt: skip


def _copy(locked: LockedFile, wheels: dict[str, Path], out: IO[bytes]) -> str:
    """Join the members into `out`, never past the locked size; gives the hash of what was written."""
    digest, left = hashlib.sha256(), locked.bytes
    for package, member in locked.sources:
        for chunk in _chunks(wheels[package], member):
            left -= len(chunk)
            if left < 0:
                raise StoreError(
                    f"The member is larger than its locked {locked.bytes} bytes",
                    where=f"{wheels[package].name}: {member}", cure="Nothing was kept.",
                )  # fmt: skip
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def _chunks(wheel: Path, member: str) -> Iterator[bytes]:
    """The bytes of a member, or of all that a pattern matches."""
    if wheel.suffix == ".deb":
        yield from _deb_chunks(wheel, member)
        return
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(fnmatch.filter(archive.namelist(), member)) if "*" in member else [member]
            if not set(names) & set(archive.namelist()):
                raise StoreError("The archive has no such member", where=f"{wheel.name}: {member}")
            for name in names:
                with archive.open(name) as source:
                    while chunk := source.read(MEGABYTE):
                        yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise _damaged(wheel, error) from error


def _deb_chunks(package: Path, member: str) -> Iterator[bytes]:
    try:
        yield from debian.member_chunks(package, member)
    except KeyError:
        raise StoreError("The archive has no such member", where=f"{package.name}: {member}") from None


def _damaged(wheel: Path, error: Exception) -> StoreError:
    return StoreError(f"The archive is damaged: {error}", where=wheel.name, cure="Fetch it again.")


def _check_names(wheel: Path) -> None:
    """No member of the archive may point outside of a folder."""
    if wheel.suffix == ".deb":
        return  # members are found by their whole name and never unpacked under it
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise _damaged(wheel, error) from error
    for name in names:
        _check_name(name, wheel.name)


def _check_name(name: str, where: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise StoreError(f"The member {name!r} points outside of its archive", where=where,
                         cure="Nothing was kept. Do not use this archive.")  # fmt: skip


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
