"""Assets of images: tables of pixels to labelled pictures, Debian packages read without installing them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from temper.core.errors import NeedsError, StoreError
from temper.data import archives, debian
from temper.data.conversions import convert
from temper.data.loading import load_data

MEMBERS = {"usr/share/a.txt": b"alpha" * 1000, "usr/share/b.txt": b"beta"}


def make_deb(path, members=MEMBERS, magic=b"!<arch>\n"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("./usr/share/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with path.open("wb") as file:
        file.write(magic)
        for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
            head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
            file.write(head.encode() + content + b"\n" * (len(content) % 2))
    return path


def line_of(path) -> str:
    return f"pack=1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def fetch(lock_line, folder):
    return archives.download(lock_line, folder, size_bytes=1, ticker=None, label="")


def test_members_of_a_debian_package(tmp_path):
    path = make_deb(tmp_path / "pack_1.0_all.deb")
    assert b"".join(debian.member_chunks(path, "usr/share/a.txt")) == MEMBERS["usr/share/a.txt"]
    content = MEMBERS["usr/share/b.txt"]
    locked = archives.LockedFile(
        "b.txt", hashlib.sha256(content).hexdigest(), len(content), (("pack", "usr/share/b.txt"),)
    )
    archives.extract([locked], {"pack": path}, tmp_path / "out")
    assert (tmp_path / "out" / "b.txt").read_bytes() == content


@pytest.mark.parametrize("name", ["usr/share/none.txt", "usr/share/link.txt"])
def test_a_missing_member_and_a_link_are_refused(tmp_path, name):
    path = make_deb(tmp_path / "pack_1.0_all.deb")
    locked = archives.LockedFile("x", "0" * 64, 10, (("pack", name),))
    with pytest.raises(StoreError, match="no such member"):
        archives.extract([locked], {"pack": path}, tmp_path / "out")


def test_what_is_no_debian_package(tmp_path):
    path = make_deb(tmp_path / "pack_1.0_all.deb", magic=b"nothing\n")
    with pytest.raises(StoreError, match="no Debian package: it does not begin as an ar archive"):
        list(debian.member_chunks(path, "a"))


def test_a_package_put_into_the_folder_needs_no_apt(tmp_path, monkeypatch):
    path = make_deb(tmp_path / "pack_1.0_all.deb")
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch(line_of(path), tmp_path) == path
    with pytest.raises(StoreError, match=r"its hash differs \(pack=1.0\)"):
        fetch("pack=1.0 --hash=sha256:" + "0" * 64, tmp_path)
    assert not path.exists()


def test_apt_is_asked_and_its_absence_explained(tmp_path, monkeypatch):
    there = make_deb(tmp_path / "there.deb")
    asked = []

    def run(command, *, cwd, **_):
        asked.append(command)
        (cwd / "pack_1.0_all.deb").write_bytes(there.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert fetch(line_of(there), tmp_path / "down").name == "pack_1.0_all.deb"
    assert asked == [["apt-get", "download", "-q", "pack=1.0"]]
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NeedsError, match="Put pack_1.0_all.deb from a Debian mirror into"):
        fetch(line_of(there), tmp_path / "none")


def test_apts_own_error_is_told(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 100, "", "E: Version '1.0' for 'pack' was not found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(StoreError, match="Version '1.0' for 'pack' was not found"):
        fetch("pack=1.0 --hash=sha256:" + "0" * 64, tmp_path)


def test_mnist_parts_are_balanced_and_fixed(tmp_path):
    labels = np.repeat(np.arange(10), 10)
    table = np.concatenate([np.tile(np.arange(784) % 256, (100, 1)), labels[:, None]], axis=1)
    table[:, 0] = np.arange(100)
    lines = "\n".join(",".join(map(str, row)) for row in table)
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(lines.encode()))
    convert("mnist-5k", tmp_path)
    data = {part: load_data(str(tmp_path / f"{part}.jsonl")).rows for part in ("train", "test")}
    assert {part: len(rows) for part, rows in data.items()} == {"train": 80, "test": 20}
    assert [record.label for record in data["train"][:12]] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert set(Counter(record.label for record in data["test"]).values()) == {2}
    firsts = {record.image.array()[0, 0, 0] for rows in data.values() for record in rows}
    assert firsts == set(range(100))
    assert {int(r.image.array()[0, 0, 0]) % 10 for r in data["test"]} == {4, 9}


def idx(array) -> bytes:
    head = (0x800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def test_fashion_mnist_keeps_its_order_and_names(tmp_path):
    pixels = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images.gz").write_bytes(idx(pixels))
        (tmp_path / f"{prefix}-labels.gz").write_bytes(idx(np.array([9, 0, 1])))
    convert("fashion-mnist", tmp_path)
    rows = load_data(str(tmp_path / "test.jsonl")).rows
    assert [(r.label, r.extra["name"]) for r in rows] == [(9, "ankle boot"), (0, "t-shirt"), (1, "trouser")]
    assert (rows[1].image.array()[:, :, 0] == pixels[1]).all()
    (tmp_path / "train-images.gz").write_bytes(gzip.compress(b"\0\0\x0d\x03" + bytes(12)))
    with pytest.raises(StoreError, match="not an idx file"):
        convert("fashion-mnist", tmp_path)


def test_efficientnet_becomes_safetensors_under_our_names(tmp_path):
    from temper.systems.efficientnet import EfficientNetLite0
    from temper.systems.loading import load_base

    model = EfficientNetLite0()
    theirs = {
        ".".join(f"_{p}" if p.startswith(("conv", "bn", "blocks", "fc", "dep", "exp", "pro")) else p for p in k.split(".")): v
        for k, v in model.state_dict().items()
    }  # fmt: skip
    assert {"_conv_stem.weight", "_blocks.0._bn1.running_mean", "_fc.bias"} <= set(theirs)
    torch.save(theirs, tmp_path / "weights.pth")
    convert("efficientnet-lite0", tmp_path)
    assert not (tmp_path / "weights.pth").exists()
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    system = load_base(str(tmp_path))
    assert (system.kind, system.shape, len(system.classes)) == ("ImageClassifier", (3, 224, 224), 1000)
    assert json.loads((tmp_path / "config.json").read_text())["resize"] == [256]


def test_newsgroups(tmp_path):
    head = "Category\tText\nd\tstring\nclass\t\n"
    for part in ("train", "test"):
        (tmp_path / f"{part}.tab").write_text(f"{head}sci.space\tthe moon\nrec.autos\t \nrec.autos\ta car\n")
    convert("20newsgroups", tmp_path)
    rows = load_data(str(tmp_path / "train.jsonl")).rows
    assert [(r.id, r.label, r.text) for r in rows] == [
        ("train-1", "sci.space", "the moon"),
        ("train-3", "rec.autos", "a car"),
    ]
