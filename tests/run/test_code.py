"""Which files of a method count in the hash of its code."""

import shutil

from temper.core.registry import find
from temper.run.code import code_hash


def test_tests_are_no_part_of_a_methods_code(tmp_path, monkeypatch):
    folder = tmp_path / "tries" / "copied"
    shutil.copytree(find("npo").folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("TEMPER_METHODS", str(tmp_path))
    before = code_hash("copied")
    for name in ("test_more.py", "conftest.py"):
        (folder / name).write_text("NUMBER = 1\n")
    assert code_hash("copied") == before
    (folder / "more.py").write_text("NUMBER = 1\n")
    assert code_hash("copied") != before
