"""Dialogues about a scene: a caption, then five rounds of question and answer, with pronouns, and 20 candidate answers each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from temper.core.types import Json, Message
from temper.data.schemas import Dialogue
from temper.data.worlds.captions.graphs import graph_json
from temper.data.worlds.captions.noise import uniform
from temper.data.worlds.captions.scenes import Scene, to_json
from temper.data.worlds.captions.text import captions, name_of, relation
from temper.data.worlds.captions.words import COLOURS, NUMBERS, PLACES_2, SHAPES, SYNONYMS

__all__ = ["NUM_CANDIDATES", "Round", "dialogue_record", "rounds_of", "visdial_json"]

NUM_CANDIDATES = 20
NUM_ROUNDS = 5
ROUND_STREAM, CANDIDATE_STREAM = 14, 15
SAME_TYPE = 0.3
"""Relevance of a wrong answer of the right type; a synonym of the right answer has 1."""
TYPES: tuple[tuple[str, ...], ...] = (COLOURS, SHAPES, NUMBERS, PLACES_2, ("yes", "no"))


class Round(NamedTuple):
    """One question with its answer among the candidates, and how relevant each of them is."""

    question: str
    answer: str
    candidates: tuple[str, ...]
    relevance: tuple[float, ...]
    pronoun: bool
    """Whether the question can be understood only from what was said before."""

    @property
    def answer_index(self) -> int:
        """Where the answer is among the candidates."""
        return self.candidates.index(self.answer)


def rounds_of(scene: Scene) -> list[Round]:
    """The five rounds of a scene of at least two objects; the caption speaks of the first one."""
    seeds = np.array([scene.noise_seed])
    picks = uniform(seeds, NUM_ROUNDS + 1, ROUND_STREAM)[0].tolist()
    order = uniform(seeds, NUM_ROUNDS * len(_pool()), CANDIDATE_STREAM).reshape(NUM_ROUNDS, -1)
    rounds = []
    for (question, answer, pronoun), keys in zip(_questions(scene, picks), order, strict=True):
        said = _candidates(answer, keys)
        rounds.append(Round(question, answer, said, tuple(_relevance(answer, c) for c in said), pronoun))
    return rounds


def _questions(scene: Scene, picks: Sequence[float]) -> list[tuple[str, str, bool]]:
    """Question, answer, and whether it leans on what came before; "it" is the thing last spoken of."""
    first, others = scene.things[0], scene.things[1:]
    other = others[int(picks[5] * len(others))]
    place = scene.place(other.cell)
    asked, left = ("colour", "shape") if picks[1] < 0.5 else ("shape", "colour")
    side = ("left of", "right of", "above", "below")[int(picks[3] * 4)]
    number = NUMBERS[len(scene.things)]
    same = NUMBERS[sum(thing.colour == first.colour for thing in scene.things)]
    return [
        ("where is it ?", scene.place(first.cell), True)
        if picks[0] < 0.5
        else ("how many things are there ?", number, False),
        (f"what {asked} is the {place} thing ?", getattr(other, asked), False),
        (f"what {left} is it ?", getattr(other, left), True),
        (f"is it {side} the {name_of(first)} ?", "yes" if relation(other, first) == side else "no", True),
        (f"how many {first.colour} things are there ?", same, False)
        if picks[4] < 0.5
        else (f"where is the {name_of(first)} ?", scene.place(first.cell), False),
    ]


def _pool() -> tuple[str, ...]:
    words = [word for kind in TYPES for word in kind]
    return (*words, *(synonym for word in words for synonym in SYNONYMS.get(word, ())))


def _type_of(answer: str) -> tuple[str, ...]:
    return next(kind for kind in TYPES if answer in kind)


def _candidates(answer: str, keys: np.ndarray) -> tuple[str, ...]:
    """The answer, its synonyms, up to five of its type and others, shuffled by `keys`."""
    pool = _pool()
    shuffled = [pool[place] for place in keys.argsort()]
    must = [answer, *SYNONYMS.get(answer, ())]
    alike = [word for word in shuffled if word in _type_of(answer) and word not in must][:5]
    rest = [word for word in shuffled if word not in must and word not in _type_of(answer)]
    chosen = {*must, *alike, *rest[: NUM_CANDIDATES - len(must) - len(alike)]}
    return tuple(word for word in shuffled if word in chosen)


def _relevance(answer: str, candidate: str) -> float:
    if candidate == answer or candidate in SYNONYMS.get(answer, ()):
        return 1.0
    return SAME_TYPE if candidate in _type_of(answer) else 0.0


def dialogue_record(scene: Scene, named: str = "") -> Dialogue:
    """The dialogue as a record: the caption as system message, then the rounds; scene, graph and candidates are extra columns."""
    (caption,) = captions([scene])
    messages = [Message("system", caption)]
    rounds: list[Json] = []
    for turn in rounds_of(scene):
        messages += [Message("user", turn.question), Message("assistant", turn.answer)]
        facts = {"candidates": list(turn.candidates), "relevance": list(turn.relevance)}
        rounds.append({**facts, "answer_index": turn.answer_index, "pronoun": turn.pronoun})
    extra = {"caption": caption, "rounds": rounds, "graph": graph_json(scene), "scene": to_json(scene)}
    return Dialogue(tuple(messages), id=named, extra=extra)


def visdial_json(records: Iterable[Dialogue], split: str = "train") -> tuple[Json, Json]:
    """Dialogues of this world in the layout of VisDial 1.0, and their dense relevance annotations.

    Questions and answers stand once in lists of their own; rounds point into them. Annotations are one a round.
    """
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    dialogs, dense = [], []
    for record in records:
        turns = []
        pairs = zip(record.messages[1::2], record.messages[2::2], record.extra["rounds"], strict=True)
        for number, (question, answer, facts) in enumerate(pairs, start=1):
            options = [answers.setdefault(option, len(answers)) for option in facts["candidates"]]
            turns.append(
                {
                    "question": questions.setdefault(question.content, len(questions)),
                    "answer": answers.setdefault(answer.content, len(answers)),
                    "answer_options": options,
                    "gt_index": facts["answer_index"],
                }
            )
            dense.append({"image_id": record.id, "round_id": number, "gt_relevance": facts["relevance"]})
        dialogs.append({"image_id": record.id, "caption": record.extra["caption"], "dialog": turns})
    data = {"questions": list(questions), "answers": list(answers), "dialogs": dialogs}
    return {"version": "1.0", "split": split, "data": data}, dense
