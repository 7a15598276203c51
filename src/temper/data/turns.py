"""The columns of FastChat-style benchmark files, under the names that records know.

questions   `turns: [prompt]`, beside question_id, category (a name or a number), prompt_style
answers     `choices: [{"turns": [reply]}]`, and `human_score` where people judged the reply
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from temper.core.types import Json

if TYPE_CHECKING:
    from temper.data.columns import Place

__all__ = ["ANSWER_SCORE", "plain_row"]

PROMPT_COLUMNS = ("prompt", "question", "goal", "behavior", "behaviour", "messages", "conversations")
ANSWER_SCORE = 0.5
"""A human score from here on is label 1, below it 0."""


def plain_row(row: Mapping[str, Json], schema: str, place: Place) -> Mapping[str, Json]:
    """The row with `turns` as `prompt`, or the first choice's turn as `text` and its score as `label`.

    A row that has our own column is left as it is. Raises DataError for more or fewer than one turn.
    """
    if schema in ("Behaviour", "Dialogue") and "turns" in row and not _filled(row, *PROMPT_COLUMNS):
        return _question(row, place)
    if schema == "Labelled" and "choices" in row and not _filled(row, "text"):
        return _answer(row, place)
    return row


def _filled(row: Mapping[str, Json], *columns: str) -> bool:
    return any(row.get(column) is not None for column in columns)


def _question(row: Mapping[str, Json], place: Place) -> dict[str, Json]:
    named = {"prompt": _only(row["turns"], "turns", place)}
    category = row.get("category")
    if isinstance(category, int) and not isinstance(category, bool):
        named["category"] = str(category)
    return {**{name: value for name, value in row.items() if name != "turns"}, **named}


def _answer(row: Mapping[str, Json], place: Place) -> dict[str, Json]:
    choices = row["choices"]
    if not isinstance(choices, list | tuple) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise place.error("The row does not hold one answer", column="choices",
                          cure='Write [{"turns": ["the reply"]}].')  # fmt: skip
    named: dict[str, Json] = {"text": _only(choices[0].get("turns"), "choices[0].turns", place)}
    score = row.get("human_score")
    if score is not None and "label" not in row:
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise place.error(
                f"The score is {score!r}", column="human_score", cure="Write a number from 0 to 1."
            )
        named["label"] = int(score >= ANSWER_SCORE)
    return {**{name: value for name, value in row.items() if name not in ("choices", "human_score")}, **named}


def _only(turns: Json, column: str, place: Place) -> str:
    if not isinstance(turns, list | tuple) or len(turns) != 1 or not isinstance(turns[0], str):
        raise place.error(f"Not a list of one text: {str(turns)[:40]}", column=column,
                          cure='Write ["the text"]; conversations of several turns go into messages.')  # fmt: skip
    return turns[0]
