"""Benchmark files in FastChat's columns: questions with turns, answers with choices and a human score."""

from __future__ import annotations

import json

import pytest

from temper.core.errors import DataError
from temper.data.columns import Place, from_row, infer_schema
from temper.data.loading import load_data
from temper.data.schemas import Behaviour, Labelled

PLACE = Place("f.jsonl", 7, "line")
QUESTION = {"question_id": 12, "category": 2, "turns": ["Do x."], "prompt_style": "base"}
ANSWER = {"question_id": 12, "choices": [{"turns": ["No."]}], "human_score": 0.0}


def read(row, schema=None):
    return from_row(row, schema or infer_schema(list(row), PLACE), PLACE, default_id="r")


def test_a_question_is_a_behaviour_and_keeps_its_other_columns():
    found = read(QUESTION)
    assert found == Behaviour(
        "Do x.", category="2", id="r", extra={"question_id": 12, "prompt_style": "base"}
    )


def test_a_question_also_reads_as_a_dialogue():
    assert read({"turns": ["Do x."]}, "Dialogue").messages[0].content == "Do x."


@pytest.mark.parametrize(("score", "label"), [(0, 0), (0.49, 0), (0.5, 1), (1, 1)])
def test_an_answer_is_labelled_by_its_score(score, label):
    assert read({**ANSWER, "human_score": score}) == Labelled("No.", label, id="r", extra={"question_id": 12})


def test_our_own_columns_win_and_turns_stay_beside_them():
    found = read({"prompt": "a", "turns": ["b"], "category": "c"}, "Behaviour")
    assert (found.prompt, found.extra) == ("a", {"turns": ["b"]})
    assert read({"text": "a", "label": 1, "choices": 5}, "Labelled").extra == {"choices": 5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**QUESTION, "turns": ["a", "b"]}, "Not a list of one text.*line 7, column 'turns'"),
        ({**QUESTION, "turns": "a"}, "Not a list of one text"),
        ({**QUESTION, "turns": []}, "Not a list of one text"),
        ({**QUESTION, "turns": [" "]}, "text is empty"),
        ({**QUESTION, "category": True}, "not a text"),
        ({**ANSWER, "choices": []}, "does not hold one answer"),
        ({**ANSWER, "choices": [{"turns": [1]}]}, "Not a list of one text.*choices"),
        ({**ANSWER, "human_score": 3}, "score is 3"),
        ({**ANSWER, "human_score": "yes"}, "score is 'yes'"),
        ({**ANSWER, "human_score": None}, "column 'label'|'label'"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, message):
    with pytest.raises(DataError, match=message):
        read(row)


def test_files_of_either_kind_load_by_their_columns_also_from_csv(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "q.csv").write_text('question_id,turns,category\n1,"[""Do, x.""]",2\n')
    assert load_data(str(tmp_path / "q.jsonl")).schemas == {"train": "Behaviour"}
    assert load_data(str(tmp_path / "q.csv")).rows[0].prompt == "Do, x."
