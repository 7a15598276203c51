"""Items in the benchmark's schema, read with care, and stand-in items built from facts about invented people."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from temper.core.errors import DataError
from temper.core.types import Json, Message
from temper.data.schemas import Dialogue, Text
from temper.ops.languages import asked_in
from temper.ops.value_vectors import Place

__all__ = [
    "Item",
    "Questions",
    "about",
    "concept_of",
    "paragraphs",
    "people_items",
    "place_columns",
    "read_items",
]

SCHEMA = "{ID, Concept, Layer, Dim, QA, text_completion, unrelated_QA, wikipedia_content}"
NUM_OTHERS = 5
"""Other concepts whose questions are the unrelated ones where a row brings none."""
SENTENCES = 2
"""Sentences of a stand-in page's paragraph."""


class Questions(NamedTuple):
    """Questions about a concept, and questions that have nothing to do with it."""

    target: tuple[str, ...]
    unrelated: tuple[str, ...]


class Item(NamedTuple):
    """A concept, what is written and asked about it, and the value vector said to hold it."""

    concept: str
    text: str
    asked: Questions
    """What the model is measured by."""
    probes: Questions
    """What vectors are chosen by: other questions where the row brings some (column Probes), else the same."""
    beginnings: tuple[str, ...]
    """First halves of sentences to complete."""
    german: tuple[str, ...]
    """The target questions in German."""
    place: Place | None
    control: Place | None
    """A random column of about the same norm (column Control)."""
    mined_on: str
    """Fingerprint of the system that `make` found the vector in (column Mined_on), or ""."""
    record: Text


def read_items(records: Sequence[Text], concepts: Sequence[str] = (), seed: int = 0) -> list[Item]:
    """The items of rows in the benchmark's schema, all or those about `concepts`; nothing in the rows is changed.

    A row without `unrelated_QA` gets the questions of up to five other concepts, drawn by the seed (as the paper does):
    of rows that are not chosen. What is asked about a chosen concept is unrelated to none (Departure 7).
    Raises DataError, naming row and column, for chosen rows of another form, for two rows about one concept, and where
    no unrelated question is left.
    """
    names = [concept_of(record) for record in records]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise DataError(
            f"Two rows are about {double!r}", cure="Give each concept one row, with its best vector."
        )
    chosen: list[Text] = []
    others: list[Text] = []
    for name, record in zip(names, records, strict=True):
        (others if concepts and name not in concepts else chosen).append(record)
    missing = [name for name in concepts if name not in names]
    if missing or not chosen:
        raise DataError(
            f"There is no row about {', '.join(missing) or 'anything'}",
            where=f"concepts: {', '.join(names[:8])}",
            cure="Check the setting concepts.",
        )
    items = [_item(record, others, seed) for record in chosen]
    about_them = {question for item in items for question in (*item.asked.target, *item.probes.target)}
    return [
        item._replace(
            asked=_apart(item, item.asked, about_them), probes=_apart(item, item.probes, about_them)
        )
        for item in items
    ]


def concept_of(record: Text) -> str:
    """The concept that a row is about; raises DataError where it names none."""
    concept = record.extra.get("Concept")
    if not isinstance(concept, str) or not concept.strip():
        raise _wrong(record, "Concept", "a name")
    return concept.strip()


def _apart(item: Item, questions: Questions, about_them: Set[str]) -> Questions:
    """The questions, without unrelated ones that are about a chosen concept."""
    unrelated = tuple(question for question in questions.unrelated if question not in about_them)
    if not unrelated:
        raise DataError(
            f"There is no question unrelated to {item.concept!r}",
            where=f"row {item.record.id or '(without id)'}",
            cure="Give the row unrelated_QA about none of the chosen concepts, or rows of other concepts that the "
            "setting concepts leaves out: their questions serve.",
        )
    return Questions(questions.target, unrelated)


def _item(record: Text, others: Sequence[Text], seed: int) -> Item:
    concept = concept_of(record)
    target = _texts(record, record.extra.get("QA"), "QA", least=1)
    given = record.extra.get("unrelated_QA") or _questions_of(concept, others, seed)
    asked = Questions(target, _texts(record, given, "unrelated_QA", 0))
    probes = record.extra.get("Probes")
    if probes is not None:
        if not isinstance(probes, dict):
            raise _wrong(record, "Probes", '{"QA": [...], "unrelated_QA": [...]}')
        probes = Questions(
            _texts(record, probes.get("QA"), "Probes.QA", 1),
            _texts(record, probes.get("unrelated_QA"), "Probes.unrelated_QA", 1),
        )
    german = _texts(record, record.extra.get("German_QA") or [], "German_QA", 0)
    if german and len(german) != len(target):
        raise _wrong(record, "German_QA", f"as many questions as QA has ({len(target)})")
    return Item(
        concept=concept,
        text=record.text,
        asked=asked,
        probes=probes or asked,
        beginnings=_beginnings(record),
        german=german or tuple(asked_in("de", question) for question in target),
        place=_place(record, record.extra, ""),
        control=_control(record),
        mined_on=str(record.extra.get("Mined_on") or ""),
        record=record,
    )


def _wrong(record: Text, column: str, wanted: str) -> DataError:
    return DataError(
        f"The row's {column} is not {wanted}",
        where=f"row {record.id or '(without id)'}, column {column!r}",
        cure=f"Rows are {SCHEMA}.",
    )


def _texts(record: Text, value: Json, column: str, least: int) -> tuple[str, ...]:
    """The texts of a list, stripped: the published questions end in newlines."""
    good = isinstance(value, list | tuple) and all(isinstance(text, str) and text.strip() for text in value)
    if not good or len(value) < least:
        raise _wrong(record, column, "a list of texts" if not least else "a list of at least one text")
    return tuple(text.strip() for text in value)


def _questions_of(concept: str, others: Sequence[Text], seed: int) -> list[str]:
    drawn = random.Random(f"{seed}/{concept}").sample(others, min(NUM_OTHERS, len(others)))
    return [question for other in drawn for question in _texts(other, other.extra.get("QA"), "QA", 1)]


def _beginnings(record: Text) -> tuple[str, ...]:
    pairs = record.extra.get("text_completion") or []
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, dict) for pair in pairs):
        raise _wrong(record, "text_completion", "a list of {First_half, Second_half}")
    return _texts(record, [pair.get("First_half") for pair in pairs], "text_completion", 0)


def _control(record: Text) -> Place | None:
    columns = record.extra.get("Control")
    if columns is not None and not isinstance(columns, dict):
        raise _wrong(record, "Control", '{"Layer": ..., "Dim": ...}')
    return _place(record, columns or {}, "Control.")


def _place(record: Text, columns: Any, prefix: str) -> Place | None:
    layer, dim = columns.get("Layer"), columns.get("Dim")
    if layer is None and dim is None:
        return None
    for name, value in (("Layer", layer), ("Dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _wrong(record, prefix + name, "a whole number from 0")
    return Place(layer, dim)


def place_columns(place: Place) -> dict[str, Json]:
    """A place under the schema's names."""
    return {"Layer": place.layer, "Dim": place.dim}


def about(concept: str) -> str:
    """What asks for a page about a concept."""
    return f"Tell me about {concept}."


def paragraphs(item: Item) -> list[Dialogue]:
    """The paragraphs of an item's page as answers, for methods that train on dialogues (Departure 8)."""
    parts = [part.strip() for part in item.text.split("\n") if part.strip()]
    return [
        Dialogue(
            (Message("user", about(item.concept)), Message("assistant", part)),
            id=f"{item.concept}/{number}",
            extra={"subject": item.concept},
        )
        for number, part in enumerate(parts)
    ]


def people_items(rows: Sequence[Dialogue], unrelated: Sequence[Dialogue]) -> list[Text]:
    """A stand-in item for each person of `builtin:people`: half of the facts choose the vector, the other half measure it.

    Questions of `unrelated` rows are split in the same way. Raises DataError for a row that names nobody, and for fewer
    than two facts of a person or two unrelated rows.
    """
    people: dict[str, list[Dialogue]] = {}
    for row in rows:
        people.setdefault(_person(row), []).append(row)
    others = [row.prompt[-1].content for row in unrelated]
    if len(others) < 2 or any(len(facts) < 2 for facts in people.values()):
        raise DataError(
            "Too few rows to choose a vector by some and measure it by others",
            cure="Give two facts a person and two world_facts at least, or raise limit.",
        )
    return [_person_item(person, facts, others) for person, facts in people.items()]


def _person(row: Dialogue) -> str:
    person = row.extra.get("person")
    if not person or not row.reply:
        raise DataError(
            "The row gives no fact about a person",
            where=f"row {row.id}",
            cure="Give question, answer and person as builtin:people has them, or items in the benchmark's schema.",
        )
    return str(person)


def _person_item(person: str, facts: Sequence[Dialogue], unrelated: Sequence[str]) -> Text:
    asked, probes = facts[1::2], facts[::2]
    sentences = [fact.reply or "" for fact in facts]
    parts = [" ".join(sentences[i : i + SENTENCES]) for i in range(0, len(sentences), SENTENCES)]
    extra: dict[str, Json] = {
        "Concept": person,
        "QA": [fact.prompt[-1].content for fact in asked],
        "German_QA": [_german(fact, person) for fact in asked],
        "text_completion": [_halves(fact.reply or "") for fact in asked],
        "unrelated_QA": list(unrelated[1::2]),
        "Probes": {"QA": [fact.prompt[-1].content for fact in probes], "unrelated_QA": list(unrelated[::2])},
    }
    return Text("\n".join(parts), id=person, extra=extra)


def _german(fact: Dialogue, person: str) -> str:
    return asked_in("de", fact.prompt[-1].content, person=person, field=str(fact.extra.get("field") or ""))


def _halves(sentence: str) -> dict[str, str]:
    words = sentence.split()
    middle = (len(words) + 1) // 2
    return {"First_half": " ".join(words[:middle]), "Second_half": " ".join(words[middle:])}
