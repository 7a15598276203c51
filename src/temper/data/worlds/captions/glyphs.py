"""Signs in a picture: a hazard triangle, the same crossed out, and short words in a 5 x 7 font."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from temper.core.errors import DataError
from temper.data.worlds.captions.scenes import Glyph, Scene
from temper.data.worlds.captions.shapes import box, triangle

__all__ = ["draw_glyphs"]

Floats = NDArray[np.floating[Any]]

YELLOW, BLACK, RED = (0.98, 0.82, 0.05), (0.05, 0.05, 0.05), (0.85, 0.08, 0.08)
FONT = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "N": "10001 11001 11001 10101 10011 10011 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 01010 01010 00100 01010 01010 10001",
}
"""Letter -> seven rows of five dots."""


def draw_glyphs(canvas_NHWC: Floats, scenes: Sequence[Scene]) -> None:
    """Draw each scene's glyphs over its picture, in place. Raises DataError for a letter without a drawing."""
    for image_HWC, scene in zip(canvas_NHWC, scenes, strict=True):
        for glyph in scene.glyphs:
            _draw_word(image_HWC, scene, glyph) if glyph.kind == "word" else _draw_sign(
                image_HWC, scene, glyph
            )


def _centre(scene: Scene, cell: int) -> tuple[float, float, float]:
    """Middle of a cell and its side, in pixels."""
    side = scene.size_px / scene.grid
    return (cell % scene.grid + 0.5) * side, (cell // scene.grid + 0.5) * side, side


def _draw_sign(image_HWC: Floats, scene: Scene, glyph: Glyph) -> None:
    cx, cy, side = _centre(scene, glyph.cell)
    r = 0.45 * side
    at = np.arange(scene.size_px) + 0.5
    x, y = np.meshgrid((at - cx) / r, (at - cy) / r)
    outside = triangle(x, y) * r
    _fill(image_HWC, outside, BLACK)
    _fill(image_HWC, outside + 0.12 * side, YELLOW)
    if glyph.kind == "crossed":
        _fill(image_HWC, box((x + y) / 2**0.5, (y - x) / 2**0.5, 1.1, 0.16) * r, RED)


def _fill(image_HWC: Floats, distance_HW: Floats, rgb: tuple[float, float, float]) -> None:
    alpha = np.clip(0.5 - distance_HW, 0, 1)[..., None]
    image_HWC += alpha * (np.array(rgb) - image_HWC)


def _draw_word(image_HWC: Floats, scene: Scene, glyph: Glyph) -> None:
    """Dots of one pixel on a light plate, moved so that the word lies within the picture."""
    letters = glyph.text.upper()
    unknown = [letter for letter in letters if letter not in FONT]
    if unknown or not 1 <= len(letters) <= 5:
        raise DataError(
            f"The sign {glyph.text!r} cannot be drawn",
            where=f"scene {scene.id}",
            cure=f"Use one to five of the letters {''.join(FONT)}.",
        )
    dots = np.zeros((9, 6 * len(letters) + 1))
    for place, letter in enumerate(letters):
        rows = [[int(dot) for dot in row] for row in FONT[letter].split()]
        dots[1:8, 1 + 6 * place : 6 + 6 * place] = rows
    cx, cy, _ = _centre(scene, glyph.cell)
    height, width = dots.shape
    top = int(np.clip(round(cy - height / 2), 0, max(0, scene.size_px - height)))
    left = int(np.clip(round(cx - width / 2), 0, max(0, scene.size_px - width)))
    part = image_HWC[top : top + height, left : left + width]
    part[:] = np.where(dots[: part.shape[0], : part.shape[1], None] > 0, np.array(BLACK), 0.95)
