"""Keeping what a model does: the cross-entropy of rows, and the distance of its hidden states to those it began with.

Hidden states are the embeddings' output, every layer's output, and in the last one's place what the final norm makes of
it, as transformers lists them. B rows, T columns, D width, L hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from temper.ops.batching import Batch, Example, collate
from temper.ops.hooks import Captured, capture
from temper.ops.objectives import SumCount
from temper.ops.projection import wanted_hidden
from temper.ops.toward_away import TokenScores, score_tokens
from temper.systems import anchors

__all__ = [
    "RetainObjective",
    "hidden_sites",
    "hidden_states",
    "mean_distance",
    "num_positions",
    "read_positions",
    "scored_states",
]


def hidden_sites(model: nn.Module) -> list[str]:
    """Where the L hidden states are read."""
    num_layers = len(anchors.layers(model))
    blocks = [f"layers.{number}.output" for number in range(num_layers - 1)]
    return ["embeddings.output", *blocks, "final_norm.output"]


def hidden_states(model: nn.Module, batch: Batch) -> list[Tensor]:
    """L hidden states (B, T, D), detached; the vocabulary projection is not computed."""
    with capture(model, hidden_sites(model)) as seen:
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT.long()}
        wanted_hidden(model, inputs, torch.zeros_like(batch.mask_BT))
    return _last(seen)


def scored_states(model: nn.Module, batch: Batch) -> tuple[TokenScores, list[Tensor]]:
    """The scored tokens' log-probabilities and the L hidden states, of one forward pass, with gradient."""
    with capture(model, hidden_sites(model), grad=True) as seen:
        scores = score_tokens(model, batch)
    return scores, _last(seen)


def _last(seen: Captured) -> list[Tensor]:
    """Of the last forward pass: a model whose head is met for the first time is tried on one token before."""
    return [passes[-1] for passes in seen.passes.values()]


def read_positions(batch: Batch, num_skipped: int) -> Tensor:
    """Real tokens but for each row's first `num_skipped`, (B, T) bool, of a batch padded on the right."""
    at_BT = batch.mask_BT.clone()
    at_BT[:, :num_skipped] = False
    return at_BT


def num_positions(rows: Sequence[Example], num_skipped: int) -> float:
    """How many positions `read_positions` marks."""
    return float(sum(max(0, len(row.ids) - num_skipped) for row in rows))


def mean_distance(states: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """L2 distance of each token's hidden states to earlier ones, a mean over the L of them, (B, T), float32."""
    gaps = [
        torch.linalg.vector_norm(new.float() - old.float(), dim=-1)
        for new, old in zip(states, before, strict=True)
    ]
    return torch.stack(gaps).mean(0)


@dataclass(frozen=True)
class RetainObjective:
    """Terms "retain", nats a scored token, and "hidden", the distance to `reference`'s hidden states a position.

    `reference` is a context manager that gives the system as it was; items are Examples.
    """

    reference: Callable[[], AbstractContextManager[Any]]
    pad_id: int
    device: str | torch.device = "cpu"
    num_skipped: int = 1
    """First tokens of each row whose hidden states are not compared: some models keep a huge vector there."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"retain": 1.0, "hidden": 1.0})

    def counts(self, items: Sequence[Example]) -> dict[str, float]:
        """Scored tokens and compared positions."""
        return {
            "retain": float(sum(sum(row.scored) for row in items)),
            "hidden": num_positions(items, self.num_skipped),
        }

    def __call__(self, model: nn.Module, items: Sequence[Example]) -> dict[str, SumCount]:
        """Both sums."""
        batch = collate(items, self.pad_id, self.device)
        with self.reference() as before:
            start = hidden_states(before.model, batch)
        scores, states = scored_states(model, batch)
        at_BT = read_positions(batch, self.num_skipped)
        distance = mean_distance(states, start)[at_BT].sum()
        return {
            "retain": SumCount(-scores.logp_S.sum(), len(scores.logp_S)),
            "hidden": SumCount(distance, float(at_BT.sum())),
        }
