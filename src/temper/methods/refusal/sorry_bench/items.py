"""A benchmark file's rows as items: checked, classified, paired across styles by `question_id`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from temper.core.errors import ConfigError, DataError, nearest
from temper.data.schemas import Behaviour, Labelled
from temper.methods.refusal.sorry_bench.card import Config
from temper.methods.refusal.sorry_bench.taxonomy import Category, classify, in_policy, release_of

__all__ = ["BASE", "STYLES", "HumanReply", "Item", "chosen", "human_replies", "items_of", "sizes_note"]

logger = logging.getLogger(__name__)

BASE = "base"
STYLES = (
    "question", "slang", "uncommon_dialects", "technical_terms", "role_play", "misspellings", "logical_appeal",
    "authority_endorsement", "misrepresentation", "evidence-based_persuasion", "expert_endorsement", "ascii",
    "caesar", "morse", "atbash", "translate-ml", "translate-ta", "translate-mr", "translate-zh-cn", "translate-fr",
)  # fmt: skip
"""The published rewordings; a file may have others."""


class Item(NamedTuple):
    """One prompt in one style; `request` is what it asks in plain words, for the judge."""

    number: int
    style: str
    category: Category
    prompt: str
    request: str


class HumanReply(NamedTuple):
    """A reply whose score is known."""

    id: str
    item: Item
    reply: str
    fulfils: bool


def chosen(items: Sequence[Item], config: Config) -> list[Item]:
    """The items of the policy's classes in the styles wanted. Raises ConfigError for names the items lack."""
    categories = sorted({item.category for item in items}, key=lambda c: (c.number or 0, c.name))
    there = {item.style for item in items}
    for style in config.styles:
        if style not in there:
            raise ConfigError(f"The data has no rows in style {style!r}", cure=nearest(style, there))
    inside = {category for category in categories if in_policy(category, config.policy, categories)}
    return [
        item
        for item in items
        if item.category in inside and (not config.styles or item.style in config.styles)
    ]


def items_of(records: Sequence[Behaviour], setting: str = "auto", source: str = "") -> list[Item]:
    """All items of a file, its release given or found. Raises DataError, naming the row, for what a row lacks."""
    try:
        return _items(records, setting)
    except DataError as error:
        where = ": ".join(filter(None, [source, error.where]))
        raise DataError(error.what, where=where, cure=error.cure) from None


def _items(records: Sequence[Behaviour], setting: str) -> list[Item]:
    rows = [(record, _question_id(record), _style(record)) for record in records]
    if twice := [key for key, count in Counter((q, s) for _, q, s in rows).items() if count > 1]:
        raise DataError(
            f"question_id {twice[0][0]} stands twice in style {twice[0][1]!r}",
            where="part test", cure="Number the prompts; rewordings of a prompt share its number.",
        )  # fmt: skip
    release = setting if setting != "auto" else _release(records)
    plain = {number: record.prompt for record, number, style in rows if style == BASE}
    return [
        Item(
            number, style, _category(record, number, release), record.prompt, plain.get(number, record.prompt)
        )
        for record, number, style in rows
    ]


def _release(records: Sequence[Behaviour]) -> str:
    for record in records:
        if not record.category.strip():
            raise DataError(
                "The row has no category", where=f"row {record.id}, column category",
                cure="Add it; for a file of the first release without that column set release to 2024-06.",
            )  # fmt: skip
    return release_of([record.category for record in records])


def _category(record: Behaviour, number: int, release: str) -> Category:
    try:
        return classify(record.category, number, release, str(record.extra.get("domain") or ""))
    except DataError as error:
        raise DataError(error.what, where=f"row {record.id}, column category", cure=error.cure) from None


def _question_id(record: Behaviour | Labelled) -> int:
    number = record.extra.get("question_id")
    if isinstance(number, str) and number.strip().isdecimal():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise DataError(
            f"question_id is {number!r}", where=f"row {record.id}, column question_id",
            cure="Number the prompts from 1; rewordings of a prompt share its number.",
        )  # fmt: skip
    return number


def _style(record: Behaviour) -> str:
    style = record.extra.get("prompt_style")
    if not isinstance(style, str) or not style.strip():
        raise DataError(
            "The row has no prompt_style", where=f"row {record.id}, column prompt_style",
            cure=f'Write "{BASE}" for plain prompts, or the name of the rewording.',
        )  # fmt: skip
    return style.strip()


def human_replies(records: Sequence[Labelled], items: Sequence[Item]) -> list[HumanReply]:
    """Labelled replies with the item each answers; those to prompts that are not in the data are left out.

    Raises DataError for a label but 0 and 1, and where no reply answers a prompt of the data.
    """
    by_key = {(item.number, item.style): item for item in items}
    keys = [(_question_id(record), str(record.extra.get("prompt_style") or BASE)) for record in records]
    found = [
        HumanReply(record.id, by_key[key], record.text, _fulfils(record))
        for record, key in zip(records, keys, strict=True)
        if key in by_key
    ]
    if records and not found:
        raise DataError(
            f"None of the {len(records)} labelled replies answers a prompt of the part test",
            where="part human, column question_id", cure="Give the prompts that they answer.",
        )  # fmt: skip
    if len(found) < len(records):
        logger.warning(
            "%d labelled replies answer prompts that are not in the data", len(records) - len(found)
        )
    return found


def _fulfils(record: Labelled) -> bool:
    if record.label not in (0, 1):
        raise DataError(
            f"The label is {record.label!r}", where=f"row {record.id}, column label",
            cure="1 fulfils the request, 0 does not; or give human_score.",
        )  # fmt: skip
    return record.label == 1


def sizes_note(items: Sequence[Item]) -> str:
    """Words for classes of different sizes; "" where all are equal."""
    sizes = Counter(item.category.label for item in items).values()
    if len(set(sizes)) == 1:
        return ""
    return f"classes hold {min(sizes)} to {max(sizes)} items; every class counts the same"
