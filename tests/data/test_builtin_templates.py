"""Template banks: filling, turns, errors; and the generators' command line."""

import json
import random

import pytest

from temper.core.errors import DataError
from temper.data.builtin import emit
from temper.data.builtin.templates import expand, read_bank

BANK = """
lists:
  city: Oslo|Norway; Lima|Peru
groups:
  - subcategory: places
    count: {count}
    rows: |
      where is {{city}}? => {{city}} is in {{city.1}}. || in {{city.1}}.
      Name a city. => Oslo.
"""


def bank_of(tmp_path, count=3, text=BANK):
    path = tmp_path / "bank.yaml"
    path.write_text(text.format(count=count), "utf-8")
    return read_bank(path)


def test_slots_take_matching_fields_and_every_template_comes_first(tmp_path):
    bank = bank_of(tmp_path)
    rows = expand(bank.groups[0], bank, random.Random(0))
    assert {row.request for row in rows} == {"where is Oslo?", "where is Lima?", "Name a city."}
    assert "Name a city." in [row.request for row in rows[:2]]
    answers = {row.request: row.reply for row in rows}
    assert answers["where is Lima?"] in ("Lima is in Peru.", "In Peru.")
    assert answers["where is Oslo?"] in ("Oslo is in Norway.", "In Norway.")
    assert all(row.labels == {"subcategory": "places"} for row in rows)


def test_same_seed_same_rows(tmp_path):
    bank = bank_of(tmp_path)
    assert expand(bank.groups[0], bank, random.Random(7)) == expand(bank.groups[0], bank, random.Random(7))


def test_too_many_rows_wanted_is_an_error(tmp_path):
    bank = bank_of(tmp_path, count=4)
    with pytest.raises(DataError, match="only 3 different rows of the 4"):
        expand(bank.groups[0], bank, random.Random(0))


def test_row_without_reply_is_an_error(tmp_path):
    with pytest.raises(DataError, match="row without a reply"):
        bank_of(tmp_path, text="groups:\n  - rows: |\n      Hello?\n")


def test_check_finds_changed_and_unknown_files(tmp_path):
    parts = {"train": [{"id": "1", "text": "é"}]}
    emit.write(tmp_path, parts)
    emit.check(tmp_path, parts)
    assert json.loads((tmp_path / "train.jsonl").read_text("utf-8")) == parts["train"][0]
    (tmp_path / "old.jsonl").write_text("", "utf-8")
    with pytest.raises(DataError, match="old"):
        emit.check(tmp_path, parts)
    with pytest.raises(DataError, match="train"):
        emit.check(tmp_path, {"train": []})


def test_command_line_exit_codes(tmp_path, capsys):
    parts = {"train": [{"id": "1"}]}
    assert emit.main(tmp_path, lambda: parts, ["--check"]) == 2
    assert "--write" in capsys.readouterr().err
    assert emit.main(tmp_path, lambda: parts, ["--write"]) == 0
    assert emit.main(tmp_path, lambda: parts, ["--check"]) == 0
    assert "train: 1 rows" in capsys.readouterr().out
