"""`world:diffusion` and `world:classes`: a few steps of training, and a folder that draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from temper.data.worlds.captions.words import SHAPES
from temper.ops.world_models import clip, diffusion
from temper.systems.diffusion import load_diffusion
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


def test_parameters_are_told_apart() -> None:
    assert dict(diffusion.MODELS["diffusion"].parameters) != dict(diffusion.MODELS["classes"].parameters)
    assert diffusion.MODELS["diffusion"].needs == ("clip",)
