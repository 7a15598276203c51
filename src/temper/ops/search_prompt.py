"""A slot within a rendered prompt: its ids and its text, and the check that one gives the other back.

A string is what an attack hands over, ids are what it searches. A candidate counts only if the whole prompt, rendered
and encoded with the candidate's text in the slot, gives exactly the ids that were scored: tokens may merge
inside the slot and across both of its borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from temper.core.errors import DataError, ModelError
from temper.core.types import Message
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import SLOT

__all__ = [
    "SLOT",
    "PrefixesReply",
    "SlotPrompt",
    "exact_rows",
    "initial_ids",
    "reply_prefix_ids",
    "slot_prompt",
]

LEFT_TOKENS = 4
"""Tokens decoded in front of the slot, so that its first token reads as it does in the middle of a text."""
FILLERS = (" !", "! ", "!", " x", "x ", " a", " the", "0")
"""What a slot is filled with at first, in the order tried."""


@runtime_checkable
class PrefixesReply(Protocol):
    """A step rule that makes every answer open with ids the text does not show, such as a control token."""

    def reply_prefix_ids(self) -> list[int]:
        """The ids that open an answer which is no refusal."""
        ...


def reply_prefix_ids(system: CausalLM) -> list[int]:
    """The ids that the system's step rules put before the text of an answer, in the rules' order."""
    return [
        i for rule in system.step_rules if isinstance(rule, PrefixesReply) for i in rule.reply_prefix_ids()
    ]


@dataclass(frozen=True)
class SlotPrompt:
    """One prompt with a slot, as ids: before | slot | after | target.

    `messages` are the conversation after the system's rewrites, with `SLOT` where the slot is.
    """

    system: CausalLM
    messages: tuple[Message, ...]
    before: list[int]
    after: list[int]
    target: list[int]

    def fill(self, text: str) -> tuple[Message, ...]:
        """The conversation with `text` in the slot."""
        return tuple(Message(m.role, m.content.replace(SLOT, text)) for m in self.messages)

    def full_ids(self, slot_ids: Sequence[int]) -> list[int]:
        """Prompt and target as ids."""
        return [*self.before, *slot_ids, *self.after, *self.target]

    def texts(self, ids_KN: Sequence[Sequence[int]]) -> list[str | None]:
        """The slot's text for each row of ids, as it reads right of the prompt; None where bytes cross its border."""
        left = self.before[-LEFT_TOKENS:]
        rows = [left, *([*left, *ids] for ids in ids_KN)]
        head, *wholes = self.system.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return [whole[len(head) :] if whole.startswith(head) else None for whole in wholes]

    def encode(self, text: str) -> list[int] | None:
        """The whole prompt's ids with `text` in the slot; None where the template or tokenizer refuses it."""
        try:
            return self.system.chat.prompt(self.fill(text)).ids
        except (DataError, ModelError):
            return None

    def is_exact(self, ids_N: Sequence[int], text: str | None) -> bool:
        """Whether `text` in the slot, encoded within the whole prompt, gives exactly these ids."""
        return text is not None and self.encode(text) == [*self.before, *ids_N, *self.after]


def slot_prompt(
    system: CausalLM, prompt: str | Sequence[Message], target: str, *, opening: Sequence[int] | None = None
) -> SlotPrompt:
    """The prompt with its slot; a single user message without `SLOT` gets it at its end.

    The target starts with `opening`, by default the system's own `reply_prefix_ids`. Raises DataError for a target
    without text, one longer than the context, or a slot that stands elsewhere than once in a user message.
    """
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    if len(messages) == 1 and SLOT not in messages[0].content:
        messages = [Message(messages[0].role, messages[0].content + SLOT)]
    sent = system.rewritten(messages)
    before, after = system.chat.split_prompt(sent)
    ids = [*(reply_prefix_ids(system) if opening is None else opening), *_target_ids(system, sent, target)]
    _require_room(system, len(before) + len(after) + len(ids))
    return SlotPrompt(system, sent, before, after, ids)


def _target_ids(system: CausalLM, messages: Sequence[Message], target: str) -> list[int]:
    """The target as the ids the model would write: those of a reply, without its end of turn."""
    if not target.strip():
        raise DataError("The target is empty", cure="Give how the reply should begin.")
    chat = system.chat
    if chat.opens_reply:
        return chat.continuation_ids(target)
    whole = chat.dialogue([*messages, Message("assistant", target)])
    span = whole.spans[-1]
    start = len(chat.prompt(messages).ids)
    ids = whole.ids[start : span.end]
    return ids[:-1] if len(ids) > 1 and ids[-1] in chat.stop_ids else ids


def _require_room(system: CausalLM, num_tokens: int) -> None:
    room = system.max_tokens
    if room is not None and num_tokens >= room:
        raise DataError(
            f"Prompt and target have {num_tokens} tokens; the context holds {room}",
            cure="Shorten them, or use a model with a longer context.",
        )


def exact_rows(prompts: Sequence[SlotPrompt], ids_KN: Tensor) -> list[int]:
    """Rows whose text gives their ids back in every one of the prompts."""
    rows = list(range(len(ids_KN)))
    ids = ids_KN.tolist()
    for prompt in prompts:
        texts = prompt.texts([ids[row] for row in rows])
        rows = [row for row, text in zip(rows, texts, strict=True) if prompt.is_exact(ids[row], text)]
    return rows


def initial_ids(prompts: Sequence[SlotPrompt], num_tokens: int, text: str = "") -> list[int]:
    """Ids to start from that every prompt gives back: those of `text`, or `num_tokens` exclamation marks.

    Where a tokenizer merges the marks, other fillers are tried. Raises DataError if none holds.
    """
    first = prompts[0]
    left = next(m.content for m in first.messages if SLOT in m.content).partition(SLOT)[0]
    tried = []
    for filler in [text] if text else FILLERS:
        ids = first.system.chat.continuation_ids(filler if text else filler * num_tokens, left)
        ids = ids if text else ids[:num_tokens]
        tried.append(filler)
        if all(p.is_exact(ids, p.texts([ids])[0]) for p in prompts) and (text or len(ids) == num_tokens):
            return ids
    raise DataError(
        f"The initial text {tried[0]!r} does not keep its tokens inside the prompt",
        where=f"prompt {left[-60:]!r}",
        cure="Give another initial text, e.g. one that starts with a space, or end the prompt with a letter or mark.",
    )
