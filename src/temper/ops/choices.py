"""Multiple choice: how likely a model finds each of several continuations of one context.

The rows of all items go through `response_logprobs` together, so a passage is read once for all its questions and a
question once for its choices. The slow twin is every row on its own (`Run(exact=True)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from temper.core.errors import DataError
from temper.core.types import Message, Run
from temper.ops.batching import Example, encode, plain_ids
from temper.ops.logprobs import response_logprobs

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = ["ChoiceItem", "choice_logprobs", "encode_choices", "encode_replies"]


class ChoiceItem(NamedTuple):
    """One question: a row for each choice, its continuation scored, and the choices' texts."""

    rows: list[Example]
    texts: list[str]


def encode_choices(
    system: CausalLM, context: str, choices: Sequence[str], *, delimiter: str = " ", where: str = ""
) -> ChoiceItem:
    """Plain text, without a chat template, tokenised as lm-evaluation-harness does.

    Spaces that end the context move to the continuation, `delimiter` + choice. The context's ids are those of the
    context alone; the continuation's are what the ids of both together have beyond that many. After an empty context
    stands the tokenizer's beginning-of-text token, or its end-of-text token. Control strings are ordinary text here.
    Raises DataError for a choice that adds no token.
    """
    _require_choices(choices, where)
    before = context.rstrip()
    rows = []
    for choice in choices:
        after = context[len(before) :] + delimiter + choice
        known = plain_ids(system.tokenizer, before) if before else []
        added = plain_ids(system.tokenizer, before + after)[len(known) :]
        if not before:
            known, added = _opened(system, added)
        if not added:
            raise DataError(
                f"The choice {choice!r} adds no token to its context",
                where=where or f"context {context[-40:]!r}",
                cure="Begin it with a space, or give it some text.",
            )
        rows.append(Example(known + added, [False] * len(known) + [True] * len(added)))
    return ChoiceItem(rows, list(choices))


def _opened(system: CausalLM, ids: list[int]) -> tuple[list[int], list[int]]:
    """The token that opens an empty context, and the rest; a tokenizer may have written it itself."""
    tokenizer = system.tokenizer
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return ([first], ids[1:] if ids[:1] == [first] else ids)


def encode_replies(
    system: CausalLM, prompt: str | Sequence[Message], replies: Sequence[str], *, where: str = ""
) -> ChoiceItem:
    """The replies as assistant turns, with their end-of-turn tokens, in the system's chat template."""
    _require_choices(replies, where)
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    return ChoiceItem([encode(system, (messages, reply), where=where) for reply in replies], list(replies))


def _require_choices(choices: Sequence[str], where: str) -> None:
    if not choices:
        raise DataError("A question has no choices", where=where, cure="Give it at least one.")


def choice_logprobs(
    system: CausalLM,
    items: Sequence[ChoiceItem],
    run: Run,
    *,
    per: Literal["choice", "token", "byte", "character"] = "choice",
) -> list[Tensor]:
    """Log-probability of every choice in nats, a tensor (K,) for each item; the argmax is the model's answer.

    Summed over the choice's tokens (benchmarks call its accuracy acc), or that divided by their number, by the text's
    UTF-8 bytes, or by its characters (acc_norm). Raises DataError for a text of no length, and as
    `response_logprobs` does.
    """
    rows = [row for item in items for row in item.rows]
    texts = [text for item in items for text in item.texts]
    if per in ("byte", "character") and not all(texts):
        raise DataError(
            "A choice has no length", where=f"choice {texts.index('')}", cure="Count by choice or by token."
        )
    sum_N = response_logprobs(system, rows, run=run)
    if per == "token":
        sum_N = sum_N / torch.tensor([sum(row.scored) for row in rows])
    elif per != "choice":
        sum_N = sum_N / torch.tensor([len(text.encode() if per == "byte" else text) for text in texts])
    return list(sum_N.split([len(item.rows) for item in items]))
