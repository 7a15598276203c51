"""Needle: noise on chosen value vectors, and those vectors alone optimised to forget a text."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from temper.core.types import Run
from temper.methods.unlearning.concept_vectors.card import Config
from temper.ops.batching import Example, collate
from temper.ops.logprobs import score_batch
from temper.ops.objectives import SumCount
from temper.ops.train import TrainLog, TrainSettings, train
from temper.ops.value_vectors import Place, with_vectors
from temper.systems.causal_lm import CausalLM

__all__ = ["Ascent", "noise_sigma", "noised", "optimised"]

logger = logging.getLogger(__name__)

Unit = Literal["norm", "coordinate"]


def noise_sigma(vector_D: Tensor, noise: float, unit: Unit) -> float:
    """Standard deviation of the noise on each coordinate: `noise`, or so much that it is `noise` vector norms long."""
    return noise if unit == "coordinate" else noise * float(vector_D.norm()) / math.sqrt(len(vector_D))


def noised(vectors_PD: Tensor, noise: float, unit: Unit, seed: int) -> Tensor:
    """Each vector plus its own Gaussian noise, (P, D), drawn on the CPU from the seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn_PD = torch.randn(vectors_PD.shape, generator=generator).to(vectors_PD)
    sigma_P = torch.tensor([noise_sigma(vector_D, noise, unit) for vector_D in vectors_PD]).to(vectors_PD)
    return vectors_PD + sigma_P[:, None] * drawn_PD


@dataclass(frozen=True)
class Ascent:
    """Gradient ascent: the mean log-probability of the scored tokens, to be lowered."""

    pad_id: int
    device: str | torch.device = "cpu"
    weights: Mapping[str, float] = field(default_factory=lambda: {"ascent": 1.0})

    def counts(self, items: Sequence[Example]) -> dict[str, float]:
        """Scored tokens."""
        return {"ascent": float(sum(sum(item.scored) for item in items))}

    def __call__(self, model: nn.Module, items: Sequence[Example]) -> dict[str, SumCount]:
        """The sum of the scored tokens' log-probabilities."""
        logp_S = score_batch(model, collate(items, self.pad_id, self.device)).logp_S
        return {"ascent": SumCount(logp_S.sum(), len(logp_S))}


def optimised(
    system: CausalLM,
    places: Sequence[Place],
    start_PD: Tensor,
    rows: Sequence[Example],
    config: Config,
    run: Run,
) -> Tensor:
    """The vectors after gradient ascent on the rows, (P, D); nothing else of the model is trained or decayed (Departure 6)."""
    vectors = nn.Parameter(start_PD.clone())
    settings = TrainSettings(
        lr=config.lr,
        num_epochs=config.num_epochs,
        batch_rows=config.batch_rows,
        weight_decay=0.0,
        clip_norm=config.clip_norm,
        log_every=1,
    )

    def diverged(log: TrainLog) -> bool:
        return bool(config.max_forget_nll) and -log.loss[-1] > config.max_forget_nll

    with with_vectors(system.model, places, vectors):
        log = train(
            system.model,
            [vectors],
            lambda epoch: rows,
            Ascent(system.pad_id, system.device),
            settings,
            run,
            length=lambda row: len(row.ids),
            stop_when=diverged,
        )
    logger.info(
        "optimised %d vectors for %d steps: %.2f to %.2f nats a token",
        len(places),
        log.num_steps,
        -log.loss[0],
        -log.loss[-1],
    )
    if log.stopped_early:
        logger.warning(
            "stopped as diverged at step %d: the forget text cost %.1f nats a token, more than max_forget_nll=%g: lower lr",
            log.num_steps,
            -log.loss[-1],
            config.max_forget_nll,
        )
    return vectors.detach()
