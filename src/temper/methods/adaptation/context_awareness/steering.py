"""Attention steering towards the user's words: every other key of the prompt weighs alpha times as much.

Shape letters: K key positions of one row, counted from its first real token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from temper.core.errors import ConfigError, DataError
from temper.ops.hooks import Rows, attention_bias
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Span
from temper.systems.recent import Recent, Seen

__all__ = ["UserSteering", "steered", "steering_bias", "user_mask"]

logger = logging.getLogger(__name__)

MEMORY = 4096
"""Prompts whose bias is kept."""


def user_mask(spans: Sequence[Span], num_tokens: int) -> Tensor:
    """True at tokens of any user message (U), shape (num_tokens,)."""
    mask_T = torch.zeros(num_tokens, dtype=torch.bool)
    for span in spans:
        if span.role == "user":
            mask_T[span.start : span.end] = True
    return mask_T


def steering_bias(user_T: Tensor, num_keys: int, alpha: float, steer_generated: bool) -> Tensor:
    """What is added to attention logits, (K,): log(alpha) at prompt keys outside U, 0 at user keys.

    `user_T` covers the prompt; later keys are the reply's and get log(alpha) only if `steer_generated`.
    """
    bias_K = torch.full((num_keys,), math.log(alpha) if steer_generated else 0.0)
    prompt = bias_K[: len(user_T)]
    prompt[:] = torch.where(user_T[: len(prompt)], 0.0, math.log(alpha))
    return bias_K


class UserSteering:
    """The bias for the rows of a forward pass; finds user spans by the ids of what the chat rendered."""

    def __init__(self, recent: Recent[Span], alpha: float, steer_generated: bool) -> None:
        self.recent, self.alpha, self.steer_generated = recent, alpha, steer_generated
        self._known: dict[int, tuple[list[int], Tensor | None]] = {}
        self._warned = False

    def __call__(self, rows: Rows) -> Tensor:
        """(B, K) for the pass's rows."""
        bias_BK = torch.zeros(len(rows.prompt_ids_B), rows.key_len)
        for bias_K, ids in zip(bias_BK, rows.prompt_ids_B, strict=True):
            user_T = self._user_of(ids)
            if user_T is not None:
                bias_K[:] = steering_bias(user_T, rows.key_len, self.alpha, self.steer_generated)
        return bias_BK

    def _user_of(self, ids: list[int]) -> Tensor | None:
        """U over a row's prompt, or None for ids without user messages to know of; looked up once a list object."""
        known = self._known.get(id(ids))
        if known is None or known[0] is not ids:
            if len(self._known) >= MEMORY:
                self._known.clear()
            known = self._known[id(ids)] = (ids, self._find(ids))
        return known[1]

    def _find(self, ids: list[int]) -> Tensor | None:
        seen = self.recent.find(ids)
        if seen is None:
            if not self._warned:
                logger.warning(
                    "ids that no chat template wrote are not steered: where the user speaks is unknown"
                )
                self._warned = True
            return None
        user_T = user_mask(seen.spans, _prompt_length(seen))
        if not user_T.any():
            raise DataError(
                "The conversation has no user token to steer towards",
                where=f"a prompt of {seen.num_tokens} tokens",
                cure="Give it a user message with text.",
            )
        return user_T


def _prompt_length(seen: Seen[Span]) -> int:
    """Tokens before the closing reply; all of them where there is none."""
    last = seen.spans[-1]
    return last.start if last.role == "assistant" else seen.num_tokens


@contextmanager
def steered(
    system: CausalLM,
    alpha: float,
    *,
    steer_generated: bool = False,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[None]:
    """Attention of the block's forward passes is steered; alpha = 1 puts nothing in place."""
    if not 0 < alpha <= 1:
        raise ConfigError(
            f"The steering factor alpha is {alpha:g}",
            cure="It must lie in (0, 1]: the share of attention that other tokens keep. Lower the strength.",
        )
    system.chat.require_template()
    if alpha == 1:
        yield
        return
    bias = UserSteering(system.chat.recent, alpha, steer_generated)
    with attention_bias(system.model, bias, layers, heads):
        yield
