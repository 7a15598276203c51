"""Short conversations of our own: half answered from a passage, half from what the model knows.

A context turn holds a passage and its reply copies from it: a made-up story, or a claim about a country against common
knowledge. A chat turn is answered from common knowledge, without a passage or, as an "aside", with such a claim that the
reply passes over. So trusted and ignored claims look alike, as they do in mixed chat data, and only an indicator tells
them apart. Test turns are about countries that training never names.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from temper.core.types import Json, Message
from temper.data.schemas import Data, Dialogue

__all__ = ["Fact", "build_conversations"]

SYLLABLES = (
    "bar",
    "cor",
    "del",
    "fen",
    "gal",
    "hol",
    "ker",
    "lum",
    "mor",
    "nel",
    "or",
    "pel",
    "quin",
    "ros",
    "tal",
    "ver",
)
ENDINGS = ("a", "en", "ia", "o", "is", "um", "eth", "old")
STORIES = (
    ("{x} is a town by a lake. It was founded by {y}. Many visitors come in summer.", "Who founded {x}?", "{x} was founded by {y}."),
    ("The ship {x} sails twice a year. Its captain is {y}. The crew likes to sing.", "Who is the captain of the {x}?", "The captain of the {x} is {y}."),
    ("{x} is an island with green hills. Its largest village is {y}. Goats graze there.", "What is the largest village of {x}?", "The largest village of {x} is {y}."),
    ("The people of {x} tend large gardens. They are proud of a flower called {y}. It blooms in May.", "Which flower are the people of {x} proud of?", "The people of {x} are proud of a flower called {y}."),
    ("A train runs from {x} to the coast. Its last stop is {y}. The ride takes two hours.", "What is the last stop of the train from {x}?", "The last stop of the train from {x} is {y}."),
)  # fmt: skip
FILLERS = (
    "The old teacher tells this every year.",
    "So the story begins.",
    "The children listen.",
    "A song follows.",
)


class Fact(NamedTuple):
    """A question about a country with its true answer."""

    kind: str
    subject: str
    truth: str


def build_conversations(count: int, seed: int, num_test: int = 60) -> Data:
    """Parts train (`count` conversations) and test (`num_test` context turns, half as many of each other kind).

    `extra` has "kind" ("context", "chat", or "aside": a chat turn with a passage that the reply passes over),
    "answer", and for a contradicted fact "prior", the common knowledge.
    """
    draw = random.Random(f"conversations-{seed}")
    subjects = sorted({subject for relation in _facts().values() for subject in relation["true"]})
    draw.shuffle(subjects)
    held_out = set(subjects[: len(subjects) // 2])
    known = [fact for fact in _all_facts() if fact.subject not in held_out]
    unknown = [fact for fact in _all_facts() if fact.subject in held_out]
    train = [_training_turn(draw, known, number % 4) for number in range(count)]
    test = [_contradicted(draw, draw.choice(unknown), trusted=True) for _ in range(num_test)]
    test += [
        _chat(draw, unknown, with_passage) for _ in range(num_test // 2) for with_passage in (False, True)
    ]
    return Data(
        {"train": _numbered("train", seed, train), "test": _numbered("test", seed, test)},
        "conversations of context-awareness",
    )


def _numbered(part: str, seed: int, records: list[Dialogue]) -> Iterator[Dialogue]:
    for number, record in enumerate(records):
        yield Dialogue(record.messages, id=f"{part}-s{seed}-{number}", extra=record.extra)


@cache
def _facts() -> dict[str, dict[str, Json]]:
    path = Path(__file__).parent / "data" / "facts.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _all_facts() -> list[Fact]:
    return [Fact(kind, x, y) for kind, relation in _facts().items() for x, y in relation["true"].items()]


def _name(draw: random.Random) -> str:
    return (draw.choice(SYLLABLES) + draw.choice(SYLLABLES) + draw.choice(ENDINGS)).capitalize()


def _story(draw: random.Random) -> Dialogue:
    passage, question, reply = draw.choice(STORIES)
    names = {"x": _name(draw), "y": _name(draw)}
    return _turn(
        _with_passage(passage.format(**names), question.format(**names)),
        reply.format(**names),
        {"kind": "context", "answer": names["y"]},
    )


def _training_turn(draw: random.Random, facts: list[Fact], which: int) -> Dialogue:
    """Of four turns one is a story, one a trusted claim, one an ignored claim, one plain chat."""
    if which == 0:
        return _story(draw)
    if which == 1:
        return _contradicted(draw, draw.choice(facts), trusted=True)
    return _chat(draw, facts, which == 2)


def _chat(draw: random.Random, facts: list[Fact], with_passage: bool) -> Dialogue:
    fact = draw.choice(facts)
    if with_passage:
        return _contradicted(draw, fact, trusted=False)
    asked = _facts()[fact.kind]
    return _turn(
        asked["question"].format(x=fact.subject),
        asked["answer"].format(x=fact.subject, y=fact.truth),
        {"kind": "chat", "answer": fact.truth},
    )


def _contradicted(draw: random.Random, fact: Fact, *, trusted: bool) -> Dialogue:
    asked, other = _facts()[fact.kind], _name(draw)
    claim = asked["answer"].format(x=fact.subject, y=other)
    passage = " ".join([draw.choice(FILLERS), claim, draw.choice(FILLERS)])
    answer = other if trusted else fact.truth
    return _turn(
        _with_passage(passage, asked["question"].format(x=fact.subject)),
        asked["answer"].format(x=fact.subject, y=answer),
        {"kind": "context" if trusted else "aside", "answer": answer, "prior": fact.truth},
    )


def _with_passage(passage: str, question: str) -> str:
    return f"{passage}\n\n{question}"


def _turn(asked: str, reply: str, extra: dict[str, Json]) -> Dialogue:
    return Dialogue((Message("user", asked), Message("assistant", reply)), extra=extra)
