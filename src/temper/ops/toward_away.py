"""Losses that pull a model toward one reply and push it away from another, as sums and counts.

toward  -log p(y_t);  away  -log(1 - p(y_t)), nothing from tokens that are unlikely enough already.
S counts scored tokens, B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from temper.ops.batching import Batch
from temper.ops.objectives import SumCount
from temper.ops.projection import CHUNK_LOGITS, head_is_plain, head_of, selected_logits, wanted_hidden

__all__ = [
    "LEAST_LOGP",
    "TokenScores",
    "away_tokens",
    "bounded_logp",
    "log_one_minus_p",
    "mean_rows",
    "score_tokens",
    "softened",
    "toward_away",
    "toward_tokens",
]

LEAST_LOGP = -5.0
"""Log-probability below which a token is unlikely enough: the away loss leaves it alone."""


class TokenScores(NamedTuple):
    """Every scored token, row by row: log p(y_t), log(1 - p(y_t)), the row it stands in, and how many rows there are."""

    logp_S: Tensor
    log_rest_S: Tensor
    row_S: Tensor
    num_rows: int
    logits_of: Callable[[Tensor], Tensor]
    """Logits in float32 of the tokens marked in a bool mask (S,): for terms that compare whole distributions."""

    def of(self, start: int, stop: int) -> TokenScores:
        """The scores of rows start to stop, renumbered from 0."""
        here_S = (self.row_S >= start) & (self.row_S < stop)
        places_S = here_S.nonzero()[:, 0]

        def logits_of(mask_S: Tensor) -> Tensor:
            whole_S = torch.zeros_like(here_S)
            whole_S[places_S[mask_S]] = True
            return self.logits_of(whole_S)

        row_S = self.row_S[here_S] - start
        return TokenScores(self.logp_S[here_S], self.log_rest_S[here_S], row_S, stop - start, logits_of)


def log_one_minus_p(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """log(1 - p(target)), (S,), float32: logsumexp of all logits but the target's, minus that of all.

    Exact where p is so near 1 that 1 - p has no digits left.
    """
    logits_SV = logits_SV.float()
    others_SV = logits_SV.scatter(-1, target_S[:, None], float("-inf"))
    return others_SV.logsumexp(-1) - logits_SV.logsumexp(-1)


def _scores(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """The logs of p and of 1 - p of each target, (2, S)."""
    logits_SV = logits_SV.float()
    logp_S = logits_SV.gather(-1, target_S[:, None])[:, 0] - logits_SV.logsumexp(-1)
    return torch.stack([logp_S, log_one_minus_p(logits_SV, target_S)])


def score_tokens(model: nn.Module, batch: Batch) -> TokenScores:
    """Both log-probabilities of every scored token, with gradient; only scored positions reach the head, in chunks.

    The rows go through the model as they are padded, so that hooks find token t of a row in column t.
    """
    scored_BT = batch.scored_BT[:, 1:]
    target_S = batch.ids_BT[:, 1:][scored_BT]
    # The token at t is predicted at t - 1; nothing is asked of the last position.
    at_BT = nn.functional.pad(scored_BT, (0, 1))
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT.long()}
    row_S = scored_BT.nonzero()[:, 0]
    if not head_is_plain(model):
        logits_SV = selected_logits(model, inputs, at_BT).float()
        both_2S = _scores(logits_SV, target_S)
        return _token_scores(both_2S, row_S, len(batch.ids_BT), lambda mask_S: logits_SV[mask_S])
    hidden_SD, num_ids = wanted_hidden(model, inputs, at_BT)
    head, size = head_of(model), max(1, CHUNK_LOGITS // num_ids)
    parts = list(zip(hidden_SD.split(size), target_S.split(size), strict=True))
    again = torch.is_grad_enabled() and len(parts) > 1

    def chunk(states_SD: Tensor, wanted_S: Tensor) -> Tensor:
        return _scores(head(states_SD), wanted_S)

    both_2S = torch.cat(
        [checkpoint(chunk, *part, use_reentrant=False) if again else chunk(*part) for part in parts], 1
    )
    return _token_scores(both_2S, row_S, len(batch.ids_BT), lambda mask_S: head(hidden_SD[mask_S]).float())


def _token_scores(
    both_2S: Tensor, row_S: Tensor, num_rows: int, logits_of: Callable[[Tensor], Tensor]
) -> TokenScores:
    return TokenScores(both_2S[0], both_2S[1], row_S, num_rows, logits_of)


def toward_tokens(scores: TokenScores) -> Tensor:
    """Cross-entropy of each token, (S,), nats."""
    return -scores.logp_S


def away_tokens(scores: TokenScores, least_logp: float = LEAST_LOGP) -> Tensor:
    """-log(1 - p) of each token, (S,), nats; 0, without gradient, where log p is below `least_logp`."""
    kept_S = torch.where(scores.logp_S < least_logp, scores.log_rest_S.new_zeros(()), scores.log_rest_S)
    return -kept_S


def toward_away(
    toward: TokenScores, away: TokenScores, least_logp: float = LEAST_LOGP
) -> dict[str, SumCount]:
    """Both terms over tokens; a token that the away loss leaves alone still counts."""
    return {
        "toward": SumCount(toward_tokens(toward).sum(), len(toward.logp_S)),
        "away": SumCount(away_tokens(away, least_logp).sum(), len(away.logp_S)),
    }


def mean_rows(values_S: Tensor, scores: TokenScores) -> Tensor:
    """The mean of token values over each row, (B,)."""
    sums_B = values_S.new_zeros(scores.num_rows).index_add(0, scores.row_S, values_S)
    return sums_B / torch.bincount(scores.row_S, minlength=scores.num_rows).clamp(min=1)


def softened(loss_B: Tensor, cutoff: float, slope: float = 0.001) -> Tensor:
    """Losses, but below the cutoff `cutoff + slope * loss`: hardly any gradient is left there."""
    return torch.where(loss_B < cutoff, cutoff + slope * loss_B, loss_B)


def bounded_logp(scores: TokenScores, *, least: float = float("-inf"), most: float = 0.0) -> Tensor:
    """Mean log-probability of each row, (B,); tokens outside [least, most] give 0 and no gradient, and still count."""
    outside_S = (scores.logp_S < least) | (scores.logp_S > most)
    return mean_rows(torch.where(outside_S, scores.logp_S.new_zeros(()), scores.logp_S), scores)
