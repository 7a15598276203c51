"""BM25: lexical search through bm25s, and documents that share words with a query without being meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from temper.core.errors import ConfigError, DataError, NeedsError
from temper.ops.retrieve import Found

__all__ = ["bm25_search"]


def bm25_search(
    queries: Sequence[str], corpus: Sequence[str], k: int, *, k1: float = 0.9, b: float = 0.4
) -> Found:
    """The k documents with the largest BM25 score for every query, best first; equal scores by place in the corpus.

    Words are lower-cased and English stop words dropped; `k1` and `b` are those of common MS MARCO baselines. A corpus
    with fewer than k documents gives all of them. Raises DataError for a corpus without a word.
    """
    try:
        import bm25s
    except ImportError:
        raise NeedsError("BM25 needs bm25s", cure="pip install 'temper-ml[retrieval]'") from None
    if k < 1:
        raise ConfigError(f"k is {k}", cure="It must be at least 1.")
    words = bm25s.tokenize(list(corpus), stopwords="en", return_ids=False, show_progress=False)
    if not any(words):
        raise DataError("The corpus holds no word that BM25 could index", cure="Give documents with text.")
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(words, show_progress=False)
    asked = bm25s.tokenize(list(queries), stopwords="en", return_ids=False, show_progress=False)
    k, nothing = min(k, len(corpus)), torch.zeros(len(corpus))
    best = [_best(torch.from_numpy(index.get_scores(row)).float() if row else nothing, k) for row in asked]
    if not best:
        return Found(torch.zeros(0, k), torch.zeros(0, k, dtype=torch.long))
    return Found(torch.stack([row.values for row in best]), torch.stack([row.indices for row in best]))


class _Best(NamedTuple):
    values: Tensor
    indices: Tensor


def _best(score_M: Tensor, k: int) -> _Best:
    """The k largest; of equal ones the first."""
    place_F = (score_M >= score_M.topk(k).values[-1]).nonzero()[:, 0]
    order = score_M[place_F].argsort(descending=True, stable=True)[:k]
    return _Best(score_M[place_F[order]], place_F[order])
