"""What the attack and the two defences want, as sums and counts over rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from temper.methods.hardening.continuous_at.card import Config
from temper.ops.batching import collate
from temper.ops.latent import Found
from temper.ops.latent_objective import Kind, LatentItem, Seen, mean_bad_loss, scored_count
from temper.ops.objectives import SumCount
from temper.ops.preference import ipo
from temper.ops.toward_away import TokenScores, away_tokens, bounded_logp, mean_rows, softened, toward_tokens

__all__ = ["AdvIPO", "AdvUL", "Reference", "away_rows", "toward_rows"]

Reference = Callable[[], AbstractContextManager[Any]]
"""Gives the system as it was when training began."""


def away_rows(bad: TokenScores, config: Config) -> Tensor:
    """The away loss of each row, (B,), nats a token."""
    if config.away_loss == "log_1_minus_p":
        return mean_rows(away_tokens(bad, config.away_cutoff), bad)
    return softened(-mean_rows(toward_tokens(bad), bad), config.away_cutoff)


def toward_rows(good: TokenScores, config: Config) -> Tensor:
    """The toward loss of each row, (B,), nats a token."""
    return softened(mean_rows(toward_tokens(good), good), config.toward_cutoff)


class _Game:
    """What both share: the attack makes the unwanted reply likely, utility rows are kept."""

    attack_reads: Sequence[Kind] = ("bad",)
    defence_reads: Sequence[Kind] = ("bad", "good")
    captures: Sequence[str] = ()

    def __init__(self, config: Config) -> None:
        self.config = config

    def attack_loss(self, scores: Mapping[str, TokenScores], items: Sequence[LatentItem]) -> Tensor:
        """Cross-entropy of the unwanted reply."""
        return mean_bad_loss(scores)

    def reference(self, model: nn.Module, items: Sequence[LatentItem], found: Found) -> Any:
        """Nothing."""


class AdvUL(_Game):
    """away, toward and utility."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.weights = {
            "away": config.away_weight,
            "toward": config.toward_weight,
            "utility": config.utility_weight,
        }

    def counts(self, items: Sequence[LatentItem]) -> dict[str, float]:
        """Rows; tokens of utility replies."""
        utility = scored_count([row for item in items for row in item.benign])
        return {"away": float(len(items)), "toward": float(len(items)), "utility": utility}

    def terms(self, seen: Seen, items: Sequence[LatentItem], reference: Any) -> dict[str, SumCount]:
        """The three losses."""
        scores = seen.scores
        utility_S = toward_tokens(scores["benign"])
        return {
            "away": SumCount(away_rows(scores["bad"], self.config).sum(), len(items)),
            "toward": SumCount(toward_rows(scores["good"], self.config).sum(), len(items)),
            "utility": SumCount(utility_S.sum(), len(utility_S)),
        }


class AdvIPO(_Game):
    """IPO between the refusal and the unwanted reply, both under attack."""

    def __init__(self, config: Config, before: Reference, pad_id: int, device: str | torch.device) -> None:
        super().__init__(config)
        self.before, self.pad_id, self.device = before, pad_id, device
        self.weights = {"ipo": 1.0}

    def counts(self, items: Sequence[LatentItem]) -> dict[str, float]:
        """Rows."""
        return {"ipo": float(len(items))}

    def reference(self, model: nn.Module, items: Sequence[LatentItem], found: Found) -> tuple[Tensor, Tensor]:
        """Mean log-probabilities of the model as it was, (B,) of good and of bad: kept ones, or under attack."""
        if not self.config.online:
            pairs = [(item.ref_good, item.ref_bad) for item in items]
            good_B, bad_B = torch.tensor(pairs, device=self.device).unbind(1)
            return good_B, bad_B
        from temper.ops.logprobs import mean_by_row, score_batch

        rows = [item.row(kind) for kind in ("good", "bad") for item in items]  # type: ignore[arg-type]
        order = list(range(len(items)))
        with self.before() as system, found.perturbation.applied(model, [*order, *order]):
            logp_R = mean_by_row(score_batch(system.model, collate(rows, self.pad_id, self.device)))
        return logp_R[: len(items)], logp_R[len(items) :]

    def terms(self, seen: Seen, items: Sequence[LatentItem], reference: Any) -> dict[str, SumCount]:
        """The squared distance of the margin from 1 / (2 beta)."""
        config = self.config
        good_B = bounded_logp(seen.scores["good"], most=-config.ipo_toward_cutoff)
        bad_B = bounded_logp(seen.scores["bad"], least=config.away_cutoff)
        loss_B = ipo(good_B, bad_B, *reference, beta=config.beta)
        return {"ipo": SumCount(loss_B.sum(), len(items))}
