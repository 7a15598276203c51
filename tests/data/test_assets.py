"""Fetching assets: what is kept, what is asked, when it is fetched again, and the real catalogue."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from temper.core.errors import ConfigError, NeedsError, StoreError
from temper.data import archives, assets, conversions
from temper.data.loading import load_data

from .conftest import BODY, OTHER, locked, sha256


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


def test_catalogue_cannot_point_outside(no_pip):
    no_pip.package("p", {"m": BODY})
    no_pip.asset("a", [locked("../x", BODY, ["p", "m"])])
    with pytest.raises(StoreError, match="points outside"):
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
