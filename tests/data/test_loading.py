"""Files, built-in sets, assets and the hub as data: what is accepted, and the error for what is not."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from temper.core.errors import ConfigError, DataError, NeedsError, StoreError
from temper.core.types import Message
from temper.data import loading, readers
from temper.data.loading import builtin_names, load_data, write_jsonl
from temper.data.schemas import Behaviour, Choice, Data, Dialogue, Labelled, Text


@pytest.fixture
def put(tmp_path):
    """Writes a file and gives its path as text."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_json_lines(put):
    path = put(
        "a.jsonl", '{"prompt": "p", "completion": "c"}\n\n  \n{"prompt": "q", "completion": "d", "n": 1}'
    )
    data = load_data(path)
    assert (list(data), data.source) == (["train"], path)
    assert data.rows[0] == Dialogue((Message("user", "p"), Message("assistant", "c")), id="train-1")
    assert (data.rows[1].id, data.rows[1].extra) == ("train-4", {"n": 1})


def test_json_list_and_json_lines_under_one_suffix(put):
    rows = [{"text": "a"}, {"text": "b"}]
    whole = load_data(put("a.json", " " + json.dumps(rows, indent=1)))
    lines = load_data(put("b.json", "\n".join(map(json.dumps, rows))))
    assert whole.rows == lines.rows == (Text("a", id="train-1"), Text("b", id="train-2"))


def test_byte_order_marks_are_ignored(put):
    mark = b"\xef\xbb\xbf"
    assert load_data(put("a.jsonl", mark + b'{"text": "a"}\n')).rows[0].text == "a"
    assert load_data(put("a.json", mark + b'[{"text": "a"}]')).rows[0].text == "a"
    assert load_data(put("a.csv", mark + b"text,label\na,1\n")).rows[0] == Labelled("a", 1, id="train-2")


def test_only_a_newline_ends_a_line(put):
    text = "one\u2028two\rthree\x85four"
    path = put("a.jsonl", json.dumps({"text": text}, ensure_ascii=False).replace("\\r", "\r") + "\n")
    # A bare carriage return is not allowed inside JSON text, so the line reaches the parser whole.
    with pytest.raises(DataError, match=r"Invalid control character .*line 1"):
        load_data(path)
    assert load_data(put("b.jsonl", json.dumps({"text": text}, ensure_ascii=False))).rows[0].text == text


def test_windows_line_ends(put):
    assert [r.text for r in load_data(put("a.jsonl", '{"text": "a"}\r\n{"text": "b"}\r\n')).rows] == [
        "a",
        "b",
    ]


def test_csv_cells(put):
    path = put(
        "a.csv",
        "question,choices,answer,note\r\n"
        '"two\nlines","[""x"", ""y""]",1,\r\n'
        ",,,\r\n"
        'q,"[""x"", ""y""]",A,n\r\n',
    )
    assert load_data(path).rows == (
        Choice("two\nlines", ("x", "y"), 1, id="train-3", extra={"note": None}),
        Choice("q", ("x", "y"), 0, id="train-5", extra={"note": "n"}),
    )


def test_csv_messages_and_flags(put):
    messages = json.dumps([{"role": "user", "content": "a, b"}]).replace('"', '""')
    assert load_data(put("a.csv", f'messages\n"{messages}"\n')).rows[0].messages == (Message("user", "a, b"),)
    path = put("b.csv", "goal,target,benign\ng,,False\nh,t,1\n")
    assert load_data(path).rows == (
        Behaviour("g", None, "", False, id="train-2"),
        Behaviour("h", "t", "", True, id="train-3"),
    )
    chat = load_data(put("c.csv", f'prompt,completion\n"{messages}",[{{ is a bracket\n')).rows[0]
    assert chat.messages == (Message("user", "a, b"), Message("assistant", "[{ is a bracket"))


def test_csv_takes_documents_longer_than_the_csv_modules_default(put):
    assert len(load_data(put("a.csv", "text,label\n" + "x" * 300_000 + ",1\n")).rows[0].text) == 300_000


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": 1}, {"messages": [], "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_data(str(tmp_path / "a.parquet"), limit=1).rows == (
        Dialogue((Message("user", "a"),), id="train-1", extra={"n": 1}),
    )
    with pytest.raises(DataError, match=r"empty \(.*a.parquet, row 2, column 'messages'"):
        load_data(str(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="Not a Parquet file"):
        load_data(str(tmp_path / "b.parquet"))


def test_parquet_without_pyarrow_gives_the_install_line(put, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(NeedsError, match=r"pip install 'temper-ml\[data\]'"):
        load_data(put("a.parquet", b""))


BAD_FILES = [
    ("a.jsonl", '{"text": "a"}\n{"text": }\n', "Not valid JSON at character 10: .*a.jsonl, line 2"),
    ("a.json", '[{"text": "a"},\n {"text" "b"}]', "Not valid JSON at character 10: .*a.json, line 2"),
    ("a.jsonl", '{"text": "a"}{"text": "b"}\n', "Not valid JSON at character 14: Extra data .*line 1"),
    ("a.jsonl", '"just a text"\n', "must be an object with columns, not a text .*line 1"),
    ("a.jsonl", '{"text": "a", "score": NaN}\n', "nan .*line 1, column 'score'"),
    ("a.jsonl", '{"text": "a", "label": NaN}\n', "nan .*line 1, column 'label'"),
    ("a.jsonl", "", "no rows"),
    ("a.jsonl", "\n \n", "no rows"),
    ("a.json", "[]", "no rows"),
    ("a.json", '{"data": [{"text": "a"}]}', "'data' fit no kind"),
    ("a.csv", "", "no rows"),
    ("a.csv", "text,label\n", "no rows"),
    ("a.csv", "text,text\na,b\n", "'text' stands twice .*line 1"),
    ("a.csv", "text,\na,b\n", "no name .*line 1"),
    ("a.csv", "text,label\na,1\nb\n", "1 cells under 2 columns .*line 3"),
    ("a.csv", "text,label\na,b,c\n", "3 cells under 2 columns .*line 2"),
    ("a.csv", 'text,label\n"a"b,1\n', "Not valid CSV.*line 2"),
    ("a.csv", "text,label\na,\n", "column is empty .*line 2, column 'label'"),
    ("a.csv", "question,choices,answer\nq,[x,0\n", "not a JSON list: .*line 2, column 'choices'"),
    ("a.csv", 'question,choices,answer\nq,"[x]",0\n', "not a JSON list: .*line 2, column 'choices'"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "not UTF-8 at byte 11 .*line 2"),
    ("a.json", b'[{"text": "\xff"}]', "not UTF-8"),
    (
        "a.jsonl",
        '{"text": "a", "id": 1}\n\n{"text": "b", "id": "1"}\n',
        "id '1' stands already in line 1 .*line 3",
    ),
    ("a.jsonl", "[" * 100_000 + "\n", "nested too deeply"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file(put, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_data(put(name, content))
    assert name in caught.value.where


def test_huge_line(put, monkeypatch):
    monkeypatch.setattr(readers, "LINE_LIMIT", 2**20)
    with pytest.raises(DataError, match=r"longer than 1 MiB .*line 2"):
        load_data(put("a.jsonl", '{"text": "a"}\n{"text": "' + "x" * 2**20 + '"}\n'))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_data(str(tmp_path / "no.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="a folder, not a file"):
        load_data(str(tmp_path / "folder.jsonl"))


def test_a_file_is_read_once_and_only_as_far_as_the_limit(put, monkeypatch):
    path = put("a.jsonl", "\n".join(json.dumps({"text": str(i)}) for i in range(50)) + "\nnot json\n")
    opened = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self) or original(self, *a, **k))
    assert len(load_data(path, limit=50).rows) == 50
    assert opened == [Path(path)]


def test_parts_by_name(put):
    a, b = put("a.jsonl", '{"text": "a"}'), put("b.jsonl", '{"prompt": "b"}')
    data = load_data({"forget": a, "retain": b}, {"forget": "Text", "retain?": "Dialogue"})
    assert data.schemas == {"forget": "Text", "retain": "Dialogue"}
    assert data.source == f"forget={a} retain={b}"
    assert list(load_data({"forget": a}, {"forget": "Text", "retain?": "Text"})) == ["forget"]


@pytest.mark.parametrize("spec", ["builtin:behaviours:neutral", "builtin:behaviours"])
def test_a_chosen_part_takes_the_name_of_the_only_one_that_must_be_there(spec):
    data = load_data(spec, {"goals": "Behaviour", "held_out?": "Behaviour"}, limit=3)
    chosen = load_data(spec if spec.endswith("neutral") else "builtin:behaviours:train", limit=3)
    assert data["goals"] == chosen.rows


def test_a_part_that_is_wanted_keeps_its_name(put):
    with pytest.raises(ConfigError, match="no part 'goals'"):
        load_data("builtin:behaviours:test", {"goals": "Behaviour", "test?": "Behaviour"})


def test_one_file_takes_the_name_of_the_only_part_wanted(put):
    assert list(load_data(put("a.jsonl", '{"text": "a"}'), {"test": "Text"})) == ["test"]


def test_missing_part_shows_how_to_name_parts(put):
    path = put("a.jsonl", '{"text": "a"}')
    wanted = {"forget": "Text", "retain": "Text"}
    with pytest.raises(
        ConfigError, match=r"no part 'forget'; it has 'train'.*--data forget=FILE --data retain=FILE"
    ):
        load_data(path, wanted)


def test_schema_for_all_parts_and_unknown_schema(put):
    path = put("a.jsonl", '{"prompt": "a", "text": "b"}')
    assert load_data(path, "Text").rows[0].text == "b"
    with pytest.raises(ConfigError, match="no schema 'Txt'"):
        load_data(path, "Txt")


@pytest.mark.parametrize("spec", ["step-one", "builtin:", "a.txt", ""])
def test_specs_that_are_not_data(spec):
    with pytest.raises(ConfigError):
        load_data(spec)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_of_nothing(put, limit):
    with pytest.raises(ConfigError, match=f"limit is {limit}"):
        load_data(put("a.jsonl", '{"text": "a"}'), limit=limit)


def test_nothing_named():
    with pytest.raises(ConfigError, match="No data is named"):
        load_data({})


@pytest.fixture
def builtins(tmp_path, monkeypatch):
    for part in ("train", "test"):
        folder = tmp_path / "little_set"
        folder.mkdir(exist_ok=True)
        (folder / f"{part}.jsonl").write_text(json.dumps({"text": part}))
    (tmp_path / "__pycache__").mkdir()
    monkeypatch.setattr(loading, "BUILTIN", tmp_path)


@pytest.mark.usefixtures("builtins")
def test_builtin_sets():
    assert builtin_names() == ["little-set"]
    assert {name: r[0].text for name, r in load_data("builtin:little-set").items()} == {
        "train": "train",
        "test": "test",
    }
    assert list(load_data("builtin:little-set:test")) == ["test"]
    assert load_data({"retain": "builtin:little-set:test"})["retain"][0].text == "test"
    assert load_data({"retain": "builtin:little-set"})["retain"][0].text == "train"
    with pytest.raises(ConfigError, match=r"no built-in set 'litle-set'. Did you mean little-set"):
        load_data("builtin:litle-set")
    with pytest.raises(ConfigError, match=r"no part 'tset'. Did you mean test"):
        load_data("builtin:little-set:tset")


def fake_hub(monkeypatch, answer):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer[split.partition("[")[0]] if split else answer

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_specs(monkeypatch):
    splits = {"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]}
    calls = fake_hub(monkeypatch, splits)
    assert {name: len(records) for name, records in load_data("hub:o/n").items()} == {"train": 2, "test": 1}
    assert list(load_data("hub:o/n:test")) == ["test"]
    assert list(load_data("hub:o/n:conf:train[:5%]")) == ["train"]
    load_data("hub:o/n:conf")
    assert calls == [
        ("o/n", None, None),
        ("o/n", None, "test"),
        ("o/n", "conf", "train[:5%]"),
        ("o/n", "conf", None),
    ]
    with pytest.raises(ConfigError, match="too many fields"):
        load_data("hub:o/n:a:b:c")


def test_hub_errors_name_row_and_cure(monkeypatch):
    fake_hub(monkeypatch, {"train": [{"text": "a"}, {"text": ""}]})
    with pytest.raises(DataError, match=r"hub:o/n:train, row 2, column 'text'"):
        load_data("hub:o/n")
    fake_hub(monkeypatch, ConnectionError("no route\nmore"))
    with pytest.raises(DataError, match=r"did not give it: no route \(hub:o/n\). Check the name"):
        load_data("hub:o/n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NeedsError, match=r"temper-ml\[data\]"):
        load_data("hub:o/n")


def test_write_is_atomic(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    write_jsonl(path, [Text("a")])

    def broken():
        yield Text("b")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert path.read_text() == '{"text": "a"}\n'
    assert os.listdir(path.parent) == ["a.jsonl"]
    assert load_data(str(path)).rows[0].text == "a"


def test_write_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="folder cannot be written"):
        write_jsonl(tmp_path / "file" / "a.jsonl", [])

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        write_jsonl(tmp_path / "a.jsonl", [Text("a")])
    assert os.listdir(tmp_path) == ["file"]


def test_written_images_are_found_from_another_folder(put, tmp_path):
    data = load_data(put("a.jsonl", '{"image": "i.png", "text": "t"}'))
    write_jsonl(tmp_path / "sub" / "b.jsonl", data.rows)
    assert load_data(str(tmp_path / "sub" / "b.jsonl")).rows[0].image.path == tmp_path / "i.png"


def test_loading_leaves_its_arguments(put):
    spec, schemas = {"a": put("a.jsonl", '{"text": "a"}')}, {"a": "Text"}
    data = load_data(spec, schemas)
    assert isinstance(data, Data)
    assert (list(spec), schemas) == (["a"], {"a": "Text"})
