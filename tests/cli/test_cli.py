"""The command line as a user meets it: output, JSON, exit codes, speed, what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from fakes import CARD, own_folder, write_pipeline

from temper.cli.main import COMMANDS, main

from .conftest import run

# Typer itself casts arguments with pydantic in its newer versions; that is within the 0.3 s.
HEAVY = ("torch", "transformers", "numpy", "scipy", "rich", "pandas", "accelerate", "peft")
TEXT, NUMBER, OPTIONAL = str, (int, float), (int, float, type(None))
ROW = {"metric": TEXT, "value": OPTIONAL, "n": int, "facts": dict}
CLAIM = {
    "claim": TEXT, "sentence": TEXT, "metric": TEXT, "arm": TEXT, "baseline": (str, int, float), "direction": TEXT,
    "paper": TEXT, "verdict": TEXT, "reason": TEXT, "arms": list, "difference": OPTIONAL, "low": OPTIONAL,
    "high": OPTIONAL, "n": int, "pairing": TEXT, "seeds": list,
}  # fmt: skip
SCHEMAS = {
    "list": [{"slug": TEXT, "family": TEXT, "verbs": list, "title": TEXT, "paper": TEXT, "produces": list, "needs": list}],
    "show fake-measure": {
        "slug": TEXT, "family": TEXT, "title": TEXT, "paper": TEXT, "verbs": list, "kinds": list, "needs": list,
        "data": dict, "produces": list, "story": TEXT, "settings": [{"name": TEXT, "type": TEXT, "doc": TEXT}],
        "claims": [CLAIM], "recipes": list,
    },
    "plan fake-measure": {
        "name": TEXT, "hash": TEXT, "options": dict, "cells": [{"arm": TEXT, "seed": int, "matrix": dict, "steps": dict}],
        "steps": [{"name": TEXT, "verb": TEXT, "method": TEXT, "settings": dict}],
        "costs": [{"step": TEXT, "label": TEXT, "tokens": int, "seconds": OPTIONAL, "memory_bytes": OPTIONAL, "disk_bytes": int}],
    },
    "run fake-measure": [ROW],
    "evidence": [{"slug": TEXT} | CLAIM],
    "fetch --list": [{"name": TEXT, "title": TEXT, "kind": TEXT, "licence": TEXT, "size_bytes": int, "cached": bool}],
    "doctor": {"versions": dict, "extras": dict, "machine": dict, "storage": dict, "problems": list},
    "new tries/mine --into mine": {"slug": TEXT, "folder": TEXT, "files": list},
    "data show my.jsonl": [{"part": TEXT, "schema": TEXT, "text": TEXT}],
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    own_folder(tmp_path, monkeypatch)
    write_pipeline(tmp_path / "chain.yaml")
    (tmp_path / "my.jsonl").write_text('{"text": "1.5"}\n{"text": "2"}\n')
    return tmp_path


def fits(value, schema):
    if isinstance(schema, list):
        assert isinstance(value, list)
        assert value
        for item in value:
            fits(item, schema[0])
    elif isinstance(schema, dict):
        for key, inner in schema.items():
            assert key in value, key
            fits(value[key], inner)
    else:
        assert isinstance(value, schema), (value, schema)


@pytest.mark.parametrize("command", SCHEMAS)
def test_json_is_one_document_of_the_promised_form(home, capsys, command):
    code, out, _ = run(capsys, command, "--json")
    assert code == 0
    fits(json.loads(out), SCHEMAS[command])


def test_json_of_compare_index_and_report(home, capsys):
    run(capsys, "run", "fake-measure", "--seeds", "0,1")
    run(capsys, "run", "fake-measure", "--seeds", "0,1", "--set", "num_items=5")
    names = sorted(p.parent.name for p in (home / "runs").glob("*/run.json"))
    code, out, _ = run(capsys, "compare", *names, "--json")
    assert code == 0
    keys = {
        "metric": TEXT,
        "a": NUMBER,
        "b": NUMBER,
        "difference": NUMBER,
        "p": NUMBER,
        "n": int,
        "verdict": TEXT,
    }
    fits(json.loads(out), [keys])
    code, out, _ = run(capsys, "index", "--json")
    assert code == 0
    runs = {"id": TEXT, "name": TEXT, "status": TEXT, "created": TEXT, "num_rows": int}
    fits(json.loads(out), {"index": TEXT, "runs": [runs]})
    code, out, _ = run(capsys, "report", names[0], "--json")
    assert code == 0
    page = home / json.loads(out)["report"]
    assert "<html" in page.read_text()


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("run fake-measre", 2, "Did you mean fake-measure"),
        ("run fake-measure --set scal=1", 2, "Did you mean scale"),
        ("run fake-measure --set scale=big", 2, "not a valid value"),
        ("run fake-measure --set scale", 2, "not key=value"),
        ("run fake-measure --recipe smal", 2, "Did you mean small"),
        ("run fake-measure --seeds a,b", 2, "whole numbers"),
        ("run fake-measure --arms bigg", 2, "Did you mean big"),
        ("run none.yaml", 2, "no such recipe file"),
        ("run chain.yaml --recipe small", 2, "not with a file"),
        ("run fake-fit --data none.jsonl", 2, "none.jsonl"),
        ("run fake-fit --data builtin:nones", 2, "no built-in set"),
        ("run fake-fit --data a=my.jsonl --data a=my.jsonl", 2, "twice"),
        ("run fake-fit --data my.jsonl --data my.jsonl", 2, "names no part"),
        ("run fake-measure --on slurm", 2, "--on ray"),
        ("run fake-measure --track wandb", 2, "--track mlflow"),
        ("run fake-measure --device tpu", 2, "unknown"),
        ("run fake-measure --precision int8", 2, "float32 or bf16"),
        ("run fake-measure --resume", 2, "no run to resume"),
        ("run fake-measure --evidence --set scale=2", 2, "do not go together"),
        ("run", 2, "Missing argument"),
        ("run fake-measure --nonsense", 2, "No such option"),
        ("frobnicate", 2, "No such command"),
        ("show nothing", 2, "no method"),
        ("evidence nothing", 2, "no method"),
        ("compare a b", 2, "not a run folder"),
        ("report a", 2, "not a run folder"),
        ("index --out none", 2, "no folder"),
        ("fetch nonsense", 2, "no asset"),
        ("new nonsense", 2, "family/name"),
        ("new tries/../../x", 2, "family/name"),
        ("new tries/fake_fit --into x", 2, "There is a method"),
        ("data show my.jsonl --mask", 2, "--system"),
        ("data show my.jsonl --limit 0", 2, "below 1"),
        ("serve", 2, "coming"),
    ],
)
def test_a_bad_request_is_one_clear_error_and_exit_code_2(home, capsys, command, code, said):
    found, out, err = run(capsys, command)
    assert found == code
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    assert not (home / "runs").exists()


def test_a_failure_is_exit_code_1_and_says_how_to_see_more(home, capsys, monkeypatch):
    path = home / "methods" / "fakes" / "fake_measure" / "method.py"
    path.write_text("def measure(system, data, config, run):\n    raise RuntimeError('broken')\n")
    code, _out, err = run(capsys, "run", "fake-measure")
    assert code == 1
    assert "Unexpected RuntimeError: broken" in err
    assert "TEMPER_DEBUG=1" in err
    monkeypatch.setenv("TEMPER_DEBUG", "1")
    with pytest.raises(RuntimeError, match="broken"):
        main(["run", "fake-measure"])


def test_a_damaged_run_makes_index_fail_after_listing_the_others(home, capsys):
    run(capsys, "run", "fake-measure")
    run(capsys, "run", "fake-attack", "--recipe", "tiny")
    (next((home / "runs").glob("fake-attack-*")) / "run.json").write_text("{")
    code, out, err = run(capsys, "index")
    assert code == 1
    assert "fake-measure-" in out
    assert "damaged: fake-attack-" in err


def test_without_a_terminal_everything_is_plain(home, capsys):
    for command in (
        "list",
        "show fake-measure",
        "plan fake-measure",
        "run fake-measure",
        "evidence",
        "doctor",
    ):
        _, out, err = run(capsys, command)
        assert "\x1b" not in out + err
        assert not set("━│╭█") & set(out + err)


def test_the_same_command_again_says_so(home, capsys):
    run(capsys, "run", "chain.yaml")
    code, _out, err = run(capsys, "run", "chain.yaml")
    assert code == 0
    assert "complete and unchanged; nothing was run" in err


def test_nproc_finishes_the_run_in_two_processes(home):
    command = [sys.executable, "-m", "temper.cli.main", "run", "chain.yaml", "--nproc", "2", "--seeds", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "mean_score" in done.stdout
    assert done.stderr.count("score: measure fake-measure") <= 2


def test_ray_without_ray_gives_the_install_line(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(capsys, "run", "fake-measure", "--on", "ray")
    assert code == 2
    assert "pip install 'temper-ml[ray]'" in err


def write_cards(root, num):
    for number in range(num):
        folder = root / f"family_{number % 12}" / f"method_{number}"
        folder.mkdir(parents=True)
        claims = '(Claim(id="c", sentence="s", metric="m", arm="a", baseline="b", direction="higher"),)'
        text = CARD.format(
            title=f"Method {number}", verbs='("fit",)', data="{}", produces="()", claims=claims
        )
        (folder / "card.py").write_text(text)
        (folder / "recipes.yaml").write_text("tiny: {}\nsmall: {}\npaper: {}\n")
    return root


PROBE = """
import sys, time
start = time.perf_counter()
try:
    from temper.cli.main import main
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
else:
    code = 0
print(time.perf_counter() - start, [m for m in {heavy} if m in sys.modules], code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "command", ["list", "list --json", "show method-7", "show method-7 --json", "--help", "run --help"]
)
def test_listing_is_fast_and_imports_nothing_heavy(tmp_path, command):
    environment = {
        **os.environ,
        "TEMPER_METHODS": str(write_cards(tmp_path / "m", 96)),
        "TEMPER_CACHE": str(tmp_path),
    }
    run = [sys.executable, "-c", PROBE.format(heavy=HEAVY), *command.split()]
    best, loaded = 9.0, ""
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
        loaded = done.stderr.strip().splitlines()[-1]
    assert loaded.endswith("[] 0"), loaded
    # 0.3 s is what users are promised on an idle machine; a shared one gets room.
    assert best < 1.0
    if command == "list":
        assert done.stdout.count("method-") == 96


def test_help_names_every_command_and_each_has_its_own(capsys, home):
    _, out, _ = run(capsys, "--help")
    for name in COMMANDS:
        assert f"  {name} " in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0
        assert "Usage" in text


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out.split()[0]) == (0, "temper")
