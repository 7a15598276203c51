"""Image classifiers: how pixels are made, what the model is asked, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from temper.core.errors import ConfigError, DataError, ModelError, NeedsError
from temper.data import assets
from temper.data.pictures import Picture
from temper.data.schemas import Labelled
from temper.systems.image_classifier import ImageClassifier
from temper.systems.image_loading import save_image_classifier, with_processor
from temper.systems.loading import load_base

RNG = np.random.default_rng(0)


def picture(*shape: int) -> Picture:
    return Picture.from_array(RNG.integers(0, 256, shape, dtype=np.uint8))


def plain(shape=(1, 4, 4), num_classes=2, **fields) -> ImageClassifier:
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), num_classes))
    return ImageClassifier(model, tuple("ab"[:num_classes]), shape, **fields)


NAMES = ("tiny:cnn", "tiny:resnet:3", "new:cnn3:1x28x28:10", "new:resnet8:3x16x16:5:7")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_a_system_that_can_what_it_says(name):
    system = load_base(name)
    assert system.kind == "ImageClassifier"
    assert system.capabilities == {"classify", "grads", "hidden", "see"}
    assert system.spec == name
    assert not system.model.training
    pixels = system.pixels([picture(5, 9, 3), picture(20, 7)])
    assert pixels.shape == (2, *system.shape)
    assert system.logits(pixels).shape == (2, len(system.classes))
    assert system.features(pixels).ndim == 2
    assert load_base(name).fingerprint == system.fingerprint
    with pytest.raises(NeedsError, match="class scores only"):
        system.require("generate")


def test_seeds_and_shapes_give_different_fingerprints():
    names = ("new:cnn3:1x8x8:4", "new:cnn3:1x8x8:4:1", "new:cnn3:1x8x8:5", "new:cnn3-bn:1x8x8:4")
    assert len({load_base(name).fingerprint for name in names}) == len(names)
    system = plain()
    assert system.fingerprint != system.with_(mean=(0.1,)).fingerprint
    assert system.with_(fingerprint="x").fingerprint == "x"


def test_logits_by_hand_and_normalisation_inside():
    system = plain(mean=(0.5,), std=(0.25,))
    pixels = torch.rand(3, 1, 4, 4)
    expected = system.model((pixels - 0.5) / 0.25)
    assert torch.allclose(system.logits(pixels), expected)
    assert torch.equal(plain().logits(pixels * 0), plain().model(pixels * 0)) is False  # two fresh models
    grad = torch.autograd.grad(system.logits(pixels.requires_grad_()).sum(), pixels)[0]
    assert torch.allclose(grad[0].flatten(), system.model[1].weight.sum(0) / 0.25)


def test_outputs_of_transformers_are_unwrapped_in_float32():
    system = load_base("tiny:resnet")
    pixels = torch.rand(2, 3, 32, 32)
    expected = system.model((pixels - 0.5) / 0.25).logits
    assert torch.equal(system.logits(pixels), expected)
    half = load_base("tiny:cnn", dtype="bf16")
    assert half.logits(torch.rand(1, 1, 8, 8)).dtype == torch.float32


def test_features_by_name():
    system = load_base("tiny:cnn")
    pixels = torch.rand(2, 1, 8, 8)
    assert system.head == "head"
    assert torch.equal(system.features(pixels), system.model.features(pixels))
    assert torch.equal(system.features(pixels, "head"), system.logits(pixels))
    assert torch.equal(system.features(pixels, "features.input"), pixels)
    assert system.features(pixels, "features.0").shape == (2, 4, 8, 8)
    assert not system.model.features._forward_hooks
    with pytest.raises(ConfigError, match="no module 'feature'.*Did you mean features"):
        system.features(pixels, "feature")


def test_a_model_without_a_linear_layer_says_so():
    system = ImageClassifier(nn.Flatten(), ("a", "b"), (1, 1, 2))
    assert "hidden" not in system.capabilities
    with pytest.raises(ModelError, match="no linear layer"):
        _ = system.head


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(2, 3, 4, 4), r"shape \(2, 3, 4, 4\) do not fit.*1, 4, 4 at the end"),
        (torch.rand(1, 4, 4), "do not fit"),
        (torch.rand(2, 1, 4, 4) * 255, "divide by 255"),
        (torch.randint(0, 255, (2, 1, 4, 4), dtype=torch.uint8), "Pixels are torch.uint8"),
        (torch.full((2, 1, 4, 4), float("nan")), "NaN or infinity"),
        (torch.full((2, 1, 4, 4), float("inf")), "NaN or infinity"),
    ],
)
def test_wrong_pixels_are_refused(pixels, message):
    with pytest.raises(DataError, match=message):
        plain().logits(pixels)


def test_noise_beyond_the_range_and_no_pixels_are_fine():
    system = plain()
    assert system.logits(torch.randn(2, 1, 4, 4)).shape == (2, 2)
    assert system.logits(torch.zeros(0, 1, 4, 4)).shape == (0, 2)
    assert system.pixels([]).shape == (0, 1, 4, 4)


def test_grey_and_colour():
    grey, colour = picture(4, 4), picture(4, 4, 3)
    in_colour = plain((3, 4, 4)).pixels([grey])
    assert torch.equal(in_colour[0, 0], in_colour[0, 2])
    assert torch.allclose(in_colour[0, 1], torch.from_numpy(grey.pixels[:, :, 0] / 255).float())
    in_grey = plain().pixels([colour])[0, 0]
    luma = colour.pixels @ np.array([0.299, 0.587, 0.114]) / 255
    assert np.allclose(in_grey.numpy(), luma, atol=1.01 / 255)
    with pytest.raises(DataError, match="No picture has 4 channels"):
        plain((4, 4, 4)).pixels([grey])


def test_sizes_before_the_crop():
    stripes = np.zeros((4, 8), np.uint8)
    stripes[:, 2:6] = 255
    wide = Picture.from_array(stripes)
    assert (plain().pixels([wide]) == 1).all()  # the middle, unscaled
    squeezed = plain(resize=(4, 4), resample="box").pixels([wide])[0, 0]
    assert squeezed[0].tolist() == [0, 1, 1, 0]
    margin = plain(resize=(8,)).pixels([Picture.from_array(np.full((2, 2), 255, np.uint8))])
    assert (margin == 1).all()
    small = plain(resize=(2,)).pixels([Picture.from_array(np.full((2, 2), 255, np.uint8))])[0, 0]
    assert small.sum() == 4  # black around


def test_labels():
    system = load_base("new:cnn3:1x8x8:3")
    records = [
        Labelled("", 2, picture(8, 8), id="a"),
        Labelled("", "1", picture(8, 8), id="b"),
        Labelled("", "cat", picture(8, 8), id="c", extra={"class_index": 0}),
    ]
    examples = system.examples(records)
    assert examples.pixels_BCHW.shape == (3, 1, 8, 8)
    assert examples.class_B.tolist() == [2, 1, 0]
    named = plain()
    assert named.class_ids([Labelled("", "b"), Labelled("", 0)]).tolist() == [1, 0]
    for label in ("c", 2, -1):
        with pytest.raises(DataError, match=r"none of the 2 classes.*row 'x'"):
            named.class_ids([Labelled("", label, id="x", extra={"class_index": 0})])


def test_images_among_text():
    with pytest.raises(DataError, match=r"a text and no image \(row 'x'\)"):
        plain().examples([Labelled("", 0, picture(4, 4)), Labelled("words", 1, id="x")])


def test_saved_networks_come_back(tmp_path):
    system = load_base("new:resnet8-bn:3x8x8:4:5").with_(classes=tuple("abcd"), mean=(0.1, 0.2, 0.3))
    save_image_classifier(system, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = load_base(str(tmp_path))
    assert again.fingerprint == system.fingerprint
    assert again.classes == tuple("abcd")
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.logits(pixels), system.logits(pixels))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_classes": 3}))
    with pytest.raises(ModelError, match="do not fit config.json"):
        load_base(str(tmp_path))
    with pytest.raises(ModelError, match="no network of ours"):
        save_image_classifier(load_base("tiny:resnet"), tmp_path)


PROCESSORS = [
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    {"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 36, "width": 36}, "do_center_crop": True,
     "crop_size": {"height": 32, "width": 32}},
]  # fmt: skip


def processor(settings, folder):
    from transformers import AutoImageProcessor

    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("settings", PROCESSORS, ids=lambda s: s["image_processor_type"])
@pytest.mark.parametrize("shape", [(50, 70, 3), (90, 20, 3), (40, 40)], ids=str)
def test_pixels_are_the_image_processors(settings, shape, tmp_path):
    from PIL import Image

    theirs = processor(settings, tmp_path)
    system = with_processor(nn.Flatten(), ("a", "b"), theirs, "test")
    smooth = np.array(
        Image.fromarray(RNG.integers(0, 256, shape[:2][::-1], dtype=np.uint8)).resize((shape[1], shape[0]))
    )
    given = smooth if len(shape) == 2 else np.stack([smooth, 255 - smooth, smooth // 2], axis=2)
    expected = theirs(images=Image.fromarray(given).convert("RGB"), return_tensors="pt")["pixel_values"]
    ours = system._normal(system.pixels([Picture.from_array(given)]))
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 0.03


def test_an_image_processor_that_does_more_is_refused(tmp_path):
    settings = {"image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}  # fmt: skip
    with pytest.raises(ModelError, match="does more to pictures than resize, crop and normalise"):
        with_processor(nn.Flatten(), ("a", "b"), processor(settings, tmp_path), "test")


def tiny_vit(folder, classes=("cat", "dog", "owl")):
    from transformers import ViTConfig, ViTForImageClassification

    names = dict(enumerate(classes))
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.save_pretrained(folder)
    processor({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}, folder)
    return model


def test_a_transformers_folder(tmp_path):
    model = tiny_vit(tmp_path).eval()
    system = load_base(str(tmp_path))
    assert system.classes == ("cat", "dog", "owl")
    assert system.capabilities == {"classify", "grads", "hidden", "see"}
    pixels = system.pixels([picture(20, 16, 3)])
    assert torch.allclose(system.logits(pixels), model((pixels - 0.5) / 0.5).logits, atol=1e-6)
    assert system.features(pixels).shape == (1, 8)


def test_weights_without_a_head_are_refused(tmp_path):
    tiny_vit(tmp_path).vit.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["ViTForImageClassification"]})
    )
    with pytest.raises(ModelError, match="The weights lack classifier.bias"):
        load_base(str(tmp_path))


def test_efficientnet_sees_a_daisy():
    if not assets.is_cached("efficientnet-lite0"):
        pytest.skip("not fetched: temper fetch efficientnet-lite0")
    datasets = pytest.importorskip("sklearn.datasets")
    system = load_base("efficientnet-lite0")
    pictures = [Picture.from_array(image) for image in datasets.load_sample_images().images]
    with torch.no_grad():
        logits = system.logits(system.pixels(pictures))
    assert logits.argmax(1).tolist() == [698, 985]  # palace, daisy
    assert logits.softmax(1).amax(1).tolist() == pytest.approx([0.380, 0.305], abs=2e-3)
