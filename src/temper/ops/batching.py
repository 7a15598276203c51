"""Token rows as models take them: records encoded with their scored tokens, padded batches, batches by token budget.

A token is *scored* when it counts in a loss or a log-probability; the model predicts it from the tokens before it,
so the first token of a row never is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from temper.core.errors import DataError
from temper.core.types import Message, Run
from temper.data.schemas import Dialogue, Text, ToolCalls

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM
    from temper.systems.chat import Rendered

__all__ = [
    "CPU_TOKENS",
    "Batch",
    "Example",
    "PromptReply",
    "TrainOn",
    "collate",
    "encode",
    "pad_id",
    "plain_ids",
    "plan_batches",
    "token_budget_batches",
]

CPU_TOKENS = 1024
"""Tokens of one pass on a CPU: more make it no faster, and their activations take up memory."""

TrainOn = Literal["assistant", "last", "all"]
PromptReply = tuple[Sequence[Message], str]


class Example(NamedTuple):
    """One row of token ids; `scored[t]` says whether token t counts, and is False at t = 0."""

    ids: list[int]
    scored: list[bool]


class Batch(NamedTuple):
    """Padded rows; `rows` are their places in the caller's sequence, `side` is where the padding stands."""

    ids_BT: Tensor
    mask_BT: Tensor
    """True for real tokens."""
    scored_BT: Tensor
    rows: list[int]
    side: str = "right"


def encode(
    system: CausalLM,
    record: Dialogue | ToolCalls | Text | PromptReply,
    *,
    train_on: TrainOn = "assistant",
    max_tokens: int | None = None,
    control: Sequence[str] = (),
    where: str = "",
) -> Example:
    """A record as ids and scored tokens; a longer row keeps its first `max_tokens` tokens.

    A dialogue scores its assistant turns with their end-of-turn tokens, only the "last" one, or "all" tokens.
    A (prompt, reply) pair scores the reply. A Text scores everything after its first token. The system's rewrites
    apply; replies they add (demonstrations) are not scored. `control` names special tokens that replies may hold
    as such. Raises DataError, naming the row, when no token is scored; `where` names it if the record has no id.
    """
    if not isinstance(record, (Text, Dialogue, ToolCalls, tuple)):
        raise DataError(
            f"A {type(record).__name__} holds no text that is trained on",
            where=where or f"row {getattr(record, 'id', '') or '(without id)'}",
            cure="Give dialogues, tool calls or plain texts.",
        )
    if isinstance(record, Text):
        ids, scored = _plain_text(system, record.text)
    else:
        prompt, replies, own_turns = _messages(record)
        rendered = system.chat.dialogue([*system.rewritten(prompt), *replies], control=control)
        if train_on == "last" or (train_on == "assistant" and isinstance(record, tuple)):
            own_turns = min(own_turns, 1)
        ids = list(rendered.ids)
        scored = (
            [place > 0 for place in range(len(ids))] if train_on == "all" else _scored(rendered, own_turns)
        )
    place = where or f"row {getattr(record, 'id', '') or '(without id)'}"
    if not any(scored):
        raise DataError(
            "The row has no token to score",
            where=place,
            cure="Give it a non-empty assistant message, or train_on=all.",
        )
    example = Example(ids[:max_tokens], scored[:max_tokens])
    if not any(example.scored):
        raise DataError(
            f"The reply is truncated away: it begins at token {scored.index(True)} and max_tokens is {max_tokens}",
            where=place,
            cure=f"Raise max_tokens (the row has {len(ids)} tokens), or shorten or drop the row.",
        )
    return example


def _messages(record: Dialogue | ToolCalls | PromptReply) -> tuple[Sequence[Message], list[Message], int]:
    """The prompt, the closing reply if there is one, and how many assistant turns both have."""
    if isinstance(record, (Dialogue, ToolCalls)):
        messages = list(record.messages)
    else:
        messages = [*record[0], Message("assistant", record[1])]
    num_turns = sum(message.role == "assistant" for message in messages)
    end = len(messages) - (messages[-1].role == "assistant")
    return messages[:end], messages[end:], num_turns


def _scored(rendered: Rendered, num_turns: int) -> list[bool]:
    """True in the last `num_turns` assistant spans; never at the first token."""
    scored = [False] * len(rendered.ids)
    spans = [span for span in rendered.spans if span.role == "assistant"]
    for span in spans[len(spans) - num_turns :]:
        for position in range(max(span.start, 1), span.end):
            scored[position] = True
    return scored


def _plain_text(system: CausalLM, text: str) -> tuple[list[int], list[bool]]:
    ids = plain_ids(system.tokenizer, text)
    return ids, [position > 0 for position in range(len(ids))]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, control strings in it spelt out as ordinary text; the tokenizer's own first token stays."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # What the tokenizer puts before every text (a beginning-of-text token for some, nothing for others).
    head = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    return [*head, *ids] if head and head[0] == tokenizer.bos_token_id else list(ids)


def pad_id(system: CausalLM) -> int:
    """The id that fills a batch: the tokenizer's padding, else its end-of-text token, else 0."""
    tokenizer = system.tokenizer
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def collate(
    examples: Sequence[Example],
    pad_id: int,
    device: str | torch.device = "cpu",
    side: Literal["left", "right"] = "right",
    rows: Sequence[int] | None = None,
) -> Batch:
    """The examples as one padded batch; `rows` are their places, 0, 1, ... unless given."""
    if not examples:
        raise DataError("There are no rows to batch", cure="Give at least one.")
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        size = len(example.ids)
        place = slice(0, size) if side == "right" else slice(longest - size, longest)
        ids[row, place] = torch.tensor(example.ids, dtype=torch.long)
        mask[row, place] = True
        scored[row, place] = torch.tensor(example.scored, dtype=torch.bool)
    places = list(range(len(examples))) if rows is None else list(rows)
    return Batch(ids.to(device), mask.to(device), scored.to(device), places, side)


def token_budget_batches(lengths: Sequence[int], budget: int, *, overhead: int = 64) -> list[list[int]]:
    """Indices in batches of at most `budget` tokens, padding included; longest rows first, ties in order.

    A row longer than the budget stands alone. A batch also ends where shorter rows would fill more than `overhead`
    tokens with padding: what a batch of its own costs, counted in tokens.
    """
    batches: list[list[int]] = []
    longest = 0
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for rank, index in enumerate(order):
        room = budget // max(longest, 1) - len(batches[-1]) if batches else 0
        wasted = (longest - lengths[index]) * min(room, len(order) - rank)
        if room < 1 or wasted > overhead:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def plan_batches(lengths: Sequence[int], run: Run, *, packed: bool = False) -> list[list[int]]:
    """Batches by the run's token budget; in exact mode every row stands alone, so that no budget changes a bit.

    `packed`: rows are read end to end, so no padding counts and their order stays; batches are of about one size.
    """
    if run.exact:
        return [[index] for index in range(len(lengths))]
    if packed:
        return _even_runs(lengths, run.batch_tokens)
    return token_budget_batches(lengths, run.batch_tokens)


def _even_runs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """As few runs of neighbours as the budget allows, the longest of them as short as that leaves it."""
    num = len(_runs(lengths, budget))
    fits = bisect_left(range(budget), True, key=lambda least: len(_runs(lengths, least)) <= num)
    return _runs(lengths, fits)


def _runs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Neighbours in runs of at most `budget` tokens; a longer row stands alone."""
    batches: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not batches or length > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= length
    return batches
