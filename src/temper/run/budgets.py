"""`budget:` of an opponent: one list to go through, and single limits of what any attempt may spend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from temper.core.budget import UNITS
from temper.core.errors import ConfigError
from temper.core.types import Json

__all__ = ["Budgets", "attack_of", "parse_budget"]


class Budgets(NamedTuple):
    """`each` attempt's own setting or limit, and the `limits` of all."""

    each: tuple[Mapping[str, Json], ...]
    limits: Mapping[str, float]


def attack_of(label: Mapping[str, Json]) -> str:
    """The attack that a row's label is about, with its budget: "relearn num_steps 20"."""
    return " ".join([str(label["opponent"]), *(f"{key} {value}" for key, value in label["budget"].items())])


def parse_budget(raw: Json, where: str) -> Budgets:
    """{num_steps: [5, 20], seconds: 60} -> two attempts, neither longer than a minute. Raises ConfigError."""
    example = "Write e.g. budget: {num_steps: [5, 20], seconds: 60}."
    if not isinstance(raw or {}, Mapping):
        raise ConfigError("budget is not a mapping", where=where, cure=example)
    lists = {name: values for name, values in (raw or {}).items() if isinstance(values, list)}
    single = {name: value for name, value in (raw or {}).items() if name not in lists}
    if len(lists) > 1:
        raise ConfigError("A budget goes through one setting", where=where, cure=example)
    for name in single:
        if name not in UNITS:
            raise ConfigError(
                f"{name!r} is no unit of a budget",
                where=where,
                cure=f"Put it into settings, give a list, or use {', '.join(UNITS)}.",
            )
    listed = [(name, value) for name, values in lists.items() for value in values]
    for name, value in (*single.items(), *(pair for pair in listed if pair[0] in UNITS)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError(f"{name} = {value!r} is no number above 0", where=where, cure=example)
    if lists and not listed:
        raise ConfigError("The budget's list is empty", where=where, cure=example)
    return Budgets(tuple({name: value} for name, value in listed), single)
