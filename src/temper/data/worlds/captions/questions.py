"""Questions about a scene and their answers, in one or two words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from temper.data.worlds.captions.noise import uniform
from temper.data.worlds.captions.scenes import Scene, Thing
from temper.data.worlds.captions.text import article, name_of
from temper.data.worlds.captions.words import COLOURS, NUMBERS, SHAPES

__all__ = ["QUESTION_TYPES", "Question", "question_of", "questions_of"]

QUESTION_STREAM = 12


class Question(NamedTuple):
    """A question, its answer, and its type."""

    question: str
    answer: str
    type: str


def _unique(scene: Scene, picks: Sequence[float]) -> Thing:
    """An object whose name no other object of the scene has, if there is one."""
    names = [name_of(thing) for thing in scene.things]
    single = [thing for thing in scene.things if names.count(name_of(thing)) == 1]
    return _pick(single or scene.things, picks[0])


def _pick(things: Sequence[Thing], pick: float) -> Thing:
    return things[int(pick * len(things))]


def _colour_at(scene: Scene, picks: Sequence[float]) -> Question:
    thing = _pick(scene.things, picks[0])
    return Question(f"what colour is the {scene.place(thing.cell)} thing ?", thing.colour, "colour-at")


def _shape_at(scene: Scene, picks: Sequence[float]) -> Question:
    thing = _pick(scene.things, picks[0])
    return Question(f"what shape is the {scene.place(thing.cell)} thing ?", thing.shape, "shape-at")


def _count(scene: Scene, picks: Sequence[float]) -> Question:
    return Question("how many things are there ?", NUMBERS[len(scene.things)], "count")


def _exists(scene: Scene, picks: Sequence[float]) -> Question:
    """Half of the questions name an object of the scene; the others change its colour or its shape."""
    thing = _pick(scene.things, picks[0])
    name = name_of(thing)
    if picks[1] < 0.5:
        changed = (
            f"{COLOURS[int(picks[2] * len(COLOURS))]} {thing.shape}"
            if picks[3] < 0.5
            else f"{thing.colour} {SHAPES[int(picks[2] * len(SHAPES))]}"
        )
        name = changed
    there = any(name_of(other) == name for other in scene.things)
    return Question(f"is there {article(name)} ?", "yes" if there else "no", "exists")


def _where(scene: Scene, picks: Sequence[float]) -> Question:
    thing = _unique(scene, picks)
    return Question(f"where is the {name_of(thing)} ?", scene.place(thing.cell), "where")


def _count_of(scene: Scene, picks: Sequence[float]) -> Question:
    thing = _pick(scene.things, picks[0])
    word, field = (thing.colour, "colour") if picks[1] < 0.5 else (thing.shape, "shape")
    if picks[2] < 0.25:
        pool = COLOURS if field == "colour" else SHAPES
        word = pool[int(picks[3] * len(pool))]
    number = NUMBERS[sum(getattr(other, field) == word for other in scene.things)]
    return Question(f"how many {word} things are there ?", number, "count-of")


MAKERS: dict[str, Callable[[Scene, Sequence[float]], Question]] = {
    "colour-at": _colour_at,
    "shape-at": _shape_at,
    "count": _count,
    "exists": _exists,
    "where": _where,
    "count-of": _count_of,
}
QUESTION_TYPES = tuple(MAKERS)


def questions_of(scene: Scene) -> list[Question]:
    """One question of each type, drawn from the scene's seed."""
    picks = uniform(np.array([scene.noise_seed]), 4 * len(MAKERS), QUESTION_STREAM).reshape(-1, 4).tolist()
    return [make(scene, row) for make, row in zip(MAKERS.values(), picks, strict=True)]


def question_of(scene: Scene) -> Question:
    """One question; over consecutive scenes the types take turns."""
    return questions_of(scene)[scene.noise_seed % len(MAKERS)]
