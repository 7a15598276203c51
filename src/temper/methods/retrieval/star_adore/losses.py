"""ADORE's loss: LambdaRank for the reciprocal rank. STAR's is `pairwise_loss` of `ops/contrast.py`.

Shape letters: B queries, M ranked documents (the longest list's), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["lambda_rank_loss", "rank_values"]


def rank_values(num: int, metric_cut: int) -> Tensor:
    """1/r for the ranks 1, 2, ... up to the cut, 0 behind it, (num,)."""
    rank_M = torch.arange(1, num + 1)
    return torch.where(rank_M <= metric_cut, 1.0 / rank_M, 0.0)


def lambda_rank_loss(scores_BM: Tensor, relevant_BM: Tensor, real_BM: Tensor, metric_cut: int) -> Tensor:
    """Each query's loss, (B,), in nats: pairs of a relevant document and another, weighed by what their swap would change.

    Columns stand in the order of retrieval, not of the scores; `real_BM` marks those that are there. The pairs' mean is
    taken by query (Departure 3). A query without such a pair has loss 0.
    """
    value_M = rank_values(scores_BM.shape[1], metric_cut).to(scores_BM)
    pair_BMM = (relevant_BM & real_BM)[:, :, None] & (~relevant_BM & real_BM)[:, None, :]
    weight_MM = (value_M[:, None] - value_M[None, :]).abs()
    each_BMM = weight_MM * nn.functional.softplus(scores_BM[:, None, :] - scores_BM[:, :, None])
    count_B = pair_BMM.sum((1, 2)).clamp(min=1)
    return torch.where(pair_BMM, each_BMM, 0.0).sum((1, 2)) / count_B
