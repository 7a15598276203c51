"""The taxonomy of both releases, and rows good and bad."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from temper.core.errors import ConfigError, DataError
from temper.data.loading import load_data
from temper.data.schemas import Behaviour, Labelled
from temper.methods.refusal.sorry_bench import taxonomy
from temper.methods.refusal.sorry_bench.card import Config
from temper.methods.refusal.sorry_bench.conftest import row
from temper.methods.refusal.sorry_bench.items import STYLES, chosen, human_replies, items_of
from temper.ops import text as tx

# ---- the taxonomy


@pytest.mark.parametrize(
    ("release", "count", "bounds"),
    [("2024-06", 45, {1: 5, 6: 25, 26: 40, 41: 45}), ("2025-03", 44, {1: 5, 6: 24, 25: 39, 40: 44})],
)
def test_classes_and_domain_bounds(release: str, count: int, bounds: dict[int, int]) -> None:
    known = taxonomy.RELEASES[release]
    assert len(known.classes) == len(set(known.classes)) == count
    for domain, (first, last) in zip(taxonomy.DOMAINS, bounds.items(), strict=True):
        assert {known.category(n).domain for n in range(first, last + 1)} == {domain}


def test_the_second_release_renumbers_without_number_12() -> None:
    old, new = taxonomy.RELEASES["2024-06"], taxonomy.RELEASES["2025-03"]
    assert old.classes[11] == "Impersonation"
    assert "Impersonation" not in new.classes
    assert new.classes == old.classes[:11] + old.classes[12:]
    assert (old.category(13).name, new.category(12).name) == ("System Intrusion", "System Intrusion")
    assert new.category(12).label == "12 System Intrusion"
    assert all(
        old.category(old.classes.index(n) + 1).domain == new.category(i).domain
        for i, n in enumerate(new.classes, 1)
    )


@pytest.mark.parametrize(
    ("categories", "release"),
    [
        (["1", "45"], "2024-06"),
        ([str(n) for n in range(1, 45)], "2025-03"),
        (["fraud", "Malware"], "2024-06"),
        (list(taxonomy.RELEASES["2025-03"].classes), "2025-03"),
        (["Lyrics", "Fraud"], "own"),
    ],
)
def test_release_is_read_from_the_categories(categories: list[str], release: str) -> None:
    assert taxonomy.release_of(categories) == release


def test_categories_that_fit_no_release_are_refused() -> None:
    with pytest.raises(ConfigError, match="both releases"):
        taxonomy.release_of(["3", "12"])
    with pytest.raises(DataError, match="'Lyrics' is not"):
        taxonomy.release_of(["Fraud", "Malware", "Lyrics"])


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "Personal Insult Words"),
        (10, "Personal Insult Words"),
        (11, "Social-group Insult Words"),
        (450, "Machinery Operation Advice"),
    ],
)
def test_departure_8_the_first_release_derives_the_class_from_the_number(number: int, name: str) -> None:
    assert taxonomy.classify("", number, "2024-06").name == name
    with pytest.raises(DataError, match="Only release 2024-06"):
        taxonomy.classify("", number, "2025-03")


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ("0", 1, "from 1 to 45"),
        ("46", 1, "from 1 to 45"),
        ("Frod", 1, "Did you mean Fraud"),
        ("", 451, "question_id 451"),
    ],
)
def test_categories_out_of_range(text: str, number: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        taxonomy.classify(text, number, "2024-06")


def test_a_policy_is_classes_numbers_or_domains() -> None:
    items = items_of([row(1, "1"), row(11, "15"), row(12, "45")])
    assert [i.category.number for i in chosen(items, Config(policy=(15,)))] == [15]
    assert [i.category.number for i in chosen(items, Config(policy=("fraud", "Hate speech generation")))] == [
        1,
        15,
    ]
    with pytest.raises(ConfigError, match="Did you mean Fraud"):
        chosen(items, Config(policy=("Frauds",)))


# ---- rows


def test_a_published_file_loads_as_it_is(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "my_sorry.jsonl"
    lines = [
        {"question_id": n, "category": (n - 1) // 10 + 1, "turns": [f"Do {n}."], "prompt_style": style}
        for style in ("base", "slang")
        for n in range(1, 451)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = items_of(load_data(str(path), {"test": "Behaviour"})["test"])
    assert len(items) == 900
    assert {i.category.label for i in items if 141 <= i.number <= 150} == {"15 Fraud"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([replace(row(), extra={"question_id": 1})], "no prompt_style.*row test-1-base"),
        ([row(category="")], "no category.*2024-06"),
        ([replace(row(), extra={"prompt_style": "base"})], "question_id is None"),
        ([row(0)], "question_id is 0"),
        ([row(1), row(1)], "stands twice"),
        ([row(1, "Fraud"), row(2, "Malware"), row(3, "Frod")], "'Frod' is not"),
    ],
)
def test_bad_rows_are_refused(records: list[Behaviour], message: str) -> None:
    with pytest.raises(DataError, match=message):
        items_of(records)


def test_a_style_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rows in style 'slng'.*slang"):
        chosen(items_of([row(1), row(1, style="slang")]), Config(styles=("slng",)))


def test_published_style_names() -> None:
    assert len(set(STYLES)) == 20
    assert set(tx.MUTATIONS) < set(STYLES)


def test_labelled_replies_find_their_prompts(caplog) -> None:  # type: ignore[no-untyped-def]
    items = items_of([row(1), row(1, style="slang")])
    records = [
        Labelled("a", 1, id="h1", extra={"question_id": 1}),
        Labelled("b", 0, id="h2", extra={"question_id": 1, "prompt_style": "slang"}),
        Labelled("c", 0, id="h3", extra={"question_id": 9}),
    ]
    with caplog.at_level(logging.WARNING):
        found = human_replies(records, items)
    assert [(r.id, r.item.style, r.fulfils) for r in found] == [("h1", "base", True), ("h2", "slang", False)]
    assert "1 labelled replies" in caplog.text
    with pytest.raises(DataError, match="None of the 1"):
        human_replies(records[2:], items)
    with pytest.raises(DataError, match="label is 3"):
        human_replies([Labelled("a", 3, id="h", extra={"question_id": 1})], items)
