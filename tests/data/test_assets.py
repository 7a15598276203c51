"""Fetching assets: what is kept, and that nothing is kept when anything is wrong.

Small wheels made here stand for the real packages; pip finds them in a folder, never on an index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from temper.core.errors import ConfigError, NeedsError, StoreError
from temper.data import archives, assets, conversions
from temper.data.loading import load_data

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


def test_fetch_keeps_only_the_listed_members_and_their_hashes(little, monkeypatch):
    assert not assets.is_cached("little")
    folder = assets.fetch("little")
    assert folder == little.cache / "assets" / "little"
    assert sorted(os.listdir(folder)) == ["asset.json", "train.jsonl"]
    record = json.loads((folder / "asset.json").read_text())
    assert record["archives"] == [little.lines["little-package"]]
    assert record["members"][0]["sha256"] == record["files"]["train.jsonl"]["sha256"] == sha256(BODY)
    assert little.left() == [
        "assets", "assets/little", "assets/little/asset.json", "assets/little/train.jsonl", "downloads",
    ]  # fmt: skip
    monkeypatch.setattr(subprocess, "Popen", None)  # from here on nothing may be downloaded
    assert assets.is_cached("little")
    assert assets.fetch("little") == folder
    assert [r.text for r in load_data("asset:little").rows] == ["one"] * 3


def test_progress_reaches_its_total(little):
    shown = []

    def ticker(items, *, total=None, label=""):
        shown.append((label, total, len(list(items))))
        return iter(())

    little.sizes["little-package"] = 3 * 2**20  # as if it were 3 MB
    little.asset("little", little.entries["little"]["files"])
    assets.fetch("little", ticker=ticker)
    assert shown == [("fetch little-package", 3, 3)]


def test_another_archive_hash_leaves_nothing(little):
    make_wheel(little.wheels, "little-package", {"pkg/train.jsonl": BODY + b"{}\n"})
    with pytest.raises(StoreError, match=r"not the locked one: its hash differs \(little-package==1.0\)"):
        assets.fetch("little")
    assert little.left() == ["assets", "downloads", "downloads/little", "downloads/little/little-package"]
    assert not assets.is_cached("little")


def test_no_network_names_pips_settings(little, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(
        StoreError, match=r"could not download it: .*little-package.*pip config list; PIP_INDEX_URL"
    ):
        assets.fetch("little")
    assert not (little.cache / "assets" / "little").exists()


def test_unreachable_index_hides_credentials(little, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(StoreError) as caught:
        assets.fetch("little")
    assert "secret" not in str(caught.value)


def test_an_sdist_is_never_built(little, tmp_path, monkeypatch):
    import tarfile

    (tmp_path / "sdists").mkdir()
    proof = tmp_path / "proof"
    (tmp_path / "setup.py").write_text(f"open({str(proof)!r}, 'w')\n")
    archive = tmp_path / "sdists" / "little-package-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "setup.py", "little-package-1.0/setup.py")
    little.lines["little-package"] = f"little-package==1.0 --hash=sha256:{sha256(archive.read_bytes())}"
    little.asset("little", little.entries["little"]["files"])
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "sdists"))
    with pytest.raises(StoreError, match="could not download"):
        assets.fetch("little")
    assert not proof.exists()


def test_missing_pip_is_named(little, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(StoreError, match="pip is not installed"):
        assets.fetch("little")


def test_wrong_member_hash_leaves_nothing(no_pip):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("x.jsonl", BODY[::-1], ["p", "m"])])
    with pytest.raises(StoreError, match=f"x.jsonl has another hash: {sha256(BODY)}"):
        assets.fetch("a")
    assert no_pip.left() == ["assets", "downloads"]


def test_member_larger_than_locked_stops_at_the_limit(no_pip):
    no_pip.package("p", {"m": b"0" * (64 * 2**20)})
    no_pip.asset("a", [locked("x", b"0" * 10, ["p", "m"])])
    with pytest.raises(StoreError, match="larger than its locked 10 bytes"):
        assets.fetch("a")
    assert no_pip.left() == ["assets", "downloads"]


def test_missing_member(no_pip):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("x", BODY, ["p", "n"])])
    with pytest.raises(StoreError, match="no such member"):
        assets.fetch("a")


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:/evil", "\\evil"])
def test_archive_with_a_member_that_points_outside(no_pip, name):
    no_pip.package("p", {"m": BODY, name: b"evil"})
    no_pip.asset("a", [locked("x", BODY, ["p", "m"])])
    with pytest.raises(StoreError, match="points outside of its archive"):
        assets.fetch("a")
    assert no_pip.left() == ["assets", "downloads"]


def test_catalogue_cannot_point_outside(no_pip):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("../x", BODY, ["p", "m"])])
    with pytest.raises(StoreError, match="points outside"):
        assets.fetch("a")
    assert no_pip.left() == ["assets", "downloads"]


def test_truncated_archive(no_pip):
    wheel = no_pip.package("p", {"m": os.urandom(4000)})
    no_pip.asset("a", [locked("x", BODY, ["p", "m"])])
    wheel.write_bytes(wheel.read_bytes()[:2000])
    with pytest.raises(StoreError, match="archive is damaged"):
        assets.fetch("a")
    assert no_pip.left() == ["assets", "downloads"]


def test_damaged_member(no_pip):
    content = os.urandom(4000)
    wheel = no_pip.package("p", {"m": content})
    no_pip.asset("a", [locked("x", content, ["p", "m"])])
    raw = bytearray(wheel.read_bytes())
    raw[1000] ^= 0xFF
    wheel.write_bytes(raw)
    with pytest.raises(StoreError, match=r"archive is damaged: .*CRC"):
        assets.fetch("a")
    assert no_pip.left() == ["assets", "downloads"]


def test_parts_and_patterns_are_joined_in_order(no_pip):
    no_pip.package("p-one", {"d/b.txt": b"2", "d/a.txt": b"1", "d/c.bin": b"-"})
    no_pip.package("p-two", {"rest": b"345"})
    no_pip.asset("a", [locked("sub/all.txt", b"12345", ["p-one", "d/*.txt"], ["p-two", "rest"])])
    assert (assets.fetch("a") / "sub" / "all.txt").read_bytes() == b"12345"
    assert assets.available()["a"].packages == ("p-one", "p-two")
    no_pip.asset("b", [locked("x", b"", ["p-one", "e/*.txt"])])
    with pytest.raises(StoreError, match="no such member"):
        assets.fetch("b")


def test_not_enough_disk_is_said_before_the_download(little, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(StoreError, match=r"'little' needs 0 MB of disk and 0 MB are free .*TEMPER_CACHE"):
        assets.fetch("little")
    assert little.left() == ["assets"]


def test_disk_that_fills_up_meanwhile(no_pip, monkeypatch):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("x", BODY, ["p", "m"])])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        assets.fetch("a")
    assert no_pip.left() == ["assets", "downloads"]


def test_cache_that_cannot_be_used(little, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"cache cannot be used.*Set TEMPER_CACHE"):
        assets.fetch("little")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    catalogue = assets.available()
    monkeypatch.setattr(assets, "available", lambda: catalogue)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        assets.is_cached("little")


def test_opt_in_names_the_licence_and_is_asked_once(no_pip):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("train.jsonl", BODY, ["p", "m"])], opt_in=True)
    with pytest.raises(NeedsError, match=r"accept its terms: MIT .*temper fetch a --accept"):
        assets.fetch("a")
    assert not no_pip.cache.exists()
    assets.fetch("a", accept=True)
    assert assets.fetch("a").is_dir()


def test_unknown_asset_names_the_nearest(little):
    for ask in (assets.fetch, assets.is_cached, assets.verify):
        with pytest.raises(ConfigError, match=r"no asset 'litle'. Did you mean little"):
            ask("litle")


def test_a_changed_lock_is_fetched_again(no_pip):
    no_pip.package("p", {"m": BODY, "n": OTHER})
    no_pip.asset("a", [locked("x", BODY, ["p", "m"])])
    folder = assets.fetch("a")
    no_pip.asset("a", [locked("y", OTHER, ["p", "n"])])
    assert not assets.is_cached("a")
    assert assets.fetch("a") == folder
    assert sorted(os.listdir(folder)) == ["asset.json", "y"]
    assert sorted(os.listdir(folder.parent)) == [".a.lock", "a"]


@pytest.mark.parametrize("damage", ["shorten", "delete", "record"])
def test_a_damaged_cache_is_fetched_again(no_pip, damage):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("x", BODY, ["p", "m"])])
    folder = assets.fetch("a")
    match damage:
        case "shorten":
            (folder / "x").write_bytes(BODY[:-1])
        case "delete":
            (folder / "x").unlink()
        case "record":
            (folder / "asset.json").write_text('{"digest": ')
    assert not assets.is_cached("a")
    assert (assets.fetch("a") / "x").read_bytes() == BODY


def test_verify_sees_a_changed_byte(no_pip):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("x", BODY, ["p", "m"])])
    with pytest.raises(StoreError, match="missing or has changed"):
        assets.verify("a")
    folder = assets.fetch("a")
    assets.verify("a")
    (folder / "x").write_bytes(BODY[::-1])
    assert assets.is_cached("a")  # the size is right; only reading it all can tell
    with pytest.raises(StoreError, match=r"x is missing or has changed .*temper fetch a"):
        assets.verify("a")


SCRIPT = """
import os, signal, sys
from pathlib import Path
from temper.data import archives, assets
assets.CATALOGUE, assets.LOCK = Path(sys.argv[1]), Path(sys.argv[2])
if len(sys.argv) > 3:
    def half(files, wheels, folder):
        (folder / "train.jsonl").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    archives.extract = half
print(assets.fetch("little"))
"""


def run_fetch(shop: Shop, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(shop.catalogue), str(shop.lock), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_fetch_leaves_no_asset_and_the_next_one_clears_up(little):
    killed = run_fetch(little, "kill")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not assets.is_cached("little")
    assert any("/.little." in name for name in little.left())
    assert any(name.endswith(".whl") for name in little.left())
    folder = assets.fetch("little")
    assert (folder / "train.jsonl").read_bytes() == BODY
    assert sorted(os.listdir(folder.parent)) == [".little.lock", "little"]
    assert os.listdir(little.cache / "downloads") == []


def test_an_archive_that_is_already_there_is_not_downloaded_again(little, tmp_path, monkeypatch):
    killed = run_fetch(little, "kill")
    killed.communicate()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    assert (assets.fetch("little") / "train.jsonl").read_bytes() == BODY


def test_processes_at_the_same_time_share_one_fetch(little):
    both = [run_fetch(little) for _ in range(3)]
    outputs = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0, 0]
    assert outputs == {str(little.cache / "assets" / "little")}
    assert sorted(os.listdir(little.cache / "assets")) == [".little.lock", "little"]


def test_a_model_is_not_data(no_pip):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("model.bin", BODY, ["p", "m"])])
    with pytest.raises(ConfigError, match="use it as a system"):
        load_data("asset:a")


def test_the_real_catalogue_is_whole():
    wheels, debs = archives.read_lock(assets.LOCK), archives.read_lock(assets.DEBIAN_LOCK)
    lock = wheels | debs
    catalogue = json.loads(assets.CATALOGUE.read_text())
    assert set(lock) == set(catalogue["sizes"])
    for line in debs.values():
        assert re.fullmatch(r"[a-z0-9.-]+=[^= ]+ --hash=sha256:[0-9a-f]{64}", line)
    for line in wheels.values():
        assert re.fullmatch(r"[a-z0-9.-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line)
    found = assets.available()
    assert {"smollm2-135m", "minilm", "rotten-tomatoes", "chitchat", "refusal-labels"} <= set(found)
    assert {name for name, info in found.items() if info.opt_in} == {"gemma3-270m", "refusal-labels"}
    assert set(lock) == {package for info in found.values() for package in info.packages}
    for info in found.values():
        assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) and file.bytes > 0 for file in info.files)
        assert info.convert == "" or info.convert in conversions.STEPS
        assert info.kind in ("model", "encoder", "image classifier", "text", "images")
        assert info.disk_bytes > info.size_bytes > 0
