"""Data of a step: what an earlier make step made, as a whole or a part of it under another name."""

from __future__ import annotations

from pathlib import Path

import pytest

from temper.core.errors import ConfigError, DataError
from temper.core.spec import parse_data
from temper.run.inputs import _as_files


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    for name in ("forget", "forget_level2"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    return {"probes": tmp_path}


def test_a_step_gives_all_its_parts_or_the_one_that_is_named(made: dict[str, Path]) -> None:
    folder = made["probes"]
    both = {name: str(folder / f"{name}.jsonl") for name in ("forget", "forget_level2")}
    assert _as_files("probes", made) == both
    assert _as_files({"forget": "probes"}, made) == {"forget": both["forget"]}
    assert _as_files({"forget": "probes:forget_level2", "retain": "own.jsonl"}, made) == {
        "forget": both["forget_level2"],
        "retain": "own.jsonl",
    }
    assert _as_files("probes:forget_level2", made) == {"forget_level2": both["forget_level2"]}
    assert str(parse_data("probes:forget_level2")) == "probes:forget_level2"


def test_the_only_part_that_a_step_made_serves_as_any(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert _as_files({"forget": "make"}, {"make": tmp_path}) == {"forget": str(tmp_path / "rows.jsonl")}
    with pytest.raises(DataError, match="no part 'forget'"):
        _as_files({"forget": "make:forget"}, {"make": tmp_path})


def test_a_part_or_a_step_that_is_not_there(made: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"made no part 'test'.*forget, forget_level2"):
        _as_files({"test": "probes"}, made)
    with pytest.raises(DataError, match="made no part 'level9'"):
        _as_files("probes:level9", made)
    with pytest.raises(ConfigError, match="'other' is neither data nor an earlier make step"):
        _as_files({"forget": "other:forget"}, made)
