"""A disk that fills up, a folder that cannot be written, files that are cut short: one error, and the run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import own_folder, write_pipeline

from temper.cli.main import main
from temper.core.errors import StoreError
from temper.run.execute import run_recipe
from temper.store import lines
from temper.store.folders import run_folders
from temper.store.records import stable

TRAINING = """
name: training
system: tiny:llama
options: {checkpoint_every: 2}
steps:
  - id: refuse
    fit: refusal-tokens
    data: builtin:noncompliance
    limit: 40
    settings: {mode: lora, rank: 2, lr: 1e-2, batch_rows: 8, num_epochs: 1}
"""
CALLS = ("write", "fsync", "replace", "mkdir", "link", "open")
"""Calls of `os` through which a run reaches the disk."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    own_folder(tmp_path, monkeypatch)
    write_pipeline(tmp_path / "chain.yaml")
    (tmp_path / "training.yaml").write_text(TRAINING)
    return tmp_path


class Disk:
    """Counts calls that write below a folder, and refuses those from `fail_from` on."""

    def __init__(self, monkeypatch, out: Path) -> None:
        self.count, self.fail_from, self.code = 0, None, errno.ENOSPC
        self.out = str(out)
        for name in CALLS:
            monkeypatch.setattr(os, name, self._guarded(name, getattr(os, name)))

    def _guarded(self, name, real):
        def call(*arguments, **named):
            if self._is_ours(name, arguments):
                self.count += 1
                if self.fail_from is not None and self.count >= self.fail_from:
                    raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **named)

        return call

    def _is_ours(self, name, arguments) -> bool:
        target = arguments[1] if name == "link" else arguments[0]
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
            return False
        return os.path.abspath(os.fspath(target)).startswith(self.out)


def content(out: Path) -> dict[str, object]:
    """Everything of the only run that may not depend on what happened to it."""
    (run,) = run_folders(out)
    found: dict[str, object] = {}
    for path in sorted(p for p in run.path.rglob("*") if p.is_file()):
        name = str(path.relative_to(run.path))
        if path.suffix == ".jsonl" and path.parent.name != "data":
            found[name] = [stable(record) for record in lines.read(path)]
        elif path.name not in ("run.json", "done.json", "log.txt") and not path.name.endswith(".lock"):
            found[name] = path.read_bytes()
    return found


def code_of(capsys, *command: str) -> tuple[int, str]:
    code = 0
    try:
        main(command)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_at_any_write_is_one_error_and_the_run_goes_on(home, capsys, monkeypatch, code):
    with monkeypatch.context() as patch:
        disk = Disk(patch, home / "whole")
        assert code_of(capsys, "run", "chain.yaml", "--seeds", "0", "--out", "whole")[0] == 0
        num_calls = disk.count
    assert num_calls > 100
    wanted = content(home / "whole")
    for number, fail_from in enumerate(range(1, num_calls, num_calls // 12)):
        out = home / f"out-{number}"
        with monkeypatch.context() as patch:
            disk = Disk(patch, out)
            disk.fail_from, disk.code = fail_from, code
            exit_code, said = code_of(capsys, "run", "chain.yaml", "--seeds", "0", "--out", out.name)
        assert exit_code == 1, said
        assert "StoreError" in said
        assert os.strerror(code) in said
        assert "Unexpected" not in said
        assert not [p for p in out.rglob(".*.json.*")]  # no draft of a file stays behind
        assert code_of(capsys, "run", "chain.yaml", "--seeds", "0", "--out", out.name)[0] == 0
        assert content(out) == wanted


def test_a_file_limit_stops_rows_artefact_and_checkpoint_alike(home):
    """The system itself refuses: no write beyond so many bytes in one file."""
    command = [sys.executable, "-m", "temper.cli.main", "run", "training.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]  # blocks of 1024 bytes
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("StoreError") == 1
    assert "Traceback" not in done.stderr
    (step,) = (home / "runs").glob("*/steps/refuse-*")
    assert not [p.name for p in step.rglob("*") if p.name in ("artefact", "done.json")]
    assert not list(step.glob("checkpoint/.step-*"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (step / "artefact" / "artefact.json").is_file()


@pytest.mark.parametrize("place", ["chain.yaml", "chain.yaml/deeper", "/proc/nowhere", "/dev/null/x"])
def test_a_place_that_cannot_be_written_is_said_once(home, capsys, monkeypatch, place):
    from temper.run import estimate

    roomy = shutil._ntuple_diskusage(10**12, 0, 10**12)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: roomy)
    before = sorted(p.name for p in home.iterdir())
    code, said = code_of(capsys, "run", "chain.yaml", "--out", place)
    assert code == 1
    assert said.count("StoreError") == 1
    assert place in said
    assert sorted(p.name for p in home.iterdir()) == before


@pytest.mark.parametrize("how", ["truncated", "emptied", "changed", "gone"])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(home, monkeypatch, file, how):
    whole = artefact_of(run_recipe("training.yaml", out="whole").folder.path)
    newest = stopped_with_checkpoints(home, monkeypatch)[-1] / file
    damage(newest, how)
    assert artefact_of(run_recipe("training.yaml", out="cut").folder.path) == whole


def test_when_all_checkpoints_are_damaged_the_error_says_what_to_delete(home, capsys, monkeypatch):
    for checkpoint in stopped_with_checkpoints(home, monkeypatch):
        damage(checkpoint / "state.safetensors", "truncated")
    code, said = code_of(capsys, "run", "training.yaml", "--out", "cut")
    assert code == 1
    assert "None of the 2 checkpoints can be read" in said
    assert "Delete this folder" in said
    shutil.rmtree(next((home / "cut").glob("*/steps/*/checkpoint")))
    assert code_of(capsys, "run", "training.yaml", "--out", "cut")[0] == 0


def stopped_with_checkpoints(home: Path, monkeypatch) -> list[Path]:
    """Stop a run once it has two checkpoints; their folders, oldest first."""
    from temper.ops import checkpoint

    real, saved = checkpoint.save, []

    def save(*arguments, **named):
        real(*arguments, **named)
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run_recipe("training.yaml", out="cut")
    found = sorted((home / "cut").glob("*/steps/*/checkpoint/step-*"))
    assert len(found) == 2
    return found


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "changed":
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    else:
        path.write_bytes(whole[: len(whole) // 2] if how == "truncated" else b"")


def artefact_of(run: Path) -> dict[str, bytes]:
    (folder,) = run.glob("steps/*/artefact")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("how", ["truncated", "emptied", "changed", "gone"])
def test_a_damaged_artefact_is_never_applied(home, capsys, how):
    run = run_recipe("training.yaml").folder.path
    whole = artefact_of(run)
    (tensors,) = run.glob("steps/*/artefact/*adapter_model.safetensors")
    damage(tensors, how)
    (home / "row.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, said = code_of(capsys, "data", "show", "row.jsonl", "--mask", "--system", f"tiny:llama+{run}")
    assert code == 1
    assert "StoreError" in said
    assert "adapter_model.safetensors" in said
    code, said = code_of(capsys, "run", "training.yaml")
    assert code == 1
    assert "A file of a finished step is missing or changed" in said
    shutil.rmtree(tensors.parents[1])  # the cure it names
    assert code_of(capsys, "run", "training.yaml")[0] == 0
    assert artefact_of(run) == whole


def test_a_deleted_measurement_is_made_again(home, capsys):
    run = run_recipe("chain.yaml", seeds=(0,)).folder.path
    before = content(home / "runs")
    shutil.rmtree(next(run.glob("steps/score-*")))
    assert code_of(capsys, "run", "chain.yaml", "--seeds", "0")[0] == 0
    assert content(home / "runs") == before


def test_a_damaged_run_json_is_named_and_other_runs_are_not_touched(home, capsys):
    code_of(capsys, "run", "fake-measure")
    (run,) = run_folders(home / "runs")
    damage(run.path / "run.json", "truncated")
    for command in (("report", run.id), ("compare", run.id, run.id)):
        code, said = code_of(capsys, *command)
        assert (code, said.count("StoreError")) in ((1, 1), (0, 0)), said
    assert code_of(capsys, "index")[0] == 1
    assert code_of(capsys, "run", "fake-measure")[0] == 0
    assert len(run_folders(home / "runs")) == 2


def test_damaged_rows_stop_a_report_with_their_line(home, capsys):
    code_of(capsys, "run", "fake-measure")
    (run,) = run_folders(home / "runs")
    rows = run.path / "rows.jsonl"
    whole = rows.read_bytes()
    rows.write_bytes(whole.replace(b'"value":', b'"valve":', 1))
    code, said = code_of(capsys, "report", run.id)
    assert code == 1
    assert "rows.jsonl, line 1" in said
    assert not (run.path / "report.html").exists()


def test_a_failing_note_of_a_failure_does_not_hide_it(home, monkeypatch):
    """The disk that stopped the run may refuse run.json too."""
    real = os.replace
    state = {"full": False}

    def replace(source, target):
        if state["full"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    def full(self, record):
        state["full"] = True
        raise StoreError("Cannot append: no room", where="rows.jsonl")

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(lines.LineWriter, "write", full)
    with pytest.raises(StoreError, match="no room"):
        run_recipe("fake-measure")
    state["full"] = False
    (run,) = run_folders(home / "runs")
    assert json.loads((run.path / "run.json").read_text())["status"] == "running"
