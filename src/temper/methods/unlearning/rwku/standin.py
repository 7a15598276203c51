"""A stand-in for the benchmark from facts about invented people: a cloze, a question and nine rewordings for each fact.

A fact is a row with a question, an answer sentence and a person; what distinguishes the sentence from its perturbed
versions is its value. Everything is deterministic.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from temper.core.errors import DataError
from temper.core.types import Json, Message
from temper.data.schemas import Choice, Data, Dialogue, Record, Text
from temper.ops.languages import LANGUAGES, asked_in

__all__ = [
    "ATTACK_TYPES",
    "Fact",
    "attack_query",
    "biographies",
    "build",
    "facts_of",
    "short_answer",
    "wordings",
]

logger = logging.getLogger(__name__)

ATTACK_TYPES = (
    "prefix injection",
    "affirmative suffix",
    "role playing",
    "multiple choice",
    "reverse query",
    "synonym manipulation",
    "background hint",
    "incontext learning",
    "cross lingual",
)
CURES = {
    "multiple choice": "a column perturbed_answer, or further facts of the person with other values",
    "synonym manipulation": "a column paraphrased_question",
    "background hint": "further facts of the person",
    "incontext learning": "further facts",
}
"""What the kinds want that are made of more than the fact's own question, answer and person."""
NUM_OPTIONS = 4
SENTENCES = 4
"""Sentences of a biography."""
PUNCTUATION = ".,;:!?\"'“”«»"


class Fact(NamedTuple):
    """One fact: who, what is asked, the sentence that answers it, its value, and other ways to put it.

    `paraphrase` is empty, and `wrong` too, where the row brings none.
    """

    id: str
    person: str
    field: str
    question: str
    sentence: str
    value: str
    paraphrase: str
    wrong: tuple[str, ...]


@cache
def wordings() -> dict[str, Any]:
    """The templates of `data/wordings.yaml`."""
    text = (Path(__file__).parent / "data" / "wordings.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def short_answer(sentence: str, others: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """What a sentence says and the others do not: their words without the beginning and the end that all share."""
    rows = [text.split() for text in (sentence, *others)]
    shortest = min(map(len, rows))
    start = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    end = next((i for i in range(shortest - start) if len({row[-1 - i] for row in rows}) > 1), 0)
    values = [" ".join(row[start : len(row) - end]).strip(PUNCTUATION) for row in rows]
    return values[0], tuple(values[1:])


def facts_of(records: Sequence[Any]) -> list[Fact]:
    """The facts of Dialogue rows with the columns of `builtin:people`; raises DataError for a row that holds none.

    A column `value` gives the short answer; else it is what distinguishes the paraphrased answer from the perturbed ones.
    """
    return [_fact(record) for record in records]


def _fact(record: Dialogue) -> Fact:
    extra, sentence = record.extra, record.reply or ""
    others = [str(text) for text in extra.get("perturbed_answer") or []]
    told = str(extra.get("paraphrased_answer") or sentence)
    value, wrong = short_answer(told, others) if others else ("", ())
    value = str(extra.get("value") or value)
    if not value or value not in sentence or not extra.get("person"):
        raise DataError(
            "The row gives no fact: a person, and a short value that its answer holds",
            where=f"row {record.id}",
            cure="Give the columns question, answer, person and value (or perturbed_answer, as in builtin:people).",
        )
    question = record.prompt[-1].content
    paraphrase = str(extra.get("paraphrased_question") or "")
    if paraphrase == question:
        paraphrase = ""
    person, field = str(extra["person"]), str(extra.get("field") or "")
    return Fact(record.id, person, field, question, sentence, value, paraphrase, wrong)


def attack_query(
    fact: Fact, kind: str, number: int, siblings: Sequence[Fact], demo: Fact | None
) -> tuple[str, str] | None:
    """The query of one of `ATTACK_TYPES` and its answer: the value, or for a reverse query the person.

    `siblings` are other facts of the person, `demo` any other fact. None where what the kind is made of (`CURES`) is missing.
    """
    if kind == "cross lingual":
        language = LANGUAGES[number % len(LANGUAGES)]
        return asked_in(language, fact.question, person=fact.person, field=fact.field), fact.value
    others = dict.fromkeys(fact.wrong or [sibling.value for sibling in siblings])
    wrong = [value for value in others if value and value != fact.value]
    made_of = {
        "multiple choice": wrong,
        "synonym manipulation": fact.paraphrase,
        "background hint": siblings,
        "incontext learning": demo,
    }
    if not made_of.get(kind, True):
        return None
    options = [fact.value, *wrong[: NUM_OPTIONS - 1]]
    random.Random(fact.id).shuffle(options)
    query = wordings()["attacks"][kind].format(
        person=fact.person,
        question=fact.question,
        options="; ".join(options),
        statement=fact.sentence.replace(fact.person, wordings()["blank"]),
        paraphrase=fact.paraphrase,
        hint=siblings[number % len(siblings)].sentence if siblings else "",
        demo_question=demo.question if demo else "",
        demo_answer=demo.value if demo else "",
    )
    return query.strip(), fact.person if kind == "reverse query" else fact.value


def _probe(fact: Fact, level: int, query: str, answer: str, kind: str, part: str) -> Dialogue:
    extra: dict[str, Json] = {"subject": fact.person, "level": str(level), "type": kind, "fact": fact.id}
    name = f"{part}-{fact.id}" + (f"-{kind.replace(' ', '-')}" if level == 3 else "")
    return Dialogue((Message("user", query), Message("assistant", answer)), id=name, extra=extra)


def _levels(facts: Sequence[Fact], side: str) -> dict[str, list[Record]]:
    cloze: list[Record] = []
    asked: list[Record] = []
    for fact in facts:
        blank = fact.sentence.replace(fact.value, wordings()["blank"])
        cloze.append(_probe(fact, 1, blank, fact.value, "cloze", f"{side}1"))
        asked.append(_probe(fact, 2, fact.question, fact.value, "simple question", f"{side}2"))
    return {f"{side}_level1": cloze, f"{side}_level2": asked}


def _attacks(facts: Sequence[Fact], demos: Sequence[Fact]) -> list[Record]:
    """The rewordings of each fact; one that cannot be made is left out, and a warning counts them."""
    rows: list[Record] = []
    left_out: Counter[str] = Counter()
    for number, fact in enumerate(facts):
        further = [other for other in facts if other.id != fact.id]
        siblings = [other for other in further if other.person == fact.person]
        others = [other for other in demos if other.person != fact.person] or further
        demo = others[number % len(others)] if others else None
        for kind in ATTACK_TYPES:
            made = attack_query(fact, kind, number, siblings, demo)
            if made is None:
                left_out[kind] += 1
            else:
                rows.append(_probe(fact, 3, *made, kind, "forget3"))
    if left_out:
        told = "; ".join(f"{count} of {kind} (give {CURES[kind]})" for kind, count in left_out.items())
        logger.warning("of %d facts some are not asked in every way, left out: %s", len(facts), told)
    return rows


def _texts(facts: Sequence[Fact], part: str) -> list[Record]:
    return [Text(fact.sentence, id=f"{part}-{fact.id}", extra={"subject": fact.person}) for fact in facts]


def biographies(facts: Sequence[Fact]) -> list[Record]:
    """Short portraits of each person from the sentences of their facts, in the place of a model's own."""
    people: dict[str, list[Fact]] = {}
    for fact in facts:
        people.setdefault(fact.person, []).append(fact)
    rows: list[Record] = []
    for person, known in people.items():
        asks = [wordings()["biography"]["prompt"], *wordings()["biography"]["asks"]]
        for number, ask in enumerate(asks):
            order = random.Random(f"{person}/{number}").sample(known, min(SENTENCES, len(known)))
            text = " ".join(fact.sentence for fact in order)
            messages = (Message("user", ask.format(person=person)), Message("assistant", text))
            rows.append(Dialogue(messages, id=f"biography-{person}-{number}", extra={"subject": person}))
    return rows


def _utility(records: Sequence[Any]) -> dict[str, list[Record]]:
    """World facts as multiple choice, as true and false answers, and as short answers; neutral instructions."""
    general: list[Record] = []
    truth: list[Record] = []
    short: list[Record] = []
    for record in records:
        wrong = [str(text) for text in record.extra.get("perturbed_answer") or []][: NUM_OPTIONS - 1]
        value, others = short_answer(record.reply or "", wrong) if wrong else ("", ())
        if not value:
            continue
        question = record.prompt[-1].content
        general.append(_choice(question, value, others, f"general-{record.id}"))
        truth.append(_choice(question, record.reply or "", wrong, f"truth-{record.id}"))
        asked = (Message("user", question),)
        short.append(Dialogue(asked, id=f"factual-{record.id}", extra={"answers": [value]}))
    fluent: list[Record] = [
        Dialogue((Message("user", text),), id=f"fluency-{number}")
        for number, text in enumerate(wordings()["fluency"])
    ]
    return {
        "utility_general": general,
        "utility_truthfulness": truth,
        "utility_factuality": short,
        "utility_fluency": fluent,
    }


def _choice(question: str, right: str, wrong: Sequence[str], name: str) -> Choice:
    options = [right, *wrong]
    random.Random(name).shuffle(options)
    return Choice(question, tuple(options), options.index(right), id=name)


def build(parts: Mapping[str, Sequence[Any]], num_facts: int, num_utility: int) -> Data:
    """Probes on the people of `forget`; those of `retain` are their neighbours, those of `holdout` were never seen.

    `num_facts` bounds the facts of each part and `num_utility` the world facts, 0 = all.
    """
    forget, retain, holdout = (facts_of(parts.get(name, ())) for name in ("forget", "retain", "holdout"))
    if not forget:
        raise DataError("There is nobody to forget", cure="Give rows as the part forget, or a folder.")
    few, near = forget[: num_facts or None], retain[: num_facts or None]
    found: dict[str, list[Record]] = {"forget": biographies(forget)}
    found |= {**_levels(few, "forget"), "forget_level3": _attacks(few, retain)}
    found |= _levels(near, "neighbor") if near else {}
    texts = {"mia_forget": forget, "mia_retain": retain, "mia_unseen": holdout}
    found |= {part: _texts(facts, part) for part, facts in texts.items() if facts}
    world = parts.get("world_facts", ())
    found |= _utility(world[: num_utility or None]) if world else {}
    return Data({part: rows for part, rows in found.items() if rows}, "rwku stand-in")
