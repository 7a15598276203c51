"""The command as a process: readers that go away, full disks, poor encodings, Ctrl-C, colour."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import write_pipeline

from .conftest import run

TEMPER = (sys.executable, "-m", "temper.cli.main")


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TEMPER_CACHE": str(home / "cache"), **more}


def test_a_reader_that_goes_away_is_no_error_message(home):
    rows = "".join(json.dumps({"text": f"{n} " * 50}) + "\n" for n in range(3000))
    (home / "long.jsonl").write_text(rows)
    for more in ((), ("--json",)):
        command = [*TEMPER, "data", "show", "long.jsonl", "--limit", "3000", *more]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(home)
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(10)
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1


def test_a_full_disk_under_the_output_is_one_line(home):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*TEMPER, "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(home),
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "The disk is full" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_letters_that_the_output_lacks_are_spelt_out(home):
    (home / "far.jsonl").write_text('{"text": "\N{SNOWMAN}"}\n')
    done = subprocess.run(
        [*TEMPER, "data", "show", "far.jsonl"],
        capture_output=True, env=environment(home, PYTHONIOENCODING="ascii"), text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert r"text: \u2603" in done.stdout


def hears_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and this suite may have been started so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_says_how_to_go_on_and_does(home):
    write_pipeline(home / "slow.yaml", 0.1)
    command = [*TEMPER, "run", "slow.yaml"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(home), text=True,
        preexec_fn=hears_ctrl_c,
    ) as process:  # fmt: skip
        while not list((home / "runs").glob("*/steps/*/done.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert "interrupted; the same command goes on from here" in err
    assert "Traceback" not in err
    (folder,) = (home / "runs").iterdir()
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    done = subprocess.run(command, capture_output=True, env=environment(home), text=True, check=False)
    assert done.returncode == 0
    assert f"resuming {folder.name}" in done.stderr


@pytest.mark.parametrize("command", ["plan chain.yaml", "run chain.yaml", "list", "compare a b"])
def test_without_colour_there_is_none(home, capsys, monkeypatch, command):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, err = run(capsys, command)
    assert re.findall(r"\x1b\[(?:\d+;)*[39][0-7]m", out + err) == []
