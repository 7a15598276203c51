"""Docstrings as a retrieval set: halves, masks, splits, the cache."""

from __future__ import annotations

import pytest

from temper.core.errors import NeedsError
from temper.data.docstrings import SHARES, Pair, docstring_pairs, ensure_docstrings, split_modules
from temper.data.loading import load_data

MODULE = '''
def spell(word):
    """Return the letters that spell() takes from a word.

    The letters come in the order in which they stand, and a letter that
    stands twice is given twice.
    """

if True:
    class Box:
        """A box that holds some things.

        Things are put in at the top and taken out at the bottom, one after another.
        """
        def add(self):
            """Short one.

            Too short a summary for a body of more than ten words, as this one is.
            """

def same(word):
    """Another summary of four words.

    The letters come in the order in which they stand, and a letter that
    stands twice is given twice.
    """

def bare():
    """One paragraph and nothing behind it at all."""
'''


def test_halves_and_masks(tmp_path):
    (tmp_path / "letters.py").write_text(MODULE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def (")
    found = list(docstring_pairs(tmp_path))
    assert [pair.name for pair in found] == ["letters.spell", "letters.Box"]
    assert found[0].summary == "Return the letters that it takes from a word."
    assert found[0].body.startswith("The letters come in the order")


def test_twins_share_a_family(tmp_path):
    for name in ("_pyletters.py", "_letters.py"):
        (tmp_path / name).write_text(MODULE.replace("word", name[1:4]))
    assert {pair.family for pair in docstring_pairs(tmp_path)} == {"letters"}


def test_no_module_in_two_parts():
    pairs = [Pair(f"m{n % 37}.f{n}", f"m{n % 37}", f"summary {n}", f"body {n}") for n in range(2000)]
    pairs.append(pairs[0]._replace(summary="again"))
    parts = split_modules(pairs)
    families = [{record.extra["module"] for record in records} for records in parts.values()]
    assert sum(map(len, families)) == len(set.union(*families)) == 37
    for part, share in SHARES.items():
        assert len(parts[part]) / 2001 == pytest.approx(share, abs=0.05)
    ids = [record.id for records in parts.values() for record in records]
    assert len(set(ids)) == len(ids) == 2001
    assert "m0.f0#2" in ids


def test_a_library_without_sources_is_named(tmp_path):
    with pytest.raises(NeedsError, match="no docstrings to read"):
        list(docstring_pairs(tmp_path))


def test_made_once_for_this_python(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path))
    folder = ensure_docstrings()
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENCE", "test.jsonl", "train.jsonl", "validation.jsonl",
    ]  # fmt: skip
    before = (folder / "train.jsonl").read_bytes()
    assert before.count(b"\n") > 1000
    monkeypatch.setattr("temper.data.docstrings.docstring_pairs", None)
    assert ensure_docstrings() == folder
    found = load_data("asset:stdlib-docstrings:test", "Ranking", limit=3)
    assert len(found.rows) == 3
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
