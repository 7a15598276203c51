"""The columns of a multiple-choice question: its choices under either layout, and the one that is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from temper.core.types import Json
from temper.data.values import short

if TYPE_CHECKING:
    from temper.data.columns import RowReader

__all__ = ["choice_fields"]


def choice_fields(r: RowReader) -> dict[str, Json]:
    question = r.text("question")
    name, value = r.take("choices")
    labels: list[str] = []
    if isinstance(value, Mapping):
        labels, value = [str(x) for x in value.get("label", [])], value.get("text")
    choices = r.texts(value, name, least=2)
    column, answer = r.take("answer", "answerKey")
    return {"question": question, "choices": choices, "answer": _answer(r, answer, column, choices, labels)}


def _answer(r: RowReader, answer: Json, column: str, choices: tuple[str, ...], labels: list[str]) -> int:
    """The index meant by a number, a letter, a label or the text of a choice; never a guess between two."""
    if isinstance(answer, str):
        letters = labels or [chr(ord("A") + i) for i in range(len(choices))]
        meant = {i for names in (letters, choices) for i, name in enumerate(names) if name == answer}
        if answer.isdecimal() and not labels:
            meant.add(int(answer))
        if len(meant) > 1:
            raise r.place.error(f"{answer!r} could be {len(meant)} of the choices", column=column,
                                cure="Give the index, counted from 0, as a JSON number.")  # fmt: skip
        answer = meant.pop() if meant else answer
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise r.place.error(f"{short(answer)} names none of the {len(choices)} choices", column=column,
                            cure="Give the index counted from 0, the letter, or the choice's text.")  # fmt: skip
    return answer
