"""Learning which of two replies is preferred: pairs encoded, scored with their prompt computed once, compared.

A loss is a pure function of four log-probabilities a pair, in nats: the model's of the chosen and of the rejected reply,
then the reference's. One more loss is one more function. B counts pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from temper.core.types import Run
from temper.data.schemas import Preference
from temper.ops.batching import Example, collate, encode
from temper.ops.families import Family, score_families
from temper.ops.logprobs import Scored, reference_logprobs, score_batch, sum_by_row
from temper.ops.objectives import SumCount
from temper.ops.packed import can_pack
from temper.ops.projection import head_is_plain

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = [
    "PairLoss",
    "PreferenceObjective",
    "PreferencePair",
    "dpo",
    "encode_pair",
    "ipo",
    "score_pairs",
    "simpo",
    "with_reference",
]

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B) -> the loss of each pair, (B,)."""


def dpo(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float = 0.1
) -> Tensor:
    """DPO: -log sigmoid(beta * margin); the margin is the gap of the log-ratios to the reference."""
    return -F.logsigmoid(beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)))


def ipo(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float = 0.1
) -> Tensor:
    """IPO: (margin - 1 / (2 beta))^2; with an objective's `per_token` it reads means, as its authors do."""
    return ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B) - 1 / (2 * beta)).square()


def simpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """SimPO: -log sigmoid(beta (chosen - rejected) - gamma), of means a token (`per_token`); the reference is not read."""
    return -F.logsigmoid(beta * (chosen_B - rejected_B) - gamma)


@dataclass(frozen=True)
class PreferencePair:
    """Two rows that begin with one prompt, their replies scored; the reference's sums of log-probabilities."""

    chosen: Example
    rejected: Example
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0

    @property
    def num_shared(self) -> int:
        """Leading tokens of both rows that nothing is asked of: the prompt but for its last token."""
        most = min(row.scored.index(True) for row in (self.chosen, self.rejected)) - 1
        pairs = zip(self.chosen.ids[:most], self.rejected.ids[:most], strict=True)
        return next((place for place, (one, other) in enumerate(pairs) if one != other), most)

    @property
    def num_tokens(self) -> int:
        """Tokens of both rows, the shared ones once: an item's length in `train`."""
        return len(self.chosen.ids) + len(self.rejected.ids) - self.num_shared


def encode_pair(system: CausalLM, record: Preference, *, max_tokens: int | None = None) -> PreferencePair:
    """A preference as two rows; raises DataError, naming the row, where a reply is empty or cut away."""
    place = f"row {record.id or '(without id)'}, "

    def row(reply: str, name: str) -> Example:
        return encode(system, (record.prompt, reply), max_tokens=max_tokens, where=place + name)

    return PreferencePair(row(record.chosen, "chosen"), row(record.rejected, "rejected"))


def with_reference(system: CausalLM, pairs: Sequence[PreferencePair], run: Run) -> list[PreferencePair]:
    """The pairs with their log-probabilities under the system as it stands: computed once and stored."""
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    if not rows:
        return []
    logp = reference_logprobs(system, rows, run).tolist()
    return [
        replace(pair, ref_chosen=logp[2 * place], ref_rejected=logp[2 * place + 1])
        for place, pair in enumerate(pairs)
    ]


def score_pairs(model: nn.Module, pairs: Sequence[PreferencePair], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Sums of the replies' log-probabilities, (B,) chosen and (B,) rejected, in float32 with gradient.

    A model that `can_pack` computes each prompt once, without padding; any other gets two rows a pair.
    """
    if can_pack(model) and head_is_plain(model):
        logp_R = sum_by_row(_score_packed(model, pairs))
        return logp_R[0::2], logp_R[1::2]
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    device = next(model.parameters()).device
    chosen_B, rejected_B = sum_by_row(score_batch(model, collate(rows, pad_id, device))).split(len(pairs))
    return chosen_B, rejected_B


def _score_packed(model: nn.Module, pairs: Sequence[PreferencePair]) -> Scored:
    """Every scored token, a pair's chosen row before its rejected one."""
    given = [
        Family([pair.chosen, pair.rejected], pair.num_shared, [2 * number, 2 * number + 1])
        for number, pair in enumerate(pairs)
    ]
    return Scored(*score_families(model, given), 2 * len(pairs))


@dataclass(frozen=True)
class PreferenceObjective:
    """The mean of a loss over pairs; a term "accuracy" of weight 0 watches how many margins are above 0.

    `per_token` gives the loss means a token instead of sums.
    """

    loss: PairLoss = dpo
    pad_id: int = 0
    per_token: bool = False
    weights: Mapping[str, float] = field(default_factory=lambda: {"preference": 1.0, "accuracy": 0.0})
    packs: ClassVar[bool] = True

    def longest(self, item: PreferencePair) -> int:
        """Tokens of the pair's longer row."""
        return max(len(item.chosen.ids), len(item.rejected.ids))

    def counts(self, items: Sequence[PreferencePair]) -> dict[str, float]:
        """Pairs."""
        return dict.fromkeys(self.weights, float(len(items)))

    def __call__(self, model: nn.Module, items: Sequence[PreferencePair]) -> dict[str, SumCount]:
        """The losses' sum, and how many pairs lean to the chosen reply more than the reference does."""
        chosen_B, rejected_B = score_pairs(model, items, self.pad_id)
        ref_chosen_B = chosen_B.new_tensor([pair.ref_chosen for pair in items])
        ref_rejected_B = chosen_B.new_tensor([pair.ref_rejected for pair in items])
        if self.per_token:
            num_chosen_B = chosen_B.new_tensor([sum(pair.chosen.scored) for pair in items])
            num_rejected_B = chosen_B.new_tensor([sum(pair.rejected.scored) for pair in items])
            chosen_B, ref_chosen_B = chosen_B / num_chosen_B, ref_chosen_B / num_chosen_B
            rejected_B, ref_rejected_B = rejected_B / num_rejected_B, ref_rejected_B / num_rejected_B
        total = self.loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B).sum()
        right = (chosen_B - ref_chosen_B > rejected_B - ref_rejected_B).sum().detach().to(total.dtype)
        return {"preference": SumCount(total, len(items)), "accuracy": SumCount(right, len(items))}
