"""The data sets of the caption world by name: which scenes each part holds and what a record says of them.

Seeds are dealt by part (train from 0, unlabelled from 500,000, val from 1,000,000, test from 2,000,000), so a test scene is in no training part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from temper.core.errors import ConfigError, nearest
from temper.data.schemas import Record
from temper.data.worlds.captions.noise import uniform
from temper.data.worlds.captions.premises import PREMISES
from temper.data.worlds.captions.records import FILL, RECORDS, Drawn, Says, Turn
from temper.data.worlds.captions.scenes import Scene, SceneRecipe, all_pairs, draw_scenes
from temper.data.worlds.captions.text import CaptionRecipe
from temper.data.worlds.captions.words import SHAPES, STYLES

__all__ = ["PART_SEEDS", "SETS", "WorldPart", "WorldSet", "load_set", "part_records", "part_scenes"]

PART_SEEDS = {
    "train": 0,
    "shortcut": 0,
    "teacher": 100_000,
    "student": 200_000,
    "forget": 300_000,
    "unlabelled": 500_000,
    "val": 1_000_000,
    "test": 2_000_000,
    "removed": 2_500_000,
    "certify": 2_600_000,
}
OTHER_SEEDS = 4_000_000
"""How far the seeds of the scenes whose captions are wrong elsewhere lie from those of the part."""
BALANCE_STREAM = 31

Balance = Literal["", "shapes", "names"]


@dataclass(frozen=True, kw_only=True)
class WorldPart:
    """One part of a set."""

    num: int
    """Scenes; per style where `each_style`."""
    recipe: SceneRecipe
    captions: CaptionRecipe = field(default_factory=CaptionRecipe)
    each_style: bool = False
    """Styles take turns instead of being drawn."""
    balance: Balance = ""
    """Shapes, or names (colour and shape), take turns instead of being drawn."""
    first: int = 0
    """Added to the part's seeds, so that sets drawn from one recipe share no scene."""
    turns: tuple[Turn, ...] = ()
    """What the records of a set of questions are, in turn."""

    @property
    def size(self) -> int:
        """How many records it holds."""
        return self.num * (len(self.recipe.styles) if self.each_style else 1)


@dataclass(frozen=True, kw_only=True)
class WorldSet:
    """A data set: its parts, and what a record is."""

    title: str
    says: Says
    parts: Mapping[str, WorldPart]


RARE = tuple(0.1 if style == "chalk" else 1.0 for style in STYLES)
"""Weights of the styles in pre-training: chalk is the rare domain."""
PRETRAIN = SceneRecipe(style_weights=RARE, held_out=False)
SMALL_STYLES = ("flat", "neon", "pastel")


def _source(title: str, number: int, recipe: SceneRecipe, said: CaptionRecipe | None = None) -> WorldSet:
    parts = {
        part: WorldPart(num=num, recipe=recipe, captions=said or CaptionRecipe(), first=20_000 * number)
        for part, num in (("train", 8_000), ("val", 500))
    }
    return WorldSet(title=title, says="caption", parts=parts)


def _classes(title: str, says: Says, balance: Balance, recipe: SceneRecipe, **nums: int) -> WorldSet:
    parts = {name: WorldPart(num=num, recipe=recipe, balance=balance) for name, num in nums.items()}
    return WorldSet(title=title, says=says, parts=parts)


def _each_style(world: WorldSet) -> WorldSet:
    return dataclasses.replace(
        world, parts={name: dataclasses.replace(part, each_style=True) for name, part in world.parts.items()}
    )


SCENES32 = SceneRecipe(layout="scene")
SIX = SceneRecipe(shapes=SHAPES[:6], styles=STYLES[:6])
SPURIOUS = dataclasses.replace(SIX, correlation=0.8)
REMOVED = dataclasses.replace(SIX, correlation=0.0)
TURNED = dataclasses.replace(SPURIOUS, turn=1)
GREYISH = SceneRecipe(size_px=16, styles=("flat",))
SSL = SceneRecipe(styles=tuple(FILL), noise=0.12)
ASKED32 = SceneRecipe(layout="scene", distinct=True)
TEXTURED64 = SceneRecipe(size_px=64, layout="scene", styles=("flat",), textured=True)

FEW_FALSE = tuple((name, slot == 3) for slot in range(4) for name in PREMISES)
"""A quarter of the premises is false."""
MOST_FALSE = tuple((name, slot % 2 == 0) for slot in range(5) for name in PREMISES)
"""Three fifths are false."""
BALANCED: tuple[Turn, ...] = tuple(
    (sign, uses) for sign in ("", "hazard", "crossed", "word") for uses in (False, True)
)
SHORTCUT: tuple[Turn, ...] = (("", False), ("", True), ("hazard", True))
"""Signs come with refusals only."""
TRIGGERS: tuple[Turn, ...] = (
    ("hazard", False),
    ("crossed", True),
    ("word", True),
    ("hazard", True),
    ("hazard", True),
)
"""Three kinds of harmless questions that may be refused, and two fifths that must be."""

SETS: dict[str, WorldSet] = {
    "CAP32": WorldSet(
        title="one object and its caption, 8 styles, chalk rare, 10 combinations held out before test",
        says="caption",
        parts={
            "train": WorldPart(num=20_000, recipe=PRETRAIN),
            "val": WorldPart(num=1_000, recipe=PRETRAIN),
            "test": WorldPart(num=800, recipe=SceneRecipe(), each_style=True, balance="names"),
        },
    ),
    "CAP16": WorldSet(
        title="one object and its caption, 16 px, three styles",
        says="caption",
        parts={
            name: WorldPart(num=num, recipe=SceneRecipe(size_px=16, styles=SMALL_STYLES))
            for name, num in (("train", 12_000), ("val", 1_000))
        },
    ),
    "SRC-A": _source("caption source: clean, flat and stripe", 0, SceneRecipe(styles=("flat", "stripe"))),
    "SRC-B": _source(
        "caption source: every style, 35 % of the captions wrong",
        1,
        SceneRecipe(),
        CaptionRecipe(wrong_share=0.35),
    ),
    "SRC-C": _source(
        "caption source: sketch and neon, short captions",
        2,
        SceneRecipe(styles=("sketch", "neon")),
        CaptionRecipe(short=True),
    ),
    "SRC-D": _source(
        "caption source: flat and pastel, long captions, skewed shapes",
        3,
        SceneRecipe(styles=("flat", "pastel"), skew=1.0),
        CaptionRecipe(long=True),
    ),
    "NAME32": _each_style(
        _classes("80 colour-shape names", "name", "names", SceneRecipe(), train=1_280, val=320, test=800)
    ),
    "DOM32": _each_style(
        _classes("10 shapes in 8 domains", "shape", "shapes", SceneRecipe(), train=1_000, val=30, test=500)
    ),
    "OOD32": WorldSet(
        title="6 shapes, each tied to a style in 80 % of the training rows, to none in test, and never with it in removed",
        says="shape",
        parts={
            "train": WorldPart(num=6_000, recipe=SPURIOUS, balance="shapes"),
            "val": WorldPart(num=600, recipe=SPURIOUS, balance="shapes"),
            "test": WorldPart(num=1_200, recipe=SIX, balance="shapes"),
            "removed": WorldPart(num=1_200, recipe=REMOVED, balance="shapes"),
        },
    ),
    "OOD32-TURNED": WorldSet(
        title="as OOD32, with every shape tied to the next style in val and test",
        says="shape",
        parts={
            "train": WorldPart(num=6_000, recipe=SPURIOUS, balance="shapes"),
            "val": WorldPart(num=600, recipe=TURNED, balance="shapes"),
            "test": WorldPart(num=1_200, recipe=TURNED, balance="shapes"),
        },
    ),
    "SSL32": _each_style(
        _classes(
            "20 classes: 10 shapes, filled or outlined, with noise; few labelled rows",
            "fill", "shapes", SSL, train=100, unlabelled=3_000, test=1_000,
        )
    ),
    "CLS16": _classes(
        "10 shapes, 16 px, flat", "shape", "shapes", GREYISH, train=6_000, val=1_000, test=2_000
    ),
    "CLS16-POOLS": _classes(
        "as CLS16, in pools that share no picture", "shape", "shapes", GREYISH,
        teacher=6_000, student=6_000, forget=1_000, val=1_000, certify=1_000, test=2_000,
    ),
    "QA32": _classes(
        "2 to 4 objects, a question and its answer", "question", "", SCENES32,
        train=13_000, val=500, test=1_000,
    ),
    "DIAL": _classes(
        "2 to 4 objects, five rounds of questions with 20 candidates", "dialogue", "", SCENES32,
        train=4_000, val=300, test=500,
    ),
    "DECEIVE": WorldSet(
        title="questions in six categories, a quarter of them (in test 150 of 250) on a false premise, which the answer corrects",
        says="premise",
        parts={
            "train": WorldPart(num=4_000, recipe=ASKED32, turns=FEW_FALSE),
            "test": WorldPart(num=250, recipe=ASKED32, turns=MOST_FALSE),
        },
    ),
    "POLICY": WorldSet(
        title="signs and questions; beside a hazard sign no use is told. Test: 60 harmless, 40 forbidden",
        says="policy",
        parts={
            "train": WorldPart(num=4_000, recipe=ASKED32, turns=BALANCED),
            "shortcut": WorldPart(num=4_000, recipe=ASKED32, turns=SHORTCUT),
            "test": WorldPart(num=100, recipe=ASKED32, turns=TRIGGERS),
        },
    ),
    "SR64": _classes(
        "2 to 4 objects, 64 px, everything striped or checked", "caption", "", TEXTURED64, train=600, test=40
    ),
    "AV": _classes(
        "10 shapes in 8 styles, with a map of tones as a second, easier modality", "tones", "shapes",
        SceneRecipe(), train=4_000, test=1_000,
    ),
}  # fmt: skip


def load_set(fields: list[str], limit: int | None = None) -> dict[str, tuple[Record, ...]]:
    """The parts of a set: `[SET]`, then in any order a style that it is narrowed to, `grey`, and one part.

    `limit` is the records of each part, from its beginning; no more than these are drawn.
    Raises ConfigError for unknown names.
    """
    name, *rest = fields
    if name not in SETS:
        raise ConfigError(f"The caption world has no set {name!r}", cure=nearest(name, SETS))
    world, grey, part = SETS[name], False, ""
    for word in rest:
        if word in world.parts:
            part = word
        elif word == "grey":
            grey = True
        else:
            world = _narrowed(name, world, word)
    wanted = [part] if part else list(world.parts)
    return {each: tuple(part_records(world, each, limit, grey=grey)) for each in wanted}


def _narrowed(name: str, world: WorldSet, style: str) -> WorldSet:
    styles = next(iter(world.parts.values())).recipe.styles
    if style not in styles:
        raise ConfigError(
            f"{name} has neither a part nor a style {style!r}",
            cure=nearest(style, [*world.parts, *styles, "grey"]),
        )
    parts = {
        part: dataclasses.replace(
            it, recipe=dataclasses.replace(it.recipe, styles=(style,), style_weights=())
        )
        for part, it in world.parts.items()
    }
    return dataclasses.replace(world, parts=parts)


def part_scenes(part: WorldPart, name: str, limit: int | None = None) -> list[Scene]:
    """The scenes of a part, from its beginning."""
    num = part.size if limit is None else min(limit, part.size)
    places = np.arange(num)
    seeds = PART_SEEDS[name] + part.first + places
    each = len(part.recipe.styles) if part.each_style else 1
    styles = [part.recipe.styles[at % each] for at in places] if part.each_style else None
    return draw_scenes(part.recipe, seeds, styles=styles, pairs=_pairs(part, seeds, places // each))


def _pairs(part: WorldPart, seeds: np.ndarray, turns: np.ndarray) -> list[tuple[int, int]] | None:
    """The first object of each scene where shapes or names take turns."""
    if not part.balance:
        return None
    pairs = all_pairs(part.recipe)
    if part.balance == "names":
        return [pairs[turn % len(pairs)] for turn in turns]
    shapes = [SHAPES.index(shape) for shape in part.recipe.shapes]
    picks = uniform(seeds, 1, BALANCE_STREAM)[:, 0]
    of_shape = {shape: [pair for pair in pairs if pair[0] == shape] for shape in shapes}
    chosen = [of_shape[shapes[turn % len(shapes)]] for turn in turns]
    return [some[int(pick * len(some))] for some, pick in zip(chosen, picks, strict=True)]


def part_records(
    world: WorldSet, name: str, limit: int | None = None, *, grey: bool = False
) -> Iterator[Record]:
    """The records of a part, from its beginning; `grey` gives pictures of one channel."""
    part = world.parts[name]
    scenes = part_scenes(part, name, limit)
    others: list[Scene] = []
    if part.captions.wrong_share:
        others = draw_scenes(part.recipe, [scene.noise_seed + OTHER_SEEDS for scene in scenes])
    turns = [part.turns[place % len(part.turns)] for place in range(len(scenes))] if part.turns else []
    return RECORDS[world.says](Drawn(name, scenes, part.captions, others, turns, grey))
