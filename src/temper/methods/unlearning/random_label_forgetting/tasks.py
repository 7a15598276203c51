"""Binary tasks: questions with the right response and one other, from the user's data or from our own generators."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from temper.core.errors import ConfigError, DataError, nearest
from temper.data.schemas import Choice, Data, Labelled, Record
from temper.methods.unlearning.random_label_forgetting.card import Config

__all__ = ["OWN_TASKS", "Item", "Task", "load_tasks"]

LEAST_ITEMS = 2


class Item(NamedTuple):
    """A question, its right response and a distractor."""

    question: str
    right: str
    wrong: str


class Task(NamedTuple):
    """A skill: items to train on, and others of the same kind to test with."""

    name: str
    train: list[Item]
    test: list[Item]


def load_tasks(data: Data, config: Config, *, tested: bool = True) -> list[Task]:
    """The tasks of the parts train and test by their column `task`, or our own; never an item of one part in the other.

    Raises DataError for a task that is not in both parts (where it is to be `tested`), for a question in both, or for
    images.
    """
    if "train" not in data and "test" not in data:
        found = [_own(name, config) for name in config.own_tasks]
    else:
        train, test = _by_task(data.get("train"), config.seed), _by_task(data.get("test"), config.seed)
        for name in sorted(train.keys() ^ test.keys()) if tested else ():
            raise DataError(
                f"Task {name!r} is not in both parts",
                where=f"train has {sorted(train)}, test has {sorted(test)}",
                cure="Give each task rows in both; the column `task` names it.",
            )
        found = [
            Task(
                name,
                _some(train[name], config.num_train, config.seed),
                _some(test.get(name, []), config.num_test, config.seed),
            )
            for name in sorted(train)
        ]
    for task in found:
        _check(task, tested)
    return found


def _check(task: Task, tested: bool) -> None:
    both = {item.question for item in task.train} & {item.question for item in task.test}
    if both:
        raise DataError(
            f"A question stands in both parts: {min(both)[:60]!r}",
            where=f"task {task.name!r}",
            cure="Held-out questions must be others than those trained on.",
        )
    for part, items, needed in (("train", task.train, True), ("test", task.test, tested)):
        if needed and len(items) < LEAST_ITEMS:
            raise DataError(
                f"Task {task.name!r} has {len(items)} rows in part {part}",
                cure=f"Give at least {LEAST_ITEMS}.",
            )


def _some(items: list[Item], count: int, seed: int) -> list[Item]:
    """A seeded choice of `count` items, or all of them."""
    return random.Random(f"{seed}/rows").sample(items, count) if count < len(items) else items


def _by_task(records: Sequence[Record], seed: int) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = defaultdict(list)
    labels: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if isinstance(record, Labelled):
            labels[_task_of(record)].add(str(record.label))
    for number, record in enumerate(records):
        name = _task_of(record)
        found[name].append(_binary(record, sorted(labels[name]), f"{seed}/{record.id or number}"))
    return dict(found)


def _task_of(record: Record) -> str:
    return str(record.extra.get("task", "task"))


def _binary(record: Record, labels: Sequence[str], key: str) -> Item:
    """The right response and one seeded distractor."""
    where = f"row {record.id or '(without id)'}"
    if isinstance(record, Choice):
        question, right = record.question, record.choices[record.answer]
        others = [text for text in record.choices if text != right]
    elif isinstance(record, Labelled) and record.text:
        question, right = record.text, str(record.label)
        others = [label for label in labels if label != right]
    else:
        raise DataError(
            "A task needs questions in words", where=where, cure="Give Choice rows, or texts with labels."
        )
    if not others:
        raise DataError(
            "A question has no wrong response",
            where=where,
            cure="Give it a choice that differs from the right one.",
        )
    return Item(question, right, random.Random(key).choice(others))


# Tasks of our own. Each gives facts or cases in a seeded order, none twice: every fact in two wordings, a case in one.


def _facts() -> Any:
    return yaml.safe_load((Path(__file__).parent / "data" / "facts.yaml").read_text(encoding="utf-8"))


def _capitals(draw: random.Random) -> Iterator[tuple[Item, ...]]:
    known = list(_facts()["capitals"].items())
    draw.shuffle(known)
    for land, city in known:
        other = draw.choice([capital for _, capital in known if capital != city])
        asked = (f"What is the capital of {land}?", f"From which city is {land} governed?")
        yield tuple(Item(question, city, other) for question in asked)


def _animals(draw: random.Random) -> Iterator[tuple[Item, ...]]:
    classes = _facts()["animals"]
    known = [(animal, kind) for kind, members in classes.items() for animal in members]
    draw.shuffle(known)
    for animal, kind in known:
        other = draw.choice([k for k in classes if k != kind])
        asked = (
            f"What kind of animal is the {animal}?",
            f"To which class of animals does the {animal} belong?",
        )
        yield tuple(Item(question, kind, other) for question in asked)


def _numbers(draw: random.Random) -> Iterator[tuple[Item, ...]]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    draw.shuffle(pairs)
    for a, b in pairs:
        yield (Item(f"Which number is larger, {a} or {b}?", str(max(a, b)), str(min(a, b))),)


NOUNS = ("key", "boy", "letter", "dog", "table", "teacher", "flower", "car", "bird", "book", "king", "lamp")
PLACES = ("cabinet", "window", "gardens", "old houses", "river", "doors", "school", "mountains")
STATES = ("here", "old", "small", "new", "quiet")


def _agreement(draw: random.Random) -> Iterator[tuple[Item, ...]]:
    frames = [
        (noun, place, state, plural)
        for noun in NOUNS
        for place in PLACES
        for state in STATES
        for plural in (0, 1)
    ]
    draw.shuffle(frames)
    for noun, place, state, plural in frames:
        subject = f"The {noun}{'s' if plural else ''} near the {place}"
        right, wrong = ("are", "is") if plural else ("is", "are")
        yield (Item(f"Which verb is right in: {subject} ... {state}?", right, wrong),)


OWN_TASKS: dict[str, Callable[[random.Random], Iterator[tuple[Item, ...]]]] = {
    "capitals": _capitals,
    "animals": _animals,
    "numbers": _numbers,
    "agreement": _agreement,
}


def _own(name: str, config: Config) -> Task:
    """The last facts are for the test, whatever is trained on: no fact stands in both parts in any wording."""
    if name not in OWN_TASKS:
        raise ConfigError(f"There is no task {name!r}", where="own_tasks", cure=nearest(name, OWN_TASKS))
    facts = list(OWN_TASKS[name](random.Random(f"{config.seed}/{name}")))
    wordings = len(facts[0])
    num_test = min(-(-config.num_test // wordings), len(facts) // 2)
    train, test = (
        [item for fact in part for item in fact] for part in (facts[:-num_test], facts[-num_test:])
    )
    return Task(name, train[: config.num_train], test[: config.num_test])
