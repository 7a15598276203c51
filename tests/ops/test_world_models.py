"""Reference models: trained once, kept by their parameters, and as good as they are said to be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from temper.core.errors import ConfigError, NeedsError
from temper.data.worlds.captions.scenes import SceneRecipe, draw_scenes
from temper.data.worlds.captions.words import STYLES
from temper.data.worlds.folders import models_home, world_folder
from temper.ops import world_models
from temper.ops.world_models import attributes, clip
from temper.ops.world_models.base import WorldModel
from temper.systems.dual_encoder import DualEncoder
from temper.systems.image_classifier import ImageClassifier
from temper.systems.loading import load_base
from temper.systems.names import WORLD_MODELS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path))
    return tmp_path


def instead(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> list[Path]:
    """Replace a model's entry; gives the list of folders that its training was called with."""
    calls: list[Path] = []
    module = {"clip": clip, "attributes": attributes}[name]

    def train(folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    entry = WorldModel(**({"parameters": {"a": 1}, "train": train} | changes))
    monkeypatch.setitem(module.MODELS, name, entry)
    return calls


def test_names_agree_with_the_systems() -> None:
    assert world_models.names() == sorted(WORLD_MODELS)
    for name in world_models.names():
        model = world_models.world_model(name)
        assert json.loads(json.dumps(dict(model.parameters))) == dict(model.parameters)
        assert model.title
    with pytest.raises(ConfigError, match="no world model 'clap'.*clip"):
        world_models.world_model("clap")


def test_a_model_is_trained_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = instead(monkeypatch, "clip")
    with pytest.raises(NeedsError, match=r"not on this machine yet.*temper fetch world:clip"):
        world_folder("clip")
    assert not world_models.is_ready("clip")
    folder = world_models.ensure("clip")
    assert world_models.ensure("clip") == folder == world_folder("clip")
    assert len(calls) == 1
    record = json.loads((folder / world_models.RECORD).read_text())
    assert record["parameters"] == {"a": 1}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "world.json"]


def test_other_parameters_are_another_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, "clip")
    first = world_models.ensure("clip")
    instead(monkeypatch, "clip", parameters={"a": 2})
    second = world_models.ensure("clip")
    assert first != second == world_folder("clip")
    instead(monkeypatch, "clip")
    assert world_models.ensure("clip") == first == world_folder("clip"), "nothing is trained again"


def test_what_a_model_needs_comes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = instead(monkeypatch, "clip")
    above = instead(monkeypatch, "attributes", needs=("clip",))
    first = world_models.ensure("attributes")
    assert len(below) == len(above) == 1
    instead(monkeypatch, "clip", parameters={"a": 2})
    assert world_models.ensure("attributes") != first, "its text tower would be another one"


def test_a_training_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("killed")

    instead(monkeypatch, "clip", train=fail)
    with pytest.raises(RuntimeError, match="killed"):
        world_models.ensure("clip")
    assert [path.name for path in models_home("clip").iterdir()] == [".lock"]


def test_fetch_trains_and_lists(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from temper.cli.fetch import register

    app = typer.Typer()
    register(app, "fetch", "")
    app.command("other")(lambda: None)
    instead(monkeypatch, "clip", title="a small one")
    done = CliRunner().invoke(app, ["fetch", "world:clip", "--json"])
    assert done.exit_code == 0, done.output
    assert "training world:clip: a small one" in done.output
    listed = CliRunner().invoke(app, ["fetch", "--list", "--json"])
    cached = {record["name"]: record["cached"] for record in json.loads(listed.stdout)}
    assert cached["world:clip"]
    assert not cached["world:attributes"]
    wrong = CliRunner().invoke(app, ["fetch", "world:clap"])
    assert isinstance(wrong.exception, ConfigError)


def test_a_short_training_gives_a_model_that_loads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((clip, "clip"), (attributes, "attributes")):
        short = {**module.PARAMETERS, "steps": 2, "batch": 8, "num_pictures": 32}
        monkeypatch.setattr(module, "PARAMETERS", short)
        monkeypatch.setitem(module.MODELS, name, dataclasses.replace(module.MODELS[name], parameters=short))
        world_models.ensure(name)
    dual = load_base("world:clip")
    assert isinstance(dual, DualEncoder)
    assert dual.shape == (3, 32, 32)
    assert dual.template == clip.PARAMETERS["template"]
    again = clip.train_clip(clip.PARAMETERS)
    texts = ["a photo of a red star"]
    assert torch.allclose(again.text_vectors(texts), dual.text_vectors(texts), atol=1e-6), (
        "seeded, and kept whole"
    )
    judge = load_base("world:attributes")
    assert isinstance(judge, ImageClassifier)
    seen = attributes.read_attributes(judge, torch.rand(2, 3, 16, 16))
    assert set(seen.names) == {"shape", "colour", "style"}
    assert all(len(values) == 2 for values in seen.names.values())
    assert clip.names_accuracy(dual, "flat", 8) <= 1


def test_truth_is_of_the_first_object() -> None:
    scenes = draw_scenes(SceneRecipe(), range(3), styles=["neon"] * 3, pairs=[(5, 0), (0, 7), (9, 3)])
    found = attributes.truth(scenes)
    assert found["shape"].tolist() == [5, 0, 9]
    assert found["colour"].tolist() == [0, 7, 3]
    assert found["style"].tolist() == [STYLES.index("neon")] * 3


@pytest.mark.slow
def test_clip_is_as_good_as_it_is_said_to_be() -> None:
    """Zero-shot over 80 names, on test pictures; trains it where it is not there."""
    world_models.ensure("clip")
    system = load_base("world:clip")
    assert isinstance(system, DualEncoder)
    found = {style: clip.names_accuracy(system, style) for style in STYLES}
    assert all(found[style] >= least for style, least in clip.QUALITY.items()), found


@pytest.mark.slow
def test_the_judge_is_as_good_as_it_is_said_to_be() -> None:
    """Share of right names on unseen pictures of both sizes; trains it where it is not there."""
    world_models.ensure("attributes")
    judge = load_base("world:attributes")
    assert isinstance(judge, ImageClassifier)
    found = attributes.judged_accuracy(judge)
    assert all(found[name] >= least for name, least in attributes.QUALITY.items()), found
