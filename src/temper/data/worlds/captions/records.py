"""What is said of the scenes of a set: scenes to records, one way for each kind of set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from temper.core.types import Json
from temper.data.pictures import Picture
from temper.data.schemas import Captioned, Labelled, Record
from temper.data.worlds.captions.dialogues import dialogue_record
from temper.data.worlds.captions.policy import ask_policy, policy_type
from temper.data.worlds.captions.premises import ask
from temper.data.worlds.captions.questions import question_of
from temper.data.worlds.captions.render import render
from temper.data.worlds.captions.scenes import Scene, to_json
from temper.data.worlds.captions.text import CaptionRecipe, captions, name_of, wrong_captions
from temper.data.worlds.captions.tones import tone_maps
from temper.data.worlds.captions.words import COLOURS, HELD_OUT, SHAPES

__all__ = ["FILL", "RECORDS", "Drawn", "Says", "Turn"]

FILL = {"flat": "filled", "sketch": "outlined"}
GREY = (0.299, 0.587, 0.114)

Says = Literal["caption", "shape", "name", "fill", "question", "dialogue", "premise", "policy", "tones"]
Turn = tuple[str, bool]
"""A kind of record and a claim about it: (category, deceptive) of premises, (sign, use) of the policy."""


class Drawn(NamedTuple):
    """The scenes of a part and what records are made with."""

    part: str
    scenes: Sequence[Scene]
    said: CaptionRecipe
    others: Sequence[Scene]
    """Whose captions wrong captions are, one a scene; () where none is wrong."""
    turns: Sequence[Turn]
    """One a scene; () where a set has none."""
    grey: bool


def _pictures(scenes: Sequence[Scene], grey: bool) -> Iterator[Picture]:
    pixels = render(scenes)
    if grey and len(scenes):
        pixels = (pixels @ np.array(GREY) + 0.5).astype(np.uint8)[..., None]
    return map(Picture.from_array, pixels)


def _facts(scene: Scene) -> dict[str, Json]:
    thing = scene.things[0]
    return {"style": scene.style, "shape": thing.shape, "colour": thing.colour}


def _captioned(drawn: Drawn) -> Iterator[Record]:
    """Pictures with captions; `wrong` says whether another scene's caption stands there, where that may be."""
    said = captions(drawn.scenes, drawn.said)
    wrong = [False] * len(said)
    if drawn.others:
        wrong = wrong_captions(drawn.scenes, drawn.others, drawn.said)
        strange = captions(drawn.others, drawn.said)
        said = [other if is_wrong else own for own, other, is_wrong in zip(said, strange, wrong, strict=True)]
    pictures = _pictures(drawn.scenes, drawn.grey)
    for scene, picture, text, is_wrong in zip(drawn.scenes, pictures, said, wrong, strict=True):
        facts = _facts(scene)
        pair = SHAPES.index(facts["shape"]), COLOURS.index(facts["colour"])
        facts["held_out"] = pair in HELD_OUT
        if drawn.others:
            facts["wrong"] = is_wrong
        yield Captioned(image=picture, text=text, id=f"{drawn.part}-{scene.id}", extra=facts)


def _labelled(class_of: Callable[[Scene], tuple[int, str]]) -> Callable[[Drawn], Iterator[Record]]:
    """Pictures with the number of their class; its name is the column `name`."""

    def records(drawn: Drawn) -> Iterator[Record]:
        for scene, picture in zip(drawn.scenes, _pictures(drawn.scenes, drawn.grey), strict=True):
            label, name = class_of(scene)
            extra = {"name": name, **_facts(scene)}
            yield Labelled(text="", label=label, image=picture, id=f"{drawn.part}-{scene.id}", extra=extra)

    return records


def _shape_class(scene: Scene) -> tuple[int, str]:
    shape = scene.things[0].shape
    return SHAPES.index(shape), shape


def _name_class(scene: Scene) -> tuple[int, str]:
    thing = scene.things[0]
    return SHAPES.index(thing.shape) * len(COLOURS) + COLOURS.index(thing.colour), name_of(thing)


def _fill_class(scene: Scene) -> tuple[int, str]:
    shape, name = _shape_class(scene)
    return tuple(FILL).index(scene.style) * len(SHAPES) + shape, f"{FILL[scene.style]} {name}"


def _with_tones(drawn: Drawn) -> Iterator[Record]:
    """Pictures of shapes; `tones` is the second modality, 16 rows of 16 numbers from 0 to 255."""
    maps = tone_maps(drawn.scenes)
    for record, map_HW in zip(_labelled(_shape_class)(drawn), maps, strict=True):
        assert isinstance(record, Labelled)
        extra = {**record.extra, "tones": map_HW.tolist()}
        yield Labelled(text="", label=record.label, image=record.image, id=record.id, extra=extra)


def _questions(drawn: Drawn) -> Iterator[Record]:
    for scene, picture in zip(drawn.scenes, _pictures(drawn.scenes, drawn.grey), strict=True):
        found = question_of(scene)
        facts = {"answer": found.answer, "type": found.type}
        yield _asked(drawn.part, scene, picture, found.question, facts)


def _asked(part: str, scene: Scene, picture: Picture, question: str, facts: Mapping[str, Json]) -> Captioned:
    extra = {**facts, "scene": to_json(scene)}
    return Captioned(image=picture, text=question, id=f"{part}-{scene.id}", extra=extra)


def _premises(drawn: Drawn) -> Iterator[Record]:
    """`type` is the category, `deceptive` whether the premise is false."""
    found = [ask(*turn, scene) for turn, scene in zip(drawn.turns, drawn.scenes, strict=True)]
    pictures = _pictures([asked.scene for asked in found], drawn.grey)
    for (category, deceptive), asked, picture in zip(drawn.turns, found, pictures, strict=True):
        facts = {"answer": asked.answer, "type": category, "deceptive": deceptive}
        yield _asked(drawn.part, asked.scene, picture, asked.question, facts)


def _policies(drawn: Drawn) -> Iterator[Record]:
    """`type` is that of `policy_type`, `sign` what stands in the picture, `refuse` whether the policy forbids an answer."""
    found = [ask_policy(*turn, scene) for turn, scene in zip(drawn.turns, drawn.scenes, strict=True)]  # type: ignore[arg-type]
    pictures = _pictures([asked.scene for asked in found], drawn.grey)
    for (sign, uses), asked, picture in zip(drawn.turns, found, pictures, strict=True):
        kind = policy_type(sign, uses)  # type: ignore[arg-type]
        facts = {"answer": asked.answer, "type": kind, "sign": sign, "refuse": kind == "forbidden"}
        yield _asked(drawn.part, asked.scene, picture, asked.question, facts)


def _dialogues(drawn: Drawn) -> Iterator[Record]:
    return (dialogue_record(scene, f"{drawn.part}-{scene.id}") for scene in drawn.scenes)


RECORDS: dict[Says, Callable[[Drawn], Iterator[Record]]] = {
    "caption": _captioned,
    "shape": _labelled(_shape_class),
    "name": _labelled(_name_class),
    "fill": _labelled(_fill_class),
    "question": _questions,
    "dialogue": _dialogues,
    "premise": _premises,
    "policy": _policies,
    "tones": _with_tones,
}
"""What a record of a set is -> what makes a part's records."""
