"""Records, their rows and `Data`: round trips, and a fingerprint that is the same everywhere."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import ConfigError
from temper.core.types import Message
from temper.data.columns import Place, from_row, infer_schema
from temper.data.loading import load_data, write_jsonl
from temper.data.pictures import Picture
from temper.data.schemas import (
    SCHEMAS,
    Behaviour,
    Captioned,
    Choice,
    Data,
    Dialogue,
    Labelled,
    Preference,
    Ranking,
    Text,
    ToolCalls,
    to_row,
)

texts = st.text(min_size=1, max_size=20).filter(str.strip)
messages = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts),
    min_size=1,
    max_size=4,
).map(tuple)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
# Names that no schema reads, under any of its spellings.
common = {
    "id": texts,
    "extra": st.dictionaries(st.text(max_size=5).map("x_".__add__), json_values, max_size=3),
}
choices = st.lists(texts, min_size=2, max_size=5).map(tuple)
records = st.one_of(
    st.builds(Dialogue, messages, **common),
    st.builds(Preference, messages, texts, texts, **common),
    st.builds(Behaviour, texts, st.none() | texts, st.text(max_size=5), st.booleans(), **common),
    choices.flatmap(lambda c: st.builds(Choice, texts, st.just(c), st.integers(0, len(c) - 1), **common)),
    st.builds(Labelled, texts, st.integers() | texts, **common),
    st.builds(Text, texts, **common),
    st.builds(Ranking, texts, texts, st.lists(texts, max_size=3).map(tuple), **common),
    st.builds(
        ToolCalls,
        messages,
        st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=2), max_size=2).map(tuple),
        **common,
    ),
    st.builds(Captioned, st.just(Picture.from_array(np.zeros((2, 3), np.uint8))), texts, **common),
)


@given(records)
def test_row_round_trip(record):
    row = json.loads(json.dumps(to_row(record)))
    assert from_row(row, type(record).__name__, Place("memory", 1)) == record


@given(records)
def test_schema_inferred_from_own_columns(record):
    assert infer_schema(list(to_row(record)), Place("memory", 1)) == type(record).__name__


@settings(max_examples=30)
@given(st.lists(records, min_size=1, max_size=4, unique_by=lambda r: r.id))
def test_file_round_trip(tmp_path_factory, found):
    same = [r for r in found if type(r) is type(found[0])]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, same)
    back = load_data(str(path))
    assert list(back.rows) == same
    assert back.fingerprint == Data({"train": same}).fingerprint


def test_every_schema_is_tried_by_the_round_trip():
    built = (Dialogue, Preference, Behaviour, Choice, Labelled, Text, Ranking, ToolCalls, Captioned)
    assert set(SCHEMAS.values()) == set(built)


def test_dialogue_prompt_and_reply():
    asked = Message("user", "Hello?")
    full = Dialogue((asked, Message("assistant", "Hi.")))
    assert (full.prompt, full.reply) == ((asked,), "Hi.")
    assert (Dialogue((asked,)).prompt, Dialogue((asked,)).reply) == ((asked,), None)


def test_preference_row_is_a_string_for_one_user_message():
    plain = Preference((Message("user", "a"),), "b", "c")
    assert to_row(plain) == {"prompt": "a", "chosen": "b", "rejected": "c"}
    led = Preference((Message("system", "s"), Message("user", "a")), "b", "c")
    assert to_row(led)["prompt"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]


def test_rows_is_the_only_part_or_train():
    one, two = Text("one"), Text("two")
    assert Data({"retain": [one]}).rows == (one,)
    assert Data({"train": [one], "test": [two]}).rows == (one,)
    with pytest.raises(ConfigError, match="no part 'train'"):
        _ = Data({"forget": [one], "retain": [two]}).rows


def test_unknown_part_names_the_nearest():
    data = Data({"forget": [Text("a")], "retain": []}, "here.jsonl")
    with pytest.raises(ConfigError, match=r"'forgot' \(here.jsonl\). Did you mean forget"):
        _ = data["forgot"]
    assert "forgot" not in data
    assert data.get("forgot") == ()
    assert data.schemas == {"forget": "Text"}


def test_with_part_leaves_the_original():
    data = Data({"train": [Text("a")]}, "s")
    more = data.with_part("test", [Text("b")])
    assert list(data) == ["train"]
    assert list(more) == ["train", "test"]
    assert more.source == "s"
    assert more.fingerprint != data.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        Data({"train": [Text("a", id="1"), Text("b", id="2")]}),
        Data({"train": [Text("b", id="2"), Text("a", id="1", extra={"k": 1})]}),
        Data({"test": [Text("b", id="2"), Text("a", id="1")]}),
        Data({"train": [Text("b", id="2")]}),
        Data({"train": [Text("b", id="2")], "test": [Text("a", id="1")]}),
        Data({"train": [Labelled("b", 1, id="2"), Text("a", id="1")]}),
    ],
)
def test_fingerprint_sees_every_change(changed):
    assert changed.fingerprint != Data({"train": [Text("b", id="2"), Text("a", id="1")]}).fingerprint


def test_fingerprint_ignores_order_of_parts_keys_and_source():
    one = Data({"a": [Text("x", extra={"k": 1, "l": 2})], "b": [Text("y")]}, "one")
    two = Data({"b": [Text("y")], "a": [Text("x", extra={"l": 2, "k": 1})]}, "two")
    assert one.fingerprint == two.fingerprint


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "from temper.data.schemas import Data, Text;"
        "print(Data({'a': [Text('é', id='1')], 'b': [Text('y')]}).fingerprint)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert found == {Data({"b": [Text("y")], "a": [Text("é", id="1")]}).fingerprint}


def test_schemas_import_no_torch():
    code = "import sys, temper.data.schemas, temper.data.loading, temper.data.assets; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_records_of_a_part_have_the_type_asked_for() -> None:
    data = Data({"train": [Text("a")]}, "here")
    assert data.records("train", Text) == (Text("a"),)
    assert data.records("test", Text) == ()
    with pytest.raises(ConfigError, match="holds Text, not Dialogue"):
        data.records("train", Dialogue)
