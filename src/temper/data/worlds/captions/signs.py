"""Signs put into scenes: a hazard triangle, the same crossed out, or a word, where no object lies."""

from __future__ import annotations

import dataclasses
from typing import Literal

from temper.data.worlds.captions.scenes import Glyph, Scene, Thing
from temper.data.worlds.captions.words import SIGNS

__all__ = ["SignKind", "sign_place", "with_sign"]

SignKind = Literal["", "hazard", "crossed", "word"]


def with_sign(scene: Scene, kind: SignKind, cell_pick: float, word_pick: float = 0.0) -> Scene:
    """The 2 x 2 scene with a sign that hides nothing; "" leaves it as it is.

    A triangle takes a free cell, so at most three objects stay. A word is as wide as the picture: it takes one row, and the
    two objects that stay are moved to the other.
    """
    if not kind:
        return scene
    if kind == "word":
        row = int(cell_pick * 2)
        things = tuple(_moved(thing, scene, 2 * (1 - row) + at) for at, thing in enumerate(scene.things[:2]))
        word = SIGNS[int(word_pick * len(SIGNS))]
        return dataclasses.replace(scene, things=things, glyphs=(Glyph("word", 2 * row, word),))
    things = scene.things[:3]
    free = sorted({0, 1, 2, 3} - {thing.cell for thing in things})
    return dataclasses.replace(scene, things=things, glyphs=(Glyph(kind, free[int(cell_pick * len(free))]),))


def _moved(thing: Thing, scene: Scene, cell: int) -> Thing:
    side = scene.size_px / scene.grid
    dx = (cell % scene.grid - thing.cell % scene.grid) * side
    dy = (cell // scene.grid - thing.cell // scene.grid) * side
    return dataclasses.replace(thing, cell=cell, cx=round(thing.cx + dx, 3), cy=round(thing.cy + dy, 3))


def sign_place(scene: Scene) -> str:
    """Where the scene's sign is: the cell of a triangle, the row of a word."""
    (glyph,) = scene.glyphs
    if glyph.kind == "word":
        return ("top", "bottom")[glyph.cell // 2]
    return scene.place(glyph.cell)
