"""Membership inference: scores by which a model betrays that it was trained on a text, and how well they tell.

Every score is higher for a text the model is more likely to have seen. A text is scored from its second token on.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.core.errors import DataError
from temper.core.types import Run
from temper.data.schemas import Text
from temper.ops.batching import Batch, collate, encode, plain_ids, plan_batches
from temper.ops.logprobs import position_logit_chunks
from temper.ops.precision import autocast, eval_mode

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = [
    "ATTACKS",
    "TextTokens",
    "loss_score",
    "membership_scores",
    "min_k",
    "min_k_plus",
    "text_tokens",
    "token_statistics",
    "zlib_score",
]

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus")


class TextTokens(NamedTuple):
    """A text's token log-probabilities in nats, and mean and deviation of log p under the model at each of its places."""

    logp_T: Tensor
    mean_T: Tensor
    deviation_T: Tensor


def loss_score(logp_T: Tensor) -> float:
    """Mean log-likelihood a token, in nats: minus the loss."""
    return float(logp_T.mean())


def zlib_score(logp_T: Tensor, text: str) -> float:
    """Mean log-likelihood a token over the text's compressed bytes: what the model knows beyond its redundancy."""
    return loss_score(logp_T) / len(zlib.compress(text.encode()))


def min_k(logp_T: Tensor, share: float) -> float:
    """Mean of the least likely `share` of the tokens' log-probabilities, at least one."""
    return float(logp_T.sort().values[: max(1, int(share * len(logp_T)))].mean())


def min_k_plus(tokens: TextTokens, share: float) -> float:
    """Min-K%++: `min_k` of (log p - mean) / deviation, each of the model's distribution at the token's place."""
    return min_k((tokens.logp_T - tokens.mean_T) / tokens.deviation_T.clamp(min=1e-6), share)


def token_statistics(logits_SV: Tensor, target_S: Tensor) -> TextTokens:
    """Log-probability of each target; mean sum_v p log p and deviation of log p over the vocabulary; float32."""
    logp_SV = logits_SV.float().log_softmax(-1)
    p_SV = logp_SV.exp()
    # p log p is 0 where p vanished; a masked id has log p = -inf.
    finite_SV = logp_SV.clamp(min=-1e4)
    mean_S = (p_SV * finite_SV).sum(-1)
    spread_S = (p_SV * (finite_SV - mean_S[:, None]).square()).sum(-1)
    return TextTokens(logp_SV.gather(-1, target_S[:, None])[:, 0], mean_S, spread_S.sqrt())


def text_tokens(
    system: CausalLM, texts: Sequence[Text], run: Run, *, max_tokens: int | None = None
) -> list[TextTokens]:
    """Statistics of every token of the texts, without a template, in their order, on the CPU.

    Raises DataError, naming the row, for a text of a single token.
    """
    examples = [encode(system, text, max_tokens=max_tokens) for text in texts]
    found: list[TextTokens] = [TextTokens(*[torch.zeros(0)] * 3)] * len(examples)
    plan = plan_batches([len(example.ids) for example in examples], run)
    for rows in run.ticker(plan, total=len(plan), label="membership"):
        batch = collate([examples[row] for row in rows], system.pad_id, system.device, rows=rows)
        for row, tokens in zip(rows, _batch_tokens(system, batch, run), strict=True):
            found[row] = tokens
    return found


def _batch_tokens(system: CausalLM, batch: Batch, run: Run) -> list[TextTokens]:
    scored_BT = batch.scored_BT[:, 1:]
    with eval_mode(system.model), torch.no_grad(), autocast(run):
        found, start, target_S = [], 0, batch.ids_BT[:, 1:][scored_BT]
        for logits_CV in position_logit_chunks(system.model, batch, F.pad(scored_BT, (0, 1))):
            found.append(token_statistics(logits_CV, target_S[start : start + len(logits_CV)]))
            start += len(logits_CV)
    sizes = scored_BT.sum(1).tolist()
    columns = (torch.cat(column).cpu().split(sizes) for column in zip(*found, strict=True))
    return [TextTokens(*parts) for parts in zip(*columns, strict=True)]


def _scored_text(system: CausalLM, text: str, num_tokens: int) -> str:
    """The text, or that of its first `num_tokens` tokens where it has more."""
    ids = plain_ids(system.tokenizer, text)
    if len(ids) <= num_tokens:
        return text
    return str(system.tokenizer.decode(ids[:num_tokens], skip_special_tokens=True))


def membership_scores(
    system: CausalLM, texts: Sequence[Text], run: Run, *, share: float = 0.2, max_tokens: int | None = None
) -> dict[str, list[float]]:
    """Score of each text by each of `ATTACKS`; `share` is that of min_k and min_k_plus.

    A longer text counts, in zlib too, up to its first `max_tokens` tokens.
    Raises DataError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise DataError(f"The share {share} of least likely tokens is not in (0, 1]", cure="Take e.g. 0.2.")
    tokens = text_tokens(system, texts, run, max_tokens=max_tokens)
    # The first token is not scored.
    said = [
        _scored_text(system, text.text, len(one.logp_T) + 1) for one, text in zip(tokens, texts, strict=True)
    ]
    return {
        "loss": [loss_score(one.logp_T) for one in tokens],
        "zlib": [zlib_score(one.logp_T, text) for one, text in zip(tokens, said, strict=True)],
        "min_k": [min_k(one.logp_T, share) for one in tokens],
        "min_k_plus": [min_k_plus(one, share) for one in tokens],
    }
