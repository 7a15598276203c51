"""Which ids are the control tokens: their texts, new ones, or unused special ids taken over."""

from __future__ import annotations

from collections.abc import Sequence

from temper.core.errors import ModelError
from temper.methods.refusal.refusal_tokens.card import REFUSE, Config
from temper.methods.refusal.refusal_tokens.gate import Controls
from temper.systems.causal_lm import CausalLM

__all__ = ["controls_of", "token_of", "unused_specials"]


def token_of(name: str) -> str:
    """The control token's text for a refusal category, or for the one refusal token."""
    return REFUSE if name == "refuse" else f"[{name}]"


def unused_specials(system: CausalLM, count: int) -> list[int]:
    """Ids of special tokens that neither the template nor the tokenizer's own roles use; ModelError if too few."""
    tokenizer = system.tokenizer
    taken = {str(token) for token in tokenizer.special_tokens_map.values()}
    spare = [
        token_id
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in taken and token.content not in (system.chat.template or "")
    ]
    if len(spare) < count:
        raise ModelError(
            f"The tokenizer has {len(spare)} unused special tokens and {count} are needed",
            cure="Use placement=add.",
        )
    return spare[:count]


def controls_of(
    system: CausalLM, names: Sequence[str], tokens: Sequence[str], config: Config
) -> Controls | None:
    """Ids of the control tokens on the grown system, or None for plain fine-tuning."""
    if not tokens:
        return None
    if config.placement == "reuse":
        ids = unused_specials(system, len(tokens))
    else:
        ids = [system.tokenizer.convert_tokens_to_ids(token) for token in tokens]
    return Controls(tuple(ids[:-1]), tuple(names), ids[-1])
