"""Dual encoders: texts from embeddings equal the ordinary model, prepared pictures, names checked, folders loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from temper.core.errors import DataError, ModelError, NeedsError
from temper.data.pictures import Picture
from temper.systems.dual_encoder import DualEncoder, load_dual_encoder
from temper.systems.loading import load_base
from temper.systems.wanted import Wanted
from temper.systems.word_tokenizer import SPECIAL_WORDS, build_word_tokenizer

TEXTS = ("a photo of a red star", "blue ring", "a neon sign of a small orange bar left of a hoop")


@pytest.fixture
def system() -> DualEncoder:
    return load_dual_encoder("tiny:clip", Wanted())


def pictures(num: int, side: int = 16) -> list[Picture]:
    draw = np.random.default_rng(0)
    return [Picture.from_array(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(num)]


def save(system: DualEncoder, folder: Path, **changes: Any) -> str:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    system.model.save_pretrained(folder)
    system.tokenizer.save_pretrained(folder)
    settings = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}} | changes
    CLIPImageProcessorPil(**settings, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vectors_from_embeddings_are_those_of_the_ordinary_model(attention: str) -> None:
    system = load_dual_encoder("tiny:clip:3", Wanted(attention=attention))
    rows = system.token_rows(TEXTS)
    mask = (rows.ids_BT != system.pad_id).long()
    pixels_BCHW = system.pixels(pictures(2))
    with torch.no_grad():
        ordinary = system.model(
            input_ids=rows.ids_BT, attention_mask=mask, pixel_values=(pixels_BCHW - 0.5) / 0.25
        )
        ours_BE = system.text_vectors_from_embeddings(system.token_embeddings(rows.ids_BT), rows.end_B)
        logits_BC = system.logits(system.image_vectors(pixels_BCHW), ours_BE)
    assert torch.allclose(ours_BE, ordinary.text_embeds, atol=1e-4)
    assert torch.allclose(logits_BC, ordinary.logits_per_image, atol=1e-4)


def test_what_follows_the_end_is_never_read(system: DualEncoder) -> None:
    rows = system.token_rows(TEXTS)
    embeddings = system.token_embeddings(rows.ids_BT).detach()
    changed = embeddings.clone()
    changed[1, rows.end_B[1] + 1 :] += 5.0
    one, two = (system.text_vectors_from_embeddings(each, rows.end_B) for each in (embeddings, changed))
    assert torch.allclose(one, two, atol=1e-6)
    alone = system.text_vectors([TEXTS[1]])
    assert torch.allclose(alone[0], one[1], atol=1e-6)


def test_the_end_is_the_tokenizers_whatever_the_config_says(system: DualEncoder) -> None:
    """Configs with eos_token_id 2 make transformers pool at the largest id instead."""
    before = system.text_vectors(TEXTS)
    system.model.text_model.eos_token_id = 2
    assert torch.equal(system.text_vectors(TEXTS), before)


def test_gradients_reach_pixels_and_token_embeddings(system: DualEncoder) -> None:
    pixels_BCHW = system.pixels(pictures(2)).requires_grad_()
    system.class_logits(pixels_BCHW, ["red star", "blue ring"]).square().sum().backward()
    assert pixels_BCHW.grad is not None
    assert pixels_BCHW.grad.abs().sum() > 0
    rows = system.token_rows(TEXTS)
    embeddings = system.token_embeddings(rows.ids_BT).detach().requires_grad_()
    system.text_vectors_from_embeddings(embeddings, rows.end_B).sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad[0, 1].abs().sum() > 0


def test_capabilities_are_tried(system: DualEncoder) -> None:
    assert system.capabilities == {"see", "embed", "classify", "grads", "hidden"}
    with pytest.raises(NeedsError, match=r"lacks 'generate'.*smollm2"):
        system.require("generate")


def test_vectors_of_pictures_and_texts(system: DualEncoder) -> None:
    rows = pictures(5)
    vectors_BE = system.image_vectors(rows)
    assert vectors_BE.shape == (5, system.width)
    assert torch.allclose(vectors_BE.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(vectors_BE[3:4], system.image_vectors(rows[3:4]), atol=1e-6)
    assert system.image_vectors([]).shape == system.text_vectors([]).shape == (0, system.width)
    assert system.logit_scale.item() == pytest.approx(system.model.logit_scale.exp().item())


def test_templates_are_averaged_as_unit_vectors(system: DualEncoder) -> None:
    names = ["red star", "blue ring"]
    each = [system.class_vectors(names, [template]) for template in ("a photo of a {}", "a mosaic of a {}")]
    mean_CE = torch.nn.functional.normalize((each[0] + each[1]) / 2, dim=-1)
    assert torch.allclose(
        system.class_vectors(names, ["a photo of a {}", "a mosaic of a {}"]), mean_CE, atol=1e-6
    )
    assert torch.equal(system.class_vectors(names), each[0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["red " * 31], "33 tokens are too many: tiny:clip reads 32.*end token"),
        (["a zebra"], "'zebra' is not among the .* words that tiny:clip knows"),
        ([""], "no token"),
        (["a <eos> star"], "'<eos>' is not among"),
    ],
)
def test_texts_it_cannot_read(system: DualEncoder, texts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        system.text_vectors(texts)


def test_the_longest_text_fits(system: DualEncoder) -> None:
    (row,) = system.ids(["red " * 30])
    assert len(row) == 32
    assert row[-1] == system.end_id


def test_class_names_must_tell_classes_apart(system: DualEncoder) -> None:
    with pytest.raises(DataError, match="Two classes have the name 'red star'"):
        system.class_vectors(["red star", "blue ring", "red star"])
    with pytest.raises(DataError, match="1 class names are too few"):
        system.class_vectors(["red star"])


def test_pixels_of_another_shape(system: DualEncoder) -> None:
    with pytest.raises(DataError, match=r"do not fit.*3, 16, 16"):
        system.image_vectors(torch.rand(1, 3, 32, 32))
    with pytest.raises(DataError, match="divide by 255"):
        system.image_vectors(torch.full((1, 3, 16, 16), 200.0))


def test_a_folder_gives_the_same_system(system: DualEncoder, tmp_path: Path) -> None:
    system.model.config.zero_shot_template = "a chalk drawing of a {}"
    loaded = load_base(save(system, tmp_path / "clip"))
    assert isinstance(loaded, DualEncoder)
    assert torch.equal(loaded.text_vectors(TEXTS), system.text_vectors(TEXTS))
    assert torch.allclose(loaded.image_vectors(pictures(2)), system.image_vectors(pictures(2)), atol=1e-6)
    assert loaded.template == "a chalk drawing of a {}"
    assert loaded.pixels(pictures(1, side=40)).shape == (1, 3, 16, 16)


def test_weights_that_lack_a_tower(system: DualEncoder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(system, tmp_path / "clip")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="visual_projection"):
        load_dual_encoder(folder, Wanted())


def test_what_decides_answers_is_in_the_fingerprint(system: DualEncoder) -> None:
    again = load_dual_encoder("tiny:clip", Wanted())
    assert again.fingerprint == system.fingerprint
    assert load_dual_encoder("tiny:clip:1", Wanted()).fingerprint != system.fingerprint
    others = [system.with_(template="{}"), system.with_(mean=(0.4, 0.5, 0.5)), system.with_(resample="box")]
    assert len({each.fingerprint for each in (system, *others)}) == 4


def test_word_tokenizer() -> None:
    tokenizer = build_word_tokenizer(("red", "star", "."), 8)
    assert tokenizer(["Red star."])["input_ids"] == [[1, 6, 7, 8, 3]]
    assert tokenizer.eos_token_id == SPECIAL_WORDS.index("<eos>") != 2


def test_a_world_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path))
    with pytest.raises(NeedsError, match=r"not on this machine yet.*temper fetch world:clip"):
        load_base("world:clip")
