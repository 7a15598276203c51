"""Questions that take something for granted about a scene, truly or falsely, in the six categories of MAD-Bench.

The answer to a false premise says what is wrong with it; by its words alone a true one cannot be told from a false one.
Scenes have 2 to 4 objects without a shape or a colour in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from temper.data.worlds.captions.noise import uniform
from temper.data.worlds.captions.scenes import Scene, Thing
from temper.data.worlds.captions.signs import sign_place, with_sign
from temper.data.worlds.captions.text import article, name_of, relation
from temper.data.worlds.captions.words import COLOURS, NUMBERS, SHAPES, SIGNS, STYLE_PHRASES, STYLES

__all__ = ["PREMISES", "Asked", "Premise", "ask"]

PREMISE_STREAM = 16
NUM_PICKS = 4
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = NUMBERS[2:5]
"""How many objects a scene may have."""


class Asked(NamedTuple):
    """A scene, perhaps with a sign put into it, and what is asked and answered about it."""

    scene: Scene
    question: str
    answer: str


Premise = Callable[[Scene, Sequence[float], bool], Asked]


def ask(category: str, deceptive: bool, scene: Scene) -> Asked:
    """The question of a category about a scene, drawn from its seed; `deceptive` makes its premise false."""
    picks = uniform(np.array([scene.noise_seed]), NUM_PICKS, PREMISE_STREAM)[0].tolist()
    return PREMISES[category](scene, picks, deceptive)


def _two(scene: Scene, picks: Sequence[float]) -> tuple[Thing, Thing]:
    """An object, and another one."""
    first = int(picks[0] * len(scene.things))
    second = (first + 1 + int(picks[1] * (len(scene.things) - 1))) % len(scene.things)
    return scene.things[first], scene.things[second]


def _other(words: Sequence[str], taken: Sequence[str], pick: float) -> str:
    free = [word for word in words if word not in taken]
    return free[int(pick * len(free))]


def _count(scene: Scene, picks: Sequence[float], deceptive: bool) -> Asked:
    """A number of things; the false one is another scene's."""
    thing, num = _two(scene, picks)[0], NUMBERS[len(scene.things)]
    said = _other(COUNTS, [num], picks[2]) if deceptive else num
    question = f"which of the {said} things is {thing.colour} ?"
    return Asked(scene, question, f"there are {num} things" if deceptive else f"the {thing.shape}")


def _existence(scene: Scene, picks: Sequence[float], deceptive: bool) -> Asked:
    """An object by its shape; the false one is nowhere."""
    thing = _two(scene, picks)[0]
    shape = _other(SHAPES, [t.shape for t in scene.things], picks[2]) if deceptive else thing.shape
    return Asked(
        scene, f"what colour is the {shape} ?", f"there is no {shape}" if deceptive else thing.colour
    )


def _attribute(scene: Scene, picks: Sequence[float], deceptive: bool) -> Asked:
    """An object by colour and shape; the false colour is not its own."""
    thing = _two(scene, picks)[0]
    if not deceptive:
        return Asked(scene, f"where is the {name_of(thing)} ?", scene.place(thing.cell))
    wrong = _other(COLOURS, [thing.colour], picks[2])
    answer = f"the {thing.shape} is {thing.colour} , not {wrong}"
    return Asked(scene, f"where is the {wrong} {thing.shape} ?", answer)


def _kind_of_picture(style: str) -> str:
    return STYLE_PHRASES[style][0].removeprefix("a ").removesuffix(" of")


def _surroundings(scene: Scene, picks: Sequence[float], deceptive: bool) -> Asked:
    """The kind of picture; the false one is another style's."""
    own = _kind_of_picture(scene.style)
    said = _kind_of_picture(_other(STYLES, [scene.style], picks[2])) if deceptive else own
    question = f"how many things are there in this {said} ?"
    answer = f"this is a {own} , not a {said}" if deceptive else NUMBERS[len(scene.things)]
    return Asked(scene, question, answer)


def _relation(scene: Scene, picks: Sequence[float], deceptive: bool) -> Asked:
    """How one object lies to another; the false relation is the opposite one."""
    thing, other = _two(scene, picks)
    true = relation(thing, other)
    said = OPPOSITE[true] if deceptive else true
    question = f"what colour is the {thing.shape} {said} the {name_of(other)} ?"
    return Asked(
        scene, question, f"the {thing.shape} is {true} the {name_of(other)}" if deceptive else thing.colour
    )


def _confusion(scene: Scene, picks: Sequence[float], deceptive: bool) -> Asked:
    """A sign by the word on it; the false one is taken for another."""
    scene = with_sign(scene, "word", picks[0], picks[1])
    word = scene.glyphs[0].text
    said = _other(SIGNS, [word], picks[2]) if deceptive else word
    answer = f"there is no {said} sign , it is {article(word)} sign" if deceptive else sign_place(scene)
    return Asked(scene, f"where is the {said} sign ?", answer)


PREMISES: dict[str, Premise] = {
    "count-of-object": _count,
    "non-existent-object": _existence,
    "object-attribute": _attribute,
    "scene-understanding": _surroundings,
    "spatial-relationship": _relation,
    "visual-confusion": _confusion,
}
"""Category -> what makes its questions."""
