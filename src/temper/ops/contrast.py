"""Contrastive training of encoders: queries beside the candidates of a whole batch.

Every item's candidates (its positive first, then its own hard negatives) are candidates of every query. The batch
is one comparison and cannot be split; instead its texts are encoded in chunks, whose activations are computed again
in the backward pass. So memory is bounded by a chunk and the gradient is that of the whole batch (GradCache,
arXiv:2101.06983).

Shape letters: B queries, K candidates of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.ops.embed import vectors
from temper.ops.objectives import SumCount

if TYPE_CHECKING:
    from temper.systems.encoder import Encoder

__all__ = [
    "BatchLoss",
    "ContrastObjective",
    "Contrasted",
    "contrastive_loss",
    "num_tokens",
    "pairwise_loss",
    "similarities",
]


class Contrasted(NamedTuple):
    """A query and its candidates, as ids: the positive, then its hard negatives.

    `names` tells candidates apart (one each, or none) and `relevant` names those that are positives of this query:
    in the batch of another item they are no negatives of it.
    """

    query: list[int]
    candidates: tuple[list[int], ...]
    names: tuple[str, ...] = ()
    relevant: frozenset[str] = frozenset()


BatchLoss = Callable[[Tensor, Tensor, Tensor], SumCount]
"""From scores (B, K), the place of each query's positive (B,) and which candidates count for it (B, K), bool."""


def similarities(query_BD: Tensor, candidate_KD: Tensor, *, cosine: bool = True) -> Tensor:
    """Cosines or inner products of every query and candidate, (B, K), float32 (float64 for float64)."""
    if cosine:
        query_BD, candidate_KD = nn.functional.normalize(query_BD), nn.functional.normalize(candidate_KD)
    return query_BD @ candidate_KD.T


def contrastive_loss(
    scores_BK: Tensor, positive_B: Tensor, counts_BK: Tensor, *, temperature: float = 0.05
) -> SumCount:
    """Softmax cross-entropy of each query's positive among the candidates that count for it, summed over queries, in nats.

    The multiple negatives ranking loss is this with cosines and temperature 1/20.
    """
    logits_BK = (scores_BK / temperature).masked_fill(~counts_BK, -torch.inf)
    return SumCount(nn.functional.cross_entropy(logits_BK, positive_B, reduction="sum"), len(scores_BK))


def pairwise_loss(
    scores_BK: Tensor, positive_B: Tensor, counts_BK: Tensor, *, scale: float = 1.0
) -> SumCount:
    """log(1 + exp(scale (negative - positive))) of each query and each other candidate that counts, summed over the pairs, in nats."""
    negative_BK = counts_BK.scatter(1, positive_B[:, None], False)
    above_BK = scale * (scores_BK - scores_BK.gather(1, positive_B[:, None]))
    pairs = nn.functional.softplus(above_BK[negative_BK])
    return SumCount(pairs.sum(), pairs.numel())


def num_tokens(item: Contrasted) -> int:
    """Tokens of the query and all its candidates: the `length` of an item for `train`."""
    return len(item.query) + sum(map(len, item.candidates))


@dataclass(frozen=True)
class ContrastObjective:
    """A loss over all queries and candidates of a step, for `train`; items are `Contrasted`, encoded by `system`.

    `chunk_tokens` bounds a chunk; a batch within it is encoded once. `loss` takes scores as `similarities` gives them.
    """

    system: Encoder
    chunk_tokens: int = Run.batch_tokens
    cosine: bool = True
    loss: BatchLoss = contrastive_loss
    per: Literal["query", "pair"] = "query"
    """What the loss counts: queries, or pairs of a query and a negative."""
    shared: bool = True
    """Whether the candidates of other queries count; else a query's own alone."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"contrast": 1.0})
    unsplittable: bool = True
    bounds_memory: bool = True
    """Within a step its own chunks keep to the budget."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}", cure="It must be at least 1.")

    def counts(self, items: Sequence[Contrasted]) -> dict[str, float]:
        """Queries, or pairs."""
        if self.per == "query":
            return {"contrast": float(len(items))}
        return {"contrast": float(_candidates(items, self.shared)[1].sum()) - len(items)}

    def __call__(self, model: nn.Module, items: Sequence[Contrasted]) -> dict[str, SumCount]:
        """The loss over the batch."""
        rows = [item.query for item in items] + list(chain.from_iterable(item.candidates for item in items))
        encoded_ND = self._encoded(self.system.with_(model=model), rows)
        query_BD, candidate_KD = encoded_ND[: len(items)], encoded_ND[len(items) :]
        positive_B, counts_BK = _candidates(items, self.shared)
        with torch.autocast(encoded_ND.device.type, enabled=False):
            scores_BK = similarities(query_BD, candidate_KD, cosine=self.cosine)
            return {
                "contrast": self.loss(
                    scores_BK, positive_B.to(scores_BK.device), counts_BK.to(scores_BK.device)
                )
            }

    def _encoded(self, system: Encoder, rows: list[list[int]]) -> Tensor:
        """Vectors of all rows; with more than one chunk, activations are kept of none."""
        chunks = _chunks(system, [len(row) for row in rows], self.chunk_tokens)
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [vectors(system, [rows[place] for place in places]) for places in chunks]
        else:
            parts = [
                checkpoint(vectors, system, [rows[place] for place in places], use_reentrant=False)
                for places in chunks
            ]
        order = torch.tensor(list(chain.from_iterable(chunks)))
        return torch.cat(parts)[order.argsort().to(parts[0].device)]


def _chunks(system: Encoder, lengths: list[int], budget: int) -> list[list[int]]:
    """Places in chunks of like lengths; a row without padding costs its own tokens, in a padded batch those of the longest."""
    chunks: list[list[int]] = []
    used = longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        cost = lengths[place] if system.takes_rows else longest
        if not chunks or used + cost > budget:
            chunks.append([])
            used, longest, cost = 0, lengths[place], lengths[place]
        chunks[-1].append(place)
        used += cost
    return chunks


def _candidates(items: Sequence[Contrasted], shared: bool) -> tuple[Tensor, Tensor]:
    """Where each query's positive stands among the batch's candidates, (B,), and which count for it, (B, K)."""
    sizes = [len(item.candidates) for item in items]
    for place, item in enumerate(items):
        if not item.candidates or len(item.names) not in (0, len(item.candidates)):
            raise DataError(
                f"A query has {len(item.candidates)} candidates and {len(item.names)} names",
                where=f"item {place} of the batch",
                cure="Give a positive at least, and a name for each candidate or for none.",
            )
    positive_B = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    names = [name for item in items for name in (item.names or [""] * len(item.candidates))]
    counts_BK = torch.tensor([[name not in item.relevant for name in names] for item in items])
    if not shared:
        owner_K = torch.arange(len(items)).repeat_interleave(torch.tensor(sizes))
        counts_BK &= owner_K == torch.arange(len(items))[:, None]
    counts_BK[torch.arange(len(items)), positive_B] = True
    return positive_B, counts_BK
