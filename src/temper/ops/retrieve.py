"""Exact dense search: the k items of a corpus with the largest inner product, for every query.

A rough pass, in bfloat16 where the run allows it, scores every item; a bound on its error says which items could
still be among the best k, and those alone are scored exactly. So the answer depends on no chunk size and no precision.

Shape letters: N queries, Q queries of one pass, M items, R blocks of items, E blocks over all chunks, F query-item
pairs that the bound leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from temper.core.errors import ConfigError, NumericsError
from temper.core.types import Run

__all__ = ["DenseIndex", "Found", "build_index", "search"]

SCORES = 1 << 20
"""Scores of one product: they stay in a core's cache while their maxima are taken."""
QUERIES = 128
"""Queries of one product."""
ROWS = 4096
"""Items converted at a time."""
ITEMS = 1 << 17
"""Items whose rough scores are kept at a time."""
BLOCK = 64
"""Items that share one maximum."""
PAIRS = 1024
"""Query-item pairs scored exactly at a time."""


class Found(NamedTuple):
    """The best items of each query, best first; of equal scores the smaller index comes first."""

    scores_NK: Tensor
    """Inner products, summed in float64 and rounded to float32."""
    indices_NK: Tensor


@dataclass(frozen=True, eq=False)
class DenseIndex:
    """A corpus ready to be searched many times. Its memory is that of the corpus, plus half in bfloat16."""

    corpus_MD: Tensor = field(repr=False)
    rough_MD: Tensor = field(repr=False)
    """What the rough pass multiplies by."""
    lost: float
    """The largest norm of a row of corpus - rough."""
    longest: float
    """The largest norm of a row."""

    def __len__(self) -> int:
        return len(self.corpus_MD)


def build_index(corpus_MD: Tensor, run: Run) -> DenseIndex:
    """An index of the rows, on the run's device. Raises ConfigError for an empty corpus, NumericsError for a row that is not finite."""
    if corpus_MD.ndim != 2 or not len(corpus_MD):
        raise ConfigError(
            f"The corpus has shape {tuple(corpus_MD.shape)}", cure="Give (items, width), one item at least."
        )
    corpus_MD = corpus_MD.detach().to(run.device, torch.float32).contiguous()
    norm_M = corpus_MD.norm(dim=1)
    _check_finite(norm_M, "item")
    if run.precision != "bf16" or run.exact or torch.device(run.device).type != "cpu":
        return DenseIndex(corpus_MD, corpus_MD, 0.0, float(norm_M.max()))
    rough_MD = corpus_MD.bfloat16()
    lost = max(
        float((part - rough.float()).norm(dim=1).max())
        for part, rough in zip(corpus_MD.split(ROWS), rough_MD.split(ROWS), strict=True)
    )
    return DenseIndex(corpus_MD, rough_MD, lost, float(norm_M.max()))


def search(queries_ND: Tensor, corpus: Tensor | DenseIndex, k: int, run: Run) -> Found:
    """The k items with the largest inner product, exactly, as a full sort of all scores would give them.

    A corpus with fewer than k items gives all of them. Give a `DenseIndex` to search one corpus more than once.
    """
    index = corpus if isinstance(corpus, DenseIndex) else build_index(corpus, run)
    if queries_ND.ndim != 2 or queries_ND.shape[1] != index.corpus_MD.shape[1]:
        raise ConfigError(
            f"The queries have shape {tuple(queries_ND.shape)}, the items width {index.corpus_MD.shape[1]}",
            cure="Embed both with the same encoder.",
        )
    if k < 1:
        raise ConfigError(f"k is {k}", cure="It must be at least 1.")
    queries_ND = queries_ND.detach().to(index.corpus_MD)
    _check_finite(queries_ND.norm(dim=1), "query")
    k = min(k, len(index))
    parts = [_search_some(part, index, k) for part in queries_ND.split(QUERIES)]
    if not parts:
        return Found(
            queries_ND.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=queries_ND.device)
        )
    return Found(
        torch.cat([part.scores_NK for part in parts]), torch.cat([part.indices_NK for part in parts])
    )


def _check_finite(norm_N: Tensor, what: str) -> None:
    bad = (~torch.isfinite(norm_N)).nonzero()
    if len(bad):
        raise NumericsError(
            "The vector is not finite", where=f"{what} {int(bad[0])}", cure="Check the encoder."
        )


def _search_some(queries_QD: Tensor, index: DenseIndex, k: int) -> Found:
    """The best of the whole corpus, taken from the best of its pieces."""
    found: Found | None = None
    for start in range(0, len(index), ITEMS):
        piece = slice(start, min(start + ITEMS, len(index)))
        own = _search_piece(queries_QD, index, piece, min(k, piece.stop - start))
        found = own if found is None else _merged(found, own, k)
    assert found is not None
    return found


def _merged(first: Found, second: Found, k: int) -> Found:
    """The best k of two lists; indices of the first are the smaller ones."""
    scores = torch.cat([first.scores_NK, second.scores_NK], dim=1)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return Found(
        scores.gather(1, order), torch.cat([first.indices_NK, second.indices_NK], dim=1).gather(1, order)
    )


def _search_piece(queries_QD: Tensor, index: DenseIndex, piece: slice, k: int) -> Found:
    """Rough scores, the pairs they leave, those scored exactly, the best k."""
    rough = _Rough(queries_QD, index, piece, k)
    query_F, item_F = rough.pairs(_cut(rough.least_Q(k), queries_QD, index))
    item_F = item_F + piece.start
    chunks = zip(query_F.split(PAIRS), item_F.split(PAIRS), strict=True)
    exact = [(queries_QD[q].double() * index.corpus_MD[m].double()).sum(1).float() for q, m in chunks]
    return _best(query_F, item_F, torch.cat(exact), len(queries_QD), k)


class _Rough:
    """Rough scores of a piece of the corpus, in chunks, and the maximum of every block of items.

    In a chunk of C items, block r holds items r, r + R, r + 2R, ...: maxima over columns are fast.
    """

    def __init__(self, queries_QD: Tensor, index: DenseIndex, piece: slice, k: int) -> None:
        rough_MD = index.rough_MD[piece]
        small_QD = queries_QD.to(rough_MD.dtype)
        self.num_items = len(rough_MD)
        # Few blocks would leave too many items in doubt.
        block = (
            min(BLOCK, 1 << max(0, self.num_items // (4 * k)).bit_length() - 1)
            if self.num_items >= 4 * k
            else 1
        )
        fits = max(SCORES // max(len(small_QD), 1) // BLOCK, 1) * BLOCK
        self.size = min(fits, -(-self.num_items // block) * block)
        num_chunks = -(-self.num_items // self.size)
        self.scores = small_QD.new_empty(num_chunks, len(small_QD), block, self.size // block)
        tops = []
        for number, part_MD in enumerate(rough_MD.split(self.size)):
            scores_QM = self.scores[number].view(len(small_QD), self.size)
            if len(part_MD) == self.size:
                torch.mm(small_QD, part_MD.T, out=scores_QM)
            else:
                scores_QM.fill_(-torch.inf)
                scores_QM[:, : len(part_MD)] = small_QD @ part_MD.T
            tops.append(_block_maxima(self.scores[number]))
        self.top_QE = torch.cat(tops, dim=1)

    def least_Q(self, k: int) -> Tensor:
        """A score that k items reach at least, by query."""
        return self.top_QE.topk(k, dim=1).values[:, -1].float()

    def pairs(self, cut_Q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and items of every pair whose rough score is at least the query's cut."""
        query_P, place_P = (self.top_QE.float() >= cut_Q[:, None]).nonzero(as_tuple=True)
        num_blocks = self.scores.shape[-1]
        chunk_P, block_P = place_P // num_blocks, place_P % num_blocks
        inside_PB = self.scores[chunk_P, query_P, :, block_P].float() >= cut_Q[query_P][:, None]
        pair_F, place_F = inside_PB.nonzero(as_tuple=True)
        item_F = chunk_P[pair_F] * self.size + place_F * num_blocks + block_P[pair_F]
        real_F = item_F < self.num_items
        return query_P[pair_F][real_F], item_F[real_F]


def _block_maxima(scores_QBR: Tensor) -> Tensor:
    """The maximum over the middle axis, a power of two long, by halving it: several times faster than `amax`."""
    while scores_QBR.shape[1] > 1:
        half = scores_QBR.shape[1] // 2
        scores_QBR = torch.maximum(scores_QBR[:, :half], scores_QBR[:, half:])
    return scores_QBR[:, 0]


def _cut(least_Q: Tensor, queries_QD: Tensor, index: DenseIndex) -> Tensor:
    """The rough score below which no item can be among the best, given one that k items reach.

    A rough score a is off by at most lost + share |a|: what rounding the vectors loses (Cauchy-Schwarz), sums in
    float32, and the score's own rounding. Items whose upper end is below the k-th's lower end are out.
    """
    kind = index.rough_MD.dtype
    share = 0.51 * torch.finfo(kind).eps  # half of eps is what rounding to nearest can do
    norm_Q = queries_QD.norm(dim=1)
    lost_Q = (queries_QD - queries_QD.to(kind).float()).norm(dim=1)
    sums = queries_QD.shape[1] * torch.finfo(torch.float32).eps
    off_Q = (
        norm_Q * index.lost
        + lost_Q * (index.longest + index.lost)
        + sums * (norm_Q + lost_Q) * (index.longest + index.lost)
    )
    end_Q = least_Q - share * least_Q.abs() - 2 * off_Q
    return torch.where(end_Q >= 0, end_Q / (1 + share), end_Q / (1 - share))


def _best(query_F: Tensor, item_F: Tensor, score_F: Tensor, num_queries: int, k: int) -> Found:
    """The k best pairs of each query; ties by item."""
    order = item_F.argsort(stable=True)
    order = order[score_F[order].argsort(descending=True, stable=True)]
    order = order[query_F[order].argsort(stable=True)]
    count_Q = torch.bincount(query_F, minlength=num_queries)
    first_Q = count_Q.cumsum(0) - count_Q
    chosen = order[first_Q[:, None] + torch.arange(k, device=order.device)]
    return Found(score_F[chosen], item_F[chosen])
