"""Both trainers: what a step sees, and the loops around the shared training machinery."""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temper.artefacts import Tuning
from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.data.retrieval import Corpus, Question
from temper.methods.retrieval.star_adore.card import STAGES, Config
from temper.methods.retrieval.star_adore.losses import lambda_rank_loss
from temper.ops.bm25 import bm25_search
from temper.ops.contrast import (
    BatchLoss,
    Contrasted,
    ContrastObjective,
    contrastive_loss,
    num_tokens,
    pairwise_loss,
)
from temper.ops.corpus_index import CorpusIndex, index_corpus, search_texts
from temper.ops.embed import vectors
from temper.ops.negatives import cross_rater, drop_likely_positives, encoder_rater, mine
from temper.ops.objectives import SumCount
from temper.ops.optim import adamw, lamb
from temper.ops.retrieve import Found, search
from temper.ops.train import TrainLog, TrainSettings, train
from temper.systems.encoder import Encoder
from temper.systems.loading import load_base

__all__ = [
    "AdoreObjective",
    "Asked",
    "Query",
    "hard_negatives",
    "live_lists",
    "ranked",
    "ranked_lists",
    "reset_last_layers",
    "scale_of",
    "star_items",
    "train_adore",
    "train_settings",
    "train_star",
]

logger = logging.getLogger(__name__)

NORMALISED_SCALE = 20.0
"""What inner products of vectors of length 1 are multiplied by (Departure 1): temperature 0.05."""
CROSS = "cross:"


def scale_of(system: Encoder, config: Config) -> float:
    """The factor on inner products."""
    return config.scale or (NORMALISED_SCALE if "normalize" in system.layout.steps else 1.0)


def train_settings(num_rows: int, config: Config) -> TrainSettings:
    """The stage's settings, with the paper's where none is given."""
    paper = STAGES[config.stage]
    batch_rows = config.batch_rows or paper.batch_rows
    steps = (
        config.max_steps or paper.max_steps or math.ceil(paper.num_epochs * math.ceil(num_rows / batch_rows))
    )
    warmup = paper.warmup_steps if config.warmup_steps < 0 else config.warmup_steps
    return TrainSettings(
        lr=config.lr or paper.lr,
        max_steps=steps,
        batch_rows=batch_rows,
        schedule="linear",
        warmup_ratio=min(1.0, warmup / steps),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def _train(
    tuned: Tuning,
    num_rows: int,
    items: Callable[[int], Sequence[Any]],
    objective: Any,
    length: Any,
    config: Config,
    run: Run,
) -> TrainLog:
    settings = train_settings(num_rows, config)
    build = (
        lamb
        if (config.optimizer or STAGES[config.stage].optimizer) == "lamb"
        else functools.partial(adamw, betas=(0.9, 0.999), eps=1e-8)
    )
    tuned.system.model.train(config.dropout)
    try:
        return train(
            tuned.system.model, tuned.parameters(), items, objective, settings, run, length=length,
            build_optimizer=lambda parameters: build(parameters, settings.lr, settings.weight_decay),
        )  # fmt: skip
    finally:
        tuned.system.model.eval()


def reset_last_layers(model: nn.Module, num: int, seed: int) -> None:
    """Draw the last `num` transformer layers anew, as for pre-training (Departure 7); raises ConfigError for too many."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=len, default=nn.ModuleList())
    if num > len(layers):
        raise ConfigError(f"reset_layers is {num}, the encoder has {len(layers)} layers", cure="Set fewer.")
    std = float(getattr(model.config, "initializer_range", 0.02))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in (part for layer in list(layers)[len(layers) - num :] for part in layer.modules()):
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, std)
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
                module.bias.zero_()


# ---- STAR


def ranked(
    system: Encoder, engine: str, queries: Sequence[str], corpus: Corpus, k: int, config: Config, run: Run
) -> Found:
    """The first k documents of each query, by the system or by BM25."""
    if engine == "bm25":
        return bm25_search(queries, corpus.texts, k)
    index = index_corpus(system.cut(config.document_tokens), corpus.texts, run, prompt=config.document_prompt)
    return search_texts(system.cut(config.query_tokens), queries, index, k, run, prompt=config.query_prompt)


def hard_negatives(
    system: Encoder, questions: Sequence[Question], corpus: Corpus, config: Config, run: Run
) -> list[list[int]]:
    """For each query its own labelled negatives and the best-ranked documents that are not relevant, `num_hard` at most."""
    texts = [question.text for question in questions]
    known = [set(question.relevant) for question in questions]
    depth = config.num_hard + max(map(len, known))  # Departure 4
    found = ranked(system, config.mine_with, texts, corpus, depth, config, run)
    mined = mine(found.indices_NK, known, config.num_hard)
    if config.filter_by:
        name = config.filter_by
        rate = (
            cross_rater(name.removeprefix(CROSS), run)
            if name.startswith(CROSS)
            else encoder_rater(_encoder(name, run), run)
        )
        before = sum(map(len, mined))
        mined = drop_likely_positives(mined, texts, known, corpus.texts, rate, config.filter_margin)
        logger.info("%s kept %d of %d hard negatives", name, sum(map(len, mined)), before)
    return [
        list(dict.fromkeys([*question.negatives, *places]))[: config.num_hard]
        for question, places in zip(questions, mined, strict=True)
    ]


def _encoder(name: str, run: Run) -> Encoder:
    system = load_base(name, device=run.device)
    if not isinstance(system, Encoder):
        raise ConfigError(f"filter_by={name!r} is no encoder", cure="Name an encoder, or cross:FOLDER.")
    return system


class Asked(NamedTuple):
    """Training queries as tokens, with what they are to find and the hard negatives they may draw."""

    queries: list[list[int]]
    relevant: list[tuple[int, ...]]
    hard: list[list[int]]
    num_documents: int
    read: Callable[[Sequence[int]], list[list[int]]]
    """Documents as tokens, by place: read when they are drawn, a large corpus never at once."""


def star_items(asked: Asked, config: Config, seed: int, epoch: int) -> list[Contrasted]:
    """An epoch: every query with one relevant document and one negative of its own, drawn by the seed."""
    drawn = [
        _draw(asked, number, config, random.Random(f"{seed}/star/{epoch}/{number}"))
        for number in range(len(asked.queries))
    ]
    needed = sorted({place for places in drawn for place in places})
    tokens = dict(zip(needed, asked.read(needed), strict=True))
    return [
        Contrasted(
            query,
            tuple(tokens[place] for place in places),
            names=tuple(map(str, places)),
            relevant=frozenset(map(str, known)),
        )
        for query, places, known in zip(asked.queries, drawn, asked.relevant, strict=True)
    ]


def _draw(asked: Asked, number: int, config: Config, draw: random.Random) -> list[int]:
    """Places of a relevant document and, where the kind of negatives has one, of another."""
    known = asked.relevant[number]
    places = [draw.choice(known)]
    if config.negatives == "random":
        some = draw.sample(range(asked.num_documents), min(len(known) + 1, asked.num_documents))
        places += [place for place in some if place not in known][:1]
    elif config.negatives != "in-batch" and asked.hard[number]:
        places.append(draw.choice(asked.hard[number]))
    return places


def train_star(tuned: Tuning, asked: Asked, config: Config, run: Run) -> TrainLog:
    """Minimise STAR's loss over the whole encoder."""
    scale = scale_of(tuned.system, config)
    pairwise = config.loss == "pairwise"
    loss: BatchLoss = (
        functools.partial(pairwise_loss, scale=scale)
        if pairwise
        else functools.partial(contrastive_loss, temperature=1 / scale)
    )
    objective = ContrastObjective(
        tuned.system, run.batch_tokens, cosine=False, loss=loss, per="pair" if pairwise else "query",
        shared=config.negatives != "hard",
    )  # fmt: skip
    items = functools.partial(star_items, asked, config, run.seed)
    return _train(tuned, len(asked.queries), items, objective, num_tokens, config, run)


# ---- ADORE


class Query(NamedTuple):
    """A query's tokens and the places of its relevant documents."""

    ids: list[int]
    relevant: tuple[int, ...]


def live_lists(found_BK: Tensor, relevant: Sequence[Sequence[int]]) -> list[list[int]]:
    """What was retrieved, in order; where no relevant document is among it, all relevant ones follow."""
    return [
        row if not set(known).isdisjoint(row) else [*row, *known]
        for row, known in zip(found_BK.tolist(), relevant, strict=True)
    ]


def ranked_lists(
    lists: Sequence[Sequence[int]], relevant: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Places, whether each is relevant and whether it is there, all (B, M), shorter lists filled with place 0."""
    longest = max(map(len, lists))
    place_BM = torch.tensor([[*row, *[0] * (longest - len(row))] for row in lists])
    real_BM = torch.tensor([[column < len(row) for column in range(longest)] for row in lists])
    relevant_BM = torch.tensor(
        [
            [place in known for place in row]
            for row, known in zip(place_BM.tolist(), map(set, relevant), strict=True)
        ]
    )
    return place_BM, relevant_BM & real_BM, real_BM


@dataclass(frozen=True)
class AdoreObjective:
    """LambdaRank over what the query encoder retrieves at this very step, for `train`; items are `Query`."""

    system: Encoder
    index: CorpusIndex
    top_k: int
    metric_cut: int
    scale: float
    run: Run
    weights: Mapping[str, float] = field(default_factory=lambda: {"lambda_rank": 1.0})

    def counts(self, items: Sequence[Query]) -> dict[str, float]:
        """Queries."""
        return {"lambda_rank": float(len(items))}

    def __call__(self, model: nn.Module, items: Sequence[Query]) -> dict[str, SumCount]:
        """The loss summed over queries; gradients reach the query vectors alone."""
        query_BD = vectors(self.system.with_(model=model), [item.ids for item in items])
        with torch.autocast(query_BD.device.type, enabled=False):
            found = search(query_BD.detach(), self.index.dense, self.top_k, self.run)
            relevant = [item.relevant for item in items]
            place_BM, relevant_BM, real_BM = ranked_lists(live_lists(found.indices_NK, relevant), relevant)
            documents_BMD = self.index.vectors_MD[place_BM.to(query_BD.device)]
            scores_BM = self.scale * torch.einsum("bd,bmd->bm", query_BD, documents_BMD)
            loss_B = lambda_rank_loss(
                scores_BM, relevant_BM.to(query_BD.device), real_BM.to(query_BD.device), self.metric_cut
            )
        return {"lambda_rank": SumCount(loss_B.sum(), len(items))}


def train_adore(tuned: Tuning, asked: Asked, index: CorpusIndex, config: Config, run: Run) -> TrainLog:
    """Minimise ADORE's loss over the query encoder; the documents are those of the index."""
    top_k = min(config.top_k, len(index.vectors_MD))
    objective = AdoreObjective(
        tuned.system, index, top_k, config.metric_cut or top_k, scale_of(tuned.system, config), run
    )  # Departure 2
    items = [Query(ids, known) for ids, known in zip(asked.queries, asked.relevant, strict=True)]
    return _train(tuned, len(items), lambda epoch: items, objective, lambda item: len(item.ids), config, run)
