"""A run killed with SIGKILL at any point goes on and ends as if it had never been stopped."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import write_methods, write_pipeline

import temper
from temper.store import lines
from temper.store.folders import RunFolder, run_folders
from temper.store.records import stable

NUM_KILLS = 20
PAUSE_S = 0.004


def environment(root: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(root / "src"),
        "TEMPER_METHODS": str(root / "methods"),
        "TEMPER_CACHE": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def start(root: Path, out: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "temper.cli.main", "run", "chain.yaml", "--out", out]
    return subprocess.Popen(
        command, cwd=root, env=environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def start_working(root: Path, out: str) -> subprocess.Popen:
    """A started run, from the moment its folder is there."""
    process = start(root, out)
    while not (root / out).exists() and process.poll() is None:
        time.sleep(0.002)
    return process


def finish(root: Path, out: str) -> RunFolder:
    process = start(root, out)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    (run,) = run_folders(root / out)
    return run


def content(run: RunFolder) -> dict[str, object]:
    """Everything of a run that may not depend on when it was stopped."""
    out: dict[str, object] = {}
    for path in sorted(p for p in run.path.rglob("*") if p.is_file()):
        name = str(path.relative_to(run.path))
        if path.suffix == ".jsonl" and path.parent.name != "data":
            out[name] = [stable(record) for record in lines.read(path)]
        elif path.name not in ("run.json", "done.json", "log.txt") and not path.name.endswith(".lock"):
            out[name] = path.read_bytes()
    return out


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    # A copy of the sources: a step's hash holds them, and a file saved meanwhile would rightly start a new run.
    package = Path(temper.__file__).parent
    shutil.copytree(package, root / "src" / "temper", ignore=shutil.ignore_patterns("methods", "__pycache__"))
    write_methods(root / "methods")
    write_pipeline(root / "chain.yaml", PAUSE_S)
    process = start_working(root, "whole")
    before = time.perf_counter()
    process.communicate(timeout=120)
    wall_s = time.perf_counter() - before
    return root, content(run_folders(root / "whole")[0]), wall_s


@pytest.mark.parametrize("number", range(NUM_KILLS))
def test_killed_and_resumed_equals_never_stopped(never_stopped, number):
    root, wanted, wall_s = never_stopped
    assert len(wanted["rows.jsonl"]) == 136
    out = f"killed-{number}"
    process = start_working(root, out)
    # One random point in each twentieth of the run, so that every phase is met.
    time.sleep(wall_s * (number + random.Random(number).random()) / NUM_KILLS)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    assert content(finish(root, out)) == wanted


def test_killed_again_and_again(never_stopped):
    root, wanted, wall_s = never_stopped
    generator = random.Random(7)
    for _ in range(4):
        process = start_working(root, "often")
        time.sleep(wall_s * (0.3 + 0.3 * generator.random()))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert content(finish(root, "often")) == wanted
