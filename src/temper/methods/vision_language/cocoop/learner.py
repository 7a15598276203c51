"""What is learned: context vectors, and for CoCoOp the net that moves them by each picture; and the scores they give.

Shape letters: B pictures, C classes, M context vectors, D text width, E width of the common space, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from temper.core.errors import ConfigError
from temper.methods.vision_language.cocoop.card import Config
from temper.methods.vision_language.cocoop.prompts import Prompts, build_prompts, fill
from temper.ops.objectives import SumCount
from temper.systems.dual_encoder import DualEncoder

__all__ = [
    "FewShot",
    "LearnedPrompts",
    "PromptLearner",
    "PromptObjective",
    "augment",
    "frozen",
    "start_learner",
]


class PromptLearner(nn.Module):
    """Context vectors (M, D), or (C, M, D) with one set a class, and the meta-net of CoCoOp."""

    def __init__(self, context: Tensor, meta_width: int = 0, vector_width: int = 0) -> None:
        super().__init__()
        self.context = nn.Parameter(context.clone())
        self.meta: nn.Sequential | None = None
        if meta_width:
            first, second = nn.Linear(vector_width, meta_width), nn.Linear(meta_width, context.shape[-1])
            self.meta = nn.Sequential(first, nn.ReLU(), second)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def without_shift(self) -> PromptLearner:
        """The context alone, which then no picture moves."""
        return PromptLearner(self.context.detach())

    def class_vectors(self, system: DualEncoder, prompts: Prompts, image_BE: Tensor) -> Tensor:
        """Unit vectors of the classes: (C, E) for CoOp, (B, C, E) for CoCoOp, whose prompts are each picture's own."""
        if self.meta is None:
            return system.text_vectors_from_embeddings(fill(prompts, self.context), prompts.end_C)
        context_B1MD = (self.context + self.meta(image_BE)[:, None])[:, None]
        rows = fill(prompts, context_B1MD)
        ends = prompts.end_C.repeat(len(image_BE))
        return system.text_vectors_from_embeddings(rows.flatten(0, 1), ends).unflatten(0, rows.shape[:2])


def start_learner(system: DualEncoder, num_classes: int, config: Config, seed: int) -> PromptLearner:
    """A learner before training: the embeddings of `init_words`, or N(0, 0.02^2) for `num_context` vectors."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if config.init_words:
            ids = system.ids([config.init_words])[0][1:-1]
            context = system.token_embeddings(torch.tensor(ids, device=system.device)).float().cpu()
            if config.per_class:
                context = context.expand(num_classes, *context.shape)
        else:
            lead = (num_classes,) if config.per_class else ()
            context = 0.02 * torch.randn(*lead, config.num_context, system.text_width)
        hidden = max(1, system.width // 16) if config.kind == "cocoop" else 0
        return PromptLearner(context, hidden, system.width).to(system.device)


class FewShot(NamedTuple):
    """Training pictures: their unit vectors, or their pixels where each pass draws them anew, and their classes."""

    image_NE: Tensor
    pixels_NCHW: Tensor | None
    class_N: Tensor


@dataclass
class PromptObjective:
    """Cross-entropy of a batch's classes; items are row numbers."""

    system: DualEncoder
    prompts: Prompts
    shots: FewShot
    weights: Mapping[str, float] = field(default_factory=lambda: {"nll": 1.0})

    def counts(self, items: Sequence[int]) -> dict[str, float]:
        """Pictures."""
        return {"nll": float(len(items))}

    def __call__(self, model: nn.Module, items: Sequence[int]) -> dict[str, SumCount]:
        """Summed over pictures, in nats."""
        rows = torch.tensor(items, device=self.system.device)
        image_BE = self._images(rows)
        learner: Any = model
        class_vectors = learner.class_vectors(self.system, self.prompts, image_BE)
        logits_BC = self.system.logits(image_BE, class_vectors)
        nll = F.cross_entropy(logits_BC.float(), self.shots.class_N[rows], reduction="sum")
        return {"nll": SumCount(nll, len(items))}

    def _images(self, rows: Tensor) -> Tensor:
        if self.shots.pixels_NCHW is None:
            return self.shots.image_NE[rows]
        with torch.no_grad():
            return self.system.image_vectors(augment(self.shots.pixels_NCHW[rows]))


def augment(pixels_BCHW: Tensor) -> Tensor:
    """A random crop of 8 to 100 % of the area, up to 4:3 either way, resized by bicubic interpolation, and mirrored half the time."""
    num = len(pixels_BCHW)
    area, ratio = (
        torch.empty(num).uniform_(0.08, 1),
        torch.empty(num).uniform_(-math.log(4 / 3), math.log(4 / 3)),
    )
    width = (area * ratio.exp()).sqrt().clamp(max=1)
    height = (area / ratio.exp()).sqrt().clamp(max=1)
    mirror = torch.where(torch.rand(num) < 0.5, -1.0, 1.0)
    theta = torch.zeros(num, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2] = (1 - width) * torch.empty(num).uniform_(-1, 1)
    theta[:, 1, 2] = (1 - height) * torch.empty(num).uniform_(-1, 1)
    grid = F.affine_grid(theta.to(pixels_BCHW.device), list(pixels_BCHW.shape), align_corners=False)
    cropped = F.grid_sample(pixels_BCHW, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return cropped.clamp(0, 1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model collects a gradient inside; afterwards each is as it was."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


class LearnedPrompts:
    """Class scores from learned prompts, for whatever class names are asked for: the scorer of a DualEncoder."""

    def __init__(self, learner: PromptLearner, settings: Mapping[str, Any], name: str) -> None:
        self.learner, self.settings, self.name = learner, settings, name
        self._built: dict[tuple[str, ...], Prompts] = {}

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained."""
        return self.learner.num_parameters

    def __call__(self, system: DualEncoder, pixels_BCHW: Tensor, names: Sequence[str]) -> Tensor:
        """Scores (B, C), with gradient in the pixels."""
        image_BE = system.image_vectors(pixels_BCHW)
        return self.score(system, image_BE, names)

    def score(self, system: DualEncoder, image_BE: Tensor, names: Sequence[str]) -> Tensor:
        """Scores (B, C) of pictures whose vectors are known; at most `chunk_prompts` prompts of CoCoOp at once."""
        prompts = self.prompts(system, names)
        size = len(image_BE) or 1
        if self.learner.meta is not None:
            size = max(1, int(self.settings["chunk_prompts"]) // len(names))
        parts = [
            system.logits(part_BE, self.learner.class_vectors(system, prompts, part_BE))
            for part_BE in image_BE.split(size)
        ]
        return torch.cat(parts) if parts else image_BE.new_zeros(0, len(names))

    def prompts(self, system: DualEncoder, names: Sequence[str]) -> Prompts:
        """The prompts of these names, built once. Raises ConfigError for other classes than one-set-a-class contexts were trained on."""
        key = tuple(names)
        if self.learner.context.ndim == 3 and list(names) != list(self.settings["names"]):
            raise ConfigError(
                "Contexts of one set a class know only the classes they were trained on",
                where=f"{len(names)} names asked for, trained on {len(self.settings['names'])}",
                cure="Fit with per_class: false to use other class names.",
            )
        if key not in self._built:
            self._built[key] = build_prompts(
                system,
                names,
                self.learner.context.shape[-2],
                self.settings["position"],
                str(self.settings["ending"]),
            )
        return self._built[key]
