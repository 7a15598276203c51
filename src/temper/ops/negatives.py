"""Hard negatives: what a search finds for a query and no label calls relevant, and the check that it is not relevant.

A document that a search ranks high and nobody judged may well answer the query. A second, stronger model (a cross-encoder,
or another encoder) can say so: what it rates nearly as high as the labelled positive is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from temper.core.errors import DataError, ModelError
from temper.core.types import Run
from temper.ops.embed import embed
from temper.ops.precision import autocast

if TYPE_CHECKING:
    from temper.systems.encoder import Encoder

__all__ = ["Rater", "cross_rater", "drop_likely_positives", "encoder_rater", "mine"]

Rater = Callable[[Sequence[tuple[str, str]]], Tensor]
"""From (query, document) pairs, how well each document answers its query, (N,)."""


def mine(found_NK: Tensor, positives: Sequence[Collection[int]], num: int) -> list[list[int]]:
    """For each query the best `num` places found that are none of its positives, best first; fewer where no more were found."""
    if len(found_NK) != len(positives):
        raise DataError(
            f"{len(found_NK)} rankings for {len(positives)} queries",
            cure="Search with the queries themselves.",
        )
    return [
        [place for place in row if place not in known][:num]
        for row, known in zip(found_NK.tolist(), positives, strict=True)
    ]


def drop_likely_positives(
    negatives: Sequence[Sequence[int]],
    queries: Sequence[str],
    positives: Sequence[Collection[int]],
    corpus: Sequence[str],
    rate: Rater,
    margin: float,
) -> list[list[int]]:
    """The negatives that `rate` puts more than `margin` below the query's worst-rated positive."""
    pairs = [
        (query, corpus[place])
        for query, known, mined in zip(queries, positives, negatives, strict=True)
        for place in (*known, *mined)
    ]
    ratings = iter(rate(pairs).tolist() if pairs else [])
    kept = []
    for known, mined in zip(positives, negatives, strict=True):
        limit = min([next(ratings) for _ in known], default=float("inf")) - margin
        kept.append([place for place in mined if next(ratings) < limit])
    return kept


def encoder_rater(system: Encoder, run: Run) -> Rater:
    """Cosines of another encoder; every text is embedded once."""

    def rate(pairs: Sequence[tuple[str, str]]) -> Tensor:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors_ND = torch.nn.functional.normalize(embed(system, texts, run))
        place = {text: number for number, text in enumerate(texts)}
        left, right = ([place[pair[side]] for pair in pairs] for side in (0, 1))
        return (vectors_ND[left] * vectors_ND[right]).sum(1)

    return rate


def cross_rater(folder: Path | str, run: Run, *, max_tokens: int = 512, batch_rows: int = 32) -> Rater:
    """Logits of a cross-encoder: a transformers sequence classifier with one output, from a folder or a hub.

    Raises ModelError for a classifier with several outputs.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    model = model.to(run.device).eval()
    if model.config.num_labels != 1:
        raise ModelError(
            f"The classifier has {model.config.num_labels} outputs", where=str(folder),
            cure="A cross-encoder for ranking has one.",
        )  # fmt: skip

    def rate(pairs: Sequence[tuple[str, str]]) -> Tensor:
        out_N = torch.zeros(len(pairs))
        order = sorted(range(len(pairs)), key=lambda n: -sum(map(len, pairs[n])))
        with torch.inference_mode(), autocast(run):
            for start in range(0, len(order), batch_rows):
                places = order[start : start + batch_rows]
                left, right = ([pairs[n][side] for n in places] for side in (0, 1))
                batch = tokenizer(
                    left, right, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt"
                )
                out_N[places] = model(**batch.to(run.device)).logits[:, 0].float().cpu()
        return out_N

    return rate
