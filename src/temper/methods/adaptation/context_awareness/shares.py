"""Where a reply looks: attention shares of groups of tokens, and how much a turn depends on the user's words.

Shape letters: K keys, G groups of keys (first position, user, response), N conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.data.schemas import Dialogue
from temper.ops.batching import Example, collate, plan_batches
from temper.ops.hooks import attention_weights
from temper.ops.precision import eval_mode
from temper.ops.seen_padding import decoder_stack
from temper.systems import anchors
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Rendered

__all__ = [
    "GROUPS",
    "SKIPPED",
    "Answer",
    "Turn",
    "attention_shares",
    "dependency_scores",
    "layer_number",
    "retrieval_head",
    "shares_of",
    "strongest_user_attention",
    "turns",
]

GROUPS = ("bos", "user", "response")
SKIPPED = -1.0
"""The score of a turn without a reply, or one that is cut off."""


def attention_shares(att_HQK: Tensor, groups_KG: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of Q response tokens by group: as it is and renormalised over the groups, each (H, G), mean over Q."""
    share_HQG = att_HQK @ groups_KG.to(att_HQK.dtype)
    total_HQ1 = share_HQG.sum(-1, keepdim=True).clamp_min(torch.finfo(att_HQK.dtype).tiny)
    return share_HQG.mean(1), (share_HQG / total_HQ1).mean(1)


def retrieval_head(user_NH: Tensor) -> int:
    """The head with the largest mean attention to user tokens; the first of equals."""
    return int(user_NH.mean(0).argmax())


def strongest_user_attention(att_BHTK: Tensor, user_BK: Tensor) -> Tensor:
    """Max over heads of the attention that each token gives to user tokens, (B, T).

    A token sees what stands before it, so in turn m the sum covers the user messages 1..m.
    """
    return torch.einsum("bhtk,bk->bht", att_BHTK, user_BK.to(att_BHTK.dtype)).amax(1)


def layer_number(system: CausalLM, layer: int | None) -> int:
    """The layer asked for, or the middle one: 15 of 32, 14 of 30."""
    count = len(anchors.layers(system.model))
    if layer is None:
        return (count - 1) // 2
    if not 0 <= layer < count:
        raise ConfigError(f"There is no layer {layer}", cure=f"Layers go from 0 to {count - 1}.")
    return layer


class Answer(NamedTuple):
    """A prompt with a reply, and which prompt tokens are the user's."""

    prompt_ids: list[int]
    user_T: Tensor
    reply_ids: list[int]


def shares_of(
    system: CausalLM, answers: Sequence[Answer], layer: int, num_tokens: int, run: Run
) -> tuple[Tensor, Tensor]:
    """Shares at the first `num_tokens` reply tokens, as they are and renormalised: two tensors (N, H, G).

    Departure 5: the group "bos" is the first position, whatever token stands there.
    """
    ids_N = [[*a.prompt_ids, *a.reply_ids[:num_tokens]] for a in answers]

    def reduce(att_BHTK: Tensor, rows: list[int]) -> Tensor:
        found = []
        for att_HTK, row in zip(att_BHTK, rows, strict=True):
            start, end = len(answers[row].prompt_ids), len(ids_N[row])
            groups_KG = _groups(answers[row], att_HTK.shape[-1], end).to(att_HTK.device)
            found.append(torch.stack(attention_shares(att_HTK[:, start:end], groups_KG)))
        return torch.stack(found)

    both = torch.stack(_over_batches(system, ids_N, layer, reduce, run))
    return both[:, 0], both[:, 1]


def _groups(answer: Answer, num_keys: int, end: int) -> Tensor:
    groups_KG = torch.zeros(num_keys, len(GROUPS))
    start = len(answer.prompt_ids)
    groups_KG[0, 0] = 1
    groups_KG[1:start, 1] = answer.user_T[1:].float()
    groups_KG[start:end, 2] = 1
    return groups_KG


class Turn(NamedTuple):
    """A user message and, if an assistant message follows at once, the token range of that reply's text."""

    message: int
    reply: tuple[int, int] | None


def turns(rendered: Rendered, control_ids: frozenset[int]) -> list[Turn]:
    """The user turns of a conversation. Departure 7: the end-of-turn token is no part of the reply."""
    found: list[Turn] = []
    for span, after in zip(rendered.spans, (*rendered.spans[1:], None), strict=True):
        if span.role != "user":
            continue
        reply = None
        if after is not None and after.role == "assistant":
            end = after.end
            while end > after.start and rendered.ids[end - 1] in control_ids:
                end -= 1
            reply = (after.start, end) if end > after.start else None
        found.append(Turn(span.message, reply))
    return found


def dependency_scores(
    system: CausalLM, records: Sequence[Dialogue], layer: int, max_tokens: int, run: Run
) -> list[list[float]]:
    """s_M of every user turn of every conversation: mean over its reply's tokens of the strongest user attention.

    -1 where there is no reply, or where `max_tokens` cuts it.
    """
    rendered = [system.chat.dialogue(record.messages) for record in records]
    ids_N = [r.ids[:max_tokens] for r in rendered]
    newlines = _Newlines(system)
    user_N = [_user_content(r, system.chat.control_ids, newlines) for r in rendered]

    def reduce(att_BHTK: Tensor, rows: list[int]) -> Tensor:
        user_BK = torch.zeros(len(rows), att_BHTK.shape[-1], device=att_BHTK.device)
        for b, row in enumerate(rows):
            user_BK[b, : len(ids_N[row])] = user_N[row][: len(ids_N[row])]
        return strongest_user_attention(att_BHTK, user_BK)

    strongest_N = _over_batches(system, ids_N, layer, reduce, run)
    out = []
    for r, ids, strongest_T in zip(rendered, ids_N, strongest_N, strict=True):
        found = turns(r, system.chat.control_ids)
        out.append([_mean_over(strongest_T, turn, len(ids)) for turn in found])
    return out


def _mean_over(strongest_T: Tensor, turn: Turn, num_tokens: int) -> float:
    if turn.reply is None or turn.reply[1] > num_tokens:
        return SKIPPED
    return float(strongest_T[slice(*turn.reply)].mean())


def _user_content(rendered: Rendered, control_ids: frozenset[int], newlines: _Newlines) -> Tensor:
    """1 at user tokens that are neither control tokens nor line breaks."""
    user_T = torch.zeros(len(rendered.ids))
    for span in rendered.spans:
        if span.role == "user":
            for place in range(span.start, span.end):
                token_id = rendered.ids[place]
                user_T[place] = float(token_id not in control_ids and not newlines(token_id))
    return user_T


class _Newlines:
    """Which ids are nothing but line breaks; each is decoded once."""

    def __init__(self, system: CausalLM) -> None:
        self.tokenizer = system.tokenizer
        self._known: dict[int, bool] = {}

    def __call__(self, token_id: int) -> bool:
        if token_id not in self._known:
            text = self.tokenizer.decode([token_id])
            self._known[token_id] = bool(text) and not text.strip("\r\n")
        return self._known[token_id]


def _over_batches(
    system: CausalLM,
    ids_N: Sequence[list[int]],
    layer: int,
    reduce: Callable[[Tensor, list[int]], Tensor],
    run: Run,
) -> list[Tensor]:
    """`reduce(attention of one layer, rows)` for every batch, taken apart by row in the order of `ids_N`."""
    found: dict[int, Tensor] = {}
    stack = decoder_stack(system.model)
    batches = plan_batches([len(ids) for ids in ids_N], run)
    with torch.no_grad(), eval_mode(system.model):
        for rows in run.ticker(batches, total=len(batches), label="attention"):
            examples = [Example(ids_N[row], [False] * len(ids_N[row])) for row in rows]
            batch = collate(examples, system.pad_id, system.device)
            with (
                attention_weights(system.model, [layer], reduce=_bound(reduce, rows)) as kept,
                _ending_after(anchors.layers(system.model)[layer]),
            ):
                stack(input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), use_cache=False)
            found.update(zip(rows, kept[layer][0].cpu(), strict=True))
    return [found[row] for row in range(len(ids_N))]


class _Enough(Exception):  # noqa: N818
    """The layer that was asked for has run."""


@contextmanager
def _ending_after(layer: nn.Module) -> Iterator[None]:
    """The block ends as soon as `layer` has run: what lies above is not needed."""

    def stop(*_: object) -> None:
        raise _Enough

    handle = layer.register_forward_hook(stop)
    try:
        with suppress(_Enough):
            yield
    finally:
        handle.remove()


def _bound(reduce: Callable[[Tensor, list[int]], Tensor], rows: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda att_BHTK: reduce(att_BHTK.float(), rows)
