"""The caption world: pictures, captions, questions, graphs and dialogues agree with the scene they come from."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from temper.core.errors import ConfigError, DataError
from temper.data.worlds import load_world
from temper.data.worlds.captions.dialogues import NUM_CANDIDATES, rounds_of, visdial_json
from temper.data.worlds.captions.graphs import NODE_FEATURES, graph_json, scene_graph, triples
from temper.data.worlds.captions.noise import normal, uniform
from temper.data.worlds.captions.questions import QUESTION_TYPES, questions_of
from temper.data.worlds.captions.render import render
from temper.data.worlds.captions.scenes import (
    Glyph,
    Scene,
    SceneRecipe,
    Texture,
    Thing,
    draw_scenes,
    from_json,
    to_json,
)
from temper.data.worlds.captions.text import CaptionRecipe, captions, wrong_captions
from temper.data.worlds.captions.words import COLOURS, RGB, SHAPES, STYLES, SYNONYMS, VOCABULARY

GRID = SceneRecipe(layout="scene")


def scene_of(*things: tuple[str, str, int], style: str = "flat", **changes: object) -> Scene:
    """A 32 px scene on a 2 x 2 grid."""
    centre = {0: (8, 8), 1: (24, 8), 2: (8, 24), 3: (24, 24)}
    made = tuple(
        Thing(shape, colour, RGB[COLOURS.index(colour)], cell, *centre[cell], 6, 0)
        for shape, colour, cell in things
    )
    return Scene("s", 32, style, (0.93, 0.93, 0.93), made, 5, grid=2, **changes)  # type: ignore[arg-type]


# ---- random numbers and scenes


def test_numbers_depend_on_seed_stream_and_index_alone() -> None:
    seeds = np.arange(2_000)
    many = uniform(seeds, 8, 1)
    assert np.array_equal(many[7:9], uniform(seeds[7:9], 8, 1))
    assert np.array_equal(many[:, :3], uniform(seeds, 3, 1))
    assert not np.allclose(many, uniform(seeds, 8, 2))
    assert many.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.06
    drawn = normal(seeds, 9, 3)
    assert drawn.mean() == pytest.approx(0, abs=0.02)
    assert drawn.std() == pytest.approx(1, abs=0.02)


def test_a_scene_is_the_same_alone_and_among_others() -> None:
    many = draw_scenes(GRID, range(60))
    assert draw_scenes(GRID, [41]) == [many[41]]
    assert np.array_equal(render(many)[41], render([many[41]])[0])
    assert {len(scene.things) for scene in many} == {2, 3, 4}
    assert all(len({t.cell for t in scene.things}) == len(scene.things) for scene in many)


def test_a_scene_survives_json() -> None:
    scene = scene_of(("star", "red", 0), glyphs=(Glyph("word", 3, "stop"),))
    drawn = draw_scenes(GRID, [3])[0]
    textured = draw_scenes(dataclasses.replace(GRID, size_px=64, textured=True), [3])[0]
    assert "textures" not in to_json(drawn)
    assert len(textured.textures) == 1 + len(textured.things)
    for each in (scene, drawn, textured):
        assert from_json(json.loads(json.dumps(to_json(each)))) == each
        assert json.loads(json.dumps(to_json(each))) == to_json(each)


def test_pixels_are_pinned() -> None:
    """The same pictures on every machine; a change here changes every result that rests on this world."""
    pixels = render(draw_scenes(SceneRecipe(styles=("flat",)), range(4)))
    assert pixels.shape == (4, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, 0, 0].tolist() == PINNED_CORNERS


PINNED_CORNERS = [[236, 248, 235], [249, 235, 240], [245, 229, 244], [230, 228, 224]]


@pytest.mark.parametrize("style", STYLES)
def test_every_style_shows_the_object(style: str) -> None:
    (scene,) = draw_scenes(SceneRecipe(), [11], styles=[style], pairs=[(SHAPES.index("square"), 0)])
    image = render([scene])[0].astype(float) / 255
    ground = np.array(scene.background_rgb)
    thing = scene.things[0]
    yy, xx = np.mgrid[:32, :32] + 0.5
    near = (abs(xx - thing.cx) < 0.85 * thing.r) & (abs(yy - thing.cy) < 0.85 * thing.r)
    inside, outside = (image[mask] - ground for mask in (near, ~near))
    assert abs(inside).mean() > 2 * abs(outside).mean() or style == "noisy"
    assert (inside.mean(0) - outside.mean(0)).argmax() == 0, "red stands out in red"


def test_shapes_have_their_areas() -> None:
    """A disc of radius 0.85 r, a square of side 1.5 r, and a bar, in pixels of coverage."""
    areas = {"circle": np.pi * 0.85**2, "square": 2.25, "bar": 1.9 * 0.64, "triangle": 0.5 * 1.8 * 1.7}
    for shape, area in areas.items():
        thing = Thing(shape, "red", (0.0, 0.0, 0.0), 0, 16, 16, 9, 0.1)
        scene = Scene("s", 32, "flat", (1.0, 1.0, 1.0), (thing,), 0)
        covered = (255 - render([scene])[0].astype(float)).mean(-1).sum() / 255
        assert covered == pytest.approx(area * 81, rel=0.02), shape


def test_sizes_are_not_mixed() -> None:
    pair = [*draw_scenes(SceneRecipe(), [0]), *draw_scenes(SceneRecipe(size_px=16), [0])]
    with pytest.raises(ConfigError, match="several sizes"):
        render(pair)
    assert render([]).shape == (0, 0, 0, 3)
    assert draw_scenes(SceneRecipe(), []) == []


def test_textures_darken_half_of_what_they_cover() -> None:
    """Upright stripes of 8 px: four columns keep their colour, four keep a half of it; a check turns every other row."""
    for kind in ("stripe", "check"):
        texture = Texture(kind, 8.0, 0.0, 0.5)  # type: ignore[arg-type]
        scene = Scene("s", 32, "flat", (0.8, 0.8, 0.8), (), 0, textures=(texture,))
        image = render([scene])[0, :, :, 0].astype(int)
        bands = [102] * 4 + [204] * 4
        assert image[0, :8].tolist() == (bands if kind == "stripe" else bands[::-1])
        assert (image[:4] == image[0]).all()
        assert (image[4] == image[0]).all() == (kind == "stripe")
        assert image.mean() == pytest.approx(0.75 * 204, abs=1)
    thing = Thing("square", "red", (1.0, 0.0, 0.0), 0, 16, 16, 12, 0)
    covered = (Texture("stripe", 8.0, 0.0, 1.0), Texture("stripe", 8.0, 0.0, 0.5))
    image = render([Scene("s", 32, "flat", (0.8, 0.8, 0.8), (thing,), 0, textures=covered)])[0]
    assert {tuple(pixel) for pixel in image[16, 8:24].tolist()} == {(255, 0, 0), (128, 0, 0)}
    assert (image[0] == 204).all(), "a shade of 1 darkens nothing"


def test_distinct_things_share_neither_shape_nor_colour() -> None:
    scenes = draw_scenes(SceneRecipe(layout="scene", distinct=True), range(400))
    for scene in scenes:
        assert (
            len({t.shape for t in scene.things}) == len({t.colour for t in scene.things}) == len(scene.things)
        )
    pairs = {(t.shape, t.colour) for scene in scenes for t in scene.things}
    assert len(pairs) == 80, "every combination comes"


def test_glyphs_are_drawn() -> None:
    plain = scene_of(("circle", "blue", 3))
    for glyph in (Glyph("hazard", 0), Glyph("crossed", 0), Glyph("word", 0, "sale")):
        changed = render([scene_of(("circle", "blue", 3), glyphs=(glyph,))])[0]
        differs = (changed != render([plain])[0]).any(-1)
        assert differs[:16].sum() > 40
        assert not differs[17:].any()
    with pytest.raises(DataError, match=r"sign 'quit' cannot be drawn.*scene s"):
        render([scene_of(("circle", "blue", 3), glyphs=(Glyph("word", 0, "quit"),))])


# ---- words


def test_captions_say_what_is_there() -> None:
    scenes = draw_scenes(SceneRecipe(), range(300))
    for scene, text in zip(scenes, captions(scenes, CaptionRecipe()), strict=True):
        thing = scene.things[0]
        for word in (thing.shape, thing.colour):
            assert {word, *SYNONYMS[word]} & set(text.split()), text
        assert set(text.split()) <= set(VOCABULARY)
    assert captions(scenes)[7] == captions([scenes[7]])[0]
    assert captions([scene_of(("star", "red", 0))]) == ["a photo of a red star"]
    assert captions(
        [scene_of(("star", "orange", 0))], CaptionRecipe(short=True, second_share=0, third_share=0)
    ) == ["an orange star"]


def test_words_are_replaced_as_often_as_asked() -> None:
    scenes = draw_scenes(SceneRecipe(), range(12_000))
    words = [word for text in captions(scenes, CaptionRecipe(style_share=0)) for word in text.split()]
    found = Counter(words)
    seconds, thirds = (sum(found[pair[at]] for pair in SYNONYMS.values()) for at in (0, 1))
    assert seconds / 24_000 == pytest.approx(0.15, abs=0.01)
    assert thirds / 24_000 == pytest.approx(0.01, abs=0.003)
    sized = (found["small"] + found["large"]) / 12_000
    assert sized == pytest.approx(0.5 * 2 / 3, abs=0.02), "half of the small and the large ones"


def test_wrong_captions_come_as_often_as_asked() -> None:
    scenes, others = (
        draw_scenes(SceneRecipe(), range(2_000)),
        draw_scenes(SceneRecipe(), range(9_000, 11_000)),
    )
    recipe = CaptionRecipe(wrong_share=0.35)
    wrong = wrong_captions(scenes, others, recipe)
    assert np.mean(wrong) == pytest.approx(0.35 * 79 / 80, abs=0.03)
    assert wrong_captions(scenes[:7], others[:7], recipe) == wrong[:7]
    assert not any(wrong_captions(scenes, scenes, recipe)), "a scene's own caption is not wrong"
    assert wrong_captions([], [], recipe) == []


def test_answers_are_true() -> None:
    scene = scene_of(("star", "red", 0), ("ring", "red", 3), ("star", "blue", 1))
    for seed in range(40):
        changed = dataclasses.replace(scene, noise_seed=seed)
        found = {question.type: question for question in questions_of(changed)}
        assert tuple(found) == QUESTION_TYPES
        assert found["count"].answer == "three"
        place = {"red star": "top left", "red ring": "bottom right", "blue star": "top right"}
        name = found["where"].question.removeprefix("where is the ").removesuffix(" ?")
        assert found["where"].answer == place[name]
        exists = found["exists"].question.split()[-3:-1]
        assert found["exists"].answer == ("yes" if " ".join(exists) in place else "no")
        word = found["count-of"].question.split()[2]
        expected = sum(word in thing for thing in place)
        assert found["count-of"].answer == ("zero", "one", "two", "three")[expected]


def test_yes_and_no_are_about_as_frequent() -> None:
    found = [questions_of(scene)[3].answer for scene in draw_scenes(GRID, range(1_000))]
    assert 0.4 < found.count("yes") / len(found) < 0.65


def test_graph_by_hand() -> None:
    scene = scene_of(("star", "red", 0), ("ring", "red", 3))
    graph = scene_graph(scene)
    assert graph.nodes_TF.shape == (2, NODE_FEATURES)
    assert graph.nodes_TF[0, SHAPES.index("star")] == 1
    edge = graph.edges_TT8[0, 1]
    assert edge.tolist() == pytest.approx([-0.5, -0.5, 0.5**0.5, 1, 1, 1, 0, 0])
    assert not graph.edges_TT8[0, 0].any()
    assert triples(scene) == [
        (0, "left of", 1),
        (0, "same_colour", 1),
        (1, "right of", 0),
        (1, "same_colour", 0),
    ]
    assert graph_json(scene)["nodes"][1] == {"shape": "ring", "colour": "red", "place": "bottom right"}
    noisy = scene_graph(scene, noise=0.3)
    assert abs(noisy.nodes_TF - graph.nodes_TF).std() > 0.1
    assert np.array_equal(noisy.nodes_TF, scene_graph(scene, noise=0.3).nodes_TF)


def test_rounds_have_true_answers_and_graded_candidates() -> None:
    for scene in draw_scenes(GRID, range(80)):
        for turn in rounds_of(scene):
            assert len(set(turn.candidates)) == NUM_CANDIDATES
            assert turn.candidates[turn.answer_index] == turn.answer
            relevant = {c for c, r in zip(turn.candidates, turn.relevance, strict=True) if r == 1}
            assert relevant == {turn.answer, *SYNONYMS.get(turn.answer, ())}
        _, about_other, about_it, *_ = rounds_of(scene)
        place = about_other.question.split(" is the ")[1].removesuffix(" thing ?")
        (other,) = [thing for thing in scene.things if scene.place(thing.cell) == place]
        assert {about_other.answer, about_it.answer} == {other.shape, other.colour}
        assert about_it.pronoun


def test_visdial_layout() -> None:
    records = load_world("captions:DIAL:val", 3)["val"]
    layout, dense = visdial_json(records, "val")  # type: ignore[arg-type]
    data = layout["data"]
    assert len(data["dialogs"]) == 3
    assert len(dense) == 15
    turn = data["dialogs"][1]["dialog"][4]
    assert data["answers"][turn["answer_options"][turn["gt_index"]]] == data["answers"][turn["answer"]]
    assert data["questions"][turn["question"]] == records[1].messages[-2].content  # type: ignore[attr-defined]
