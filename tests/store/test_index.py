from __future__ import annotations

import pytest

from temper.core.errors import ConfigError, StoreError
from temper.core.types import Row
from temper.store import lines
from temper.store.folders import RunFolder
from temper.store.index import index_path, query, rebuild
from temper.store.records import row_record


def _run(out, values):
    run = RunFolder.create(out, "npo", {"method": "npo"})
    lines.append(
        run.path / "rows.jsonl", [row_record(Row(metric="f1", value=v, facts={"seed": 0})) for v in values]
    )
    return run


def test_the_index_holds_what_the_folders_hold_and_can_be_rebuilt(tmp_path):
    _run(tmp_path, [0.1, 0.2])
    second = _run(tmp_path, [0.3])
    assert rebuild(tmp_path)[:2] == (2, 3)
    assert [r["value"] for r in query(tmp_path, "select value from rows order by value")] == [0.1, 0.2, 0.3]
    index_path(tmp_path).unlink()
    lines.append(second.path / "rows.jsonl", [row_record(Row(metric="f1", value=0.4))])
    assert rebuild(tmp_path).num_rows == 4
    assert sorted(p.name for p in tmp_path.glob("*.sqlite")) == ["index.sqlite"]
    assert not list(tmp_path.glob(".index*"))


def test_a_damaged_run_is_named_and_left_out_whole(tmp_path):
    good, bad, worse = _run(tmp_path, [0.1]), _run(tmp_path, [0.2, 0.3]), _run(tmp_path, [0.4])
    path = bad.path / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.3", b"0.9"))
    (worse.path / "run.json").write_text("{")
    indexed = rebuild(tmp_path)
    assert (indexed.num_runs, indexed.num_rows) == (1, 1)
    assert sorted(message.split(":")[0] for message in indexed.damaged) == sorted([bad.id, worse.id])
    assert [r["id"] for r in query(tmp_path, "select id from runs")] == [good.id]


def test_no_folder_no_index_and_a_broken_index_are_clear(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        rebuild(tmp_path / "none")
    with pytest.raises(ConfigError, match="temper index"):
        list(query(tmp_path, "select 1"))
    index_path(tmp_path).write_text("not a database, but long enough to be read as one" * 100)
    with pytest.raises(StoreError, match="temper index"):
        list(query(tmp_path, "select * from runs"))


def test_queries_cannot_write(tmp_path):
    _run(tmp_path, [0.1])
    rebuild(tmp_path)
    with pytest.raises(StoreError):
        list(query(tmp_path, "delete from rows"))
    assert len(list(query(tmp_path, "select * from rows"))) == 1
