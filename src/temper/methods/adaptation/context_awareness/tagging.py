"""Which user turns carry the indicator: tagged as text in data, as a control id in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median
from typing import Literal

from temper.core.errors import DataError
from temper.core.types import Message
from temper.data.schemas import Dialogue
from temper.methods.adaptation.context_awareness.card import INDICATOR
from temper.methods.adaptation.context_awareness.shares import SKIPPED

__all__ = ["MARK", "as_control", "tag", "tag_text", "threshold", "without_tags"]

MARK = f" {INDICATOR}"


def tag_text(text: str) -> str:
    """The message with the indicator behind it, after a full stop if it ends in a letter or digit."""
    return text + ("." if text[-1:].isalnum() else "") + MARK


def threshold(scores_N: Sequence[Sequence[float]], beta: float | Literal["median"]) -> float:
    """beta, or the median of the scores of all turns that have one (Departure 9)."""
    if beta != "median":
        return beta
    known = [score for scores in scores_N for score in scores if score != SKIPPED]
    if not known:
        raise DataError(
            "No turn has a score to take the median of",
            where="part train",
            cure="Give conversations with replies that fit into score_max_tokens.",
        )
    return median(known)


def tag(record: Dialogue, scores: Sequence[float], beta: float) -> Dialogue:
    """The conversation with its context-dependent user turns tagged; `extra` keeps scores and tags, one a user turn."""
    messages = list(without_tags(record).messages)
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    tagged = [score > beta for score in scores]
    for index, is_tagged in zip(users, tagged, strict=True):
        if is_tagged:
            messages[index] = dataclasses.replace(messages[index], content=tag_text(messages[index].content))
    extra = {**record.extra, "context_scores": list(scores), "context_tagged": tagged}
    return dataclasses.replace(record, messages=tuple(messages), extra=extra)


def _is_tagged(message: Message) -> bool:
    return message.role == "user" and message.content.endswith(MARK)


def without_tags(record: Dialogue) -> Dialogue:
    """The conversation without the indicator's text; a full stop that came with it stays."""
    messages = (
        dataclasses.replace(m, content=m.content.removesuffix(MARK)) if _is_tagged(m) else m
        for m in record.messages
    )
    return dataclasses.replace(record, messages=tuple(messages))


def as_control(record: Dialogue) -> Dialogue:
    """The conversation with the text of each tag replaced by the control token (Departures 3 and 4)."""
    messages = (
        dataclasses.replace(m, content=m.content.removesuffix(MARK), control=(INDICATOR,))
        if _is_tagged(m)
        else m
        for m in record.messages
    )
    return dataclasses.replace(record, messages=tuple(messages))
