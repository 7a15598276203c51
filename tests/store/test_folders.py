from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from temper.core.errors import ConfigError, StoreError
from temper.core.types import Attempt, Row
from temper.store import atomic, lines
from temper.store.folders import RunFolder, find_step, run_folders
from temper.store.records import attempt_from, attempt_record, row_from, row_record, stable


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    import temper.store.folders as folders

    # Every name is taken at first: only mkdir decides, so collisions are retried with more characters.
    monkeypatch.setattr(
        folders.secrets, "token_hex", lambda n: "a" * (2 * n) if n < 3 else os.urandom(n).hex()
    )
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunFolder.create(tmp_path, "NPO!", {}).path, range(40)))
    assert len(set(made)) == 40
    assert all(path.name.startswith("npo-") for path in made)


def test_run_json_is_replaced_whole(tmp_path):
    run = RunFolder.create(tmp_path, "npo", {"method": "npo"})
    run.update(status="done")
    assert run.record()["status"] == "done"
    assert run.record()["method"] == "npo"
    assert [p.name for p in run.path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "nonsense"])
def test_unreadable_run_json_is_a_store_error(tmp_path, content):
    run = RunFolder.create(tmp_path, "npo", {})
    (run.path / "run.json").write_text(content)
    with pytest.raises(StoreError, match=r"run\.json"):
        run.record()


def test_a_folder_without_run_json_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        RunFolder.open(tmp_path)
    assert run_folders(tmp_path / "none") == []


def test_rows_and_attempts_come_back(tmp_path):
    run = RunFolder.create(tmp_path, "npo", {})
    row = Row(metric="f1", value=0.5, n=3, item="a", arm="x", facts={"seed": 1})
    attempt = Attempt(goal="g", attack="a", input="i", reply="r", success=None, cost={"queries": 2})
    lines.append(run.path / "rows.jsonl", [row_record(row)])
    lines.append(run.path / "attempts.jsonl", [attempt_record(attempt)])
    assert list(run.rows()) == [row]
    assert list(run.attempts()) == [attempt]


def test_default_fields_are_left_out_and_read_back():
    record = row_record(Row(metric="f1", value=None, note="no items"))
    assert set(record) == {"metric", "value", "n", "note", "facts"}
    assert row_from(record | {"unknown": 1}) == Row(metric="f1", value=None, note="no items")
    assert attempt_from(
        {"goal": "g", "attack": "a", "input": "", "reply": "", "success": True, "cost": {}, "x": 1}
    )


def test_a_non_finite_value_is_refused():
    with pytest.raises(StoreError, match="None, with a note"):
        row_record(Row(metric="f1", value=float("inf")))


def test_stable_drops_only_what_may_differ():
    record = {"value": 1, "facts": {"wall_s": 3, "seed": 1}, "cost": {"wall_s": 1, "queries": 2}}
    assert stable(record) == {"value": 1, "facts": {"seed": 1}, "cost": {"queries": 2}}


def test_a_second_process_cannot_take_a_locked_run(tmp_path):
    run = RunFolder.create(tmp_path, "npo", {})
    code = (
        "import sys; from pathlib import Path; from temper.store.folders import RunFolder\n"
        "with RunFolder.open(Path(sys.argv[1])).lock(): pass"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    with run.lock():
        assert run.is_locked()
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"In use by process {os.getpid()}" in second.stderr
    assert not run.is_locked()
    assert subprocess.run(command, check=False).returncode == 0


def _finished(tmp_path, name="fit-abc"):
    step = RunFolder.create(tmp_path, "npo", {}).step(name)
    step.clear()
    step.artefact.mkdir()
    (step.artefact / "w.bin").write_bytes(b"\x01" * 1000)
    (step.path / "checkpoint").mkdir()
    step.finish({"hash": "abc"})
    return step


def test_a_finished_step_lists_its_files_and_has_no_checkpoint(tmp_path):
    step = _finished(tmp_path)
    assert list(step.done()["files"]) == ["artefact/w.bin"]
    assert not (step.path / "checkpoint").exists()
    step.check()
    assert find_step(tmp_path, "abc").path == step.path
    assert find_step(tmp_path, "abd") is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_changed_file_of_a_finished_step_is_noticed(tmp_path, damage):
    step = _finished(tmp_path)
    path = step.artefact / "w.bin"
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(
            b"\x01" * (500 if damage == "truncate" else 999) + (b"" if damage == "truncate" else b"\x02")
        )
    with pytest.raises(StoreError, match=r"w\.bin"):
        step.check()
    with pytest.raises(StoreError, match=r"w\.bin"):
        RunFolder.create(tmp_path, "npo", {}).step("fit-abc").adopt(step)


def test_adopting_takes_the_files_and_says_from_where(tmp_path):
    step = _finished(tmp_path)
    other = RunFolder.create(tmp_path, "npo", {}).step("fit-abc")
    other.adopt(step)
    other.check()
    assert other.done()["reused_from"] == str(step.path)
    assert (other.artefact / "w.bin").read_bytes() == b"\x01" * 1000


def test_clear_keeps_the_checkpoint_only(tmp_path):
    step = RunFolder.create(tmp_path, "npo", {}).step("s")
    step.clear()
    (step.path / "checkpoint").mkdir()
    (step.path / "checkpoint" / "state").write_text("1")
    (step.path / "rows.jsonl").write_text("x")
    (step.path / "data").mkdir()
    step.clear()
    assert [str(p.relative_to(step.path)) for p in sorted(step.path.rglob("*"))] == [
        "checkpoint",
        "checkpoint/state",
    ]


def test_full_disk_while_creating_leaves_no_folder(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(StoreError, match="disk is full"):
        RunFolder.create(tmp_path, "npo", {})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"n": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(StoreError, match="disk is full"):
        atomic.write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_store_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="--out"):
            RunFolder.create(tmp_path / "runs", "npo", {})
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be_is_a_store_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(StoreError, match="create a run"):
        RunFolder.create(tmp_path / "runs", "npo", {})


def test_a_read_only_file_system_names_the_cure(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(atomic.tempfile, "mkstemp", read_only)
    with pytest.raises(StoreError, match="read-only: choose another folder"):
        atomic.write_json(tmp_path / "a.json", 1)


def test_what_a_killed_process_was_writing_goes_when_the_run_is_held_again(tmp_path):
    folder = RunFolder.create(tmp_path, "demo", {"name": "demo"})
    left = folder.path / "steps" / "fit" / ".done.json.abc123.part"
    left.parent.mkdir(parents=True)
    for path in (left, folder.path / ".run.json.xyz.part"):
        path.write_text("{")
    kept = folder.path / "steps" / "fit" / ".hidden"
    kept.write_text("a method's own")
    with folder.lock():
        names = sorted(path.name for path in folder.path.rglob(".*"))
    assert names == [".hidden"]
