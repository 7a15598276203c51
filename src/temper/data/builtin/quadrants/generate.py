"""Pictures of which one quarter is bright, with noise."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from temper.data.builtin import emit
from temper.data.pictures import Picture

__all__ = ["HERE", "build"]

HERE = Path(__file__).parent
NUM_CLASSES, SIDE = 4, 8
EACH = {"train": 3, "test": 2}
"""Pictures of each class."""


def build(seed: int = 20250) -> dict[str, list[dict[str, object]]]:
    """The rows of every part, classes taking turns."""
    draw = np.random.default_rng(seed)
    parts: dict[str, list[dict[str, object]]] = {}
    for part, each in EACH.items():
        labels = [place % NUM_CLASSES for place in range(each * NUM_CLASSES)]
        parts[part] = [
            {"id": f"quadrants-{part}-{place:02d}", "image": _picture(label, draw).uri(), "label": label}
            for place, label in enumerate(labels)
        ]
    return parts


def _picture(label: int, draw: np.random.Generator) -> Picture:
    pixels = draw.integers(20, 70, (SIDE, SIDE))
    half = SIDE // 2
    top, left = (label // 2) * half, (label % 2) * half
    pixels[top : top + half, left : left + half] += 160
    return Picture.from_array(pixels.astype(np.uint8))


if __name__ == "__main__":
    sys.exit(emit.main(HERE, build))
