"""One optimiser step of unlearning: forget, retain and "I don't know" rows in one forward pass, each term a sum and a count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.losses import Answers, Loss, kl_divergence, nll
from temper.ops.batching import Batch, Example, collate
from temper.ops.logprobs import position_logits, score_batch, sum_by_row
from temper.ops.projection import CHUNK_LOGITS, head_is_plain, head_of, wanted_hidden
from temper.ops.train import SumCount

__all__ = ["Pair", "UnlearnObjective", "count_positions", "kl_sum", "positions"]


@dataclass(frozen=True)
class Pair:
    """A forget row with the retain row drawn for it and its "I don't know" reply; log-probabilities of the reference."""

    forget: Example
    forget_ref: float = 0.0
    idk: Example | None = None
    idk_ref: float = 0.0
    retain: Example | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(row.ids) for row in (self.forget, self.idk, self.retain) if row is not None)

    def row(self, part: str) -> Example:
        row = getattr(self, part)
        assert row is not None, f"the pair has no {part} row"
        return row  # type: ignore[no-any-return]

    def ref(self, part: str) -> float:
        return float(getattr(self, f"{part}_ref", 0.0))


def positions(batch: Batch, which: str) -> Tensor:
    """Positions whose next-token distributions kl compares, (B, T): Departure 1."""
    if which == "all":
        return torch.ones_like(batch.mask_BT)
    if which == "nonpad":
        return batch.mask_BT
    # The token at t is predicted at t - 1.
    return nn.functional.pad(batch.scored_BT[:, 1:], (0, 1))


def count_positions(example: Example, which: str, width: int) -> int:
    """How many positions of a row `positions` marks; "all" counts padding up to `width`."""
    return {"all": width, "nonpad": len(example.ids), "answer": sum(example.scored)}[which]


def kl_sum(model: nn.Module, batch: Batch, at_BT: Tensor, ref_SV: Tensor) -> Tensor:
    """KL(pi_ref || pi) summed over the marked positions, with gradient; logits exist a chunk at a time.

    Equals `kl_divergence(ref_SV, position_logits(model, batch, at_BT).log_softmax(-1))`.
    """
    if not head_is_plain(model):
        return kl_divergence(ref_SV, position_logits(model, batch, at_BT).log_softmax(-1))
    hidden = wanted_hidden(model, {"input_ids": batch.ids_BT}, at_BT)
    head = head_of(model)

    def chunk(hidden_SD: Tensor, part_SV: Tensor) -> Tensor:
        return kl_divergence(part_SV, head(hidden_SD).float().log_softmax(-1))

    size = max(1, CHUNK_LOGITS // hidden.num_ids)
    parts = zip(hidden.hidden_SD.split(size), ref_SV.split(size), strict=True)
    sums = [checkpoint(chunk, states, ref, use_reentrant=False) for states, ref in parts]
    return torch.stack(sums).sum()


class UnlearnObjective:
    """The weighted sum of a forget loss and its further terms, over Pairs.

    `reference` is a context manager that gives the system as it was when training began. Terms of weight 0 watch
    the forget answers: "forget_nll" their cross-entropy, "log_ratio" how far they are from the reference, in nats a token.
    """

    def __init__(
        self,
        loss: Loss,
        config: Config,
        *,
        pad_id: int,
        device: str | torch.device,
        reference: Callable[[], AbstractContextManager[Any]],
        width: int = 0,
    ) -> None:
        self.loss, self.config, self.pad_id, self.device = loss, config, pad_id, device
        self.reference, self.width = reference, width
        self.unsplittable = loss.forget.whole_step
        self.packs = not any(term.divergence for term in loss.terms.values())
        self.weights = {"forget": config.forget_weight, **dict.fromkeys(loss.terms, config.retain_weight)}
        self.watches = "forget" in loss.forget.reads
        if self.watches:
            self.weights["forget_nll"] = 0.0
        self.compares = self.watches and loss.forget.uses_reference
        if self.compares:
            self.weights["log_ratio"] = 0.0

    def longest(self, item: Pair) -> int:
        """Tokens of the pair's longest row."""
        return max(len(row.ids) for row in (item.forget, item.idk, item.retain) if row is not None)

    def counts(self, items: Sequence[Pair]) -> dict[str, float]:
        """Rows or answer tokens of each term, or positions of a divergence."""

        def tokens(part: str) -> float:
            return float(sum(sum(item.row(part).scored) for item in items))

        def spots(part: str) -> float:
            which = self.config.kl_positions
            return float(sum(count_positions(item.row(part), which, self.width) for item in items))

        forget = self.loss.forget
        found = {"forget": float(len(items)) if forget.per == "rows" else tokens(forget.reads[0])}
        for name, term in self.loss.terms.items():
            found[name] = spots(term.part) if term.divergence else tokens(term.part)
        if self.watches:
            found["forget_nll"] = tokens("forget")
        if self.compares:
            found["log_ratio"] = tokens("forget")
        return found

    def __call__(self, model: nn.Module, items: Sequence[Pair]) -> dict[str, SumCount]:
        """Each term's sum over the pairs."""
        counts = self.counts(items)
        divergences = {name: term.part for name, term in self.loss.terms.items() if term.divergence}
        # The reference answers first, before anything of the trained model waits for its backward pass.
        targets = {name: self._reference_logp(self._batch(items, part)) for name, part in divergences.items()}
        answers = self._score(model, items)
        totals = {"forget": self.loss.forget.total(answers, self.config)}
        for name, term in self.loss.terms.items():
            if term.divergence:
                batch = self._batch(items, term.part)
                totals[name] = kl_sum(model, batch, positions(batch, self.config.kl_positions), targets[name])
            else:
                totals[name] = nll(answers[term.part].logp_B)
        if self.watches:
            totals["forget_nll"] = nll(answers["forget"].logp_B.detach())
        if self.compares:
            totals["log_ratio"] = (answers["forget"].logp_B.detach() - answers["forget"].ref_B).sum()
        return {name: SumCount(total, counts[name]) for name, total in totals.items()}

    def _score(self, model: nn.Module, items: Sequence[Pair]) -> dict[str, Answers]:
        """All answers of the step in one forward pass."""
        parts = self.loss.answers
        rows = [item.row(part) for part in parts for item in items]
        logp = sum_by_row(score_batch(model, collate(rows, self.pad_id, self.device)))
        found = {}
        for part, logp_B in zip(parts, logp.split(len(items)), strict=True):
            ref_B = logp_B.new_tensor([item.ref(part) for item in items])
            found[part] = Answers(
                logp_B, ref_B, logp_B.new_tensor([sum(item.row(part).scored) for item in items])
            )
        return found

    def _batch(self, items: Sequence[Pair], part: str) -> Batch:
        batch = collate([item.row(part) for item in items], self.pad_id, self.device)
        missing = self.width - batch.ids_BT.shape[1] if self.config.kl_positions == "all" else 0
        if missing <= 0:
            return batch
        pad = nn.functional.pad
        return batch._replace(
            ids_BT=pad(batch.ids_BT, (0, missing), value=self.pad_id),
            mask_BT=pad(batch.mask_BT, (0, missing)),
            scored_BT=pad(batch.scored_BT, (0, missing)),
        )

    def _reference_logp(self, batch: Batch) -> Tensor:
        with self.reference() as before:
            logits_SV = position_logits(before.model, batch, positions(batch, self.config.kl_positions))
            return logits_SV.log_softmax(-1)
