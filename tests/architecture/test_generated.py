"""Generated pages are fresh, and the check notices when they are not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
from generators import demo, markdown, method_pages, tables  # noqa: E402


def test_every_generated_page_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_names_what_is_stale_and_writes_nothing(tmp_path: Path, monkeypatch) -> None:
    import generate

    page = tmp_path / "methods" / "gone.md"
    page.parent.mkdir()
    page.write_text("of a method that is gone")
    (tmp_path / "old.md").write_text("old")
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    pages = {tmp_path / "old.md": "new", tmp_path / "missing.md": "text"}
    assert generate.stale(pages) == [tmp_path / "old.md", tmp_path / "missing.md", page]
    assert (tmp_path / "old.md").read_text() == "old"
    generate.write(pages)
    assert (tmp_path / "old.md").read_text() == "new"
    assert not page.exists()
    assert generate.stale(pages) == []


def test_regions_are_replaced_and_the_rest_is_kept() -> None:
    text = "before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n"
    once = markdown.replace_region(text, "x", "new")
    assert once == "before\n<!-- x:begin -->\nnew\n<!-- x:end -->\nafter\n"
    assert markdown.replace_region(once, "x", "new") == once
    with pytest.raises(SystemExit):
        markdown.replace_region("no markers", "x", "new")


def test_escaped_text_keeps_code_and_loses_no_character() -> None:
    assert markdown.escape("a*b_c <d> `e*f <g>`") == r"a\*b\_c &lt;d&gt; `e*f <g>`"
    assert markdown.cell("a|b\n`c|d`") == r"a\|b `c\|d`"
    assert markdown.cell("") == "-"


def test_a_story_is_split_into_its_parts() -> None:
    story = "One line.\n\nPaper         A, B.\n              C.\nMaths         x   y\n                z\nDepartures    1. d\n"
    summary, parts = method_pages.split_story(story)
    assert summary == "One line."
    assert parts == {"Paper": "A, B.\nC.", "Maths": "x   y\nz", "Departures": "1. d"}


def test_a_family_without_a_sentence_stops(tmp_path: Path) -> None:
    (tmp_path / "tricks" / "one").mkdir(parents=True)
    (tmp_path / "tricks" / "one" / "card.py").touch()
    (tmp_path / "tricks" / "__init__.py").touch()
    with pytest.raises(SystemExit, match="tricks"):
        tables.families(tmp_path)
    (tmp_path / "tricks" / "__init__.py").write_text('"""What they are."""')
    assert tables.families(tmp_path) == {"tricks": "What they are."}


def test_the_demo_block_holds_the_runs_own_numbers(tmp_path: Path) -> None:
    from temper.core.types import Row
    from temper.store import lines
    from temper.store.folders import RunFolder
    from temper.store.records import row_record

    cells = [{"arm": "category", "seed": 0, "matrix": {}, "steps": {"test": "test-1"}}]
    environment = {"cores": 2, "torch": "2"}
    folder = RunFolder.create(tmp_path, "demo", {"cells": cells, "steps": {}, "environment": environment})
    step = folder.path / "steps" / "test-1"
    step.mkdir(parents=True)
    (step / "done.json").write_text('{"wall_s": 125.4}')
    rows = [
        Row(metric="auroc", value=0.91234, n=7, arm="category"),
        Row(metric="off_spill", value=0.25, arm="category", group="Odd requests"),
        Row(metric="leak", value=0.5, arm="category"),
    ]
    lines.append(folder.path / "rows.jsonl", [row_record(row) for row in rows])
    with pytest.raises(SystemExit, match="not finished"):
        demo.demo_block(folder.path)
    folder.update(status="done")
    text = demo.demo_block(folder.path)
    assert re.search(r"^auroc +0\.912", text, re.MULTILINE)
    assert re.search(r"^off_spill +Odd requests +0\.25", text, re.MULTILINE)
    assert "2 min 5 s" in text
    assert "leak" not in text
