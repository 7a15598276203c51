"""Conversions of assets to do with images: tables of pixels to labelled pictures, a classifier's weights."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from temper.core.errors import StoreError
from temper.data.loading import write_jsonl
from temper.data.pictures import Picture
from temper.data.schemas import Labelled

__all__ = ["efficientnet_lite0", "fashion_mnist", "mnist_5k", "read_idx"]

SIDE = 28
MNIST_CLASSES = 10
TEST_EVERY = 5
"""Of each digit's pictures, every fifth is kept for the test part."""
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
IDX_IMAGES, IDX_LABELS = 2051, 2049
"""The first numbers of the files: unsigned bytes in three dimensions, and in one."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def mnist_5k(folder: Path) -> None:
    """500 pictures a digit: 400 to train on, 100 to test; every ten rows hold each digit once."""
    path = folder / "mnist_5k.csv.gz"
    table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
    groups = [table[table[:, -1] == digit, :-1].reshape(-1, SIDE, SIDE) for digit in range(MNIST_CLASSES)]
    turns = min(len(group) for group in groups)
    for part, is_test in (("train", False), ("test", True)):
        write_jsonl(
            folder / f"{part}.jsonl",
            (
                Labelled("", digit, Picture.from_array(group[turn]), id=f"digit-{digit}-{turn}")
                for turn in range(turns)
                if (turn % TEST_EVERY == TEST_EVERY - 1) == is_test
                for digit, group in enumerate(groups)
            ),
        )
    path.unlink()


def fashion_mnist(folder: Path) -> None:
    """The set's own 60,000 pictures to train on and 10,000 to test, in its own order."""
    for prefix, part in (("train", "train"), ("t10k", "test")):
        images, labels = folder / f"{prefix}-images.gz", folder / f"{prefix}-labels.gz"
        write_jsonl(folder / f"{part}.jsonl", _clothes(read_idx(images), read_idx(labels), part))
        images.unlink()
        labels.unlink()


def _clothes(pixels: Pixels, labels: Iterable[int], part: str) -> Iterator[Labelled]:
    for number, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        name = {"name": FASHION_CLASSES[label]}
        yield Labelled("", int(label), Picture.from_array(picture), id=f"{part}-{number}", extra=name)


def read_idx(path: Path) -> Pixels:
    """A gzipped idx file of unsigned bytes: a big-endian kind and sizes, then the bytes. Raises StoreError."""
    content = gzip.decompress(path.read_bytes())
    kind = int.from_bytes(content[:4], "big")
    if kind not in (IDX_IMAGES, IDX_LABELS):
        raise StoreError(f"The file is of kind {kind}, not an idx file of bytes", where=path.name)
    num_sizes = kind & 0xFF
    shape = np.frombuffer(content, ">i4", num_sizes, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_sizes).reshape(shape)


def efficientnet_lite0(folder: Path) -> None:
    """PyTorch's file as config.json and safetensors, under the names of `systems/efficientnet.py`."""
    import torch
    from safetensors.torch import save_file

    path = folder / "weights.pth"
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    plain = {".".join(part.lstrip("_") for part in name.split(".")): value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in plain.items()}, folder / "model.safetensors")
    config = {
        "model_type": "temper-network", "network": "efficientnet-lite0", "shape": [3, 224, 224], "num_classes": 1000,
        "mean": [127 / 255] * 3, "std": [128 / 255] * 3, "resize": [256], "resample": "bicubic",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    path.unlink()
