"""The ecosystem's columns, and one clear error for every way a row can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from temper.core.errors import ConfigError, DataError
from temper.core.types import Message
from temper.data.columns import Place, from_row, infer_schema
from temper.data.pictures import Picture
from temper.data.schemas import (
    Behaviour,
    Captioned,
    Choice,
    Dialogue,
    Labelled,
    Preference,
    Ranking,
    ToolCalls,
)

PLACE = Place("f.jsonl", 7, "line")
ASKED = Message("user", "Where?")
TOLD = Message("assistant", "Here.")
ASKED_ROW = {"role": "user", "content": "Where?"}
TOLD_ROW = {"role": "assistant", "content": "Here."}


def read(row, schema=None):
    return from_row(row, schema or infer_schema(list(row), PLACE), PLACE, default_id="r")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED_ROW, TOLD_ROW]},
        {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]},
        {"prompt": "Where?", "completion": "Here."},
        {"prompt": "Where?", "response": "Here."},
        {"question": "Where?", "answer": "Here."},
        {"prompt": [ASKED_ROW], "completion": [TOLD_ROW]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Whe"}, {"text": "re?"}]},
                TOLD_ROW,
            ]
        },
    ],
)
def test_dialogue_columns(row):
    assert read(row) == Dialogue((ASKED, TOLD), id="r")


def test_prompt_alone_is_a_request():
    assert read({"prompt": "Where?"}) == Dialogue((ASKED,), id="r")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Where?", "chosen": "Here.", "rejected": "No."},
        {"prompt": [ASKED_ROW], "chosen": [TOLD_ROW], "rejected": "No."},
        {
            "prompt": "Where?",
            "chosen": [ASKED_ROW, TOLD_ROW],
            "rejected": [ASKED_ROW, {"role": "assistant", "content": "No."}],
        },
        {"chosen": [ASKED_ROW, TOLD_ROW], "rejected": [ASKED_ROW, {"role": "assistant", "content": "No."}]},
    ],
)
def test_preference_columns(row):
    assert read(row) == Preference((ASKED,), "Here.", "No.", id="r")


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"goal": "g", "target": "t"}, Behaviour("g", "t", id="r")),
        ({"behavior": "g", "category": "c", "benign": True}, Behaviour("g", None, "c", True, id="r")),
        ({"prompt": "g", "benign": 0}, Behaviour("g", id="r")),
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, Choice("q", ("x", "y"), 1, id="r")),
        ({"question": "q", "choices": ["x", "y"], "answer": "B"}, Choice("q", ("x", "y"), 1, id="r")),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, Choice("q", ("x", "y"), 1, id="r")),
        ({"question": "q", "choices": ["x", "y"], "answer": "1"}, Choice("q", ("x", "y"), 1, id="r")),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            Choice("q", ("x", "y"), 1, id="r"),
        ),
        ({"text": "t", "label": 3}, Labelled("t", 3, id="r")),
        ({"text": "t", "label": 3.0}, Labelled("t", 3, id="r")),
        ({"text": "t", "label": True}, Labelled("t", 1, id="r")),
        ({"text": "t", "label": "pos", "id": 5, "z": [1]}, Labelled("t", "pos", id="5", extra={"z": [1]})),
        ({"query": "q", "positive": "p", "negatives": ["n"]}, Ranking("q", "p", ("n",), id="r")),
        ({"query": "q", "positive": "p"}, Ranking("q", "p", id="r")),
        ({"messages": [ASKED_ROW], "tools": [{"name": "f"}]}, ToolCalls((ASKED,), ({"name": "f"},), id="r")),
        ({"image": "i.png", "caption": "c"}, Captioned(Picture.from_file("i.png"), "c", id="r")),
    ],
)
def test_other_columns(row, record):
    assert read(row) == record


def test_image_paths_start_at_the_file():
    place = Place("d/f.jsonl", 1, folder=Path("d"))
    assert from_row({"image": "i.png", "text": "c"}, "Captioned", place).image.path == Path("d/i.png")


def test_columns_not_used_are_kept():
    assert read({"messages": [ASKED_ROW], "prompt": "other", "n": None}).extra == {
        "prompt": "other",
        "n": None,
    }


BAD = [
    ({"prmpt": "a", "completion": "b"}, "Dialogue", "no column 'messages' or 'prompt'.*Rename 'prmpt'"),
    ({"text": "a", "lable": 1}, "Labelled", r"no column 'label'; the row has .*Rename 'lable' to 'label'"),
    ({"a": 1}, "Text", "no column 'text'; the row has 'a'.*Text wants text"),
    ({"prompt": "a", "completion": None}, "Dialogue", "column 'completion'.*Fill it in"),
    ({"prompt": "a", "completion": "  "}, "Dialogue", "text is empty .*column 'completion'"),
    (
        {"prompt": 3, "completion": "b"},
        "Dialogue",
        "3 is a number, not a text or a list of messages .*'prompt'",
    ),
    ({"prompt": "a", "completion": ["b"]}, "Dialogue", r"not a message .*column 'completion\[0\]'"),
    ({"prompt": "a", "completion": [ASKED_ROW, TOLD_ROW]}, "Dialogue", "reply is 2 messages"),
    ({"messages": "hello"}, "Dialogue", "'hello' is a text, not a list of messages"),
    ({"messages": []}, "Dialogue", "list of messages is empty"),
    (
        {"messages": [{"role": "asistant", "content": "a"}]},
        "Dialogue",
        r"'asistant' .*messages\[0\].*mean assistant",
    ),
    (
        {"messages": [ASKED_ROW, {"role": "user", "content": ""}]},
        "Dialogue",
        r"empty .*column 'messages\[1\]'",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "Dialogue", "None is nothing, not a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "Dialogue", "a list, not a text"),
    (
        {"messages": [{**TOLD_ROW, "tool_calls": [{}]}]},
        "Dialogue",
        "tool_calls.*Write the calls into content",
    ),
    ({"prompt": "\ud800 a"}, "Dialogue", "surrogate"),
    ({"prompt": "a", "chosen": "b"}, "Preference", "no column 'rejected'"),
    ({"chosen": "a", "rejected": "b"}, "Preference", "no column 'prompt' or 'question'"),
    ({"chosen": [ASKED_ROW, TOLD_ROW], "rejected": [TOLD_ROW]}, "Preference", "different prompts"),
    ({"goal": [ASKED_ROW, TOLD_ROW]}, "Behaviour", "not a text or one user message"),
    ({"goal": "g", "benign": "maybe"}, "Behaviour", "'maybe' is a text, not true or false"),
    ({"goal": "g", "benign": 1.0}, "Behaviour", "not true or false"),
    ({"goal": "g", "category": 3}, "Behaviour", "3 is a number, not a text .*'category'"),
    ({"question": "q", "choices": ["a"], "answer": 0}, "Choice", "1 entries, at least 2"),
    (
        {"question": "q", "choices": ["a", 2], "answer": 0},
        "Choice",
        r"2 is a number, not a text .*'choices\[1\]'",
    ),
    ({"question": "q", "choices": ["a", "b"], "answer": 2}, "Choice", "2 names none of the 2 choices"),
    ({"question": "q", "choices": ["a", "b"], "answer": -1}, "Choice", "-1 names none"),
    ({"question": "q", "choices": ["a", "b"], "answer": True}, "Choice", "True names none"),
    ({"question": "q", "choices": ["a", "b"], "answer": "E"}, "Choice", "'E' names none"),
    ({"question": "q", "choices": ["3", "0"], "answer": "0"}, "Choice", "'0' could be 2 of the choices"),
    ({"question": "q", "choices": ["B", "x"], "answer": "B"}, "Choice", "'B' could be 2"),
    ({"text": "t", "label": float("nan")}, "Labelled", "value is nan .*column 'label'"),
    ({"text": "t", "label": 0.5}, "Labelled", "0.5 is a number, not a text or a whole number"),
    ({"text": "t", "label": ""}, "Labelled", "text is empty .*'label'"),
    ({"text": "t", "id": [1]}, "Text", r"\[1\] is a list, not a text or a whole number .*'id'"),
    ({"messages": [ASKED_ROW], "tools": ["f"]}, "ToolCalls", "not a list of objects"),
    ({"query": "q", "positive": "p", "negatives": "n"}, "Ranking", "'n' is a text, not a list of texts"),
    (["a"], "Text", "must be an object with columns, not a list"),
]


@pytest.mark.parametrize(("row", "schema", "message"), BAD, ids=range(len(BAD)))
def test_bad_row_says_what_where_and_cure(row, schema, message):
    with pytest.raises(DataError, match=message) as caught:
        read(row, schema)
    assert caught.value.where.startswith("f.jsonl, line 7")
    assert caught.value.exit_code == 2


def test_columns_that_fit_nothing():
    with pytest.raises(DataError, match=r"'a', 'b' fit no kind of record.*Dialogue: messages"):
        infer_schema(["a", "b"], PLACE)


def test_unknown_schema_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'Dialog'. Did you mean Dialogue"):
        read({"prompt": "a"}, "Dialog")


@pytest.mark.parametrize("schema", ["Dialogue", "Behaviour"])
def test_a_schema_asked_for_wins_over_the_columns(schema):
    record = read({"prompt": "p", "target": "t"}, schema)
    assert type(record).__name__ == schema
    assert record.extra == ({"target": "t"} if schema == "Dialogue" else {})


def test_a_page_of_concept_vectors_is_a_text():
    row = {"Concept": "Velmora", "QA": ["Where?"], "wikipedia_content": "Velmora lies by the sea."}
    record = from_row(row, "Text", Place("f.json", 1), default_id="1")
    assert record.text == "Velmora lies by the sea."
    assert record.extra == {"Concept": "Velmora", "QA": ["Where?"]}
