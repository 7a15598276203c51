"""Finding concept vectors: which columns speak a concept's words, and which of those the concept's answers rest on."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from temper.core.errors import NeedsError
from temper.core.types import Json, Run
from temper.methods.unlearning.concept_vectors.card import Config
from temper.methods.unlearning.concept_vectors.items import Item
from temper.methods.unlearning.concept_vectors.needle import noised
from temper.ops.batching import Example
from temper.ops.generate import Sampling, generate, prompt_ids
from temper.ops.logprobs import response_logprobs
from temper.ops.value_vectors import (
    Place,
    down_projection,
    num_layers,
    output_embedding,
    replaced,
    top_tokens,
    vectors_at,
)
from temper.systems.causal_lm import CausalLM

__all__ = [
    "Candidate",
    "control_for",
    "is_strong",
    "lexicon_mask",
    "mine",
    "own_answers",
    "rank",
    "vocabulary_words",
    "word_of",
]

logger = logging.getLogger(__name__)

NUM_LIKE = 32
"""Columns nearest in norm of which a control is drawn."""


class Candidate(NamedTuple):
    """A value vector, how many of its top tokens are the concept's, and what answers lose without it, in nats a token."""

    place: Place
    overlap: int
    strength: float
    target_drop: float = 0.0
    unrelated_drop: float = 0.0

    @property
    def selectivity(self) -> float:
        # A vector without which unrelated answers gain is as little the concept's alone.
        return self.target_drop - abs(self.unrelated_drop)

    def columns(self) -> dict[str, Json]:
        """As it stands in an item's column Candidates."""
        return {
            "Layer": self.place.layer,
            "Dim": self.place.dim,
            "Overlap": self.overlap,
            "Target_drop": round(self.target_drop, 5),
            "Unrelated_drop": round(self.unrelated_drop, 5),
        }


def word_of(piece: str) -> str:
    """A token's text as words are compared: without blanks and case."""
    return piece.strip().lower()


def vocabulary_words(system: CausalLM) -> list[str]:
    """`word_of` every id that the output embedding has; "" where the tokenizer has no text for one."""
    size = len(output_embedding(system.model))
    known = min(size, len(system.tokenizer))
    texts = system.tokenizer.batch_decode([[token] for token in range(known)])
    return [word_of(text) for text in texts] + [""] * (size - known)


def lexicon_mask(system: CausalLM, words: Sequence[str], text: str) -> Tensor:
    """Which ids are words of a concept's page, (V,) bool: stop words, single letters and signs left out (Departure 4)."""
    kept = {words[token] for token in system.chat.text_ids(text, begin=False)} - _stop_words()
    kept = {word for word in kept if len(word) > 1 and any(letter.isalpha() for letter in word)}
    return torch.tensor([word in kept for word in words])


def _stop_words() -> frozenset[str]:
    try:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    except ImportError:
        raise NeedsError(
            "Stop words need scikit-learn",
            where="concept-vectors",
            cure='Install it: pip install "temper-ml[report]".',
        ) from None
    return frozenset(ENGLISH_STOP_WORDS)


def is_strong(strength_F: Tensor, weak_share: float) -> Tensor:
    """Which of a layer's vectors are not among its weakest, (F,) bool: strength is the mean of the top logits."""
    return strength_F >= strength_F.quantile(weak_share)


def rank(system: CausalLM, masks: Sequence[Tensor], config: Config, run: Run) -> list[list[Candidate]]:
    """For each lexicon mask the vectors with most of its tokens among their top ones, over all layers, best first."""
    embedding_VD = output_embedding(system.model)
    layers = config.layers or tuple(range(num_layers(system.model)))
    found: list[list[Candidate]] = [[] for _ in masks]
    for layer in run.ticker(layers, total=len(layers), label="project"):
        top = top_tokens(down_projection(system.model, layer).columns().T, embedding_VD, config.top_k)
        strong_F, ids_FK = is_strong(top.strength_P, config.weak_share), top.ids_PK
        for mask_V, candidates in zip(masks, found, strict=True):
            overlap_F = mask_V.to(ids_FK.device)[ids_FK].sum(1).masked_fill(~strong_F, -1)
            # Ties go to the stronger vector.
            order_F = overlap_F + top.strength_P / (2 * top.strength_P.abs().max() + 1e-9)
            for dim in order_F.argsort(descending=True)[: config.num_candidates].tolist():
                if strong_F[dim]:
                    strength = float(top.strength_P[dim])
                    candidates.append(Candidate(Place(layer, dim), int(overlap_F[dim]), strength))
    return [
        sorted(candidates, key=lambda c: (-c.overlap, -c.strength, c.place))[: config.num_candidates]
        for candidates in found
    ]


def own_answers(system: CausalLM, questions: Sequence[str], num_tokens: int, run: Run) -> list[Example]:
    """The model's own greedy answers as rows whose answer tokens are scored (Departure 2)."""
    ids = [prompt_ids(system, question) for question in questions]
    replies = generate(system, ids, Sampling(max_new_tokens=num_tokens, seed=run.seed), run)
    if not any(reply.text.strip() for reply in replies):
        logger.warning("the model answers none of %d questions, such as %r", len(questions), questions[0])
    return [
        Example([*prompt, *reply.ids], [False] * len(prompt) + [True] * len(reply.ids))
        for prompt, reply in zip(ids, replies, strict=True)
    ]


def mine(system: CausalLM, items: Sequence[Item], config: Config, run: Run) -> list[list[Candidate]]:
    """For each item its candidates by their projection, the most selective first."""
    words = vocabulary_words(system)
    masks = [lexicon_mask(system, words, item.text) for item in items]
    found = []
    for item, candidates in zip(items, rank(system, masks, config, run), strict=True):
        tested = _validated(system, item, candidates, config, run)
        best = max(tested, key=lambda c: c.selectivity)
        if best.selectivity <= 0 or not best.overlap:
            logger.warning(
                "%s: no column speaks its words and matters for its answers alone (best: %d of %d top tokens, "
                "selectivity %.4f nats a token); it may be spread over many",
                item.concept,
                best.overlap,
                config.top_k,
                best.selectivity,
            )
        found.append(sorted(tested, key=lambda c: -c.selectivity))
    return found


def _validated(
    system: CausalLM, item: Item, candidates: Sequence[Candidate], config: Config, run: Run
) -> list[Candidate]:
    """The candidates with what the item's probes lose when one is zeroed or noised."""
    target, unrelated = item.probes.target, item.probes.unrelated[: config.num_unrelated or None]
    rows = own_answers(system, [*target, *unrelated], config.probe_tokens, run)
    before_N = response_logprobs(system, rows, reduce="mean", run=run)
    tested: list[Candidate] = []
    label = f"validate {item.concept}"
    each: Iterable[Any] = run.ticker(candidates, total=len(candidates), label=label)
    for candidate in each:
        start_PD = vectors_at(system.model, [candidate.place])
        ablated_PD = torch.zeros_like(start_PD)
        if config.validate_by == "noise":
            ablated_PD = noised(start_PD, config.noise, config.noise_unit, run.seed)
        with replaced(system.model, [candidate.place], ablated_PD):
            drop_N = before_N - response_logprobs(system, rows, reduce="mean", run=run)
        means = (float(drop_N[: len(target)].mean()), float(drop_N[len(target) :].mean()))
        tested.append(candidate._replace(target_drop=means[0], unrelated_drop=means[1]))
    return tested


def control_for(model: Any, place: Place, taken: Sequence[Place], seed: int) -> Place:
    """A column of the same layer with about the same norm, drawn by the seed; never one of `taken`."""
    norms_F = down_projection(model, place.layer).columns().float().norm(dim=0)
    others = {p.dim for p in (*taken, place) if p.layer == place.layer}
    order = (norms_F - norms_F[place.dim]).abs().argsort(stable=True).tolist()
    like = [dim for dim in order if dim not in others][:NUM_LIKE]
    return Place(place.layer, random.Random(f"{seed}/{place.layer}/{place.dim}").choice(like))
