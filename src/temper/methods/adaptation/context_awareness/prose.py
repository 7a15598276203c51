"""Neutral prose of our own for haystacks, and invented needles to hide in it; the same for the same seed."""

from __future__ import annotations

import random
from typing import NamedTuple

__all__ = ["Needle", "build_distractors", "build_needles", "sentence"]

PEOPLE = (
    "Anka",
    "Borin",
    "Celda",
    "Dovan",
    "Elsin",
    "Farro",
    "Gilda",
    "Hemmo",
    "Ilvy",
    "Joren",
    "Kesta",
    "Lumo",
)
PLACES = (
    "Aldermere", "Brackwell", "Corrin Hill", "Dunmarsh", "Eastfold", "Fenlow", "Grayford", "Holm Bay",
    "Ivelstead", "Juniper Cross", "Kelding", "Larkmoor",
)  # fmt: skip
TIMES = (
    "In spring", "Late in autumn", "On market days", "Every second week", "Before sunrise", "After the harvest",
    "When the rain stops", "During the long winter", "Towards evening", "At the end of the month",
)  # fmt: skip
DEEDS = (
    "mends the nets beside the pier", "carries flour to the bakery", "walks the dogs along the ridge",
    "repairs clocks for the neighbours", "sorts letters in the old post house", "waters the plum trees",
    "reads the weather signs aloud", "paints the shutters of the school", "counts the sheep on the slope",
    "sweeps the steps of the library", "bakes rye bread for the ferry crew", "tunes the organ in the hall",
)  # fmt: skip
SCENES = (
    "The road to {place} bends around a quiet pond.",
    "Most houses in {place} have slate roofs and small gardens.",
    "From {place} it takes an hour to reach the nearest station.",
    "The people of {place} like to talk about the weather.",
    "A narrow bridge joins both halves of {place}.",
    "The mill of {place} turns only when the stream is high.",
)
ADJECTIVES = (
    "copper",
    "velvet",
    "crimson",
    "wooden",
    "silver",
    "striped",
    "marble",
    "golden",
    "purple",
    "glass",
)
NOUNS = (
    "teapot",
    "lantern",
    "falcon",
    "compass",
    "violin",
    "turtle",
    "anchor",
    "feather",
    "pyramid",
    "kettle",
)
SECRETS = (
    ("The secret emblem of {place} is a {thing}.", "What is the secret emblem of {place}?"),
    ("The prize of the lottery in {place} is a {thing}.", "What is the prize of the lottery in {place}?"),
    (
        "The chest in the cellar of {place} holds a {thing}.",
        "What does the chest in the cellar of {place} hold?",
    ),
    (
        "The oldest gift to the mayor of {place} is a {thing}.",
        "What is the oldest gift to the mayor of {place}?",
    ),
)


class Needle(NamedTuple):
    """A sentence to be found, the question it answers, and the words that show it was."""

    text: str
    question: str
    keywords: tuple[str, ...]


def sentence(draw: random.Random) -> str:
    """One sentence of the haystack; it holds no needle's keyword."""
    if draw.random() < 0.4:
        return draw.choice(SCENES).format(place=draw.choice(PLACES))
    return f"{draw.choice(TIMES)} {draw.choice(PEOPLE)} {draw.choice(DEEDS)}."


def build_needles(count: int, seed: int) -> list[Needle]:
    """`count` needles, things drawn anew for each seed."""
    draw = random.Random(f"needles-{seed}")
    found = []
    for number in range(count):
        secret = SECRETS[number % len(SECRETS)]
        found.append(_needle(secret, draw.choice(PLACES), (draw.choice(ADJECTIVES), draw.choice(NOUNS))))
    return found


def build_distractors(needle: Needle, count: int, draw: random.Random) -> list[str]:
    """Sentences of the needle's form about other places and things; none holds a keyword of it."""
    secret = next(
        s for s in SECRETS if s[1].split("{place}")[0] == needle.question[: len(s[1].split("{place}")[0])]
    )
    places = [place for place in PLACES if place not in needle.text]
    adjectives = [word for word in ADJECTIVES if word not in needle.keywords]
    nouns = [word for word in NOUNS if word not in needle.keywords]
    chosen = draw.sample(places, min(count, len(places)))
    return [_needle(secret, place, (draw.choice(adjectives), draw.choice(nouns))).text for place in chosen]


def _needle(secret: tuple[str, str], place: str, thing: tuple[str, str]) -> Needle:
    statement, question = secret
    return Needle(statement.format(place=place, thing=" ".join(thing)), question.format(place=place), thing)
