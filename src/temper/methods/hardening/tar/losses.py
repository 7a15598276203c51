"""What tampering should not undo: the losses of both safeguards.

Shapes: L hidden states (B, T, D); S positions; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from temper.ops.batching import Batch, Example, collate
from temper.ops.logprobs import position_logits
from temper.ops.objectives import SumCount
from temper.ops.projection import CHUNK_LOGITS, head_is_plain, head_of, wanted_hidden
from temper.ops.retain import num_positions, read_positions, scored_states

__all__ = [
    "EntropyObjective",
    "MappingObjective",
    "MappingPair",
    "entropy",
    "mapping_loss",
    "random_rows",
]


def entropy(logits_SV: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, (S,), float32."""
    logp_SV = logits_SV.float().log_softmax(-1)
    return -(logp_SV.exp() * logp_SV).sum(-1)


def mapping_loss(states: Sequence[Tensor], wanted_BTD: Tensor) -> Tensor:
    """1 - |cos| of every token's hidden states and its random vector, a mean over the L of them, (B, T), float32."""
    losses = [1 - F.cosine_similarity(state.float(), wanted_BTD, dim=-1).abs() for state in states]
    return torch.stack(losses).mean(0)


def random_rows(num_ids: int, width: int, seed: int) -> Tensor:
    """H, (V, D): a normal vector of length about sqrt(D) for each token id, the same for a seed on every machine."""
    return torch.randn(num_ids, width, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class EntropyObjective:
    """Minus the entropy of the next token, a mean over the rows' real positions (Departure 1); items are Examples."""

    pad_id: int
    device: str | torch.device = "cpu"
    weights: Mapping[str, float] = field(default_factory=lambda: {"entropy": 1.0})
    packs: ClassVar[bool] = True

    def counts(self, items: Sequence[Example]) -> dict[str, float]:
        """Real tokens."""
        return {"entropy": float(sum(len(row.ids) for row in items))}

    def __call__(self, model: nn.Module, items: Sequence[Example]) -> dict[str, SumCount]:
        """Minus the sum of the entropies; logits exist a chunk at a time."""
        batch = collate(items, self.pad_id, self.device)
        return {"entropy": SumCount(-_summed_entropy(model, batch), float(batch.mask_BT.sum()))}


def _summed_entropy(model: nn.Module, batch: Batch) -> Tensor:
    if not head_is_plain(model):
        return entropy(position_logits(model, batch, batch.mask_BT)).sum()
    hidden = wanted_hidden(model, {"input_ids": batch.ids_BT}, batch.mask_BT)
    head = head_of(model)

    def chunk(hidden_SD: Tensor) -> Tensor:
        return entropy(head(hidden_SD)).sum()

    parts = hidden.hidden_SD.split(max(1, CHUNK_LOGITS // hidden.num_ids))
    again = torch.is_grad_enabled() and len(parts) > 1
    sums = [checkpoint(chunk, part, use_reentrant=False) if again else chunk(part) for part in parts]
    return torch.stack(sums).sum()


@dataclass(frozen=True)
class MappingPair:
    """A row to keep and a row whose hidden states become noise."""

    retain: Example
    forget: Example

    @property
    def num_tokens(self) -> int:
        """Tokens of both."""
        return len(self.retain.ids) + len(self.forget.ids)


@dataclass(frozen=True)
class MappingObjective:
    """Stage 1: cross-entropy of retain rows, and forget tokens' hidden states towards their rows of H."""

    rows_VD: Tensor
    pad_id: int
    device: str | torch.device = "cpu"
    num_skipped: int = 1
    weights: Mapping[str, float] = field(default_factory=lambda: {"retain": 1.0, "mapping": 1.0})

    def counts(self, items: Sequence[MappingPair]) -> dict[str, float]:
        """Scored retain tokens and forget positions."""
        return {
            "retain": float(sum(sum(item.retain.scored) for item in items)),
            "mapping": num_positions([item.forget for item in items], self.num_skipped),
        }

    def __call__(self, model: nn.Module, items: Sequence[MappingPair]) -> dict[str, SumCount]:
        """Both sums, of one forward pass."""
        kept = [item.retain for item in items]
        mapped = [item.forget._replace(scored=[False] * len(item.forget.ids)) for item in items]
        batch = collate([*kept, *mapped], self.pad_id, self.device)
        scores, states = scored_states(model, batch)
        at_BT = read_positions(batch, self.num_skipped)[len(kept) :]
        wanted_BTD = self.rows_VD[batch.ids_BT[len(kept) :]]
        loss_BT = mapping_loss([state[len(kept) :] for state in states], wanted_BTD)
        return {
            "retain": SumCount(-scores.logp_S.sum(), len(scores.logp_S)),
            "mapping": SumCount(loss_BT[at_BT].sum(), float(at_BT.sum())),
        }
