"""What the study computes from scores and accuracies; no model here.

N items, F forgotten tasks (rows of the map), E evaluated tasks (columns).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Labels",
    "Shares",
    "accuracy",
    "clustered",
    "confidence",
    "draw_labels",
    "first_step",
    "forget_ratio",
    "hits",
    "rank_correlation",
    "variance_shares",
]

Labels = Literal["learn", "forget", "flip"]
Array = np.ndarray[Any, np.dtype[Any]]

LEAST_SKILL = 0.55
"""A model that is right less often never had the skill, and a ratio to what it had means nothing."""


class Shares(NamedTuple):
    """Shares of the map's variance that lie between rows, between columns, and in what is left."""

    forgotten: float
    tested: float
    rest: float


def draw_labels(count: int, labels: Labels, seed: str) -> list[bool]:
    """Whether each item is trained on its right response: all, none, or each with chance 1/2."""
    if labels == "forget":
        draw = random.Random(f"{seed}/labels")
        return [draw.random() < 0.5 for _ in range(count)]
    return [labels == "learn"] * count


def hits(lp_N2: Tensor) -> Tensor:
    """1 where the first response is likelier, 1/2 for a tie, else 0; shape (N,)."""
    difference_N = lp_N2[:, 0] - lp_N2[:, 1]
    return (difference_N > 0).double() + (difference_N == 0).double() / 2


def accuracy(lp_N2: Tensor) -> float:
    """Mean of `hits`."""
    return float(hits(lp_N2).mean())


def confidence(lp_N2: Tensor) -> Tensor:
    """pi(first) / (pi(first) + pi(second)), shape (N,)."""
    return torch.sigmoid(lp_N2[:, 0].double() - lp_N2[:, 1].double())


def forget_ratio(learnt: float, forgotten: float, *, flipped: bool = False) -> float | None:
    """Lost accuracy over what there was to lose: 1 complete, 0 none; may leave [0, 1]. None where nothing was learnt."""
    if learnt <= LEAST_SKILL:
        return None
    return (learnt - forgotten) / (2 * learnt - 1 if flipped else learnt - 0.5)


def variance_shares(map_FE: Array) -> Shares | None:
    """Two-way analysis of variance without repetition; None for a map that is the same everywhere."""
    total = ((map_FE - map_FE.mean()) ** 2).sum()
    if total < 1e-12:
        return None
    rows = map_FE.shape[1] * ((map_FE.mean(1) - map_FE.mean()) ** 2).sum() / total
    columns = map_FE.shape[0] * ((map_FE.mean(0) - map_FE.mean()) ** 2).sum() / total
    return Shares(float(rows), float(columns), float(1 - rows - columns))


def clustered(map_FE: Array) -> tuple[list[int], list[int]]:
    """Orders of rows and of columns in which similar ones are neighbours: average linkage over Euclidean distances."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    def order(points: Array) -> list[int]:
        return [0] if len(points) == 1 else leaves_list(linkage(points, method="average")).tolist()

    return order(map_FE), order(map_FE.T)


def first_step(steps: Sequence[int], values: Sequence[float], level: float, *, above: bool) -> int | None:
    """The first step at which the value is past the level, or None if it never is."""
    return next(
        (
            step
            for step, value in zip(steps, values, strict=True)
            if (value > level if above else value < level)
        ),
        None,
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rho; None for fewer than three pairs or where one side is the same everywhere."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(spearmanr(a, b).statistic)
