"""`world:diffusion` and `world:classes`: a few steps of training, and a folder that draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from temper.data.worlds.captions.sets import SETS, part_scenes
from temper.data.worlds.captions.words import SHAPES, STYLE_PHRASES
from temper.ops import world_models
from temper.ops.world_models import clip, diffusion
from temper.ops.world_models.attributes import Seen
from temper.systems.diffusion import Diffusion, load_diffusion
from temper.systems.image_classifier import ImageClassifier
from temper.systems.loading import load_base
from temper.systems.wanted import Wanted

SHORT = {"steps": 2, "batch": 4, "num_pictures": 20}


def test_classes_are_the_shapes_and_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "CLASSES", {**diffusion.CLASSES, **SHORT})
    diffusion.MODELS["classes"].train(tmp_path)
    system = load_diffusion(str(tmp_path), Wanted())
    assert (system.labels, system.shape, system.has_null) == (SHAPES, (3, 16, 16), True)
    assert system.draw_pixels(system.conditions(["star"]), num_steps=2, guidance=2.0).shape == (1, 3, 16, 16)


def test_texts_are_read_by_the_text_tower_of_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dual = clip.build_clip(clip.PARAMETERS)
    monkeypatch.setattr(diffusion, "load_dual_encoder", lambda name, wanted: dual)
    monkeypatch.setattr(diffusion, "TEXTS", {**diffusion.TEXTS, **SHORT})
    diffusion.MODELS["diffusion"].train(tmp_path)
    system = load_diffusion(str(tmp_path), Wanted())
    assert (system.takes_text, system.max_tokens) == (True, diffusion.TEXTS["max_tokens"])
    ids_BT = system.ids(["a red circle"])
    theirs = dual.model.text_model(input_ids=ids_BT).last_hidden_state
    assert torch.allclose(system.conditions(["a red circle"]).values, theirs, atol=1e-5)
    assert system.draw(system.conditions(["a red circle"]), num_steps=2)[0].array().shape == (16, 16, 3)


def test_training_again_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {**diffusion.CLASSES, **SHORT}
    found = []
    for _ in range(2):
        system = diffusion.build_classes(parameters)
        pixels_NCHW = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        diffusion.train_denoiser(system, pixels_NCHW, system.conditions([*range(8)]), parameters)
        found.append(system.fingerprint)
    assert found[0] == found[1]


def test_rates_are_what_the_judge_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that sees a star everywhere, and one that reads every scene but the shape of the first."""
    judge, system = load_base("tiny:resnet"), load_diffusion("tiny:unet", Wanted())
    asked: list[str] = []
    monkeypatch.setattr(Diffusion, "conditions", lambda self, texts: asked.extend(texts))
    monkeypatch.setattr(Diffusion, "draw_pixels", lambda self, *settings: torch.zeros(1))
    monkeypatch.setattr(diffusion, "read_attributes", lambda *both: Seen({"shape": ["star"] * 20}, {}))
    found = diffusion.judged_classes(system, judge, num_each=2)
    assert found == {shape: float(shape == "star") for shape in SHAPES}
    scenes = part_scenes(SETS["CAP16"].parts["val"], "val", 4)
    names = {
        "shape": ["?", *(scene.things[0].shape for scene in scenes[1:])],
        "colour": [scene.things[0].colour for scene in scenes],
        "style": [scene.style for scene in scenes],
    }
    monkeypatch.setattr(diffusion, "read_attributes", lambda *both: Seen(names, {}))
    asked.clear()
    assert diffusion.judged_texts(system, judge, 4) == {"shape": 0.75, "colour": 1.0, "style": 1.0}
    for scene, text in zip(scenes, asked, strict=True):
        assert text.startswith(STYLE_PHRASES[scene.style]), (
            "a caption that names no style cannot be judged by it"
        )


def test_parameters_are_told_apart() -> None:
    assert dict(diffusion.MODELS["diffusion"].parameters) != dict(diffusion.MODELS["classes"].parameters)
    assert diffusion.MODELS["diffusion"].needs == ("clip",)


def judged(name: str) -> tuple[Diffusion, ImageClassifier]:
    """A model and its judge; trains them where they are not there."""
    for each in (name, "attributes"):
        world_models.ensure(each)
    system, judge = load_base(f"world:{name}"), load_base("world:attributes")
    assert isinstance(system, Diffusion)
    assert isinstance(judge, ImageClassifier)
    return system, judge


@pytest.mark.slow
def test_captions_are_drawn_as_well_as_it_is_said() -> None:
    """What the judge reads in drawings after captions that name shape, colour and style."""
    found = diffusion.judged_texts(*judged("diffusion"))
    assert all(found[name] >= least for name, least in diffusion.QUALITY.items()), found


@pytest.mark.slow
def test_classes_are_drawn_as_well_as_it_is_said() -> None:
    found = diffusion.judged_classes(*judged("classes"), num_each=20)
    assert sum(found.values()) / len(found) >= diffusion.CLASS_QUALITY, found
