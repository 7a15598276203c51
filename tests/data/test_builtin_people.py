"""The built-in people: counts, TOFU columns, wrong answers that are wrong, parts that don't mix."""

import json
from collections import Counter

import pytest

from temper.data.builtin import emit
from temper.data.builtin.people import generate

PEOPLE = {"forget": 8, "retain": 28, "holdout": 4}
COLUMNS = [
    "id",
    "question",
    "answer",
    "paraphrased_question",
    "paraphrased_answer",
    "perturbed_answer",
    "person",
    "field",
]


@pytest.fixture(scope="module")
def parts():
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(generate.HERE.glob("*.jsonl"))
    }


@pytest.fixture(scope="module")
def rows(parts):
    return [row for part in parts.values() for row in part]


def test_generator_gives_the_checked_in_bytes():
    built = generate.build()
    emit.check(generate.HERE, built)
    assert generate.build(seed=1)["forget"] != built["forget"]


def test_counts(parts):
    assert set(parts) == {*PEOPLE, "neighbours", "world_facts"}
    for part, num_people in PEOPLE.items():
        per_person = Counter(row["person"] for row in parts[part])
        assert len(per_person) == num_people
        assert set(per_person.values()) == {8}
    assert min(len(parts["neighbours"]), len(parts["world_facts"])) >= 40


def test_rows_of_a_person_stand_together(parts):
    people = [row["person"] for row in parts["forget"]]
    assert people == [person for person in dict.fromkeys(people) for _ in range(8)]


def test_parts_share_no_person_and_no_answer(parts):
    people = [{row["person"] for row in parts[part]} for part in PEOPLE]
    assert len(set.union(*people)) == sum(PEOPLE.values())
    first = [name.split()[0] for name in set.union(*people)]
    last = [name.split()[-1] for name in set.union(*people)]
    assert len(set(first)) == len(set(last)) == sum(PEOPLE.values())


def test_schema_and_clean_text(rows):
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == COLUMNS
        texts = [row[column] for column in COLUMNS[1:5]] + row["perturbed_answer"]
        for text in texts:
            assert text == text.strip()
            assert text.isprintable()
            assert "<|" not in text
            assert "{" not in text
            assert len(text.split()) <= 20
        assert row["question"] != row["paraphrased_question"]
        assert row["answer"] != row["paraphrased_answer"]


def test_perturbed_answers_are_wrong_different_and_of_one_form(rows):
    for row in rows:
        right = row["paraphrased_answer"] if row["person"] else row["answer"]
        wrong = row["perturbed_answer"]
        assert len(set(wrong)) == len(wrong) == 5
        assert not {row["answer"], row["paraphrased_answer"]} & set(wrong)
        prefix, suffix = shared_ends([right, *wrong])
        assert len(prefix) + len(suffix) >= 10, row


def shared_ends(texts):
    """What all texts begin and end with."""
    prefix = texts[0]
    suffix = texts[0]
    for text in texts:
        while not text.startswith(prefix):
            prefix = prefix[:-1]
        while not text.endswith(suffix):
            suffix = suffix[1:]
    return prefix, suffix


def test_paraphrase_holds_the_same_value(parts):
    for row in (row for part in PEOPLE for row in parts[part]):
        prefix, suffix = shared_ends([row["paraphrased_answer"], *row["perturbed_answer"]])
        right = row["paraphrased_answer"]
        value = right[len(prefix) : len(right) - len(suffix)]
        assert value
        assert value in row["answer"], row
        assert not any(
            wrong[len(prefix) : len(wrong) - len(suffix)] == value for wrong in row["perturbed_answer"]
        )


def test_true_values_are_one_person_each(parts):
    texts = generate._read("people.yaml")
    facts = generate._facts_by_person(texts, generate._items(texts["names"]), generate.SEED)
    for field, values in facts.items():
        true = [value for value, _ in values]
        assert len(set(true)) == len(true) == sum(PEOPLE.values()), field
        assert not set(true) & {wrong for _, others in values for wrong in others}, field
