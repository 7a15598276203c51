"""What is said about scenes: captions, and the words for things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from temper.data.worlds.captions.noise import uniform
from temper.data.worlds.captions.scenes import Scene, Thing, size_word
from temper.data.worlds.captions.words import NEUTRAL_PHRASE, STYLE_PHRASES, SYNONYMS

__all__ = ["CaptionRecipe", "article", "captions", "name_of", "relation", "wrong_captions"]

TEXT_STREAM, WRONG_STREAM = 11, 20
NUM_PICKS = 12


@dataclass(frozen=True, kw_only=True)
class CaptionRecipe:
    """How scenes are spoken of."""

    style_share: float = 0.7
    """Captions that name the style; the others begin with the neutral phrase."""
    size_share: float = 0.5
    """Captions of one small or large object that say so."""
    second_share: float = 0.15
    """Words replaced by their second word."""
    third_share: float = 0.01
    """Words replaced by their third, rare word."""
    wrong_share: float = 0.0
    """Pictures that carry the caption of another scene."""
    short: bool = False
    """Only colour and shape, without a phrase or a size."""
    long: bool = False
    """Size, place and background are told as well."""


PLAIN = CaptionRecipe(style_share=0, size_share=0, second_share=0, third_share=0)
"""What a caption says at least, in the first words for everything."""


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def name_of(thing: Thing) -> str:
    """Colour and shape in their first words."""
    return f"{thing.colour} {thing.shape}"


def captions(scenes: Sequence[Scene], recipe: CaptionRecipe = PLAIN) -> list[str]:
    """One caption a scene, the same whatever other scenes there are; it is true whatever the recipe's `wrong_share`."""
    if not scenes:
        return []
    picks = uniform(np.array([scene.noise_seed for scene in scenes]), NUM_PICKS, TEXT_STREAM).tolist()
    return [_caption(scene, recipe, row) for scene, row in zip(scenes, picks, strict=True)]


def wrong_captions(scenes: Sequence[Scene], others: Sequence[Scene], recipe: CaptionRecipe) -> list[bool]:
    """Whether each scene carries the caption of the other at its place: `wrong_share` of them, by their own seeds.

    A scene whose other shows the same shape in the same colour keeps its own.
    """
    if not scenes:
        return []
    drawn = uniform(np.array([scene.noise_seed for scene in scenes]), 1, WRONG_STREAM)[:, 0]
    return [
        bool(draw < recipe.wrong_share) and name_of(scene.things[0]) != name_of(other.things[0])
        for scene, other, draw in zip(scenes, others, drawn, strict=True)
    ]


def _caption(scene: Scene, recipe: CaptionRecipe, picks: list[float]) -> str:
    first = _words(scene.things[0], recipe, picks[0], picks[1])
    size = size_word(scene)
    if size and not recipe.short and (recipe.long or picks[2] < recipe.size_share):
        first = f"{size} {first}"
    said = article(first)
    if len(scene.things) > 1 and picks[7] < 0.7:
        other = scene.things[1]
        said += f" {relation(scene.things[0], other)} {article(_words(other, recipe, picks[5], picks[6]))}"
    if recipe.short:
        return said
    phrase = NEUTRAL_PHRASE
    if recipe.long or picks[3] < recipe.style_share:
        phrase = STYLE_PHRASES[scene.style][int(picks[4] * 2)]
    return f"{phrase} {said}" + (f" in the {_where(scene)} of the picture" if recipe.long else "")


def _where(scene: Scene) -> str:
    if scene.grid > 1:
        return scene.place(scene.things[0].cell)
    thing, third = scene.things[0], scene.size_px / 32
    across, down = thing.cx - scene.size_px / 2, thing.cy - scene.size_px / 2
    rows = "top" if down < -third else "bottom" if down > third else ""
    columns = "left" if across < -third else "right" if across > third else ""
    return f"{rows} {columns}".strip() or "middle"


def _words(thing: Thing, recipe: CaptionRecipe, colour_pick: float, shape_pick: float) -> str:
    return f"{_word(thing.colour, recipe, colour_pick)} {_word(thing.shape, recipe, shape_pick)}"


def _word(word: str, recipe: CaptionRecipe, pick: float) -> str:
    if pick < recipe.third_share:
        return SYNONYMS[word][1]
    return SYNONYMS[word][0] if pick < recipe.third_share + recipe.second_share else word


def relation(thing: Thing, other: Thing) -> str:
    """Where `thing` is as seen from `other`: along the axis on which they are further apart."""
    dx, dy = thing.cx - other.cx, thing.cy - other.cy
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
