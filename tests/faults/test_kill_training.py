"""A training killed between two optimiser steps goes on from its checkpoint and leaves the same artefact."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import temper

RECIPE = """
name: training
system: tiny:llama
options: {checkpoint_every: 1}
steps:
  - id: refuse
    fit: refusal-tokens
    data: builtin:noncompliance
    limit: 60
    settings: {mode: lora, rank: 2, lr: 1e-2, batch_rows: 4, num_epochs: 1}
"""


def start(root: Path, out: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(root / "src"),
        "TEMPER_CACHE": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"TEMPER_NO_CACHE": "1"}
    command = [sys.executable, "-m", "temper.cli.main", "run", "training.yaml", "--out", out]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(root: Path, out: str) -> dict[str, str]:
    """Finish the run; every file of its artefact by hash."""
    process = start(root, out)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    (artefact,) = (root / out).glob("*/steps/*/artefact")
    files = sorted(p for p in artefact.rglob("*") if p.is_file())
    return {str(p.relative_to(artefact)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_killed_in_training(tmp_path):
    package = Path(temper.__file__).parent
    shutil.copytree(package, tmp_path / "src" / "temper", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "training.yaml").write_text(RECIPE)
    whole = finish(tmp_path, "whole")
    assert len(whole) > 1
    process = start(tmp_path, "cut")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cut").glob("*/steps/*/checkpoint/*[3-9]")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "cut").glob("*/steps/*/artefact"))
    assert finish(tmp_path, "cut") == whole
