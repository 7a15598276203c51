"""`temper new` writes a method that passes everything a method owes, unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TEMPER_METHODS": str(folder / "mine"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scratch")
    done = call(folder, "temper.cli.main", "new", "tries/short-answers", "--into", "mine")
    assert done.returncode == 0, done.stderr
    return folder


def test_it_passes_the_contract_of_every_method(scratch: Path) -> None:
    tests = str(ROOT / "tests" / "conformance")
    done = call(scratch, "pytest", tests, "-k", "short-answers", "-c", str(ROOT / "pyproject.toml"))
    assert done.returncode == 0, done.stdout + done.stderr
    # 4 checks for each method, 4 for each of its two verbs, 2 for its fit.
    assert "14 passed" in done.stdout


def test_its_own_test_passes(scratch: Path) -> None:
    done = call(scratch, "pytest", str(scratch / "mine"), "-c", str(ROOT / "pyproject.toml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_a_broken_one_does_not_pass(scratch: Path) -> None:
    path = scratch / "mine" / "tries" / "short_answers" / "method.py"
    kept = path.read_text()
    path.write_text(kept.replace("value=float(count)", "value=float(__import__('time').time_ns() % 99991)"))
    try:
        tests = str(ROOT / "tests" / "conformance")
        done = call(scratch, "pytest", tests, "-k", "short-answers", "-c", str(ROOT / "pyproject.toml"))
    finally:
        path.write_text(kept)
    assert done.returncode == 1, done.stdout
    assert "test_same_call_same_result" in done.stdout


def test_lists_and_shows_like_any_other(scratch: Path) -> None:
    assert "short-answers" in call(scratch, "temper.cli.main", "list").stdout
    shown = call(scratch, "temper.cli.main", "show", "short-answers").stdout
    for part in ("Idea", "Maths", "Departures", "Limits", "num_demonstrations"):
        assert part in shown
