"""Image classifiers by name: tiny and fresh ones built here, saved networks of ours, transformers folders and hub names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from temper.core.errors import ModelError
from temper.core.types import Json
from temper.data.pictures import Picture
from temper.systems.image_classifier import RESAMPLING, ImageClassifier
from temper.systems.network_names import MODEL_TYPE
from temper.systems.wanted import Wanted

__all__ = ["build_named", "save_image_classifier", "with_processor"]

TENSORS = "model.safetensors"
PREPARATION = ("classes", "mean", "std", "resize", "resample")
"""What config.json of a network of ours holds beside the network's own settings."""
AGREEMENT = 2.5 / 255
"""Largest difference from the image processor's own pixels, in units of [0, 1]; two libraries round differently."""


def build_named(name: str, wanted: Wanted) -> ImageClassifier:
    """The classifier of a name, on the CPU; raises ConfigError, ModelError, NeedsError."""
    head, _, rest = name.partition(":")
    if head == "tiny":
        return _tiny(*rest.split(":"))
    if head == "new":
        network, shape, num_classes, *seed = rest.split(":")
        return _fresh(network, tuple(map(int, shape.split("x"))), int(num_classes), *map(int, seed))
    source = _source(name)
    if source.is_dir() and _config(source).get("model_type") == MODEL_TYPE:
        return _saved(source)
    return _transformers(str(source) if source.is_dir() else name, name, wanted)


def _source(name: str) -> Path:
    """The folder of a model, fetched or found; the name itself for a hub name."""
    from temper.systems.names import asset_names

    if name in asset_names():
        from temper.data import assets

        return assets.fetch(name)
    if name.startswith("world:"):
        from temper.data.worlds.folders import world_folder

        return world_folder(name.removeprefix("world:"))
    return Path(name).expanduser()


def _config(folder: Path) -> dict[str, Json]:
    try:
        config: dict[str, Json] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json cannot be read: {error}", where=str(folder)) from None
    return config


def _tiny(architecture: str, seed: str = "0") -> ImageClassifier:
    if architecture == "cnn":
        return _fresh("cnn3-w4", (1, 8, 8), 4, int(seed))
    from transformers import ResNetConfig, ResNetForImageClassification

    build: Any = ResNetConfig
    config = build(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        model: nn.Module = ResNetForImageClassification(config)
    return ImageClassifier(model, _numbered(4), (3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def _fresh(network: str, shape: tuple[int, ...], num_classes: int, seed: int = 0) -> ImageClassifier:
    from temper.systems.networks import build_network

    model = build_network(network, shape, num_classes, seed)
    return ImageClassifier(model, _numbered(num_classes), shape)  # type: ignore[arg-type]


def _numbered(num_classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(num_classes)))


def save_image_classifier(system: ImageClassifier, folder: Path) -> None:
    """Write a network of ours as config.json and model.safetensors; raises ModelError for another model."""
    from safetensors.torch import save_file

    settings = getattr(system.model, "settings", None)
    if not settings:
        raise ModelError(
            f"{type(system.model).__name__} is no network of ours",
            where=system.spec,
            cure="Use its save_pretrained.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(settings) | {name: getattr(system, name) for name in PREPARATION}
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    tensors = {name: value.detach().cpu().contiguous() for name, value in system.model.state_dict().items()}
    save_file(tensors, folder / TENSORS)


def _saved(folder: Path) -> ImageClassifier:
    """A network of ours from its folder."""
    from safetensors.torch import load_file

    from temper.systems.efficientnet import NAME, EfficientNetLite0
    from temper.systems.networks import build_from_settings

    config = _config(folder)
    model: nn.Module
    if config.get("network") == NAME:
        model = EfficientNetLite0(int(config["num_classes"]), tuple(config["shape"]))
    else:
        model = build_from_settings(config)
    try:
        model.load_state_dict(load_file(folder / TENSORS))
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"The weights do not fit config.json: {str(error).splitlines()[-1].strip()}", where=str(folder)
        ) from None
    given: dict[str, Any] = {
        name: tuple(config[name]) if isinstance(config[name], list) else config[name]
        for name in PREPARATION
        if name in config
    }
    given.setdefault("classes", _numbered(int(config["num_classes"])))
    shape: Any = tuple(config["shape"])
    return ImageClassifier(model, shape=shape, **given)


def _transformers(source: str, name: str, wanted: Wanted) -> ImageClassifier:
    """A model of AutoModelForImageClassification with its image processor."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from temper.systems.loading import bars_as_due, explained_errors

    with bars_as_due(is_download=not Path(source).is_dir()), explained_errors(name):
        processor = AutoImageProcessor.from_pretrained(source, **wanted.common())
        model, found = AutoModelForImageClassification.from_pretrained(
            source, dtype=wanted.dtype, use_safetensors=True, output_loading_info=True, **wanted.common()
        )
    if found["missing_keys"]:
        raise ModelError(
            f"The weights lack {', '.join(sorted(found['missing_keys'])[:3])}",
            where=name,
            cure="Choose a model that was trained to classify.",
        )
    labels: Mapping[int, str] = model.config.id2label
    return with_processor(model, tuple(labels[i] for i in range(len(labels))), processor, name)


def with_processor(model: Any, classes: tuple[str, ...], processor: Any, name: str) -> ImageClassifier:
    """The classifier whose pixels, normalised, are those of an image processor; raises ModelError where ours differ."""
    black, white = (_processed(processor, np.full((32, 32, 3), value, np.uint8)) for value in (0, 255))
    shape: Any = tuple(black.shape)
    low_C, high_C = (values[:, shape[1] // 2, shape[2] // 2] for values in (black, white))
    std = tuple(round(float(value), 7) for value in 1 / (high_C - low_C))
    mean = tuple(round(float(-low * scale), 7) for low, scale in zip(low_C, std, strict=True))
    system = ImageClassifier(
        model, classes, shape, mean, std, _resize(processor), RESAMPLING[_resample(processor)], spec=name
    )
    _check_agreement(system, processor)
    return system


def _processed(processor: Any, array: Any) -> Tensor:
    from PIL import Image

    values: Tensor = processor(images=Image.fromarray(array), return_tensors="pt")["pixel_values"][0]
    return values


def _resample(processor: Any) -> int:
    value = getattr(processor, "resample", None)
    return 2 if value is None else int(value)


def _resize(processor: Any) -> tuple[int, ...]:
    """The size before the crop, as in ImageClassifier."""
    size = processor.size
    edge = size.get("shortest_edge") if size else None
    if edge and getattr(processor, "crop_pct", None):
        # ConvNeXt's rule: large pictures are stretched, smaller ones lose a margin.
        return (edge, edge) if edge >= 384 else (int(edge / processor.crop_pct),)
    if edge:
        return (edge,)
    return (size["height"], size["width"]) if size and size.get("height") else ()


def _check_agreement(system: ImageClassifier, processor: Any) -> None:
    """On a picture of smooth colours, wider than high, larger than the model's."""
    _, height, width = system.shape
    rows, columns = np.mgrid[0 : 2 * height, 0 : 3 * width]
    waves = [np.sin(rows / height * 5 + 1), np.cos(columns / width * 4), np.sin((rows + columns) / width * 3)]
    array = (127.5 + 120 * np.stack(waves, axis=2)).astype(np.uint8)
    theirs_CHW = _processed(processor, array)
    ours_CHW = system.pixels([Picture.from_array(array)])[0].cpu()
    mean, std = (torch.tensor(values)[:, None, None] for values in (system.mean, system.std))
    if theirs_CHW.shape != ours_CHW.shape or (theirs_CHW * std + mean - ours_CHW).abs().max() > AGREEMENT:
        raise ModelError(
            f"{type(processor).__name__} does more to pictures than resize, crop and normalise",
            where=system.spec,
            cure="Choose a model whose image processor does only that.",
        )
