"""Wheels made on the spot stand for the real packages of assets; pip finds them in a folder, never on an index."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from temper.data import archives, assets

BODY = b'{"text": "one"}\n' * 3
OTHER = b"x" * 5000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Shop:
    """A folder of wheels, a catalogue and a lock that stand for the real ones."""

    def __init__(self, root: Path) -> None:
        self.wheels, self.cache = root / "wheels", root / "cache"
        self.catalogue, self.lock = root / "assets.json", root / "assets.lock"
        self.wheels.mkdir()
        self.entries: dict[str, dict] = {}
        self.lines: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def package(self, name: str, members: dict[str, bytes]) -> Path:
        wheel = make_wheel(self.wheels, name, members)
        self.lines[name] = f"{name}==1.0 --hash=sha256:{sha256(wheel.read_bytes())}"
        self.sizes[name] = wheel.stat().st_size
        return wheel

    def asset(self, name: str, files: list[dict], *, opt_in: bool = False, convert: str = "") -> None:
        self.entries[name] = {
            "title": "A test", "kind": "text", "licence": "MIT", "opt_in": opt_in, "note": "",
            "convert": convert, "converted_bytes": 0, "files": files,
        }  # fmt: skip
        self.catalogue.write_text(json.dumps({"sizes": self.sizes, "assets": self.entries}))
        self.lock.write_text("# comment\n" + "\n".join(self.lines.values()) + "\n")

    def left(self) -> list[str]:
        """Every file in the cache, apart from the empty lock files."""
        return sorted(str(p.relative_to(self.cache)) for p in self.cache.rglob("*") if p.suffix != ".lock")


def locked(file: str, content: bytes, *sources: list[str]) -> dict:
    return {"file": file, "sha256": sha256(content), "bytes": len(content), "from": list(sources)}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    shop = Shop(tmp_path)
    monkeypatch.setattr(assets, "CATALOGUE", shop.catalogue)
    monkeypatch.setattr(assets, "LOCK", shop.lock)
    for name in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.wheels))
    monkeypatch.setenv("TEMPER_CACHE", str(shop.cache))
    return shop


@pytest.fixture
def little(shop):
    """One asset, "little", of one file."""
    shop.package("little-package", {"pkg/train.jsonl": BODY, "pkg/__init__.py": b"raise RuntimeError\n"})
    shop.asset("little", [locked("train.jsonl", BODY, ["little-package", "pkg/train.jsonl"])])
    return shop


@pytest.fixture
def no_pip(shop, monkeypatch):
    """The archives come straight from the folder, for tests of what happens after the download."""

    def download(lock_line, folder, **_):
        folder.mkdir(parents=True, exist_ok=True)
        name = lock_line.partition("==")[0].replace("-", "_")
        return Path(shutil.copy(next(shop.wheels.glob(f"{name}-*.whl")), folder))

    monkeypatch.setattr(archives, "download", download)
    return shop
