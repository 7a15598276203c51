"""How many tokens a step trains on, reads and writes, guessed from the characters of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from temper.core.registry import load_card
from temper.core.types import Message
from temper.run.inputs import wanted_parts
from temper.run.plan import PlannedStep

__all__ = ["Work", "text_tokens", "work_of"]

CHARS_A_TOKEN = 4.0
"""Of English text; what is not ASCII splits further."""
TURN_TOKENS = 6
"""What a template writes around a message."""
REPLY_SETTINGS = ("reply_tokens", "max_new_tokens")
"""Settings that bound a reply's length."""
REPLY_TOKENS = 64
"""Tokens guessed for a reply where no setting bounds it."""
LONGEST_REPLY = 256
"""Replies seldom fill a larger bound: they end by themselves."""
HELD_OUT = frozenset({"calibration", "validation", "dev", "test", "heldout", "eval"})
"""Parts that a fit reads but does not train on."""


class Work(NamedTuple):
    """Tokens by what is done with them; rows are what is written to."""

    trained: int
    read: int
    written: int
    num_replies: int

    @property
    def total(self) -> int:
        return self.trained + self.read + self.written


def work_of(step: PlannedStep) -> Work:
    """The step's work; none where its data is not there yet or it uses no system."""
    if step.loaded is None or step.system is None:
        return Work(0, 0, 0, 0)
    card = load_card(step.method)
    parts = [name.removesuffix("?") for name in wanted_parts(card, step.verb)]
    sizes = {part: [_record_tokens(record) for record in step.loaded.get(part)] for part in parts}
    if step.verb == "fit":
        held_out = sum(sum(sizes[part]) for part in parts if part in HELD_OUT)
        return Work(_trained([sizes[p] for p in parts if p not in HELD_OUT], step.config), held_out, 0, 0)
    prompts = sum(sum(rows) for rows in sizes.values())
    num_replies = sum(len(rows) for rows in sizes.values()) if "generate" in card.needs else 0
    return Work(0, prompts, num_replies * _reply_tokens(step.config), num_replies)


def _trained(parts: Sequence[Sequence[int]], config: Any) -> int:
    """Tokens of all optimiser steps, as far as the usual settings say."""
    longest = _setting(config, "max_tokens") or math.inf
    rows = [min(size, longest) for part in parts for size in part]
    if not rows:
        return 0
    num_rows = min(len(rows), _setting(config, "max_train_rows") or len(rows))
    num_seen = num_rows * (_setting(config, "num_epochs") or 1)
    a_step = min(_setting(config, "batch_rows") or 1, num_rows)
    num_seen = max(num_seen, _setting(config, "min_steps") * a_step)
    if steps := _setting(config, "max_steps"):
        num_seen = steps * a_step
    return int(sum(rows) / len(rows) * num_seen)


def _reply_tokens(config: Any) -> int:
    bounds = [bound for name in REPLY_SETTINGS if (bound := _setting(config, name))]
    return int(min([*bounds, LONGEST_REPLY])) if bounds else REPLY_TOKENS


def _setting(config: Any, name: str) -> float:
    """A number among the settings, 0 where the method has no such setting."""
    value = vars(config).get(name)
    return value if isinstance(value, int | float) else 0


def _record_tokens(record: Any) -> int:
    return sum(_tokens(value) for name, value in vars(record).items() if name not in ("extra", "id"))


def _tokens(value: Any) -> int:
    """Tokens of the texts in a value."""
    if isinstance(value, str):
        return text_tokens(value)
    if isinstance(value, Message):
        return text_tokens(value.content) + TURN_TOKENS
    return sum(_tokens(item) for item in value) if isinstance(value, tuple) else 0


def text_tokens(text: str) -> int:
    """Tokens of a text, guessed from its characters and how many bytes they take."""
    num_more_bytes = 0 if text.isascii() else len(text.encode("utf-8", "replace")) - len(text)
    return round(len(text) / CHARS_A_TOKEN + num_more_bytes / 2)
