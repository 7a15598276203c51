"""`world:attributes`: a small CNN that names shape, colour and style of a picture, the judge of everything that draws.

One network with a score for every name of the three attributes; a softmax over each attribute's own names gives its head.
Pictures of 16 px are shown to it with every pixel doubled, so both sizes of the caption world can be judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from temper.core.types import Json, Run
from temper.data.worlds.captions.render import render
from temper.data.worlds.captions.scenes import Scene, SceneRecipe, draw_scenes
from temper.data.worlds.captions.words import COLOURS, SHAPES, STYLES
from temper.ops.objectives import SumCount
from temper.ops.train import TrainSettings, train
from temper.ops.world_models.base import WorldModel
from temper.systems.image_classifier import ImageClassifier

__all__ = [
    "ATTRIBUTES",
    "MODELS",
    "PARAMETERS",
    "NameAttributes",
    "Seen",
    "judged_accuracy",
    "read_attributes",
    "train_attributes",
    "truth",
]

ATTRIBUTES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": COLOURS, "style": STYLES}
"""Attribute -> its names, in the order of the scores."""
PARAMETERS: dict[str, Json] = {
    "version": 1,
    "network": "cnn3-w16-bn",
    "num_pictures": 12_000,
    "small_share": 0.5,
    "seed": 0,
    "steps": 600,
    "batch": 128,
    "lr": 4e-3,
    "weight_decay": 0.01,
}
QUALITY = {
    "shape 16": 0.94,
    "shape 32": 0.9,
    "colour 16": 0.98,
    "colour 32": 0.98,
    "style 16": 0.96,
    "style 32": 0.96,
}
"""What `judged_accuracy` gives at least."""
FIRST_SEED, TEST_SEED = 5_000_000, 6_000_000
"""Scenes that no data set holds."""


class Seen(NamedTuple):
    """What the judge reads in B pictures: the most likely name of each attribute and its probability."""

    names: dict[str, list[str]]
    probability: dict[str, Tensor]


@torch.no_grad()
def read_attributes(system: ImageClassifier, pixels_BCHW: Tensor) -> Seen:
    """Shape, colour and style of pixels in [0, 1], 16 or 32 px a side."""
    side = system.shape[1]
    if pixels_BCHW.shape[-1] < side:
        pixels_BCHW = F.interpolate(pixels_BCHW, size=(side, side), mode="nearest")
    found, probability = {}, {}
    for attribute, logits_BC in _heads(system.logits(pixels_BCHW)).items():
        best = logits_BC.softmax(-1).max(-1)
        found[attribute] = [ATTRIBUTES[attribute][index] for index in best.indices.tolist()]
        probability[attribute] = best.values
    return Seen(found, probability)


def _heads(logits_BC: Tensor) -> dict[str, Tensor]:
    sizes = [len(values) for values in ATTRIBUTES.values()]
    return dict(zip(ATTRIBUTES, logits_BC.split(sizes, dim=-1), strict=True))


@dataclass
class NameAttributes:
    """Cross-entropy of each attribute's head; items are row numbers."""

    system: ImageClassifier
    pixels_NCHW: Tensor
    truth_N: Mapping[str, Tensor]
    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(ATTRIBUTES, 1.0))

    def counts(self, items: Sequence[int]) -> dict[str, float]:
        """Pictures."""
        return dict.fromkeys(ATTRIBUTES, float(len(items)))

    def __call__(self, model: nn.Module, items: Sequence[int]) -> dict[str, SumCount]:
        """Each head's cross-entropy summed over pictures."""
        rows = torch.tensor(items)
        heads = _heads(self.system.logits(self.pixels_NCHW[rows].float() / 255))
        return {
            name: SumCount(F.cross_entropy(logits, self.truth_N[name][rows], reduction="sum"), len(rows))
            for name, logits in heads.items()
        }


def train_attributes(parameters: Mapping[str, Json]) -> ImageClassifier:
    """A judge trained by these parameters, in eval mode."""
    from temper.systems.networks import build_network

    names = tuple(name for values in ATTRIBUTES.values() for name in values)
    seed = int(parameters["seed"])
    model = build_network(str(parameters["network"]), (3, 32, 32), len(names), seed)
    system = ImageClassifier(model, names, (3, 32, 32), (0.5,) * 3, (0.25,) * 3, resample="nearest")
    pixels_NCHW, scenes = _pictures(int(parameters["num_pictures"]), float(parameters["small_share"]))
    settings = TrainSettings(
        lr=float(parameters["lr"]),
        max_steps=int(parameters["steps"]),
        batch_rows=int(parameters["batch"]),
        schedule="cosine",
        warmup_ratio=0.1,
        weight_decay=float(parameters["weight_decay"]),
    )
    system.model.train()
    train(
        system.model,
        dict(system.model.named_parameters()),
        lambda epoch: range(len(scenes)),
        NameAttributes(system, pixels_NCHW, truth(scenes)),
        settings,
        Run(seed=seed, batch_tokens=1 << 20),
        length=lambda item: 1,
    )
    system.model.eval()
    return system


def _pictures(num: int, small_share: float) -> tuple[Tensor, list[Scene]]:
    """uint8 pixels (N, 3, 32, 32) and their scenes, those of 16 px behind."""
    num_small = int(num * small_share)
    seeds = np.arange(FIRST_SEED, FIRST_SEED + num)
    large = draw_scenes(SceneRecipe(), seeds[num_small:])
    small = draw_scenes(SceneRecipe(size_px=16), seeds[:num_small])
    doubled = render(small).repeat(2, axis=1).repeat(2, axis=2)
    pixels = np.concatenate([render(large), doubled]) if num_small else render(large)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), [*large, *small]


def truth(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Attribute -> index of each scene's value, of its first object."""
    values = {
        "shape": [SHAPES.index(scene.things[0].shape) for scene in scenes],
        "colour": [COLOURS.index(scene.things[0].colour) for scene in scenes],
        "style": [STYLES.index(scene.style) for scene in scenes],
    }
    return {name: torch.tensor(numbers) for name, numbers in values.items()}


def judged_accuracy(system: ImageClassifier, num: int = 800) -> dict[str, float]:
    """Share of right names, "ATTRIBUTE SIDE" -> share, over test pictures of both sizes that no training saw."""
    found = {}
    for side in (16, 32):
        scenes = draw_scenes(SceneRecipe(size_px=side), range(TEST_SEED, TEST_SEED + num))
        pixels_NCHW = torch.from_numpy(render(scenes).transpose(0, 3, 1, 2).copy()).float() / 255
        seen = read_attributes(system, pixels_NCHW.to(system.device))
        right = truth(scenes)
        for name, values in ATTRIBUTES.items():
            guess_N = torch.tensor([values.index(word) for word in seen.names[name]])
            found[f"{name} {side}"] = float((guess_N == right[name]).float().mean())
    return found


def _write(folder: Path) -> None:
    from temper.systems.image_loading import save_image_classifier

    save_image_classifier(train_attributes(PARAMETERS), folder)


MODELS = {
    "attributes": WorldModel(
        parameters=PARAMETERS,
        train=_write,
        title="judge of shape, colour and style in the caption world, 16 and 32 px",
    )
}
