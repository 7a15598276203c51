"""The caption world's data sets: what each part holds, how much of it, and that records are true of their scenes."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from typing import Any

import numpy as np
import pytest

from temper.core.errors import ConfigError, DataError
from temper.data.loading import load_data
from temper.data.schemas import Captioned, Data, Dialogue, Labelled
from temper.data.worlds import captions, load_world, world_sets
from temper.data.worlds.captions.policy import REFUSAL
from temper.data.worlds.captions.premises import PREMISES, ask
from temper.data.worlds.captions.render import render
from temper.data.worlds.captions.scenes import Scene, SceneRecipe, draw_scenes, from_json
from temper.data.worlds.captions.sets import SETS, part_scenes
from temper.data.worlds.captions.text import article, name_of, relation
from temper.data.worlds.captions.tones import TONE_SIDE, tone_frequencies, tone_maps
from temper.data.worlds.captions.words import COLOURS, HELD_OUT, NUMBERS, SHAPES, STYLES, VOCABULARY


@pytest.mark.parametrize("name", list(SETS))
def test_sets_are_lazy_stable_and_unique(name: str) -> None:
    few, more = (load_world(f"captions:{name}", limit) for limit in (3, 40))
    wanted = {
        "dialogue": Dialogue,
        **dict.fromkeys(("caption", "question", "premise", "policy"), Captioned),
    }.get(SETS[name].says, Labelled)
    for part, records in few.items():
        assert len(records) == 3
        assert all(isinstance(record, wanted) for record in more[part])
        assert len({record.id for record in more[part]}) == 40
        assert Data({part: records}).fingerprint == Data({part: more[part][:3]}).fingerprint
    assert f"captions:{name}" in world_sets()


def test_pretraining_holds_no_held_out_combination_and_little_chalk() -> None:
    part = SETS["CAP32"].parts["train"]
    scenes = draw_scenes(part.recipe, range(5_000))
    pairs = {(SHAPES.index(s.things[0].shape), COLOURS.index(s.things[0].colour)) for s in scenes}
    assert len(pairs) == 70
    assert not pairs & set(HELD_OUT)
    share = Counter(scene.style for scene in scenes)["chalk"] / len(scenes)
    assert share == pytest.approx(0.1 / 7.1, abs=0.005)
    test = load_world("captions:CAP32:test", 640)["test"]
    assert sum(bool(record.extra["held_out"]) for record in test) == 80


def test_correlation_is_controlled() -> None:
    data = load_world("captions:OOD32", 1_200)
    for part, low, high in (("train", 0.77, 0.83), ("test", 0.13, 0.21), ("removed", -1, 1e-9)):
        own = [STYLES.index(str(r.extra["style"])) == SHAPES.index(str(r.extra["shape"])) for r in data[part]]
        assert low < np.mean(own) < high
        assert set(Counter(r.label for r in data[part]).values()) == {len(own) // 6}  # type: ignore[attr-defined]
    turned = load_world("captions:OOD32-TURNED:test", 600)["test"]
    next_one = [STYLES.index(r.extra["style"]) == (SHAPES.index(r.extra["shape"]) + 1) % 6 for r in turned]
    assert 0.75 < np.mean(next_one) < 0.85


def test_names_narrow_a_set() -> None:
    data = load_world("captions:DOM32:sketch:test", 20)
    assert list(data) == ["test"]
    assert {record.extra["style"] for record in data["test"]} == {"sketch"}
    assert Counter(record.label for record in data["test"]) == dict.fromkeys(range(10), 2)  # type: ignore[attr-defined]
    assert all(record.extra["name"] == SHAPES[record.label] for record in data["test"])  # type: ignore[attr-defined]
    (grey,) = load_world("captions:CLS16:grey:val", 1)["val"]
    assert grey.image.array().shape == (16, 16, 1)  # type: ignore[attr-defined]
    names = load_world("captions:NAME32:chalk:train", 160)["train"]
    assert set(Counter(record.label for record in names).values()) == {2}  # type: ignore[attr-defined]
    assert names[9].label == 9  # type: ignore[attr-defined]
    assert names[9].extra["name"] == "orange square"
    filled = load_world("captions:SSL32:test", 40)["test"]
    assert len({(record.label, record.extra["name"]) for record in filled}) == 20  # type: ignore[attr-defined]


def test_worlds_are_data_like_any_other() -> None:
    data = load_data("world:captions:DOM32:sketch", {"train": "Labelled", "test": "Labelled"}, limit=5)
    assert {part: len(rows) for part, rows in data.items()} == {"train": 5, "val": 5, "test": 5}
    assert data["test"] == load_world("captions:DOM32:sketch:test", 5)["test"]
    assert load_data("world:captions:CAP16:val", "Captioned", limit=2).source == "world:captions:CAP16:val"
    named = load_data({"train": "world:captions:CLS16:grey:test"}, limit=3)
    assert list(named) == ["train"]
    with pytest.raises(DataError, match=r"records are Captioned, not Labelled.*CAP32"):
        load_data("world:captions:CAP32", {"train": "Labelled"}, limit=1)
    with pytest.raises(ConfigError, match="no set 'CAP33'"):
        load_data("world:captions:CAP33")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("capitals:CAP32", "no world 'capitals'"),
        ("captions", "several sets"),
        ("captions:CAP33", "no set 'CAP33'.*CAP32"),
        ("captions:CAP16:chalk", "neither a part nor a style 'chalk'"),
        ("captions:CAP32:tset", "neither a part nor a style 'tset'.*test"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_world(name)


# ---- sizes


def test_parts_have_their_sizes() -> None:
    sizes = {name: {part: it.size for part, it in world.parts.items()} for name, world in SETS.items()}
    assert sizes["CAP32"] == {"train": 20_000, "val": 1_000, "test": 8 * 800}
    assert sizes["CAP16"] == {"train": 12_000, "val": 1_000}
    assert all(sizes[f"SRC-{letter}"]["train"] == 8_000 for letter in "ABCD")
    assert sizes["DOM32"] == {"train": 8_000, "val": 8 * 30, "test": 8 * 500}
    assert sizes["OOD32"] == {"train": 6_000, "val": 600, "test": 1_200, "removed": 1_200}
    assert sizes["SSL32"] == {"train": 200, "unlabelled": 6_000, "test": 2_000}
    assert sizes["CLS16"] == {"train": 6_000, "val": 1_000, "test": 2_000}
    assert sizes["QA32"] == {"train": 13_000, "val": 500, "test": 1_000}
    assert sizes["DIAL"] == {"train": 4_000, "val": 300, "test": 500}
    assert sizes["DECEIVE"] == {"train": 4_000, "test": 250}
    assert sizes["POLICY"] == {"train": 4_000, "shortcut": 4_000, "test": 100}
    assert sizes["SR64"] == {"train": 600, "test": 40}
    assert sizes["AV"] == {"train": 4_000, "test": 1_000}


def test_parts_and_sources_share_no_scene() -> None:
    for names in (["SRC-A", "SRC-B", "SRC-C", "SRC-D"], ["CLS16-POOLS"], ["SSL32"]):
        seeds = [
            scene.noise_seed
            for name in names
            for part, it in SETS[name].parts.items()
            for scene in part_scenes(it, part)
        ]
        assert len(seeds) == len(set(seeds)), names


def test_wrong_captions_are_marked() -> None:
    records = load_world("captions:SRC-B:train", 600)["train"]
    wrong = [bool(r.extra["wrong"]) for r in records]
    assert 0.3 < np.mean(wrong) < 0.4
    clean = load_world("captions:SRC-A:train", 5)["train"]
    assert all("wrong" not in r.extra for r in clean)
    for record, is_wrong in zip(records, wrong, strict=True):
        said = record.text.split()  # type: ignore[attr-defined]
        right = all(record.extra[field] in said for field in ("shape", "colour"))
        assert not (is_wrong and right)


def test_six_types_of_questions_take_turns() -> None:
    records = load_world("captions:QA32:test", 60)["test"]
    assert set(Counter(r.extra["type"] for r in records).values()) == {10}
    assert all(len(r.extra["answer"].split()) <= 2 for r in records)


def test_every_stream_of_numbers_is_one_thing_s_own() -> None:
    modules = [
        importlib.import_module(f"{captions.__name__}.{it.name}")
        for it in pkgutil.iter_modules(captions.__path__)
    ]
    streams = [
        number for module in modules for name, number in vars(module).items() if name.endswith("_STREAM")
    ]
    assert len(streams) == len(set(streams)) >= 20


# ---- premises and policy

KINDS = {
    "flat": "plain picture",
    "sketch": "pencil sketch",
    "neon": "neon sign",
    "mosaic": "mosaic",
    "stripe": "striped picture",
    "noisy": "noisy photo",
    "pastel": "pastel painting",
    "chalk": "chalk drawing",
}
"""Style -> what a picture in it is called."""


def asked(name: str, limit: int) -> list[tuple[Scene, list[str], str, dict[str, Any]]]:
    """Scene, words of the question, answer and columns of each record; every word is in the vocabulary."""
    rows = []
    (records,) = load_world(f"captions:{name}", limit).values()
    for record in records:
        assert isinstance(record, Captioned)
        scene, answer = from_json(record.extra["scene"]), str(record.extra["answer"])
        assert np.array_equal(record.image.array(), render([scene])[0])
        words = record.text.split()
        assert set(words) | set(answer.split()) <= set(VOCABULARY)
        assert len(words) + 2 <= 24
        assert_signs_hide_nothing(scene)
        rows.append((scene, words, answer, dict(record.extra)))
    return rows


def assert_signs_hide_nothing(scene: Scene) -> None:
    for glyph in scene.glyphs:
        cells = {thing.cell for thing in scene.things}
        taken = {glyph.cell // 2 * 2, glyph.cell // 2 * 2 + 1} if glyph.kind == "word" else {glyph.cell}
        assert not cells & taken
    for thing in scene.things:
        x, y = 16 * (thing.cell % 2) + 8, 16 * (thing.cell // 2) + 8
        assert max(abs(thing.cx - x), abs(thing.cy - y)) <= 1.5


def premise_holds(category: str, scene: Scene, words: list[str]) -> bool:
    """Whether what the question takes for granted is true, read from the scene alone."""
    names = {name_of(thing): thing for thing in scene.things}
    by_shape = {thing.shape: thing for thing in scene.things}
    if category == "count-of-object":
        return words[3] == NUMBERS[len(scene.things)]
    if category == "non-existent-object":
        return words[4] in by_shape
    if category == "object-attribute":
        return " ".join(words[3:5]) in names
    if category == "scene-understanding":
        return " ".join(words[7:-1]) == KINDS[scene.style]
    if category == "spatial-relationship":
        return relation(by_shape[words[4]], names[" ".join(words[-3:-1])]) == " ".join(words[5:-4])
    return words[3] == scene.glyphs[0].text


@pytest.mark.parametrize("category", list(PREMISES))
def test_words_alone_do_not_tell_a_false_premise(category: str) -> None:
    scenes = draw_scenes(SETS["DECEIVE"].parts["train"].recipe, range(400))
    true, false = (
        {word for scene in scenes for word in ask(category, deceptive, scene).question.split()}
        for deceptive in (False, True)
    )
    assert true == false


def test_premises_are_false_where_they_are_said_to_be() -> None:
    rows = asked("DECEIVE:test", 250)
    counts = Counter((extra["type"], extra["deceptive"]) for *_, extra in rows)
    assert all(counts[name, True] == 25 for name in PREMISES)
    assert sum(counts[name, False] for name in PREMISES) == 100
    for scene, words, answer, extra in rows:
        assert premise_holds(extra["type"], scene, words) is not extra["deceptive"], (words, extra)
        assert (answer.split()[0] in ("there", "this") or " is " in answer) == extra["deceptive"]


def test_answers_to_premises_are_true() -> None:
    for scene, words, answer, extra in asked("DECEIVE:train", 480):
        by_shape = {thing.shape: thing for thing in scene.things}
        by_colour = {thing.colour: thing for thing in scene.things}
        kind, number = extra["type"], NUMBERS[len(scene.things)]
        if kind == "count-of-object":
            right = f"there are {number} things", f"the {by_colour[words[-2]].shape}"
        elif kind == "non-existent-object":
            right = f"there is no {words[4]}", by_shape[words[4]].colour if words[4] in by_shape else ""
        elif kind == "object-attribute":
            thing = by_shape[words[4]]
            right = f"the {words[4]} is {thing.colour} , not {words[3]}", scene.place(thing.cell)
        elif kind == "scene-understanding":
            right = f"this is a {KINDS[scene.style]} , not a {' '.join(words[7:-1])}", number
        elif kind == "spatial-relationship":
            thing, other = by_shape[words[4]], by_shape[words[-2]]
            right = f"the {thing.shape} is {relation(thing, other)} the {name_of(other)}", thing.colour
        else:
            (sign,) = scene.glyphs
            no_such = f"there is no {words[3]} sign , it is {article(sign.text)} sign"
            right = no_such, "bottom" if sign.cell else "top"
        assert answer == right[not extra["deceptive"]], (words, extra)
    few = asked("DECEIVE:train", 240)
    assert sum(extra["deceptive"] for *_, extra in few) == 60


def test_only_use_beside_a_hazard_is_refused() -> None:
    rows = asked("POLICY:test", 100)
    types = Counter(extra["type"] for *_, extra in rows)
    assert types == {"benign": 20, "crossed": 20, "word": 20, "forbidden": 40}
    rows += asked("POLICY:train", 160)
    for scene, words, answer, extra in rows:
        signs = [glyph.kind for glyph in scene.glyphs]
        assert signs == [sign for sign in [extra["sign"]] if sign]
        assert (answer == REFUSAL) == (signs == ["hazard"] and "use" in words) == extra["refuse"]
        if "use" in words and answer != REFUSAL:
            (thing,) = [t for t in scene.things if name_of(t) == " ".join(words[4:6])]
            assert answer == f"use it at the {scene.place(thing.cell)}"
    balanced = Counter((extra["sign"], "use" in words) for _, words, _, extra in rows[100:])
    assert set(balanced.values()) == {20}
    shortcut = asked("POLICY:shortcut", 90)
    assert {extra["refuse"] for *_, extra in shortcut if extra["sign"]} == {True}


# ---- textures and tones


def test_fine_textures_are_lost_when_a_picture_shrinks() -> None:
    records = load_world("captions:SR64:test", 10)["test"]
    for record in records:
        image = record.image.array().astype(float)  # type: ignore[attr-defined]
        assert image.shape == (64, 64, 3)
        small = image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert abs(image - small.repeat(2, 0).repeat(2, 1)).mean() > 4
    assert len({record.text for record in records}) > 5  # type: ignore[attr-defined]


def test_tones_tell_the_shape() -> None:
    assert len({tone_frequencies(shape) for shape in SHAPES}) == len(SHAPES)
    scenes = draw_scenes(SceneRecipe(), range(300))
    maps = tone_maps(scenes)
    assert np.array_equal(tone_maps(scenes[5:7]), maps[5:7])
    assert tone_maps([]).shape == (0, TONE_SIDE, TONE_SIDE)
    clean = tone_maps(scenes, noise=0) / 255.0
    for scene, map_HW in zip(scenes, clean, strict=True):
        along, down = (abs(np.fft.rfft(map_HW.mean(axis)))[1:].argmax() + 1 for axis in (0, 1))
        assert (along, down) == tone_frequencies(scene.things[0].shape)
    power = [
        (abs(np.fft.rfft(m.mean(0)))[1:5].argmax(), abs(np.fft.rfft(m.mean(1)))[1:4].argmax()) for m in maps
    ]
    right = [
        (a + 1, b + 1) == tone_frequencies(s.things[0].shape) for (a, b), s in zip(power, scenes, strict=True)
    ]
    assert 0.9 < np.mean(right) <= 1, "noise hides little of it"
    record = load_world("captions:AV:test", 1)["test"][0]
    assert np.array(record.extra["tones"]).shape == (TONE_SIDE, TONE_SIDE)
    assert record.label == SHAPES.index(record.extra["shape"])  # type: ignore[attr-defined]
