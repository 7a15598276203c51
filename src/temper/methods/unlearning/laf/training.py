"""The loops: extractor unlearning with alignment, and everything that is trained with labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temper.artefacts.training import Tuning
from temper.core.errors import DataError, NumericsError
from temper.core.types import Run
from temper.data.schemas import Data, Labelled
from temper.methods.unlearning.laf.card import Config
from temper.methods.unlearning.laf.vae import (
    Vae,
    alignment_loss,
    batches,
    extractor_loss,
    train_vae,
)
from temper.ops.train import SumCount, TrainSettings, train
from temper.systems.image_classifier import Examples, ImageClassifier, pictures_of

__all__ = [
    "ClassObjective",
    "Pixels",
    "embed",
    "image_tokens",
    "learn",
    "overlap",
    "pictures",
    "repair",
    "scored",
    "unlearn",
]

logger = logging.getLogger(__name__)

PATCH_PIXELS = 256
"""Pixels that count as one token of a run's budget, as in vision transformers."""
ALIKE = 0.9
"""Share of the error under the other autoencoder from which on the two count as one."""


class Pixels(NamedTuple):
    """The rows of both parts without labels, (N, channels, height, width)."""

    forget_NCHW: Tensor
    retain_NCHW: Tensor


def pictures(system: ImageClassifier, data: Data) -> Pixels:
    """Pixels of the parts forget and retain; raises DataError for a text among them. Labels are not looked at."""
    shown = (pictures_of(data.records(part, Labelled), part) for part in ("forget", "retain"))
    return Pixels(*(system.pixels(images) for images in shown))


def image_tokens(system: ImageClassifier) -> int:
    """Tokens of a run's budget that one picture takes."""
    return max(1, math.ceil(system.shape[1] * system.shape[2] / PATCH_PIXELS))


def scored(system: ImageClassifier, pixels_NCHW: Tensor, config: Config, run: Run) -> tuple[Tensor, Tensor]:
    """Logits, (N, C), and embeddings, (N, D), of all pictures, batched by the run's budget, without gradient."""
    size = max(1, run.batch_tokens // image_tokens(system))
    with torch.no_grad():
        read = [system.read(part, config.layer) for part in pixels_NCHW.split(size)]
    return torch.cat([r.logits_BC for r in read]), torch.cat([r.features.flatten(1) for r in read]).float()


def embed(system: ImageClassifier, pixels_BCHW: Tensor, config: Config) -> Tensor:
    """Embeddings, (B, D), with gradient."""
    return system.features(pixels_BCHW, config.layer).flatten(1).float()


def unlearn(tuned: Tuning, pixels: Pixels, config: Config, run: Run) -> None:
    """Steps (a) and (b) in turns over the smaller part; changes the tuned model in place.

    Raises DataError for fewer forget rows than `min_rows`, NumericsError at a loss that is not finite.
    """
    system: ImageClassifier = tuned.system
    if len(pixels.forget_NCHW) < config.min_rows:
        raise DataError(
            f"There are {len(pixels.forget_NCHW)} forget rows, and a step needs {config.min_rows}",
            where="part 'forget'",
            cure="Add rows, or lower min_rows: over few rows the alignment term is unstable.",
        )
    # Departure 3: once, for both autoencoders and as teacher.
    forget0_ND, retain0_ND = (scored(system, part, config, run)[1] for part in pixels)
    retain_vae, forget_vae = (train_vae(part, config, run.seed) for part in (retain0_ND, forget0_ND))
    overlap(forget0_ND, retain_vae, forget_vae, run.seed)
    parameters = tuned.parameters()
    extractor = torch.optim.Adam(parameters, lr=config.lr_ue)
    aligner = torch.optim.Adam(parameters, lr=config.lr_ra)
    generator = torch.Generator().manual_seed(run.seed)
    for _ in run.ticker(range(config.num_epochs), total=config.num_epochs, label="unlearn"):
        turns = (
            batches(len(part), config.batch_rows, config.min_rows, generator)
            for part in (pixels.forget_NCHW, pixels.retain_NCHW)
        )
        for forget_rows, retain_rows in zip(*turns, strict=False):
            forget_BCHW, retain_BCHW = pixels.forget_NCHW[forget_rows], pixels.retain_NCHW[retain_rows]
            both_BCHW, num_forget = torch.cat([forget_BCHW, retain_BCHW]), len(forget_rows)
            embedding_BD = embed(system, both_BCHW, config)
            forget_BD, retain_BD = embedding_BD[:num_forget], embedding_BD[num_forget:]
            _step(extractor, extractor_loss(retain_vae, forget_vae, retain_BD, forget_BD, generator))
            embedding_BD = embed(system, both_BCHW, config)
            forget_BD, retain_BD = embedding_BD[:num_forget], embedding_BD[num_forget:]
            teacher = retain0_ND[retain_rows], forget0_ND[forget_rows]
            _step(aligner, alignment_loss(retain_BD, teacher[0], forget_BD, teacher[1], config.tau))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    if not bool(loss.isfinite()):
        raise NumericsError("The unlearning loss is not finite", where="laf", cure="Lower lr_ue and lr_ra.")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@torch.no_grad()
def overlap(forget_ND: Tensor, retain_vae: Vae, forget_vae: Vae, seed: int) -> float:
    """The forget rows' mean squared error under their own autoencoder over that under the retain rows'.

    Warns from ALIKE on: there is nothing then that only the forget rows have.
    """
    own, other = (
        (vae(forget_ND, torch.Generator().manual_seed(seed)).out_BD - forget_ND).square().sum(1).mean()
        for vae in (forget_vae, retain_vae)
    )
    share = float(own / other)
    if share >= ALIKE:
        logger.warning(
            "the forget rows' autoencoder knows them no better than the retain rows' does (errors %.2f to 1): embeddings of "
            "one kind, or too few rows or vae_epochs; expect a small effect",
            share,
        )
    return share


@dataclass(frozen=True)
class ClassObjective:
    """Cross-entropy in nats a picture, times `sign`; items are row numbers."""

    system: ImageClassifier
    examples: Examples
    sign: float = 1.0
    weights: Mapping[str, float] = field(default_factory=lambda: {"nll": 1.0})

    def counts(self, items: Sequence[int]) -> dict[str, float]:
        """Pictures."""
        return {"nll": float(len(items))}

    def __call__(self, model: nn.Module, items: Sequence[int]) -> dict[str, SumCount]:
        """The sum over these rows."""
        rows = torch.tensor(items, device=self.examples.class_B.device)
        logits_BC = self.system.logits(self.examples.pixels_BCHW[rows])
        nll = F.cross_entropy(logits_BC, self.examples.class_B[rows], reduction="sum")
        return {"nll": SumCount(self.sign * nll, len(items))}


def learn(
    tuned: Tuning,
    records: Sequence[Labelled],
    config: Config,
    run: Run,
    epochs: float,
    lr: float,
    sign: float = 1.0,
) -> None:
    """Train on labelled rows; sign -1 is gradient ascent, which leaves norm statistics alone."""
    system: ImageClassifier = tuned.system
    system.model.train(sign > 0)
    _supervised(system, tuned.parameters(), records, _settings(config, epochs, lr, sign > 0), run, sign)


def repair(tuned: Tuning, records: Sequence[Labelled], config: Config, run: Run) -> None:
    """Train the last linear layer alone on some of the retain rows, drawn by the seed (LAF+R)."""
    system: ImageClassifier = tuned.system
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(run.seed)).tolist()
    chosen = [records[place] for place in order[: config.repair_rows]]
    head = system.model.get_submodule(system.head)
    _supervised(
        system,
        head.parameters(),
        chosen,
        _settings(config, config.repair_epochs, config.repair_lr, False),
        run,
    )


def _settings(config: Config, epochs: float, lr: float, decays: bool) -> TrainSettings:
    decay = config.weight_decay if decays else 0.0
    return TrainSettings(
        lr=lr, num_epochs=epochs, batch_rows=config.batch_rows, weight_decay=decay, clip_norm=0.0
    )


def _supervised(
    system: ImageClassifier,
    parameters: Iterable[nn.Parameter],
    records: Sequence[Labelled],
    settings: TrainSettings,
    run: Run,
    sign: float = 1.0,
) -> None:
    examples = system.examples(records)
    tokens = image_tokens(system)
    train(
        system.model,
        parameters,
        lambda epoch: range(len(records)),
        ClassObjective(system, examples, sign),
        settings,
        run,
        length=lambda row: tokens,
    )
