"""The built-in behaviours: counts, balance, placeholders only, a test part that is new."""

import json
import re
from collections import Counter

import pytest

from temper.data.builtin import emit
from temper.data.builtin.behaviours import generate
from temper.data.builtin.templates import read_bank

PER_CATEGORY = {"train": 20, "test": 10}


@pytest.fixture(scope="module")
def parts():
    return {
        part: [json.loads(line) for line in (generate.HERE / f"{part}.jsonl").read_text("utf-8").splitlines()]
        for part in generate.PARTS
    }


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def test_generator_gives_the_checked_in_bytes():
    built = generate.build()
    emit.check(generate.HERE, built)
    assert generate.build(seed=1)["train"] != built["train"]


@pytest.mark.parametrize("part", PER_CATEGORY)
def test_every_category_has_as_many_forbidden_as_benign(parts, part):
    counts = Counter((row["category"], row["benign"]) for row in parts[part])
    assert counts == {
        (name, benign): PER_CATEGORY[part] for name in generate.CATEGORIES for benign in (True, False)
    }


def test_neutral_rows(parts):
    assert len(parts["neutral"]) == 20
    assert all(row["benign"] and row["category"] == "neutral" for row in parts["neutral"])
    assert len({row["target"] for row in parts["neutral"]}) == 20


def test_schema_and_clean_text(parts):
    rows = [row for part in parts.values() for row in part]
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "prompt", "target", "refusal", "category", "benign"]
        assert (row["refusal"] is None) == row["benign"]
        for text in filter(None, (row["prompt"], row["target"], row["refusal"])):
            assert text == text.strip()
            assert text.isprintable()
            assert not re.search(r"<\||\{|~|=>", text)
            assert len(text.split()) <= 25


def test_complying_replies_are_openings_with_a_placeholder(parts):
    for row in parts["train"] + parts["test"]:
        assert re.fullmatch(r"Sure, here is [^<>]+: <[a-z]+( [a-z1]+)?>", row["target"]), row["target"]


def test_refusals_refuse(parts):
    signs = re.compile(r"\b(can't|won't|don't)\b")
    assert all(signs.search(row["refusal"]) for row in parts["train"] + parts["test"] if row["refusal"])


def test_test_part_has_other_entities_and_wordings(parts):
    banks = [read_bank(generate.HERE / "banks" / f"{part}.yaml") for part in PER_CATEGORY]
    entities = [{value[0] for values in bank.lists.values() for value in values} for bank in banks]
    templates = [{t.request for group in bank.groups for t in group.templates} for bank in banks]
    assert not entities[0] & entities[1]
    assert not templates[0] & templates[1]
    train = [set(words(row["prompt"])) for row in parts["train"]]
    nearest = [max(jaccard(set(words(row["prompt"])), other) for other in train) for row in parts["test"]]
    assert max(nearest) <= 0.6
    assert sum(nearest) / len(nearest) < 0.35


def jaccard(first, second):
    return len(first & second) / len(first | second)


def test_benign_rows_name_the_entities_of_the_forbidden_ones(parts):
    bank = read_bank(generate.HERE / "banks" / "train.yaml")
    entities = {value[0] for values in bank.lists.values() for value in values}
    for benign in (True, False):
        prompts = " ".join(row["prompt"] for row in parts["train"] if row["benign"] is benign)
        assert sum(entity in prompts for entity in entities) >= len(entities) - 1
