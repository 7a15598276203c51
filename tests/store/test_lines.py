from __future__ import annotations

import errno
import json
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.core.errors import StoreError
from temper.store import lines

RECORDS = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(), st.text(), st.none(), st.lists(st.text())), max_size=4
)


@given(RECORDS)
def test_a_record_comes_back_and_is_one_json_line(record):
    record.pop("crc32", None)
    line = lines.encode(record)
    assert line.count(b"\n") == 1
    assert lines.decode(line[:-1]) == record
    assert {k: v for k, v in json.loads(line).items() if k != "crc32"} == record


def test_checksum_is_crc32_of_the_object_without_it():
    line = lines.encode({"a": 1})
    assert json.loads(line)["crc32"] == format(zlib.crc32(b'{"a":1}'), "08x")


@given(RECORDS.filter(bool), st.data())
def test_any_changed_byte_is_noticed(record, data):
    line = bytearray(lines.encode(record)[:-1])
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= 1
    assert lines.decode(bytes(line)) is None


def test_nan_is_refused(tmp_path):
    with pytest.raises(StoreError, match="None for a number"):
        lines.append(tmp_path / "a.jsonl", [{"value": float("nan")}])


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_torn_last_line_is_skipped_and_cut_off(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    lines.append(path, [{"n": 1}, {"n": 2}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert list(lines.read(path)) == [{"n": 1}]
    assert lines.repair(path) == len(lines.encode({"n": 2})) - cut
    lines.append(path, [{"n": 2}])
    assert path.read_bytes() == whole


def test_repair_of_a_whole_file_changes_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert lines.repair(path) == 0
    lines.append(path, [{"text": "x" * 200_000}, {"n": 2}])
    before = path.read_bytes()
    assert lines.repair(path) == 0
    assert path.read_bytes() == before


def test_a_file_that_is_only_a_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text":"' + b"x" * 150_000)
    assert lines.repair(path) == 150_009
    assert path.read_bytes() == b""


def test_a_damaged_middle_line_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines.append(path, [{"n": n} for n in range(5)])
    content = path.read_bytes().replace(b'"n":2', b'"n":7')
    path.write_bytes(content)
    with pytest.raises(StoreError, match="line 3"):
        list(lines.read(path))
    with pytest.raises(StoreError, match="line 3"):
        lines.repair(path)
    assert path.read_bytes() == content


def test_reading_streams(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines.append(path, [{"n": n} for n in range(3)])
    path.write_bytes(path.read_bytes() + b"rubbish\n")
    reader = lines.read(path)
    assert [next(reader)["n"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StoreError, match="line 4"):
        next(reader)


def test_full_disk_leaves_whole_lines_only(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    real = os.write
    room = [60]

    def write(handle, content):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = content[: room[0]]
        room[0] -= len(part)
        return real(handle, part)

    monkeypatch.setattr(lines.os, "write", write)
    with pytest.raises(StoreError, match="disk is full"):
        lines.append(path, ({"number": n} for n in range(10)))
    monkeypatch.undo()
    assert path.read_bytes().endswith(b"}\n")
    found = [record["number"] for record in lines.read(path)]
    assert found == list(range(len(found)))
    assert 0 < len(found) < 10


def test_missing_file_has_no_records(tmp_path):
    assert list(lines.read(tmp_path / "none.jsonl")) == []
    assert lines.count(tmp_path / "none.jsonl") == 0
