"""Which classes are learned and which are new, few-shot draws, and the numbers of the base-to-new comparison.

Shape letters: N pictures, C classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from temper.core.errors import ConfigError, DataError, nearest
from temper.data.schemas import Labelled
from temper.methods.vision_language.cocoop.prompts import readable

__all__ = [
    "Split",
    "check_new",
    "class_name",
    "class_names",
    "draw_shots",
    "harmonic_mean",
    "of_classes",
    "split_classes",
]


class Split(NamedTuple):
    """Names of the classes that are learned, and of those that are not; both in the order of their labels."""

    base: tuple[str, ...]
    new: tuple[str, ...]


def class_name(record: Labelled) -> str:
    """The name of a record's class: its label, or the column `name` beside a number. Raises DataError without one."""
    name = record.label if isinstance(record.label, str) else record.extra.get("name")
    if not isinstance(name, str) or not readable(name):
        raise DataError(
            f"The class {record.label!r} has no name",
            where=f"row {record.id!r}",
            cure="Prompts are made of class names: add a column `name`, or write the name as the label.",
        )
    return readable(name)


def class_names(records: Sequence[Labelled]) -> tuple[str, ...]:
    """Every class's name, by label: numbers in their order, texts in alphabetical order.

    Raises DataError for a label with two names, or a name with two labels.
    """
    names: dict[int | str, str] = {}
    for record in records:
        name = class_name(record)
        if names.setdefault(record.label, name) != name:
            raise DataError(
                f"The class {record.label!r} has two names, {names[record.label]!r} and {name!r}",
                where=f"row {record.id!r}",
                cure="Give every class one name.",
            )
    ordered = [names[label] for label in sorted(names, key=lambda label: (isinstance(label, str), label))]
    doubles = sorted(name for name in set(ordered) if ordered.count(name) > 1)
    if doubles:
        raise DataError(
            f"Two classes have the name {doubles[0]!r}", cure="Give every class a name of its own."
        )
    return tuple(ordered)


def split_classes(names: Sequence[str], base: Sequence[str] = (), new: Sequence[str] = ()) -> Split:
    """The first half of the names, rounded up, and the rest; or the names given. Raises ConfigError for unknown ones.

    With `base` given and `new` not, all other names are new.
    """
    for name in (*base, *new):
        if readable(name) not in names:
            raise ConfigError(f"No row is of the class {name!r}", cure=nearest(name, names))
    if not base:
        half = math.ceil(len(names) / 2)
        return Split(tuple(names[:half]), tuple(names[half:]))
    learned = {readable(name) for name in base}
    rest = {readable(name) for name in new} or set(names) - learned
    return Split(
        tuple(name for name in names if name in learned),
        tuple(name for name in names if name in rest - learned),
    )


def check_new(new: Sequence[str], learned: Sequence[str]) -> None:
    """Raise ConfigError where prompts were learned on a class that counts as new."""
    known = [name for name in new if name in learned]
    if known:
        raise ConfigError(
            f"{len(known)} of {len(new)} new classes were learned, {known[0]!r} among them",
            where="base-to-new",
            cure="Fit with the protocol, base and new that you measure with, on data of the same classes; or set protocol: all.",
        )


def of_classes(records: Sequence[Labelled], names: Sequence[str]) -> list[Labelled]:
    """The records of these classes, in their order."""
    chosen = set(names)
    return [record for record in records if class_name(record) in chosen]


def draw_shots(records: Sequence[Labelled], names: Sequence[str], shots: int, seed: int) -> list[Labelled]:
    """`shots` records of each class, all of them where it has fewer, drawn by the seed. Raises DataError for a class without any."""
    pools: dict[str, list[Labelled]] = {name: [] for name in names}
    for record in of_classes(records, names):
        pools[class_name(record)].append(record)
    chosen = []
    for name, pool in pools.items():
        if not pool:
            raise DataError(
                f"The class {name!r} has no training picture", cure="Give each class at least one."
            )
        chosen += random.Random(f"{seed}/{name}").sample(pool, min(shots, len(pool)))
    return chosen


def harmonic_mean(base: float, new: float) -> float:
    """2bn/(b + n); 0 when either is 0."""
    return 2 * base * new / (base + new) if base > 0 and new > 0 else 0.0
