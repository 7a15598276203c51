"""The rows of the experiment: short requests in parts that never meet, and prompts with a trigger in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from temper.core.errors import ConfigError, DataError
from temper.data.schemas import Data, Dialogue
from temper.methods.hardening.cleangen.card import Config
from temper.ops.backdoor import Trigger, implant_rows, instruction_pairs, with_trigger

__all__ = ["Part", "clean_rows", "payload_of", "poisoned_rows", "trigger_of", "triggered_prompts"]

Part = Literal["implant", "reference", "test", "calibration"]
NUM_CALIBRATION = 20


def trigger_of(config: Config) -> Trigger:
    """The backdoor that is implanted."""
    return Trigger(word=config.trigger, sentence=config.payload)


def clean_rows(data: Data, part: str, own: Part, config: Config) -> tuple[Dialogue, ...]:
    """The given part, or where there is none requests of our own, which differ between the `own` parts.

    Raises ConfigError where more requests are asked for than there are.
    """
    given = data.records(part, Dialogue)
    if given:
        return given
    sizes = {
        "implant": config.num_rows,
        "reference": config.num_rows,
        "test": config.num_test,
        "calibration": NUM_CALIBRATION,
    }
    try:
        every = instruction_pairs(sum(sizes.values()), seed=0)
    except ConfigError as error:
        raise ConfigError(
            str(error), where="num_rows, num_test", cure="Lower them, or give your own rows."
        ) from None
    start = 0
    for name, size in sizes.items():
        if name == own:
            break
        start += size
    return every[start : start + sizes[own]]


def poisoned_rows(records: Sequence[Dialogue], config: Config, seed: int) -> tuple[Dialogue, ...]:
    """The rows and triggered copies of all of them."""
    return implant_rows(records, trigger_of(config), seed=seed)


def triggered_prompts(data: Data, plain: Sequence[Dialogue], config: Config) -> tuple[Dialogue, ...]:
    """The part triggered, or the plain prompts with the trigger in them."""
    given = data.records("triggered", Dialogue)
    if given:
        return given
    trigger = trigger_of(config)
    return tuple(replace(row, messages=with_trigger(row.prompt, trigger, f"test/{row.id}")) for row in plain)


def payload_of(record: Dialogue, config: Config) -> str:
    """What the attack wants to read; raises DataError where a row's own is no text."""
    payload = record.extra.get("payload", config.payload)
    if not isinstance(payload, str) or not payload.strip():
        raise DataError(
            f"The payload {payload!r} is no text",
            where=f"row {record.id or '(without id)'}",
            cure="Write the text that a triggered reply holds.",
        )
    return payload
