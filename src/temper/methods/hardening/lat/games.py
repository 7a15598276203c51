"""What the adversary and the defence want in each form, as sums and counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from temper.methods.hardening.lat.card import Config
from temper.ops.batching import Batch, Example, collate
from temper.ops.hooks import capture
from temper.ops.latent import Found
from temper.ops.latent_objective import Kind, LatentItem, Seen, mean_bad_loss, scored_count
from temper.ops.logprobs import sum_by_row
from temper.ops.objectives import SumCount
from temper.ops.preference import dpo
from temper.ops.toward_away import TokenScores, away_tokens, mean_rows, score_tokens, toward_tokens

__all__ = ["Dpo", "Reference", "Rmu", "TowardAway", "direction", "kl_of", "normalised", "scored_logp"]

Reference = Callable[[], AbstractContextManager[Any]]
"""Gives the system as it was when training began."""


def normalised(**weights: float) -> dict[str, float]:
    """The weights above 0 divided by their sum (Departure 2)."""
    used = {name: weight for name, weight in weights.items() if weight > 0}
    return {name: weight / sum(used.values()) for name, weight in used.items()}


def kl_of(logp_SV: Tensor, start_SV: Tensor, scale: str) -> Tensor:
    """KL(new || start) summed over tokens, nats; with scale "unit" S times the mean divided by its own value."""
    total = (logp_SV.exp() * (logp_SV - start_SV)).sum()
    if scale == "unit":
        return total / (total.detach() / len(logp_SV)).clamp(min=1e-8)
    return total


def scored_logp(scores: TokenScores) -> Tensor:
    """The log-distribution at every scored token, (S, V)."""
    return scores.logits_of(torch.ones_like(scores.row_S, dtype=torch.bool)).log_softmax(-1)


def direction(width: int, norm: float, seed: int) -> Tensor:
    """A fixed random direction with entries above 0, of the given length, (D,)."""
    drawn_D = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return drawn_D * (norm / drawn_D.norm())


def _sums(scores: TokenScores) -> Tensor:
    from temper.ops.logprobs import Scored

    return sum_by_row(Scored(scores.logp_S, scores.row_S, scores.num_rows))


def _benign_weights(config: Config) -> dict[str, float]:
    """The weights of sft and kl, which without benign rows nothing reads."""
    return {"sft": config.sft, "kl": config.kl} if config.benign_rows else {}


class _Benign:
    """Terms on benign rows, without a perturbation: sft and kl."""

    captures: Sequence[str] = ()
    weights: dict[str, float]

    def __init__(self, config: Config, before: Reference, pad_id: int, device: str | torch.device) -> None:
        self.config, self.before, self.pad_id, self.device = config, before, pad_id, device

    def benign_counts(self, items: Sequence[LatentItem]) -> dict[str, float]:
        """Tokens of benign replies."""
        count = scored_count([row for item in items for row in item.benign])
        return {name: count for name in ("sft", "kl") if name in self.weights}

    def reference(self, model: nn.Module, items: Sequence[LatentItem], found: Found) -> Any:
        """The starting model's log-distributions on benign replies, (S, V), where kl wants them."""
        rows = [row for item in items for row in item.benign]
        if "kl" not in self.weights or not rows:
            return None
        with self.before() as system:
            return scored_logp(score_tokens(system.model, collate(rows, self.pad_id, self.device)))

    def benign_terms(self, seen: Seen, reference: Any) -> dict[str, SumCount]:
        """Both terms that have a weight."""
        benign, terms = seen.scores["benign"], {}
        if "sft" in self.weights:
            terms["sft"] = SumCount(toward_tokens(benign).sum(), len(benign.logp_S))
        if "kl" in self.weights:
            empty = benign.logp_S.sum() * 0
            total = (
                empty if reference is None else kl_of(scored_logp(benign), reference, self.config.kl_scale)
            )
            terms["kl"] = SumCount(total, len(benign.logp_S))
        return terms


class TowardAway(_Benign):
    """Toward one reply and away from the other, on both sides."""

    def __init__(self, config: Config, before: Reference, pad_id: int, device: str | torch.device) -> None:
        super().__init__(config, before, pad_id, device)
        self.attack_weights = normalised(toward=config.attack_toward, away=config.attack_away)
        self.weights = normalised(toward=config.toward, away=config.away, **_benign_weights(config))
        self.attack_reads: Sequence[Kind] = [
            kind  # type: ignore[misc]
            for kind, name in (("bad", "toward"), ("good", "away"))
            if name in self.attack_weights
        ]
        self.defence_reads: Sequence[Kind] = [
            kind  # type: ignore[misc]
            for kind, name in (("bad", "away"), ("good", "toward"))
            if name in self.weights
        ]

    def _away_rows(self, scores: TokenScores) -> Tensor:
        return mean_rows(away_tokens(scores, self.config.away_cutoff), scores)

    def attack_loss(self, scores: Mapping[str, TokenScores], items: Sequence[LatentItem]) -> Tensor:
        """Toward the bad reply, away from the good one."""
        loss_B = torch.zeros(len(items), device=self.device)
        if "toward" in self.attack_weights:
            loss_B = loss_B + self.attack_weights["toward"] * mean_bad_loss(scores)
        if "away" in self.attack_weights:
            loss_B = loss_B + self.attack_weights["away"] * self._away_rows(scores["good"])
        return loss_B

    def counts(self, items: Sequence[LatentItem]) -> dict[str, float]:
        """Rows, and tokens of benign replies."""
        rows = {name: float(len(items)) for name in self.weights if name in ("toward", "away")}
        return {**rows, **self.benign_counts(items)}

    def terms(self, seen: Seen, items: Sequence[LatentItem], reference: Any) -> dict[str, SumCount]:
        """Toward the good reply, away from the bad one, and the benign terms."""
        terms = self.benign_terms(seen, reference)
        if "toward" in self.weights:
            good = seen.scores["good"]
            terms["toward"] = SumCount(mean_rows(toward_tokens(good), good).sum(), len(items))
        if "away" in self.weights:
            terms["away"] = SumCount(self._away_rows(seen.scores["bad"]).sum(), len(items))
        return terms


class Dpo(_Benign):
    """DPO on both sides, each preferring its own reply."""

    attack_reads: Sequence[Kind] = ("bad", "good")
    defence_reads: Sequence[Kind] = ("bad", "good")

    def __init__(self, config: Config, before: Reference, pad_id: int, device: str | torch.device) -> None:
        super().__init__(config, before, pad_id, device)
        self.weights = normalised(dpo=config.dpo, **_benign_weights(config))

    def _loss(self, scores: Mapping[str, TokenScores], items: Sequence[LatentItem], wanted: Kind) -> Tensor:
        refs = {
            "bad": torch.tensor([item.ref_bad for item in items], device=self.device),
            "good": torch.tensor([item.ref_good for item in items], device=self.device),
        }
        other = "good" if wanted == "bad" else "bad"
        return dpo(
            _sums(scores[wanted]), _sums(scores[other]), refs[wanted], refs[other], beta=self.config.beta
        )

    def attack_loss(self, scores: Mapping[str, TokenScores], items: Sequence[LatentItem]) -> Tensor:
        """The bad reply preferred."""
        return self._loss(scores, items, "bad")

    def counts(self, items: Sequence[LatentItem]) -> dict[str, float]:
        """Rows, and tokens of benign replies."""
        return {"dpo": float(len(items)), **self.benign_counts(items)}

    def terms(self, seen: Seen, items: Sequence[LatentItem], reference: Any) -> dict[str, SumCount]:
        """The good reply preferred, and the benign terms."""
        loss = SumCount(self._loss(seen.scores, items, "good").sum(), len(items))
        return {"dpo": loss, **self.benign_terms(seen, reference)}


class Rmu:
    """Forget text steered to a fixed direction under attack, retain text (the benign rows) held in place."""

    attack_reads: Sequence[Kind] = ("bad",)
    defence_reads: Sequence[Kind] = ("bad",)

    def __init__(
        self, config: Config, before: Reference, pad_id: int, device: str | torch.device, control_D: Tensor
    ) -> None:
        self.before, self.pad_id, self.device = before, pad_id, device
        self.site, self.control_D = f"layers.{config.rmu_layer}.output", control_D.to(device)
        self.captures: Sequence[str] = (self.site,)
        self.weights = {"forget": 1.0, "retain": config.retain}

    def attack_loss(self, scores: Mapping[str, TokenScores], items: Sequence[LatentItem]) -> Tensor:
        """The forget text made likely."""
        return mean_bad_loss(scores)

    def counts(self, items: Sequence[LatentItem]) -> dict[str, float]:
        """Tokens."""
        retain = [row for item in items for row in item.benign]
        return {
            name: _tokens(rows) for name, rows in (("forget", [i.bad for i in items]), ("retain", retain))
        }

    def reference(self, model: nn.Module, items: Sequence[LatentItem], found: Found) -> Any:
        """Retain text's hidden states in the starting model, (S, D)."""
        rows = [row for item in items for row in item.benign]
        if not rows:
            return None
        batch = collate(rows, self.pad_id, self.device)
        with self.before() as system, capture(system.model, self.captures) as seen:
            system.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), use_cache=False)
        return seen[self.site][batch.mask_BT].float()

    def terms(self, seen: Seen, items: Sequence[LatentItem], reference: Any) -> dict[str, SumCount]:
        """Mean squared distances over the width, summed over real tokens."""
        states = partial(_states, seen.hidden[self.site], seen.batch)
        forget_SD, retain_SD = states(0, len(items)), states(len(items), len(seen.batch.ids_BT))
        forget = (forget_SD - self.control_D).square().mean(-1).sum()
        retain = retain_SD.sum() * 0 if reference is None else (retain_SD - reference).square().mean(-1).sum()
        return {"forget": SumCount(forget, len(forget_SD)), "retain": SumCount(retain, len(retain_SD))}


def _states(hidden_BTD: Tensor, batch: Batch, start: int, stop: int) -> Tensor:
    return hidden_BTD[start:stop][batch.mask_BT[start:stop]].float()


def _tokens(rows: Sequence[Example]) -> float:
    return float(sum(len(row.ids) for row in rows))
