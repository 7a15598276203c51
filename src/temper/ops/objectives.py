"""Losses as the training loop takes them: named terms, each a sum and a count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from temper.ops.batching import Example, collate
from temper.ops.logprobs import score_batch

__all__ = ["Objective", "SftObjective", "SumCount"]

Item_contra = TypeVar("Item_contra", contravariant=True)


class SumCount(NamedTuple):
    """A loss as its sum and what it is summed over; the loop divides, once."""

    total: Tensor
    count: float  # type: ignore[assignment]


class Objective(Protocol[Item_contra]):
    """What is minimised: the sum over terms of weight * total / count.

    An objective that compares items within a batch sets `unsplittable = True` (absent means False); it then gets
    all items of a step in one call, which must fit the token budget unless it says `bounds_memory = True`. One that
    only asks for `score_batch` sets `packs = True` (absent means False): where rows are read end to end, a
    micro-batch is then filled by their tokens alone. One whose items hold several rows that stand side by side in a
    batch has a function `longest` of an item: the tokens of the longest, which choose the attention (absent means `length`).
    """

    @property
    def weights(self) -> Mapping[str, float]:
        """Term -> its weight."""

    def counts(self, items: Sequence[Item_contra]) -> Mapping[str, float]:
        """Term -> its denominator over `items`; a term that counts 0 is left out of the step."""

    def __call__(self, model: nn.Module, items: Sequence[Item_contra]) -> Mapping[str, SumCount]:
        """Term -> its sum over `items`, with gradient, and its count."""


@dataclass(frozen=True)
class SftObjective:
    """Negative log-likelihood of the scored tokens, in nats a token; items are Examples."""

    pad_id: int
    device: str | torch.device = "cpu"
    weights: Mapping[str, float] = field(default_factory=lambda: {"nll": 1.0})
    packs: ClassVar[bool] = True

    def counts(self, items: Sequence[Example]) -> dict[str, float]:
        """Scored tokens."""
        return {"nll": float(sum(sum(item.scored) for item in items))}

    def __call__(self, model: nn.Module, items: Sequence[Example]) -> dict[str, SumCount]:
        """Minus the sum of the scored tokens' log-probabilities."""
        logp_S = score_batch(model, collate(items, self.pad_id, self.device)).logp_S
        return {"nll": SumCount(-logp_S.sum(), len(logp_S))}
