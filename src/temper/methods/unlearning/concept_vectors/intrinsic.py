"""How far a value vector and what it says have moved, as pure functions, and the rows they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from temper.core.types import Row
from temper.ops.tofu_metrics import mean_row

if TYPE_CHECKING:
    from temper.methods.unlearning.concept_vectors.original import State

__all__ = [
    "cosine",
    "drift_of",
    "intrinsic_rows",
    "jaccard",
    "preciser_ratio",
    "related_tokens_rate",
]

SPLIT = "vectors"
BETTER = {
    "cosine": False,
    "l2": True,
    "relative_l2": True,
    "jaccard": False,
    "preciser_ratio": False,
    "related_tokens_rate": False,
}
"""Whether higher means more of the concept is erased."""


def cosine(before_D: Tensor, after_D: Tensor) -> float:
    """Cosine of two vectors, at most 1 whatever rounding does."""
    value = torch.nn.functional.cosine_similarity(before_D.double(), after_D.double(), dim=0)
    return min(float(value), 1.0)


def jaccard(before: set[int], after: set[int]) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    return len(before & after) / len(before | after) if before | after else 1.0


def preciser_ratio(before: set[int], after: set[int], lexicon: set[int]) -> float | None:
    """How many of the top tokens are the concept's, after / before; None where none was."""
    return len(after & lexicon) / len(before & lexicon) if before & lexicon else None


def related_tokens_rate(before: set[int], after: set[int], lexicon: set[int]) -> float | None:
    """Share of the concept's tokens among the top ones that are still among them; None where there was none."""
    related = before & lexicon
    return len(related & after) / len(related) if related else None


def drift_of(before_RD: Tensor, after_RD: Tensor) -> float:
    """|E' - E| / |E| over the rows compared, by the Frobenius norm."""
    return float((after_RD.double() - before_RD.double()).norm() / before_RD.double().norm())


def intrinsic_rows(before: State, after: State, concepts: Sequence[str]) -> Iterator[Row]:
    """Each measure for each concept and its mean, and how far the output embedding has drifted."""
    found: dict[str, list[float | None]] = {name: [] for name in BETTER}
    for place in range(len(concepts)):
        old_D, new_D = before.vectors_PD[place], after.vectors_PD[place]
        # Each with its own model's output embedding: it may have moved too.
        tops = [set(state.top_ids_PK[place].tolist()) for state in (before, after)]
        lexicon = set(before.lexicons[place])
        found["cosine"].append(cosine(old_D, new_D))
        found["l2"].append(float((new_D - old_D).norm()))
        found["relative_l2"].append(float((new_D - old_D).norm() / old_D.norm()))
        found["jaccard"].append(jaccard(*tops))
        found["preciser_ratio"].append(preciser_ratio(tops[0], tops[1], lexicon))
        found["related_tokens_rate"].append(related_tokens_rate(tops[0], tops[1], lexicon))
    for metric, values in found.items():
        yield from _rows(metric, values, concepts)
    drift = drift_of(before.embedding_RD, after.embedding_RD)
    yield Row(metric="embedding_drift", value=drift, n=len(before.embedding_RD), split=SPLIT)


def _rows(metric: str, values: Sequence[float | None], concepts: Sequence[str]) -> Iterator[Row]:
    better, known = BETTER[metric], [value for value in values if value is not None]
    note = "none of the vector's top tokens is the concept's"
    if known:
        yield mean_row(metric, known, SPLIT, better)
    else:
        yield Row(metric=metric, value=None, n=0, split=SPLIT, higher_is_better=better, note=note)
    for concept, value in zip(concepts, values, strict=True):
        yield Row(
            metric=metric,
            value=value,
            item=concept,
            split=SPLIT,
            higher_is_better=better,
            note="" if value is not None else note,
        )
