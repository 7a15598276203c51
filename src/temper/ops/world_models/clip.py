"""`world:clip`: a CLIPModel of transformers trained on the caption world's pictures and captions.

Shape letters: E width of the common space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from temper.core.types import Json, Run
from temper.data.worlds.captions.render import render
from temper.data.worlds.captions.sets import SETS, part_scenes
from temper.data.worlds.captions.text import captions
from temper.data.worlds.captions.words import COLOURS, SHAPES, VOCABULARY
from temper.ops.objectives import SumCount
from temper.ops.train import TrainSettings, train
from temper.ops.world_models.base import WorldModel
from temper.systems.dual_encoder import DualEncoder
from temper.systems.word_tokenizer import build_word_tokenizer

__all__ = ["MODELS", "PARAMETERS", "Contrast", "build_clip", "names_accuracy", "train_clip"]

PARAMETERS: dict[str, Json] = {
    "version": 2,
    "set": "CAP32",
    "num_pictures": 20_000,
    "seed": 0,
    "steps": 800,
    "batch": 256,
    "lr": 1.5e-3,
    "weight_decay": 0.05,
    "patch": 8,
    "vision_layers": 3,
    "vision_width": 128,
    "text_layers": 2,
    "text_width": 128,
    "heads": 4,
    "common_width": 64,
    "max_tokens": 32,
    "template": "a photo of a {}",
}
QUALITY = {
    "flat": 0.87,
    "sketch": 0.83,
    "neon": 0.65,
    "mosaic": 0.84,
    "stripe": 0.85,
    "noisy": 0.44,
    "pastel": 0.85,
    "chalk": 0.25,
}
"""What `names_accuracy` gives at least, style by style."""
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def build_clip(parameters: Mapping[str, Json]) -> DualEncoder:
    """The model before training, with its tokenizer; 32 px."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = build_word_tokenizer(VOCABULARY, int(parameters["max_tokens"]))

    def tower(name: str) -> dict[str, Any]:
        width = int(parameters[f"{name}_width"])
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": int(parameters["heads"]),
            "num_hidden_layers": int(parameters[f"{name}_layers"]),
            "hidden_act": "gelu",
        }

    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    build: Callable[..., Any] = CLIPConfig
    config = build(
        text_config={
            **tower("text"),
            **ends,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": int(parameters["max_tokens"]),
        },
        vision_config={
            **tower("vision"),
            "image_size": 32,
            "patch_size": int(parameters["patch"]),
        },
        projection_dim=int(parameters["common_width"]),
        zero_shot_template=parameters["template"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(parameters["seed"]))
        model = CLIPModel(config)
    return DualEncoder(model, tokenizer, (3, 32, 32), MEAN, STD, template=str(parameters["template"]))


@dataclass
class Contrast:
    """Pictures against the captions of a whole batch, both ways; items are row numbers."""

    system: DualEncoder
    pixels_NCHW: Tensor
    ids_NT: Tensor
    end_N: Tensor
    weights: Mapping[str, float] = field(default_factory=lambda: {"contrast": 1.0})
    unsplittable: ClassVar[bool] = True

    def counts(self, items: Sequence[int]) -> dict[str, float]:
        """Pairs."""
        return {"contrast": float(len(items))}

    def __call__(self, model: nn.Module, items: Sequence[int]) -> dict[str, SumCount]:
        """Mean of the two cross-entropies, summed over pairs."""
        rows = torch.tensor(items)
        image_BE = self.system.image_vectors(self.pixels_NCHW[rows].float() / 255)
        end_B = self.end_N[rows]
        ids_BT = self.ids_NT[rows, : int(end_B.max()) + 1]
        text_BE = self.system.text_vectors_from_embeddings(self.system.token_embeddings(ids_BT), end_B)
        logits_BB = self.system.logits(image_BE, text_BE)
        own_B = torch.arange(len(rows))
        both = [F.cross_entropy(scores, own_B, reduction="sum") for scores in (logits_BB, logits_BB.T)]
        return {"contrast": SumCount((both[0] + both[1]) / 2, len(rows))}


def train_clip(parameters: Mapping[str, Json]) -> DualEncoder:
    """A model trained by these parameters, in eval mode."""
    system = build_clip(parameters)
    part = SETS[str(parameters["set"])].parts["train"]
    scenes = part_scenes(part, "train", int(parameters["num_pictures"]))
    pixels_NCHW = torch.from_numpy(np.ascontiguousarray(render(scenes).transpose(0, 3, 1, 2)))
    rows = system.token_rows(captions(scenes, part.captions))
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
        Contrast(system, pixels_NCHW, rows.ids_BT, rows.end_B),
        settings,
        Run(seed=int(parameters["seed"]), batch_tokens=1 << 20),
        length=lambda item: 1,
    )
    system.model.eval()
    return system


@torch.no_grad()
def names_accuracy(system: DualEncoder, style: str, num: int = 800) -> float:
    """Zero-shot accuracy over the 80 colour-shape names on test pictures of one style."""
    part = SETS["CAP32"].parts["test"]
    scenes = [scene for scene in part_scenes(part, "test") if scene.style == style][:num]
    names = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    truth = torch.tensor([names.index(f"{s.things[0].colour} {s.things[0].shape}") for s in scenes])
    pixels_NCHW = torch.from_numpy(render(scenes).transpose(0, 3, 1, 2).copy()).float() / 255
    guess_N = system.class_logits(pixels_NCHW.to(system.device), names).argmax(1).cpu()
    return float((guess_N == truth).float().mean())


def _write(folder: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    system = train_clip(PARAMETERS)
    system.model.save_pretrained(folder)
    system.tokenizer.save_pretrained(folder)
    side = system.shape[1]
    CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)


MODELS = {
    "clip": WorldModel(
        parameters=PARAMETERS,
        train=_write,
        title="CLIP of the caption world, 32 px; pictures and captions",
    )
}
