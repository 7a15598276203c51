"""Banks of request templates and the rows they give.

A bank is a YAML file with `lists` (values separated by ";", fields of a value by "|") and `groups`; a group has
a `count` and `rows`, one template a line: `request => reply || another reply`. `{name}` takes the next value of
the list `name`, `{name.1}` the second field of the same value. Lists may also be given from code, for values that
are computed and not typed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from temper.core.errors import DataError

__all__ = ["Bank", "Filled", "Group", "Template", "expand", "read_bank"]

Values = Mapping[str, Sequence[Sequence[str]]]
SLOT = re.compile(r"\{([a-z_]+)(?:\.(\d))?\}")


class Template(NamedTuple):
    """One request with the replies that suit it."""

    request: str
    replies: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Templates of one kind; `labels` are the group's other keys (category, subcategory, ...)."""

    labels: Mapping[str, str]
    count: int
    templates: tuple[Template, ...]


class Bank(NamedTuple):
    """The lists and groups of one file."""

    lists: Mapping[str, tuple[tuple[str, ...], ...]]
    groups: tuple[Group, ...]


class Filled(NamedTuple):
    """A template with every slot filled; `labels` come from its group."""

    request: str
    reply: str
    template: Template
    labels: Mapping[str, str]


def read_bank(path: Path, computed: Mapping[str, Sequence[str]] | None = None) -> Bank:
    """The bank in a YAML file, with `computed` lists added to those it types out."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    lists = {name: _values(str(text).split(";")) for name, text in (raw.get("lists") or {}).items()}
    lists |= {name: _values(values) for name, values in (computed or {}).items()}
    return Bank(lists, tuple(_group(entry, path) for entry in raw["groups"]))


def expand(group: Group, bank: Bank, rng: random.Random) -> list[Filled]:
    """`group.count` different filled templates, every template used before one is used twice.

    Raises DataError when the templates and lists cannot give that many different requests.
    """
    order = list(group.templates)
    rng.shuffle(order)
    values = {template: _shuffled_values(template, bank, rng) for template in order}
    found: dict[str, Filled] = {}
    for round_number, template in _rounds(order):
        if len(found) == group.count:
            break
        filled = _fill(template, values[template], round_number, rng)
        found.setdefault(filled.request, filled._replace(labels=group.labels))
    if len(found) == group.count:
        return list(found.values())
    raise DataError(
        f"group has only {len(found)} different rows of the {group.count} wanted",
        where=str(dict(group.labels)),
        cure="Add templates or list values, or lower `count`.",
    )


def _rounds(order: Sequence[Template], num_rounds: int = 60) -> Iterator[tuple[int, Template]]:
    """Every template once, then again and again those that have a slot to vary."""
    yield from ((0, template) for template in order)
    for number in range(1, num_rounds):
        yield from ((number, template) for template in order if SLOT.search(template.request))


def _shuffled_values(template: Template, bank: Bank, rng: random.Random) -> Values:
    """The values of the template's lists in an order of its own, so that templates don't move in step."""
    names = dict.fromkeys(name for name, _ in SLOT.findall(template.request))
    return {name: rng.sample(bank.lists[name], len(bank.lists[name])) for name in names}


def _fill(template: Template, values: Values, number: int, rng: random.Random) -> Filled:
    reply = rng.choice(template.replies)

    def slot(match: re.Match[str]) -> str:
        of_list = values[match[1]]
        return of_list[number % len(of_list)][int(match[2] or 0)]

    return Filled(SLOT.sub(slot, template.request), _capitalised(SLOT.sub(slot, reply)), template, {})


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _values(entries: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(field.strip() for field in entry.split("|")) for entry in entries if entry.strip())


def _group(entry: dict[str, Any], path: Path) -> Group:
    labels = {key: value for key, value in entry.items() if key not in ("count", "rows")}
    templates = tuple(_template(line, path) for line in entry["rows"].splitlines() if line.strip())
    return Group(labels, int(entry.get("count", len(templates))), templates)


def _template(line: str, path: Path) -> Template:
    request, arrow, replies = line.partition("=>")
    if not arrow or not replies.strip():
        raise DataError(
            f"row without a reply: {line.strip()!r}", where=str(path), cure="Write: request => reply."
        )
    return Template(request.strip(), tuple(reply.strip() for reply in replies.split("||")))
