"""Signs in a picture: a hazard triangle, the same crossed out, and short words in a 5 x 7 font."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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
    same: dict[tuple[Glyph, int, int], list[int]] = {}
    for index, scene in enumerate(scenes):
        for glyph in scene.glyphs:
            _check_letters(glyph, scene)
            same.setdefault((glyph, scene.size_px, scene.grid), []).append(index)
    for (glyph, size_px, grid), there in same.items():
        keep_HW1, add_HW3 = _stamp(glyph, size_px, grid)
        canvas_NHWC[there] = canvas_NHWC[there] * keep_HW1 + add_HW3


def _check_letters(glyph: Glyph, scene: Scene) -> None:
    letters = glyph.text.upper()
    if glyph.kind == "word" and (set(letters) - set(FONT) or not 1 <= len(letters) <= 5):
        raise DataError(
            f"The sign {glyph.text!r} cannot be drawn",
            where=f"scene {scene.id}",
            cure=f"Use one to five of the letters {''.join(FONT)}.",
        )


@lru_cache(maxsize=64)
def _stamp(glyph: Glyph, size_px: int, grid: int) -> tuple[Floats, Floats]:
    """What a glyph does to a picture: the share of it that stays, (H, W, 1), and what is added, (H, W, 3)."""
    draw = _draw_word if glyph.kind == "word" else _draw_sign
    dark_HW3, light_HW3 = np.zeros((size_px, size_px, 3)), np.ones((size_px, size_px, 3))
    for image_HW3 in (dark_HW3, light_HW3):
        draw(image_HW3, glyph, grid)
    keep_HW1 = (light_HW3 - dark_HW3)[..., :1]
    return keep_HW1.astype(np.float32), dark_HW3.astype(np.float32)


def _centre(cell: int, size_px: int, grid: int) -> tuple[float, float, float]:
    """Middle of a cell and its side, in pixels."""
    side = size_px / grid
    return (cell % grid + 0.5) * side, (cell // grid + 0.5) * side, side


def _draw_sign(image_HWC: Floats, glyph: Glyph, grid: int) -> None:
    size_px = len(image_HWC)
    cx, cy, side = _centre(glyph.cell, size_px, grid)
    r = 0.45 * side
    at = np.arange(size_px) + 0.5
    x, y = np.meshgrid((at - cx) / r, (at - cy) / r)
    outside = triangle(x, y) * r
    _fill(image_HWC, outside, BLACK)
    _fill(image_HWC, outside + 0.12 * side, YELLOW)
    if glyph.kind == "crossed":
        _fill(image_HWC, box((x + y) / 2**0.5, (y - x) / 2**0.5, 1.1, 0.16) * r, RED)


def _fill(image_HWC: Floats, distance_HW: Floats, rgb: tuple[float, float, float]) -> None:
    alpha = np.clip(0.5 - distance_HW, 0, 1)[..., None]
    image_HWC += alpha * (np.array(rgb) - image_HWC)


def _draw_word(image_HWC: Floats, glyph: Glyph, grid: int) -> None:
    """Dots of one pixel on a light plate, moved so that the word lies within the picture."""
    letters, size_px = glyph.text.upper(), len(image_HWC)
    dots = np.zeros((9, 6 * len(letters) + 1))
    for place, letter in enumerate(letters):
        rows = [[int(dot) for dot in row] for row in FONT[letter].split()]
        dots[1:8, 1 + 6 * place : 6 + 6 * place] = rows
    cx, cy, _ = _centre(glyph.cell, size_px, grid)
    height, width = dots.shape
    top = int(np.clip(round(cy - height / 2), 0, max(0, size_px - height)))
    left = int(np.clip(round(cx - width / 2), 0, max(0, size_px - width)))
    part = image_HWC[top : top + height, left : left + width]
    part[:] = np.where(dots[: part.shape[0], : part.shape[1], None] > 0, np.array(BLACK), 0.95)
