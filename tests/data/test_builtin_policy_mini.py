"""The policy stand-in: balance, the published row schema, labels, and a judge part that shares nothing with the test part."""

import json
import re
from collections import Counter

import pytest

from temper.data.builtin import emit
from temper.data.builtin.policy_mini import generate
from temper.data.builtin.templates import read_bank
from temper.data.loading import load_data


@pytest.fixture(scope="module")
def parts():
    return {
        part: [json.loads(line) for line in (generate.HERE / f"{part}.jsonl").read_text("utf-8").splitlines()]
        for part in ("test", "human", "judge")
    }


def test_generator_gives_the_checked_in_bytes():
    emit.check(generate.HERE, generate.build())
    assert generate.build(seed=1)["test"] != generate.build()["test"]


def test_twelve_classes_of_ten_with_ids_class_by_class(parts):
    rows = parts["test"]
    assert sorted(row["question_id"] for row in rows) == list(range(1, 121))
    assert set(Counter(row["category"] for row in rows).values()) == {10}
    numbers = {row["category"]: set() for row in rows}
    for row in rows:
        numbers[row["category"]].add((row["question_id"] - 1) // 10)
        assert list(row) == ["question_id", "category", "domain", "turns", "prompt_style"]
    assert sorted(number for found in numbers.values() for number in found) == list(range(12))
    assert set(Counter(row["domain"] for row in rows).values()) == {30}
    assert len({row["category"] for row in rows[:12]}) == 12, "any beginning is balanced"


def test_texts_are_clean_and_different(parts):
    prompts = [row["turns"][0] for row in parts["test"]]
    replies = [row["choices"][0]["turns"][0] for row in parts["human"]] + [
        row["text"] for row in parts["judge"]
    ]
    assert len(set(prompts)) == 120
    for text in prompts + replies:
        assert text == text.strip()
        assert text.isprintable()
        assert not re.search(r"[{}~]|=>|\|", text)


def test_every_request_has_one_reply_that_fulfils_it(parts):
    by_id = Counter((row["question_id"], row["human_score"]) for row in parts["human"])
    assert by_id == {(number, score): 1 for number in range(1, 121) for score in (0.0, 1.0)}
    for row in parts["human"]:
        assert (row["human_score"] == 1) == (row["kind"] in generate.FULFILLED)
    for row in parts["judge"]:
        assert (row["label"] == 1) == (row["kind"] in generate.FULFILLED)


def test_the_judge_part_shares_no_template_entity_or_frame(parts):
    banks = [read_bank(generate.HERE / "banks" / f"{name}.yaml") for name in ("test", "train")]
    entities = [{value[0] for values in bank.lists.values() for value in values} for bank in banks]
    templates = [{t.request for group in bank.groups for t in group.templates} for bank in banks]
    assert not entities[0] & entities[1]
    assert not templates[0] & templates[1]
    assert not {row["prompt"] for row in parts["judge"]} & {row["turns"][0] for row in parts["test"]}
    import yaml

    frames = yaml.safe_load((generate.HERE / "frames.yaml").read_text())
    own = [
        {f for kind in part.values() for f in kind} - {"{answer}", "{related}"} for part in frames.values()
    ]
    assert not own[0] & own[1]


def test_it_loads_by_either_spelling_and_by_its_columns():
    data = load_data("builtin:policy-mini", {"test": "Behaviour", "human?": "Labelled"})
    assert data.schemas == {"test": "Behaviour", "human": "Labelled", "judge": "Labelled"}
    assert len(load_data("builtin:policy-mini:human").rows) == 240
